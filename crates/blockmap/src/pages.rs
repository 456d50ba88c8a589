//! What the caller lends: the guest's pages, and the disk's blocks.

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::PAGE_SIZE;
use crate::aligned::Page;

/// The disk, as it is now.
pub trait Blocks {
    /// Reads whole sectors from `sector` into `into`.
    ///
    /// # Errors
    /// The system's; fewer bytes than asked for are an error.
    fn read(&self, sector: u64, into: &mut [Page]) -> io::Result<()>;
}

/// The guest's memory, as it is now.
pub trait Pages {
    /// Copies a page once, each byte at some instant of the call. False if the page is not in
    /// memory (never used, or swapped out): then `into` is as it was.
    fn copy(&self, region: usize, page: usize, into: &mut Page) -> bool;
}

/// Guest memory that is mapped in this process.
#[derive(Clone)]
pub struct HostPages {
    /// First byte and pages of each region.
    regions: Vec<(usize, usize)>,
    _memory: Arc<dyn Any + Send + Sync>,
}

impl HostPages {
    pub(crate) fn new(regions: Vec<(usize, usize)>, memory: Arc<dyn Any + Send + Sync>) -> Self {
        Self { regions, _memory: memory }
    }
}

impl Pages for HostPages {
    fn copy(&self, region: usize, page: usize, into: &mut Page) -> bool {
        let Some(&(base, pages)) = self.regions.get(region) else { return false };
        if page >= pages {
            return false;
        }
        let from = std::ptr::with_exposed_provenance_mut::<u8>(base + page * PAGE_SIZE);
        let mut present = 0u8;
        // Touching a page that was never used would allocate it.
        // SAFETY: one page that `_memory` keeps mapped; one byte for the answer.
        let status = unsafe { libc::mincore(from.cast(), PAGE_SIZE, &mut present) };
        if status != 0 || present & 1 == 0 {
            return false;
        }
        for (index, word) in into.0.chunks_exact_mut(8).enumerate() {
            // SAFETY: inside the page, aligned; the guest may be storing into it, so it is read as
            // atomic words, once.
            let value = unsafe { &*from.cast::<AtomicU64>().add(index) }.load(Ordering::Relaxed);
            word.copy_from_slice(&value.to_ne_bytes());
        }
        true
    }
}
