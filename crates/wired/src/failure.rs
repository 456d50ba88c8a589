//! Why an end gives up.

use std::io;
use std::path::{Path, PathBuf};

use semper_program::Status;
use semper_wire::WireError;

/// Named by what to do about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("cannot {what} {}: {error}", path.display())]
    File { what: &'static str, path: PathBuf, error: io::Error },
    #[error(transparent)]
    Layers(#[from] semper_layers::keeper::LayersError),
    #[error("{0}")]
    Listen(#[from] semper_control::BindError),
    #[error("cannot {what}: {error}")]
    System { what: &'static str, error: io::Error },
    #[error("TLS: {0}; both hosts need certificates of one authority, and the right names in them")]
    Tls(String),
    #[error("{0}")]
    Peer(#[from] WireError),
    #[error("the connection to the other end was lost: {0}")]
    Lost(io::Error),
    #[error("QEMU's migration socket failed: {0}; QEMU's own monitor says why")]
    Qemu(io::Error),
}

impl semper_program::Failure for Failure {
    fn status(&self) -> Status {
        match self {
            Failure::Usage(_) | Failure::File { .. } | Failure::Listen(_) => Status::Usage,
            _ => Status::Failed,
        }
    }
}

impl Failure {
    pub(crate) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Failure::File { what, path: path.to_owned(), error }
    }

    pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Failure::System { what, error }
    }
}
