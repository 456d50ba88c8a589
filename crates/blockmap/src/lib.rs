//! The page/block map: which block of a disk stands in which page of the guest's memory.
//!
//! When a request ends, the address on the virtual disk and the physical address in the guest's
//! memory (region and offset) are stored together. Who later moves or saves the guest's memory can
//! then name a disk block instead of sending the page. Source: US20200371827A1 (the recording
//! half); the design, its invariants and its cost stand in `docs/design/blockmap.md`.
//!
//! ```text
//!   hot path   Recorder ──► PageTable   page  -> (sector, stamp)      16 bytes a page
//!                       ├─► Versions    block -> version, writes in flight
//!                       └─► Touched     1 bit a block
//!   off it     ContentIndex             keyed BLAKE3 of touched blocks -> block
//!              Verifier                 page = block? compared byte for byte, stamps re-checked
//!              format                   all of it as bytes, for other programs
//! ```
//!
//! Entries are hints that are dropped when the block is written or the page is read into, and told
//! wrong by their content when the guest's processor stored into the page. Only [`Verifier`] says
//! that a page equals a block; what exactly that promises is written there.
//!
//! Nothing here knows vhost, and nothing here opens a disk: the caller lends [`Blocks`].

mod aligned;
mod counters;
pub mod format;
mod index;
mod lazy;
mod map;
mod pages;
mod recorder;
mod reverse;
mod table;
mod touched;
mod verify;
mod versions;

pub use aligned::Page;
pub use counters::Counters;
pub use index::{BYTES_PER_BLOCK, ContentIndex, Hash, Refreshed, hash_page};
pub use map::{Association, BlockMap, Layout, Memory, RegionKey};
pub use pages::{Blocks, HostPages, Pages};
pub use recorder::{Access, Note, Recorder};
pub use reverse::Reverse;
pub use verify::{Found, Outcome, Pair, Tally, Verifier};

/// Bytes of a page of the guest and of a block of the disk.
pub const PAGE_SIZE: usize = 4096;
/// Bytes of a sector.
pub const SECTOR_SIZE: u64 = 512;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = PAGE_SIZE as u64 / SECTOR_SIZE;

const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();
