//! The control socket of a program: JSON lines, one request and one answer each.
//!
//! ```text
//!   {"id":1,"cmd":"status"}  -> {"id":1,"ok":{…}}
//!   anything else            -> {"id":…,"error":{"kind":"invalid","message":"…"}}
//! ```
//!
//! An answer may be followed by bytes that are no line: it says how many. Each client has a thread
//! of its own. What the requests mean is the program's.

#[cfg(feature = "golden")]
pub mod golden;

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

/// Longest request line, in bytes. A longer one is answered as far as it was read, and ends the
/// connection.
pub const MAX_LINE: u64 = 64 << 10;

/// Why a socket could not be made. Each message names the cause and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A program is there already.
    #[error("cannot listen on {0}: another program does; end it, or choose another path")]
    InUse(PathBuf),
    /// A file, a directory, a link.
    #[error(
        "cannot listen on {0}: it is there and no socket; choose another path, or remove it if \
         nobody needs it"
    )]
    NoSocket(PathBuf),
    /// Anything else.
    #[error(
        "cannot listen on {path}: {source}; choose a path in a directory that you may write, of at \
         most 107 bytes"
    )]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A path that leads to a socket of this process, and the number of the socket's own file.
struct Made {
    path: PathBuf,
    file: (u64, u64),
}

static MADE: Mutex<Vec<Made>> = Mutex::new(Vec::new());

fn made() -> MutexGuard<'static, Vec<Made>> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn number(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// Removes the paths of all sockets that [`bind`] has made or [`remember`] was told of, at an orderly end. What another has put
/// there since stays.
pub fn remove_sockets() {
    for Made { path, file } in made().drain(..) {
        if number(&path).is_ok_and(|now| now == file) {
            // Somebody else may have removed it.
            let _ = fs::remove_file(&path);
        }
    }
}

/// Listens on a unix socket. One that a dead process has left behind is replaced; nothing else is.
/// At an orderly end [`remove_sockets`] takes it away.
///
/// # Errors
/// [`BindError`].
pub fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let listener = listen(path)?;
    remember(path).map_err(|source| BindError::Io { path: path.to_owned(), source })?;
    Ok(listener)
}

/// Has [`remove_sockets`] take away what this process has just made at `path`.
///
/// # Errors
/// The system's: nothing is there.
pub fn remember(path: &Path) -> io::Result<()> {
    let file = number(path)?;
    made().push(Made { path: path.to_owned(), file });
    Ok(())
}

fn listen(path: &Path) -> Result<UnixListener, BindError> {
    let failed = |source| BindError::Io { path: path.to_owned(), source };
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
                return Err(BindError::NoSocket(path.to_owned()));
            }
            match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(failed(error)),
                Ok(_) => return Err(BindError::InUse(path.to_owned())),
            }
            fs::remove_file(path).and_then(|()| UnixListener::bind(path)).map_err(failed)
        }
        bound => bound.map_err(failed),
    }
}

/// One answer: a line, and what follows it.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// A JSON object.
    pub line: Value,
    /// As many as the line says.
    pub bytes: Vec<u8>,
}

impl Answer {
    /// What was asked for: a structure whose keys are strings.
    pub fn ok(id: &Value, ok: impl Serialize) -> Self {
        json!({"id": id, "ok": ok}).into()
    }

    /// The same with bytes behind the line, which says how many.
    pub fn followed_by(self, bytes: Vec<u8>) -> Self {
        Self { bytes, ..self }
    }

    /// A refusal: `kind` for programs, `message` for people.
    pub fn refused(id: &Value, kind: &str, message: impl Into<String>) -> Self {
        json!({"id": id, "error": {"kind": kind, "message": message.into()}}).into()
    }
}

impl From<Value> for Answer {
    fn from(line: Value) -> Self {
        Self { line, bytes: Vec::new() }
    }
}

/// Serves clients until the process ends: `answer` has an answer for any line, from any thread.
///
/// # Errors
/// The system's, when it has no thread left.
pub fn serve(
    listener: UnixListener,
    answer: impl Fn(&str) -> Answer + Send + Sync + 'static,
) -> io::Result<()> {
    let answer = Arc::new(answer);
    let accept = move || {
        for client in listener.incoming() {
            let Ok(client) = client else {
                // Out of descriptors, most likely: try again when some may be free.
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            let answer = Arc::clone(&answer);
            if let Err(error) = spawn(move || converse(&client, &*answer)) {
                log::warn!("cannot serve a control client error=\"{error}\"");
            }
        }
    };
    spawn(accept)
}

fn spawn(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("control".into()).spawn(run).map(drop)
}

/// Until the client hangs up, or cannot be understood any more.
fn converse(client: &UnixStream, answer: &dyn Fn(&str) -> Answer) {
    let mut reader = BufReader::new(client);
    let mut line = String::new();
    loop {
        line.clear();
        match reader.by_ref().take(MAX_LINE).read_line(&mut line) {
            Ok(n) if n > 0 => {}
            _ => return,
        }
        let answer = answer(&line);
        let mut text = answer.line.to_string();
        text.push('\n');
        let mut out = client;
        let sent = out.write_all(text.as_bytes()).and_then(|()| out.write_all(&answer.bytes));
        if !line.ends_with('\n') || sent.is_err() {
            return;
        }
    }
}
