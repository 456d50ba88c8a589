//! Keeping apart requests of one thread that touch the same blocks.
//!
//! virtio-blk promises no order between requests in flight, and a replayed write is harmless by
//! itself. But an engine with many requests in flight may do an old write after a newer one of the
//! same blocks that was already completed and seen, if a backend died between the two. So two
//! requests that overlap, one of them a write, are never in flight together: the later waits.
//!
//! Requests are counted in a table of hashed 4 KiB granules. A collision makes a request wait for
//! nothing, now and then; it never lets two overlapping ones pass.

use semper_block::Op;

const GRANULE_SHIFT: u32 = 12;
const TABLE_BITS: u32 = 14;
/// A request of more granules than this (16 MiB) is kept apart from everything.
const WIDE: u64 = 4096;

#[derive(Clone, Copy, Default)]
struct Users {
    readers: u16,
    writers: u16,
}

/// Which blocks the requests in flight touch.
pub(crate) struct Overlaps {
    table: Box<[Users]>,
    in_flight: u32,
    wide: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    None,
    Read,
    Write,
}

fn access(op: Op) -> Access {
    match op {
        Op::Flush => Access::None,
        Op::Read => Access::Read,
        Op::Write { .. } | Op::Discard | Op::WriteZeroes { .. } => Access::Write,
    }
}

fn granules(offset: u64, len: u64) -> std::ops::RangeInclusive<u64> {
    (offset >> GRANULE_SHIFT)..=((offset + len.max(1) - 1) >> GRANULE_SHIFT)
}

fn slot(granule: u64) -> usize {
    // Fibonacci hashing: neighbours land far apart, and a run of them never collides with itself.
    (granule.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - TABLE_BITS)) as usize
}

impl Overlaps {
    pub(crate) fn new() -> Self {
        let table = vec![Users::default(); 1 << TABLE_BITS].into_boxed_slice();
        Self { table, in_flight: 0, wide: 0 }
    }

    /// Enters the request, or says that it must wait.
    pub(crate) fn try_enter(&mut self, op: Op, offset: u64, len: u64) -> bool {
        let access = access(op);
        if access == Access::None {
            return true;
        }
        let range = granules(offset, len);
        if self.wide > 0 {
            return false;
        }
        if range.end() - range.start() >= WIDE {
            if self.in_flight > 0 {
                return false;
            }
            self.wide += 1;
            self.in_flight += 1;
            return true;
        }
        let busy =
            |users: Users| users.writers > 0 || (access == Access::Write && users.readers > 0);
        if range.clone().any(|granule| busy(self.table[slot(granule)])) {
            return false;
        }
        self.count(access, range, 1);
        self.in_flight += 1;
        true
    }

    /// Takes out a request that was entered.
    pub(crate) fn leave(&mut self, op: Op, offset: u64, len: u64) {
        let access = access(op);
        if access == Access::None {
            return;
        }
        let range = granules(offset, len);
        self.in_flight -= 1;
        if range.end() - range.start() >= WIDE {
            self.wide -= 1;
        } else {
            self.count(access, range, u16::MAX);
        }
    }

    /// Adds `n` (wrapping, so that u16::MAX subtracts one) to every granule of the range.
    fn count(&mut self, access: Access, range: std::ops::RangeInclusive<u64>, n: u16) {
        for granule in range {
            let users = &mut self.table[slot(granule)];
            let counter =
                if access == Access::Write { &mut users.writers } else { &mut users.readers };
            *counter = counter.wrapping_add(n);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const WRITE: Op = Op::Write { stable: false };

    #[test]
    fn a_write_waits_for_whatever_overlaps_it_and_reads_share() {
        let mut overlaps = Overlaps::new();
        assert!(overlaps.try_enter(Op::Read, 0, 8192));
        assert!(overlaps.try_enter(Op::Read, 4096, 4096));
        assert!(!overlaps.try_enter(WRITE, 4096, 512));
        assert!(overlaps.try_enter(WRITE, 8192, 4096));
        assert!(!overlaps.try_enter(Op::Read, 8704, 512));
        assert!(overlaps.try_enter(Op::Flush, 0, 0));
        overlaps.leave(Op::Read, 0, 8192);
        assert!(!overlaps.try_enter(WRITE, 4096, 512));
        overlaps.leave(Op::Read, 4096, 4096);
        assert!(overlaps.try_enter(WRITE, 4096, 512));
    }

    #[test]
    fn a_wide_request_is_alone() {
        let mut overlaps = Overlaps::new();
        assert!(overlaps.try_enter(Op::Discard, 0, 1 << 40));
        assert!(!overlaps.try_enter(Op::Read, 1 << 41, 512));
        overlaps.leave(Op::Discard, 0, 1 << 40);
        assert!(overlaps.try_enter(Op::Read, 1 << 41, 512));
        assert!(!overlaps.try_enter(Op::Discard, 0, 1 << 40));
        overlaps.leave(Op::Read, 1 << 41, 512);
        assert!(overlaps.try_enter(Op::Discard, 0, 1 << 40));
    }

    #[test]
    fn entering_and_leaving_in_any_order_leaves_nothing() {
        let mut overlaps = Overlaps::new();
        let entered: Vec<u64> = (0..4000u64)
            .map(|n| n * 7919 % 100_000 * 4096)
            .filter(|&offset| overlaps.try_enter(WRITE, offset, 16384))
            .collect();
        assert!(entered.len() > 1000);
        entered.iter().rev().for_each(|&offset| overlaps.leave(WRITE, offset, 16384));
        assert!(overlaps.table.iter().all(|u| u.readers == 0 && u.writers == 0));
        assert_eq!(overlaps.in_flight, 0);
    }

    /// What may not be in flight together, by comparing every pair of ranges.
    fn conflict((a, b): ((Op, u64, u64), (Op, u64, u64))) -> bool {
        let writes = access(a.0) == Access::Write || access(b.0) == Access::Write;
        let touches = access(a.0) != Access::None && access(b.0) != Access::None;
        writes && touches && a.1 < b.1 + b.2 && b.1 < a.1 + a.2
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 2000, failure_persistence: None, ..ProptestConfig::default()
        })]

        #[test]
        fn no_two_that_overlap_are_ever_let_in(
            steps in vec((0..5u8, 0..64u64, 1..40u64, any::<bool>(), any::<usize>()), 1..100),
            wide in any::<bool>(),
        ) {
            let mut overlaps = Overlaps::new();
            let mut inside: Vec<(Op, u64, u64)> = Vec::new();
            for (kind, offset, len, leaves, which) in steps {
                if leaves && !inside.is_empty() {
                    let (op, offset, len) = inside.swap_remove(which % inside.len());
                    overlaps.leave(op, offset, len);
                    continue;
                }
                let op = [Op::Read, WRITE, Op::Flush, Op::Discard, Op::Read][usize::from(kind)];
                let unit = if wide && kind == 3 { 1 << 20 } else { 512 };
                let new = (op, offset * unit, if op == Op::Flush { 0 } else { len * unit });
                let entered = overlaps.try_enter(new.0, new.1, new.2);
                let free = inside.iter().all(|old| access(old.0) == Access::None);
                prop_assert!(entered || !free, "{new:?} waits for nothing");
                if entered {
                    prop_assert!(!inside.iter().any(|old| conflict((*old, new))), "{new:?} passed");
                    inside.push(new);
                }
            }
            inside.drain(..).for_each(|(op, offset, len)| overlaps.leave(op, offset, len));
            prop_assert!(overlaps.table.iter().all(|u| u.readers == 0 && u.writers == 0));
            prop_assert_eq!((overlaps.in_flight, overlaps.wide), (0, 0));
        }
    }
}
