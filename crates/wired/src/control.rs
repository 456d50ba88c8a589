//! The control socket: JSON lines, one request and one answer each.
//!
//! ```text
//!   {"id":1,"cmd":"status"}  -> {"id":1,"ok":{…}}
//!   anything else            -> {"id":…,"error":{"kind":"invalid","message":"…"}}
//! ```

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::failure::Failure;
use crate::progress::Progress;

/// Longest request line, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// Listens on a unix socket, in place of one that a dead process left.
pub(crate) fn bind(path: &Path) -> Result<UnixListener, Failure> {
    if UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
    UnixListener::bind(path).map_err(Failure::file("listen on", path))
}

/// Serves clients until the process ends, each in a thread of its own.
pub(crate) fn spawn(path: &Path, progress: &Arc<Progress>) -> Result<(), Failure> {
    let listener = bind(path)?;
    let progress = Arc::clone(progress);
    let accept = move || {
        for client in listener.incoming() {
            let Ok(client) = client else {
                // Out of descriptors, most likely: try again when some may be free.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            let progress = Arc::clone(&progress);
            let serve = move || serve(&client, &progress);
            if let Err(error) = std::thread::Builder::new().name("control".into()).spawn(serve) {
                log::warn!("cannot serve a control client error=\"{error}\"");
            }
        }
    };
    let spawned = std::thread::Builder::new().name("control".into()).spawn(accept);
    spawned.map(drop).map_err(Failure::system("start the control thread"))
}

fn serve(client: &UnixStream, progress: &Progress) {
    let mut reader = BufReader::new(client);
    let mut line = String::new();
    loop {
        line.clear();
        match reader.by_ref().take(MAX_LINE).read_line(&mut line) {
            Ok(n) if n > 0 => {}
            _ => return,
        }
        let mut answer = answer(&line, progress).to_string();
        answer.push('\n');
        let mut out = client;
        if out.write_all(answer.as_bytes()).is_err() || !line.ends_with('\n') {
            return;
        }
    }
}

fn answer(line: &str, progress: &Progress) -> Value {
    let request: Value = serde_json::from_str(line).unwrap_or_default();
    let id = request.get("id").cloned().unwrap_or_default();
    #[cfg(feature = "unsafe-no-verify")]
    if let Some(answer) = crate::trial::answer(&request) {
        return json!({"id": id, "ok": answer});
    }
    match request.get("cmd").and_then(Value::as_str) {
        Some("status") => json!({"id": id, "ok": progress.status()}),
        _ => {
            let message = "unknown command; known is \"status\"";
            json!({"id": id, "error": {"kind": "invalid", "message": message}})
        }
    }
}
