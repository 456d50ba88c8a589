//! What a request asks for.

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Disk to memory.
    Read,
    /// Memory to disk; with `stable`, done only when it would survive a power cut.
    Write {
        /// The cache is write-through.
        stable: bool,
    },
    /// Everything that was done before is on stable storage.
    Flush,
    /// The range's content is of no interest any more.
    Discard,
    /// The range reads as zeros.
    WriteZeroes {
        /// The space may be given back.
        unmap: bool,
    },
}

impl Op {
    /// The name in rules and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes { .. } => "write-zeroes",
        }
    }

    /// Whether it changes what the disk holds.
    pub(crate) fn writes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard | Self::WriteZeroes { .. })
    }
}
