//! Snapshots: layers above a raw image.
//!
//! A layer is a sparse file with the blocks that were written since it was opened, at the same
//! offsets as in the image, and a map that says which these are. `docs/design/snapshots.md` says why.
//!
//! | module | what it is |
//! |---|---|
//! | [`record`] | the record of a chain, drawn; its states and rules, pure |
//! | [`bits`] | the map of a layer, drawn; in memory |
//! | [`plan`] | in which order a snapshot is taken and a layer is merged, pure; where a process can die |
//! | [`files`] | what it stands on: a trait, for real files ([`disk`]) and for those of the model |
//! | [`chain`] | a chain at work: which file has a block |
//! | [`keeper`] | the one who changes a chain |
//! | [`engine`] | requests of a guest on a chain |
//! | [`reader`] | a chain, or a snapshot, for who only reads |

pub mod bits;
pub mod chain;
pub mod disk;
pub mod engine;
pub mod files;
pub mod keeper;
mod mistake;
#[cfg(test)]
mod model;
pub mod plan;
pub mod reader;
pub mod record;

/// Bytes of a block of a layer: what it has as a whole, or not at all.
pub const BLOCK: u64 = 4096;
