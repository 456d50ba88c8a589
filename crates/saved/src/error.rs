//! Why a state could not be saved or restored.

use std::io;

use semper_program::Status;

/// Nothing of the request was done, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is something else.
    #[error("this is not a saved state")]
    Foreign,
    /// A later release wrote it.
    #[error("the saved state has version {0}, this program knows 1")]
    Version(u16),
    /// The file ends before its end.
    #[error("the saved state is cut off: {0}")]
    Truncated(&'static str),
    /// Something in it cannot be.
    #[error("the saved state is damaged: {0}")]
    Corrupt(String),
    /// The disk has changed since.
    #[error("disk {disk} is not in the state that the saved state belongs to: {why}")]
    Disk {
        /// The disk's name in the VM.
        disk: String,
        /// What differs.
        why: String,
    },
    /// The request does not make sense.
    #[error("{0}")]
    Invalid(String),
    /// The system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl semper_program::Failure for Error {
    fn status(&self) -> Status {
        match self {
            Error::Disk { .. } => Status::Conflict,
            Error::Io { .. } => Status::Failed,
            _ => Status::Unusable,
        }
    }
}

impl Error {
    /// For `map_err`.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }

    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }
}
