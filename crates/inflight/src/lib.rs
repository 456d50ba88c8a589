//! In-flight I/O tracking: nothing lost and nothing hung when the backend of a disk dies.
//!
//! A state array in memory that the *front end* keeps, indexed by the head of each descriptor
//! chain, is set when processing of a request begins and reset when it ends. When the backend has
//! died, the next one maps the array again and does the unfinished requests again.
//!
//! Sources: the vhost-user specification (QEMU `docs/interop/vhost-user.rst`, "Inflight I/O
//! tracking"), whose split layout and order of stores this follows to the letter, and
//! US10997099B2.
//!
//! * [`mod@format`] draws the region, byte by byte.
//! * [`QueueRegion`] reads and writes one queue's part of it.
//! * [`TrackedQueue`] joins a [`semper_ring::SplitQueue`] to its part, and recovers.
//! * [`Point`] names every instant between two stores; a [`Hook`] can end the process there.
//!
//! Nothing here knows vhost or disks; the model checker in `tests/` runs this very code.

pub mod format;
mod point;
mod region;
mod tracked;

pub use point::{Hook, NoHook, Point};
pub use region::{DeviceRecord, QueueRegion};
pub use tracked::{RecoveryError, TrackedQueue};
