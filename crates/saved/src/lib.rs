//! Saved states of VMs.
//!
//! A guest's memory is for a good part a copy of what stands on its disk. A saved state names
//! those blocks instead of holding them, so it belongs to one state of the disk, and says which.
//!
//! - [`format`]: what the file looks like, and everything that is refused about one.
//! - [`chunk`]: 512 KiB of memory, packed: zeros, blocks of images, and the rest under zstd.
//! - [`image`]: finding blocks by content; what a state of a disk is known by.
//! - [`description`]: the VM, and the disks that a state belongs to.
//! - [`answers`]: what the program says of its work.
//! - [`save`] and [`restore`]: the work on files, with several threads.

pub mod answers;
pub mod chunk;
pub mod description;
pub mod format;
pub mod image;
pub mod restore;
pub mod save;

mod error;

pub use error::Error;

/// A page of memory, and a block of a disk.
pub const PAGE: usize = 4096;
/// Pages that are packed, hashed and read together.
pub const CHUNK_PAGES: usize = 128;
/// Bytes of memory in a chunk.
pub const CHUNK: usize = PAGE * CHUNK_PAGES;

/// Called every now and then with the bytes of memory that are done.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);
