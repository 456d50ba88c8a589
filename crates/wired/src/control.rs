//! What the control socket answers (`semper_control`).
//!
//! ```text
//!   {"id":1,"cmd":"status"}  -> {"id":1,"ok":{…}}
//!   anything else            -> {"id":…,"error":{"kind":"invalid","message":"…"}}
//! ```

use std::path::Path;
use std::sync::Arc;

use semper_control::Answer;
use serde_json::Value;

use crate::failure::Failure;
use crate::progress::Progress;

/// Serves clients until the process ends.
pub(crate) fn spawn(path: &Path, progress: &Arc<Progress>) -> Result<(), Failure> {
    let progress = Arc::clone(progress);
    semper_control::serve(semper_control::bind(path)?, move |line| answer(line, &progress))
        .map_err(Failure::system("start the control thread"))
}

fn answer(line: &str, progress: &Progress) -> Answer {
    let request: Value = serde_json::from_str(line).unwrap_or_default();
    let id = &request["id"];
    #[cfg(feature = "unsafe-no-verify")]
    if let Some(answer) = crate::trial::answer(&request) {
        return Answer::ok(id, answer);
    }
    match request.get("cmd").and_then(Value::as_str) {
        Some("status") => Answer::ok(id, progress.status()),
        _ => Answer::refused(id, "invalid", "unknown command; known is \"status\""),
    }
}
