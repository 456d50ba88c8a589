//! Why the backend ends, and what its exit status says of it.

use std::fmt;
use std::io;

use semper_block::{ImageError, LockError};
use semper_control::BindError;
use semper_epoch::Denied;

/// Why the backend ends.
#[derive(Debug)]
pub(crate) enum Failure {
    Usage(String),
    Lock(LockError),
    Denied(Denied),
    Image(ImageError),
    Listen(BindError),
    System { what: &'static str, error: io::Error },
}

impl Failure {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => 2,
            Failure::Denied(Denied::Io { .. }) => 4,
            Failure::Lock(LockError::Held { .. }) | Failure::Denied(_) => 3,
            Failure::Lock(_) | Failure::Image(_) => 4,
            Failure::Listen(_) | Failure::System { .. } => 1,
        }
    }

    /// Says why, and gives the exit status.
    pub(crate) fn report(&self) -> u8 {
        eprintln!("semper-blkd: error: {self}");
        self.exit_code()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(what) => f.write_str(what),
            Failure::Lock(error) => error.fmt(f),
            Failure::Denied(error) => error.fmt(f),
            Failure::Image(error) => error.fmt(f),
            Failure::Listen(error) => error.fmt(f),
            Failure::System { what, error } => write!(f, "cannot {what}: {error}"),
        }
    }
}

pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure::System { what, error }
}
