//! What the control socket answers (`semper_control`).
//!
//! ```text
//!   {"id":1,"cmd":"status"}  -> {"id":1,"ok":{…}}
//!   anything else            -> {"id":…,"error":{"kind":"invalid","message":"…"}}
//! ```

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use semper_control::Answer;
use serde_json::Value;

use crate::failure::Failure;
use crate::progress::Progress;

/// Serves clients until the process ends.
pub(crate) fn spawn(listener: UnixListener, progress: &Arc<Progress>) -> Result<(), Failure> {
    let progress = Arc::clone(progress);
    semper_control::serve(listener, move |line| answer(line, &progress))
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

#[cfg(test)]
mod tests {
    use semper_control::golden::check;
    use semper_wire::{Counters, Judged};

    use super::*;
    use crate::progress::Phase;

    fn holds(name: &str, progress: &Progress) {
        check(name, &answer("{\"id\":1,\"cmd\":\"status\"}", progress).line);
    }

    #[test]
    fn a_status_is_complete_at_each_stage_of_an_end() {
        let source = Progress::new("source");
        holds("wired-status-source-connecting", &source);
        source.peer("semper-wired 0.1.0");
        source.phase(Phase::Streaming);
        source.flow(1 << 20, Some(117 << 20));
        source.encoded(Counters::default(), None);
        holds("wired-status-source-streaming", &source);
        source.encoded(Counters::default(), Some("a section that is not known"));
        source.phase(Phase::Done);
        holds("wired-status-source-passed-through", &source);

        let destination = Progress::new("destination");
        destination.listening("192.0.2.7:4444".parse().unwrap());
        holds("wired-status-destination-waiting", &destination);
        destination.decoded(Judged::default());
        destination.failed("the connection to the other end was lost: end of file");
        holds("wired-status-destination-failed", &destination);
    }

    #[test]
    fn a_refusal_has_a_kind_and_a_message() {
        let progress = Progress::new("source");
        check("wired-refused", &answer("{\"id\":1,\"cmd\":\"dance\"}", &progress).line);
    }
}
