//! What the program says on stdout, a JSON object a line. `crates/control/golden` has an example of
//! each, against which the program and its readers are tested.
//!
//! **Version rule.** A key may be added. To remove one, or to change its type or its meaning, is a
//! new version of the program's interface, and has to be borne by every reader first.

use serde::Serialize;

use crate::description::Description;

/// While it works, ten times a second; in bytes of memory.
#[derive(Debug, Serialize)]
pub struct Done {
    /// So much is done.
    pub done: u64,
    /// So much there is.
    pub of: u64,
}

/// What a save came to: its last line.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of the file.
    pub file: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Pages that are blocks of disks.
    pub block_pages: u64,
    /// Pages that are kept.
    pub data_pages: u64,
}

/// What a restore came to: its last line.
#[derive(Debug, Serialize)]
pub struct Restored {
    /// Bytes of memory.
    pub memory: u64,
}

/// What a saved state says about itself.
#[derive(Debug, Serialize)]
pub struct Shown<'a> {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of the file.
    pub file: u64,
    /// Bytes of the state of the devices.
    pub state: u64,
    /// `vm`, the agent's part, and `images`.
    #[serde(flatten)]
    pub description: &'a Description,
}
