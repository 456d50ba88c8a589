//! Snapshots: layers above a raw image.
//!
//! A layer is a sparse file with the blocks that were written since it was opened, at the same
//! offsets as in the image, and a map that says which these are. `docs/design/snapshots.md` says why;
//! [`record`] draws the record of a chain, [`bits`] the maps.

pub mod bits;
pub mod record;

/// Bytes of a block of a layer: what it has as a whole, or not at all.
pub const BLOCK: u64 = 4096;
