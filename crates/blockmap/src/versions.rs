//! When a block was last written, and whether it is being written now.
//!
//! ```text
//!   versions   u32 for each block       how often it was written; large, and seldom in a cache
//!   flights    u64 for each of 8192     number << 24 | writes in flight; small, always in a cache
//!
//!   begin_write   the flight's number + 1, in flight + 1    before the first byte can change
//!   end_write     version + 1, then in flight - 1           after the last byte has changed
//! ```
//!
//! Together a seqlock for every block: who sees the same version twice, and nothing in flight at
//! either time, knows that no write was in flight at any time between.
//!
//! The two are apart because of what they cost. A word of a large table is a miss of the cache,
//! more than all the rest of recording. Here it is asked for when the write begins and needed when
//! it has ended.
//!
//! Discards cover more blocks than can be counted one by one: one word counts those in flight,
//! whatever their range, and until it is 0 nothing has a stamp; before a discard leaves it, the
//! versions of the touched blocks of its range are moved on.
//!
//! Both tables are bounded. Blocks that share a version look written when one of them is; writes
//! that share a flight look simultaneous. Either costs entries and never keeps a wrong one.
//! A version is the same again only after exactly 2^32 writes.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use crate::SECTORS_PER_BLOCK;
use crate::lazy::{Lazy, Zeroable};

/// Versions at most: 4 MiB, one for each block of a disk of 4 GiB. More would not stay in a cache.
pub(crate) const SLOTS: u64 = 1 << 20;
/// Bytes of a version.
pub(crate) const SLOT_SIZE: u64 = size_of::<AtomicU32>() as u64;
/// 64 KiB.
const FLIGHTS: usize = 1 << 13;
const COUNT_BITS: u32 = 24;
const COUNT: u64 = (1 << COUNT_BITS) - 1;
const NUMBER: u64 = 1 << COUNT_BITS;

// SAFETY: an atomic integer.
unsafe impl Zeroable for AtomicU32 {}

#[derive(Debug)]
pub(crate) struct Versions {
    slots: Lazy<AtomicU32>,
    flights: Box<[AtomicU64]>,
    trims: AtomicU64,
    /// Several threads write blocks.
    shared: AtomicBool,
}

impl Versions {
    pub(crate) fn new(blocks: u64) -> io::Result<Self> {
        let slots = Lazy::new(blocks.clamp(1, SLOTS) as usize)?;
        let flights = (0..FLIGHTS).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { slots, flights, trims: AtomicU64::new(0), shared: AtomicBool::new(true) })
    }

    /// The block's version. Each further chunk of a large disk is rotated by an odd amount, so
    /// that structures at regular distances do not share one, and neighbours stay neighbours.
    #[inline]
    fn slot(&self, block: u64) -> usize {
        let slots = self.slots.len() as u64;
        if block < slots {
            return block as usize;
        }
        ((block + (block / slots).wrapping_mul(0x9e37_79b1)) % slots) as usize
    }

    /// Blocks that share a version share this too.
    #[inline]
    fn flight(&self, slot: usize) -> &AtomicU64 {
        &self.flights[slot % FLIGHTS]
    }

    /// Whether several threads write blocks. One alone does without locked instructions. A second
    /// one must not begin before the first has seen the change.
    pub(crate) fn set_shared(&self, shared: bool) {
        self.shared.store(shared, Ordering::SeqCst);
    }

    /// Adds to a flight (wrapping); gives what it was.
    #[inline]
    fn add(&self, flight: &AtomicU64, n: u64) -> u64 {
        if self.shared.load(Ordering::Relaxed) {
            return flight.fetch_add(n, Ordering::AcqRel);
        }
        let before = flight.load(Ordering::Relaxed);
        flight.store(before.wrapping_add(n), Ordering::Release);
        before
    }

    /// Moves a version on; no two writes may leave the same one.
    #[inline]
    fn move_on(&self, slot: usize) -> u32 {
        let word = &self.slots[slot];
        if self.shared.load(Ordering::Relaxed) {
            return word.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        }
        let version = word.load(Ordering::Relaxed).wrapping_add(1);
        word.store(version, Ordering::Release);
        version
    }

    /// The block's version, of which nobody knows whether it is about to change.
    #[inline]
    pub(crate) fn get(&self, block: u64) -> u64 {
        u64::from(self.slots[self.slot(block)].load(Ordering::Acquire))
    }

    /// The block's version, if no write of it is in flight.
    fn quiet(&self, block: u64) -> Option<u64> {
        let slot = self.slot(block);
        let in_flight = self.flight(slot).load(Ordering::Acquire) & COUNT;
        let version = self.slots[slot].load(Ordering::Acquire);
        (in_flight == 0).then_some(u64::from(version))
    }

    /// A write of the block begins. Gives what its end wants.
    #[inline]
    pub(crate) fn begin_write(&self, block: u64) -> u64 {
        let slot = self.slot(block);
        prefetch(&self.slots[slot]);
        let before = self.add(self.flight(slot), NUMBER + 1);
        before.wrapping_add(NUMBER + 1)
    }

    /// The write is over: the block's version, if it was the only one in flight all the time.
    #[inline]
    pub(crate) fn end_write(&self, block: u64, begun: u64) -> Option<u64> {
        let slot = self.slot(block);
        let version = self.move_on(slot);
        let alone = self.add(self.flight(slot), u64::MAX) == begun && begun & COUNT == 1;
        alone.then_some(u64::from(version))
    }

    /// A discard begins.
    pub(crate) fn begin_trim(&self) {
        self.trims.fetch_add(1, Ordering::SeqCst);
    }

    /// The discard is over; `blocks` are those of its range that were ever touched. They are asked
    /// for now: a request that touches one later began after the discard.
    pub(crate) fn end_trim(&self, blocks: impl Iterator<Item = u64>) {
        for block in blocks {
            let begun = self.begin_write(block);
            self.end_write(block, begun);
        }
        self.trims.fetch_sub(1, Ordering::SeqCst);
    }

    /// What identifies the present content of the eight sectors from `sector`: the same stamp
    /// twice means that nothing wrote them between. None while something does.
    pub(crate) fn stamp(&self, sector: u64) -> Option<u64> {
        // Orders the caller's reads of the block before the second look.
        fence(Ordering::Acquire);
        if self.trims.load(Ordering::SeqCst) != 0 {
            return None;
        }
        let block = sector / SECTORS_PER_BLOCK;
        let first = self.quiet(block)?;
        if sector % SECTORS_PER_BLOCK == 0 {
            return Some(first);
        }
        Some(both(first, self.quiet(block + 1)?))
    }

    pub(crate) fn resident(&self) -> u64 {
        self.slots.resident() + FLIGHTS as u64 * 8
    }

    /// Bytes that it can come to for a disk of so many blocks.
    pub(crate) fn bound(blocks: u64) -> u64 {
        blocks.min(SLOTS) * SLOT_SIZE + FLIGHTS as u64 * 8
    }
}

/// The stamp of a page's worth of sectors in two blocks. Versions only grow, so the sum is the same
/// only if both are.
#[inline]
pub(crate) fn both(first: u64, second: u64) -> u64 {
    first.wrapping_add(second)
}

/// Fetches a word for writing, without waiting for it.
#[inline]
fn prefetch(word: &AtomicU32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; the address is that of a word that exists.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_ET0>(std::ptr::from_ref(word).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = word;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_in_flight_hides_the_block_and_changes_its_stamp() {
        let versions = Versions::new(100).unwrap();
        let before = versions.stamp(80).unwrap();
        let first = versions.begin_write(10);
        assert_eq!(versions.stamp(80), None);
        assert_eq!(versions.stamp(76), None, "the second half of an unaligned page");
        let second = versions.begin_write(10);
        assert_eq!(versions.end_write(10, first), None, "another began");
        assert_eq!(versions.stamp(80), None);
        assert_eq!(versions.end_write(10, second), None, "another was there");
        let third = versions.begin_write(10);
        let stamp = versions.end_write(10, third);
        assert_eq!(versions.stamp(80), stamp);
        assert!(stamp.is_some() && stamp != Some(before));
    }

    #[test]
    fn a_discard_hides_all_and_changes_its_own() {
        let versions = Versions::new(100).unwrap();
        versions.begin_trim();
        assert_eq!(versions.stamp(0), None);
        versions.end_trim(3..5);
        assert_eq!((versions.stamp(0), versions.stamp(24)), (Some(0), Some(1)));
    }

    #[test]
    fn neighbours_never_share_a_word_and_regular_distances_do_not_either() {
        let versions = Versions::new(SLOTS * 64).unwrap();
        let address = |block| versions.slot(block);
        for start in [0, SLOTS - 5, SLOTS * 63 - 1] {
            let mut slots: Vec<usize> = (start..start + 1000).map(address).collect();
            slots.sort_unstable();
            slots.dedup();
            // Where two chunks meet a few may.
            assert!(slots.len() >= 990);
        }
        let mut slots: Vec<usize> = (0..64).map(|chunk| address(chunk * SLOTS)).collect();
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), 64);
    }
}
