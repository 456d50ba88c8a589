//! Disk images: opening, locking, and the engines that do their I/O.
//!
//! [`Engine`] is the one interface; [`SyncEngine`], [`NowaitEngine`], [`UringEngine`],
//! `MappedEngine` (x86-64) and [`NullEngine`] are behind it, and in builds for tests `FaultEngine`
//! (feature `faults`) decorates any of them with errors and delays. An engine belongs to one
//! thread. Front ends (vhost-user today) depend on the trait and never on a concrete engine.

#[cfg(target_arch = "x86_64")]
mod copy;
mod engine;
#[cfg(feature = "faults")]
mod fault;
mod image;
mod io;
mod lock;
#[cfg(target_arch = "x86_64")]
mod mapped;
mod nowait;
mod null;
mod op;
mod partial;
#[cfg(target_arch = "x86_64")]
mod present;
mod rings;
#[cfg(target_arch = "x86_64")]
mod search;
mod sleeper;
mod sync;
mod uring;

pub use engine::{Engine, FileEngine, Submission, Target};
#[cfg(feature = "faults")]
pub use fault::{FaultEngine, FaultRule, FaultSwitch};
pub use image::{GrowError, Image, ImageError, Name, OpenOptions, Unit};
pub use io::{Absorbed, Io, Prepared};
pub use lock::{Holder, LockError};
#[cfg(target_arch = "x86_64")]
pub use mapped::{Known, MappedEngine, Mapping};
pub use nowait::NowaitEngine;
pub use null::NullEngine;
pub use op::Op;
pub use rings::Rings;
pub use sync::SyncEngine;
pub use uring::UringEngine;

/// Bytes of the unit in which virtio-blk counts, whatever the disk's block size is.
pub const SECTOR_SIZE: u64 = 512;
