//! Why the mediator ends, and what its exit status says of it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use semper_block::{ImageError, LockError};
use semper_control::BindError;
use semper_epoch::Denied;
use semper_program::Status;
use semper_vfio::OpenError;

/// Why the mediator ends, or does not do what it was told.
#[derive(Debug)]
pub(crate) enum Failure {
    Usage(String),
    Lock(LockError),
    Denied(Denied),
    Image(ImageError),
    /// Layers stand above the image, and what is in it is old.
    Layered(PathBuf),
    Listen(BindError),
    Hardware(OpenError),
    /// A spare cannot follow, or go on.
    Succession(String),
    System {
        what: &'static str,
        error: io::Error,
    },
}

impl semper_program::Failure for Failure {
    fn status(&self) -> Status {
        match self {
            Failure::Usage(_) => Status::Usage,
            Failure::Denied(Denied::Io { .. }) => Status::Unusable,
            Failure::Lock(LockError::Held { .. }) | Failure::Denied(_) | Failure::Layered(_) => {
                Status::Conflict
            }
            Failure::Hardware(OpenError::Busy(_)) => Status::Conflict,
            Failure::Lock(_) | Failure::Image(_) | Failure::Hardware(_) => Status::Unusable,
            Failure::Listen(_) | Failure::Succession(_) | Failure::System { .. } => Status::Failed,
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
            Failure::Layered(image) => write!(
                f,
                "image {} has layers above it (snapshots), and a passed-through device serves images \
                 without; merge them first, or give the image to the VM as a disk",
                image.display()
            ),
            Failure::Listen(error) => error.fmt(f),
            Failure::Hardware(error) => error.fmt(f),
            Failure::Succession(what) => {
                write!(f, "this spare ends, and another one is to be started: {what}")
            }
            Failure::System { what, error } => write!(f, "cannot {what}: {error}"),
        }
    }
}

pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure::System { what, error }
}
