//! Which process the front end has to be: the QEMU of this VM, and no other one with the same path
//! in its arguments.
//!
//! The agent notes in a file who that is, before QEMU can connect again, and the kernel tells who
//! has connected. The file is read for each connection, so it also holds for a QEMU that takes over,
//! and for a spare whose agent is gone:
//!
//! ```text
//! PID START_TICKS\n        a line for each; the agent replaces the file as a whole
//! ```
//!
//! `START_TICKS` is field 22 of /proc/PID/stat: a later process with the same pid is another one. An
//! empty file says that QEMU has yet to be noted, which takes the agent some milliseconds. When the
//! file is gone, what it said last counts.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use semper_spare::socket::credentials;

/// From QEMU's start until the agent has noted it; also the agent's end falls into that time.
const PATIENCE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(5);
/// Nobody who is refused can make this process spin.
const PAUSE: Duration = Duration::from_millis(20);
/// A VM has two QEMUs at most.
const FILE_MAX_BYTES: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    start_ticks: u64,
}

/// Why a front end is not served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stranger {
    Gone(i32),
    OtherNamespace,
    Other { pid: i32, name: String },
    Unnoted { pid: i32 },
    Untold(io::ErrorKind),
}

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stranger::Gone(pid) => write!(f, "pid {pid} connected and has ended"),
            Stranger::OtherNamespace => {
                write!(f, "who connected is in another pid namespace, and not the QEMU of this VM")
            }
            Stranger::Other { pid, name } => {
                write!(f, "pid {pid} ({name}) connected and is not the QEMU of this VM")
            }
            Stranger::Unnoted { pid } => {
                write!(f, "pid {pid} connected, and which QEMU is to be served was never noted")
            }
            Stranger::Untold(kind) => write!(f, "who connected cannot be told: {kind}"),
        }
    }
}

/// The processes that may be served; all, without a file.
pub(crate) struct Peers {
    file: Option<PathBuf>,
    known: Vec<Process>,
    patience: Duration,
}

impl Peers {
    /// Of the file `file`, which is read now as well, so that its loss later does no harm.
    pub(crate) fn new(file: Option<PathBuf>) -> Peers {
        let known = file.as_deref().and_then(read).unwrap_or_default();
        Peers { file, known, patience: PATIENCE }
    }

    /// Whether who connected is to be served. One who is not has waited for a moment, too.
    pub(crate) fn admit(&mut self, stream: &UnixStream) -> Result<(), Stranger> {
        let Some(file) = self.file.clone() else { return Ok(()) };
        let judged = self.judge(&file, stream);
        if judged.is_err() {
            std::thread::sleep(PAUSE);
        }
        judged
    }

    fn judge(&mut self, file: &Path, stream: &UnixStream) -> Result<(), Stranger> {
        let pid = connected(stream)?;
        let peer = identify(pid).ok_or(Stranger::Gone(pid))?;
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(noted) = read(file) {
                self.known = noted;
            }
            if self.known.contains(&peer) {
                return Ok(());
            }
            if !self.known.is_empty() {
                return Err(Stranger::Other { pid, name: name_of(pid) });
            }
            if Instant::now() >= deadline {
                return Err(Stranger::Unnoted { pid });
            }
            std::thread::sleep(AGAIN);
        }
    }
}

/// The process that called connect(2).
fn connected(stream: &UnixStream) -> Result<i32, Stranger> {
    match credentials(stream) {
        Ok(peer) if peer.pid == 0 => Err(Stranger::OtherNamespace),
        Ok(peer) => Ok(peer.pid),
        Err(error) => Err(Stranger::Untold(error.kind())),
    }
}

fn identify(pid: i32) -> Option<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses, and may itself hold spaces and ")".
    let (_, rest) = stat.rsplit_once(')')?;
    let start_ticks = rest.split_ascii_whitespace().nth(19)?.parse().ok()?;
    Some(Process { pid, start_ticks })
}

fn name_of(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim().chars().filter(|c| !c.is_control()).collect()
}

/// What the file says; None when it cannot be read, or is no such file.
fn read(file: &Path) -> Option<Vec<Process>> {
    let there = std::fs::metadata(file).ok()?;
    if !there.is_file() || there.len() > FILE_MAX_BYTES {
        return None;
    }
    std::fs::read_to_string(file).ok()?.lines().map(parse).collect()
}

fn parse(line: &str) -> Option<Process> {
    let (pid, start_ticks) = line.split_once(' ')?;
    Some(Process { pid: pid.parse().ok()?, start_ticks: start_ticks.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> Process {
        identify(std::process::id() as i32).unwrap()
    }

    /// Peers by a file with that text, and a connection from this process.
    fn with(text: Option<&str>) -> (tempfile::TempDir, Peers, UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("qemu.peers");
        if let Some(text) = text {
            std::fs::write(&file, text).unwrap();
        }
        let peers = Peers { patience: Duration::from_millis(50), ..Peers::new(Some(file)) };
        (directory, peers, UnixStream::pair().unwrap().0)
    }

    #[test]
    fn the_noted_process_is_served_and_no_other() {
        let Process { pid, start_ticks } = me();
        let (_kept, mut peers, stream) = with(Some(&format!("1 1\n{pid} {start_ticks}\n")));
        assert_eq!(peers.admit(&stream), Ok(()));
        // The same pid, started at another time.
        let (_kept, mut peers, stream) = with(Some(&format!("{pid} {}\n", start_ticks + 1)));
        assert!(matches!(peers.admit(&stream), Err(Stranger::Other { pid: p, .. }) if p == pid));
    }

    #[test]
    fn without_a_file_all_are_served() {
        let (_kept, _, stream) = with(None);
        assert_eq!(Peers::new(None).admit(&stream), Ok(()));
    }

    #[test]
    fn who_is_not_noted_yet_is_waited_for() {
        let Process { pid, start_ticks } = me();
        for text in [None, Some(""), Some("garbage"), Some("1"), Some("1 x\n")] {
            let (_kept, mut peers, stream) = with(text);
            assert_eq!(peers.admit(&stream), Err(Stranger::Unnoted { pid }), "{text:?}");
        }
        let (_kept, mut peers, stream) = with(Some(""));
        peers.patience = PATIENCE;
        let file = peers.file.clone().unwrap();
        let noting = std::thread::spawn(move || {
            std::thread::sleep(3 * AGAIN);
            std::fs::write(file, format!("{pid} {start_ticks}\n")).unwrap();
        });
        assert_eq!(peers.admit(&stream), Ok(()));
        noting.join().unwrap();
    }

    #[test]
    fn what_the_file_said_last_counts_when_it_is_gone() {
        let Process { pid, start_ticks } = me();
        let (kept, mut peers, stream) = with(Some(&format!("{pid} {start_ticks}\n")));
        drop(kept);
        assert_eq!(peers.admit(&stream), Ok(()));
        let (kept, mut peers, stream) = with(Some("1 1\n"));
        drop(kept);
        assert!(matches!(peers.admit(&stream), Err(Stranger::Other { .. })));
    }
}
