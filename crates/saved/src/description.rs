//! The description in a saved state: the VM, and the disks with the state that each must be in.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::image::Identity;

/// What a saved state says about itself.
#[derive(Debug, Serialize, Deserialize)]
pub struct Description {
    /// The agent's part: the VM and its QEMU.
    pub vm: Value,
    /// The disks it belongs to, by their numbers in references.
    pub images: Vec<Described>,
}

/// One disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct Described {
    /// Its name in the VM.
    pub name: String,
    /// Where its image was.
    pub path: PathBuf,
    /// Its state.
    #[serde(flatten)]
    pub identity: Identity,
}
