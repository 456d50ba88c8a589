//! Keeping apart writes that touch the same block of the storage, in all threads of a disk.
//!
//! Direct I/O writes whole blocks. A write of a part of one reads the block, changes it and writes
//! it back; whatever another request wrote into that block meanwhile would be lost, although the
//! guest's two requests have no byte in common. So such a write has the blocks at its ends for
//! itself. Other writes share their blocks with each other.
//!
//! Who has to wait tries again, instead of sleeping: guests write whole blocks of 4 KiB wherever
//! they are told that the storage has these ([`Image::physical_block_size`]), so it is rare.
//!
//! [`Image::physical_block_size`]: crate::Image::physical_block_size

use std::ops::Range;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::SeqCst};

const TABLE_BITS: u32 = 12;
/// A request of more whole blocks than this is kept apart from all that touch blocks in part.
const WIDE: u64 = 1024;
/// Somebody has the block for himself.
const TAKEN: i32 = -1;

/// Which blocks are being written. Blocks are hashed: a collision makes a request wait for nothing,
/// now and then; it never lets two pass that must not.
pub(crate) struct PartialWrites {
    block: u64,
    /// How many share a block, or [`TAKEN`].
    blocks: Box<[AtomicI32]>,
    /// Requests that have a block for themselves.
    partial: AtomicU32,
    /// Requests that are not in the table.
    wide: AtomicU32,
}

impl std::fmt::Debug for PartialWrites {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PartialWrites").field("block", &self.block).finish_non_exhaustive()
    }
}

/// Blocks that a request has for itself, and blocks that it shares.
struct Wanted {
    own: [Option<u64>; 2],
    shared: Range<u64>,
}

impl Wanted {
    fn is_wide(&self) -> bool {
        self.shared.end - self.shared.start > WIDE
    }

    fn is_partial(&self) -> bool {
        self.own.iter().any(Option::is_some)
    }

    fn own(&self) -> impl Iterator<Item = u64> + use<> {
        self.own.into_iter().flatten()
    }

    fn in_table(&self) -> Range<u64> {
        if self.is_wide() { 0..0 } else { self.shared.clone() }
    }
}

impl PartialWrites {
    /// For blocks of so many bytes, a power of two.
    pub(crate) fn new(block: u32) -> Self {
        Self {
            block: block.into(),
            blocks: (0..1 << TABLE_BITS).map(|_| AtomicI32::new(0)).collect(),
            partial: AtomicU32::new(0),
            wide: AtomicU32::new(0),
        }
    }

    fn slot(&self, block: u64) -> &AtomicI32 {
        // Fibonacci hashing: neighbours land far apart, and a run of them never collides with itself.
        let hash = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - TABLE_BITS);
        &self.blocks[hash as usize]
    }

    fn wanted(&self, offset: u64, len: u64) -> Wanted {
        let end = offset + len;
        let (first, last) = (offset / self.block, end.div_ceil(self.block) - 1);
        let head = (offset % self.block != 0).then_some(first);
        let tail = (end % self.block != 0).then_some(last).filter(|tail| head != Some(*tail));
        let start = first + u64::from(head.is_some());
        // Where head and tail are one block nothing is left to share.
        let stop = (last + 1 - u64::from(tail.is_some())).max(start);
        Wanted { own: [head, tail], shared: start..stop }
    }

    /// Enters a write of this range, or says that it must wait. The range is not empty.
    pub(crate) fn try_enter(&self, offset: u64, len: u64) -> bool {
        let wanted = self.wanted(offset, len);
        let (partial, wide) = (u32::from(wanted.is_partial()), u32::from(wanted.is_wide()));
        // Each counts itself before it looks for others, so at least one of two sees the other. Most are
        // neither, and write to nothing that all threads share.
        if partial + wide > 0 {
            self.partial.fetch_add(partial, SeqCst);
            self.wide.fetch_add(wide, SeqCst);
        }
        let alone = (partial == 0 || self.wide.load(SeqCst) == wide)
            && (wide == 0 || self.partial.load(SeqCst) == partial);
        let (mut own, mut shared) = (0, 0);
        let entered = alone
            && wanted.own().all(|block| self.take(block).inspect(|()| own += 1).is_ok())
            && wanted.in_table().all(|block| self.share(block).inspect(|()| shared += 1).is_ok());
        if !entered {
            wanted.own().take(own).for_each(|block| self.slot(block).store(0, SeqCst));
            wanted.in_table().take(shared).for_each(|block| self.unshare(block));
            self.uncount(&wanted);
        }
        entered
    }

    /// Takes out a write that was entered.
    pub(crate) fn leave(&self, offset: u64, len: u64) {
        let wanted = self.wanted(offset, len);
        wanted.own().for_each(|block| self.slot(block).store(0, SeqCst));
        wanted.in_table().for_each(|block| self.unshare(block));
        self.uncount(&wanted);
    }

    fn uncount(&self, wanted: &Wanted) {
        let (partial, wide) = (u32::from(wanted.is_partial()), u32::from(wanted.is_wide()));
        if partial + wide > 0 {
            self.wide.fetch_sub(wide, SeqCst);
            self.partial.fetch_sub(partial, SeqCst);
        }
    }

    fn take(&self, block: u64) -> Result<(), i32> {
        self.slot(block).compare_exchange(0, TAKEN, SeqCst, SeqCst).map(drop)
    }

    fn share(&self, block: u64) -> Result<(), i32> {
        let more = |users: i32| (users != TAKEN).then_some(users + 1);
        self.slot(block).fetch_update(SeqCst, SeqCst, more).map(drop)
    }

    fn unshare(&self, block: u64) {
        self.slot(block).fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 4096;

    #[test]
    fn a_part_of_a_block_is_written_alone_and_whole_blocks_share() {
        let writes = PartialWrites::new(4096);
        assert!(writes.try_enter(0, BLOCK) && writes.try_enter(0, 2 * BLOCK));
        assert!(!writes.try_enter(512, 512) && !writes.try_enter(BLOCK + 512, 512));
        writes.leave(0, BLOCK);
        assert!(!writes.try_enter(512, 512));
        writes.leave(0, 2 * BLOCK);
        assert!(writes.try_enter(512, 512));
        assert!(!writes.try_enter(1024, 512) && !writes.try_enter(0, BLOCK));
        // Its neighbours are free, and so is what lies between the ends of a longer one.
        assert!(writes.try_enter(BLOCK, BLOCK));
        writes.leave(BLOCK, BLOCK);
        assert!(writes.try_enter(2 * BLOCK + 512, 3 * BLOCK) && writes.try_enter(3 * BLOCK, BLOCK));
        assert!(!writes.try_enter(2 * BLOCK, BLOCK) && !writes.try_enter(5 * BLOCK, BLOCK));
    }

    #[test]
    fn a_wide_write_and_a_part_of_a_block_exclude_each_other() {
        let writes = PartialWrites::new(4096);
        let wide = (WIDE + 1) * BLOCK;
        assert!(writes.try_enter(512, 512) && !writes.try_enter(1 << 30, wide));
        writes.leave(512, 512);
        assert!(writes.try_enter(1 << 30, wide) && writes.try_enter(0, wide));
        assert!(!writes.try_enter(512, 512) && !writes.try_enter(512, wide));
        writes.leave(1 << 30, wide);
        writes.leave(0, wide);
        assert!(writes.try_enter(512, wide) && !writes.try_enter(0, wide));
        writes.leave(512, wide);
        assert!(writes.try_enter(512, 512));
    }

    /// Nothing is left of those that were refused, whatever they had taken before.
    #[test]
    fn entering_and_leaving_in_any_order_leaves_nothing() {
        let writes = PartialWrites::new(4096);
        let ranges = (0..3000u64).map(|n| (n * 7919 % 40_000 * 512, 512 + n % 40 * 512));
        let entered: Vec<_> = ranges.filter(|(at, len)| writes.try_enter(*at, *len)).collect();
        assert!(entered.len() > 100 && entered.len() < 2900, "{}", entered.len());
        entered.iter().rev().for_each(|(at, len)| writes.leave(*at, *len));
        assert!(writes.blocks.iter().all(|users| users.load(SeqCst) == 0));
        assert_eq!((writes.partial.load(SeqCst), writes.wide.load(SeqCst)), (0, 0));
    }
}
