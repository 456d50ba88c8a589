//! When a block was last written, and whether it is being written now.
//!
//! One word for each block, `version << 24 | writes in flight`; a seqlock for every block:
//!
//! ```text
//!   begin_write   version + 1, in flight + 1      before the first byte can change
//!   end_write                  in flight - 1      after the last byte has changed
//! ```
//!
//! Whoever sees the same version twice, and nothing in flight at either time, knows that no write
//! was in flight at any time between. Discards cover more blocks than can be counted one by one:
//! one word counts those in flight, whatever their range, and until it is 0 nothing has a stamp;
//! before a discard leaves it, the versions of the touched blocks of its range are moved on.
//!
//! The table is bounded: beyond [`SLOTS`] blocks several share a word. A write of one then looks
//! like a write of the others, which costs entries and never keeps a wrong one.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crate::SECTORS_PER_BLOCK;
use crate::lazy::Lazy;

/// Words at most: 32 MiB, one for each block of a disk of 16 GiB.
pub(crate) const SLOTS: u64 = 1 << 22;
const IN_FLIGHT_BITS: u32 = 24;
const IN_FLIGHT: u64 = (1 << IN_FLIGHT_BITS) - 1;
const VERSION: u64 = 1 << IN_FLIGHT_BITS;

#[derive(Debug)]
pub(crate) struct Versions {
    slots: Lazy<AtomicU64>,
    trims: AtomicU64,
    /// Several threads write blocks.
    shared: AtomicBool,
}

impl Versions {
    pub(crate) fn new(blocks: u64) -> io::Result<Self> {
        let slots = blocks.clamp(1, SLOTS) as usize;
        let (trims, shared) = (AtomicU64::new(0), AtomicBool::new(true));
        Ok(Self { slots: Lazy::new(slots)?, trims, shared })
    }

    /// The block's word. Each further chunk of a large disk is rotated by an odd amount, so that
    /// structures at regular distances do not share words, and neighbours stay neighbours.
    #[inline]
    fn slot(&self, block: u64) -> &AtomicU64 {
        let slots = self.slots.len() as u64;
        let index = if block < slots {
            block
        } else {
            (block + (block / slots).wrapping_mul(0x9e37_79b1)) % slots
        };
        &self.slots[index as usize]
    }

    /// Whether several threads write blocks. One alone does without locked instructions, the most
    /// expensive part of recording a write. A second one must not begin before the first has seen
    /// the change.
    pub(crate) fn set_shared(&self, shared: bool) {
        self.shared.store(shared, Ordering::SeqCst);
    }

    /// Adds to the block's word (wrapping); gives what it was.
    #[inline]
    fn add(&self, block: u64, n: u64) -> u64 {
        let slot = self.slot(block);
        if self.shared.load(Ordering::Relaxed) {
            return slot.fetch_add(n, Ordering::AcqRel);
        }
        let before = slot.load(Ordering::Relaxed);
        slot.store(before.wrapping_add(n), Ordering::Release);
        before
    }

    /// The block's version, if no write of it is in flight.
    #[inline]
    pub(crate) fn quiet(&self, block: u64) -> Option<u64> {
        let word = self.slot(block).load(Ordering::Acquire);
        (word & IN_FLIGHT == 0).then_some(word >> IN_FLIGHT_BITS)
    }

    /// A write of the block begins: its new version, if it is the only one.
    #[inline]
    pub(crate) fn begin_write(&self, block: u64) -> Option<u64> {
        let before = self.add(block, VERSION + 1);
        (before & IN_FLIGHT == 0).then_some((before.wrapping_add(VERSION)) >> IN_FLIGHT_BITS)
    }

    /// The write is over. Whatever began meanwhile has moved the version on.
    #[inline]
    pub(crate) fn end_write(&self, block: u64) {
        self.add(block, u64::MAX);
    }

    /// A discard begins.
    pub(crate) fn begin_trim(&self) {
        self.trims.fetch_add(1, Ordering::SeqCst);
    }

    /// The discard is over; `blocks` are those of its range that were ever touched. They are asked
    /// for now: a request that touches one later began after the discard.
    pub(crate) fn end_trim(&self, blocks: impl Iterator<Item = u64>) {
        for block in blocks {
            self.add(block, VERSION);
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
        // Versions only grow, so the sum is the same only if both are.
        Some(first.wrapping_add(self.quiet(block + 1)?))
    }

    pub(crate) fn resident(&self) -> u64 {
        self.slots.resident()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_in_flight_hides_the_block_and_changes_its_stamp() {
        let versions = Versions::new(100).unwrap();
        let before = versions.stamp(80).unwrap();
        assert_eq!(versions.begin_write(10), Some(1));
        assert_eq!(versions.stamp(80), None);
        assert_eq!(versions.stamp(76), None, "the second half of an unaligned page");
        assert_eq!(versions.begin_write(10), None, "not the only one");
        versions.end_write(10);
        assert_eq!(versions.stamp(80), None);
        versions.end_write(10);
        assert_eq!(versions.stamp(80), Some(2));
        assert_ne!(versions.stamp(80), Some(before));
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
        let address = |block| std::ptr::from_ref(versions.slot(block)).addr();
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
