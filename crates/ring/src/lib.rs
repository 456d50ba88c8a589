//! Split virtqueues as a device sees them.
//!
//! The ring lives in memory that a hostile guest writes at any instant, so nothing here is ever
//! read twice with two meanings, every index is checked before it is used, and no reference to
//! guest memory is ever formed: only raw pointers, atomics for the ring's indices, and copies.
//!
//! Source: *Virtual I/O Device (VIRTIO) Version 1.2*, section 2.7 "Split Virtqueues". The names of
//! the fields are the specification's.
//!
//! This crate knows neither vhost nor disks.

#[cfg(target_endian = "big")]
compile_error!("virtio rings are little-endian, and only little-endian hosts are supported");

mod chain;
mod memory;
mod split;

pub use chain::{ChainError, MAX_CHAIN_DESCRIPTORS, Segment};
pub use memory::{FileId, GuestMemory, MemoryError, RegionSpec};
pub use split::{AvailWatch, RingAddresses, RingError, SplitQueue};
