//! Why the backend ends, and what its exit status says of it.

use std::fmt;
use std::io;

use semper_block::{ImageError, LockError};
use semper_control::BindError;
use semper_epoch::Denied;
use semper_layers::keeper::LayersError;
use semper_program::Status;

/// Why the backend ends.
#[derive(Debug)]
pub(crate) enum Failure {
    Usage(String),
    Lock(LockError),
    Denied(Denied),
    Image(ImageError),
    Layers(LayersError),
    Listen(BindError),
    System { what: &'static str, error: io::Error },
}

impl semper_program::Failure for Failure {
    fn status(&self) -> Status {
        match self {
            Failure::Usage(_) => Status::Usage,
            Failure::Denied(Denied::Io { .. }) => Status::Unusable,
            Failure::Lock(LockError::Held { .. })
            | Failure::Denied(_)
            | Failure::Layers(LayersError::Stale { .. }) => Status::Conflict,
            Failure::Lock(_) | Failure::Image(_) | Failure::Layers(_) => Status::Unusable,
            Failure::Listen(_) | Failure::System { .. } => Status::Failed,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(what) => f.write_str(what),
            Failure::Lock(error) => error.fmt(f),
            Failure::Denied(error) => error.fmt(f),
            Failure::Image(error) => error.fmt(f),
            Failure::Layers(error) => error.fmt(f),
            Failure::Listen(error) => error.fmt(f),
            Failure::System { what, error } => write!(f, "cannot {what}: {error}"),
        }
    }
}

pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure::System { what, error }
}
