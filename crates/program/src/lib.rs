//! How our programs end, and where they log.
//!
//! A program that fails says so in its last line on stderr, and what its caller may do about it in
//! its exit status:
//!
//! ```text
//!   semper-blkd: error: image a.raw is in use by semper-blkd (pid 7); stop that first
//!   NAME: error: CAUSE; REMEDY
//! ```
//!
//! | status | semper-blkd, semper-vfiod | semper-saved | semper-wired | semper-load | semper-probe |
//! |---|---|---|---|---|---|
//! | 0 done | ended as asked, or (vfiod) with its QEMU | done | all of the stream was delivered | measured | all was right |
//! | 1 failed | while running | the system refused | it was not | requests failed | blocks were wrong |
//! | 2 usage | command line | command line | command line, files, sockets | command line | command line |
//! | 3 conflict | the image is another's | a disk is in another state | | no connection | |
//! | 4 unusable | the image, its record | the saved state | | the backend was lost | |
//!
//! The agent reads these numbers (`disk/running.py`, `qemu/saved.py`).

use std::fmt::Display;
use std::process::ExitCode;

/// What an exit status says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// It was done.
    Done = 0,
    /// It was begun, and failed.
    Failed = 1,
    /// The request makes no sense.
    Usage = 2,
    /// The request makes sense, but not now: what it is about is another's, or in another state.
    Conflict = 3,
    /// What it is about cannot be used by anybody.
    Unusable = 4,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(status as u8)
    }
}

/// Why a program ends; `Display` gives cause and remedy in one line.
pub trait Failure: Display {
    /// What the caller is to make of it.
    fn status(&self) -> Status;
}

/// A failure that is nothing but its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told(pub Status, pub String);

impl Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.1)
    }
}

impl Failure for Told {
    fn status(&self) -> Status {
        self.0
    }
}

/// A program, by its name.
#[derive(Clone, Copy, Debug)]
pub struct Program(pub &'static str);

impl Program {
    /// Writes the last line; gives the status that belongs to it.
    pub fn report(self, failure: &impl Failure) -> Status {
        eprintln!("{}: error: {failure}", self.0);
        failure.status()
    }

    /// What `main` returns.
    pub fn end(self, result: Result<(), impl Failure>) -> ExitCode {
        match result {
            Ok(()) => Status::Done,
            Err(failure) => self.report(&failure),
        }
        .into()
    }

    /// Ends the process at once, from any thread.
    pub fn exit(self, failure: &impl Failure) -> ! {
        std::process::exit(self.report(failure) as i32)
    }

    /// Sends the log to stderr: time, level, the program's name without `semper-`, message. The
    /// variable `RUST_LOG` says how much; by default everything from `info` on.
    #[cfg(feature = "log")]
    pub fn log_to_stderr(self) {
        use std::io::Write;
        let name = self.0.trim_start_matches("semper-");
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
            .format(move |out, record| {
                let stamp = out.timestamp_millis();
                writeln!(out, "{stamp} {} {name}: {}", record.level(), record.args())
            })
            .init();
    }
}
