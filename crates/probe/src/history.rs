//! What a block may hold when several writers write to it at the same time (mode `overlap`).
//!
//! A write is *outdated* once another write was acknowledged that began after it had ended. A block
//! may hold any write that is not outdated, each of its sectors another one: the order of requests
//! in flight at the same time is nobody's promise. An acknowledged write is outdated for ever, so it
//! must never come back, however late a request is replayed.
//!
//! ```text
//!   A ├──────────────┤                     legal at the end: B and C (they overlap each other),
//!   B        ├────────────────────┤        not A (C began after A had ended)
//!   C                    ├────┤
//!     ───────────────────────────────────► ticks, taken before a request is issued and after
//!                                          it came back
//! ```

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

const IN_FLIGHT: u64 = u64::MAX;

/// The writes that a block may hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Those that were not outdated when this was asked for.
    pub seqs: Vec<u32>,
    /// Any that began since: those with a higher number.
    pub newest: u32,
    /// One of them was under way.
    pub in_flight: bool,
}

impl Allowed {
    /// Whether the block may hold this write.
    pub fn contains(&self, seq: u32) -> bool {
        seq > self.newest || self.seqs.contains(&seq)
    }
}

#[derive(Debug)]
struct Write {
    seq: u32,
    begun: u64,
    ended: u64,
}

#[derive(Debug, Default)]
struct Block {
    newest: u32,
    /// Tick at which the youngest acknowledged write began; 0 = none was acknowledged.
    outdates_before: u64,
    /// The writes that are not outdated.
    writes: Vec<Write>,
}

/// The histories of all blocks.
#[derive(Debug)]
pub struct Histories {
    blocks: Box<[Mutex<Block>]>,
    ticks: AtomicU64,
}

impl Histories {
    /// Nothing was written yet.
    pub fn new(blocks: usize) -> Self {
        Self { blocks: (0..blocks).map(|_| Mutex::default()).collect(), ticks: AtomicU64::new(1) }
    }

    fn with<T>(&self, block: usize, change: impl FnOnce(&mut Block, u64) -> T) -> T {
        let mut block = self.blocks[block].lock().expect("a thread that panics ends the probe");
        change(&mut block, self.ticks.fetch_add(1, Ordering::AcqRel))
    }

    /// A write is about to be issued; gives its number.
    pub fn begin(&self, block: usize) -> u32 {
        self.with(block, |block, now| {
            block.newest += 1;
            block.writes.push(Write { seq: block.newest, begun: now, ended: IN_FLIGHT });
            block.newest
        })
    }

    /// A write came back. One that failed may have reached the disk, but outdates nothing.
    pub fn end(&self, block: usize, seq: u32, acked: bool) {
        self.with(block, |block, now| {
            let Some(write) = block.writes.iter_mut().find(|write| write.seq == seq) else {
                return;
            };
            write.ended = now;
            if acked {
                block.outdates_before = block.outdates_before.max(write.begun);
            }
            let limit = block.outdates_before;
            block.writes.retain(|write| write.ended > limit);
        });
    }

    /// The writes that the block may hold from now on, and whether any was ever acknowledged: if
    /// not, it may hold anything that was there before.
    pub fn allowed(&self, block: usize) -> (Allowed, bool) {
        self.with(block, |block, _| {
            let seqs = block.writes.iter().map(|write| write.seq).collect();
            let in_flight = block.writes.iter().any(|write| write.ended == IN_FLIGHT);
            (Allowed { seqs, newest: block.newest, in_flight }, block.outdates_before > 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seqs(histories: &Histories) -> Vec<u32> {
        histories.allowed(0).0.seqs
    }

    #[test]
    fn the_drawing_above() {
        let histories = Histories::new(1);
        let a = histories.begin(0);
        assert!(!histories.allowed(0).1);
        let b = histories.begin(0);
        histories.end(0, a, true);
        assert!(histories.allowed(0).1);
        assert_eq!(seqs(&histories), [a, b]);
        let c = histories.begin(0);
        assert_eq!(seqs(&histories), [a, b, c]);
        histories.end(0, c, true);
        assert_eq!(seqs(&histories), [b, c]);
        assert!(histories.allowed(0).0.in_flight);
        histories.end(0, b, true);
        assert_eq!(seqs(&histories), [b, c]);
        let (allowed, _) = histories.allowed(0);
        assert!(!allowed.in_flight);
        assert!(!allowed.contains(a));
        assert!(allowed.contains(c + 1), "a write that begins during a read may be seen by it");
    }

    #[test]
    fn one_after_the_other_leaves_the_last() {
        let histories = Histories::new(1);
        for _ in 0..5 {
            let seq = histories.begin(0);
            histories.end(0, seq, true);
        }
        assert_eq!(seqs(&histories), [5]);
    }

    #[test]
    fn a_failed_write_outdates_nothing_and_is_outdated_itself() {
        let histories = Histories::new(1);
        for (acked, left) in [(true, vec![1]), (false, vec![1, 2]), (true, vec![3])] {
            let seq = histories.begin(0);
            histories.end(0, seq, acked);
            assert_eq!(seqs(&histories), left);
        }
    }

    #[test]
    fn a_write_that_never_comes_back_stays_possible() {
        let histories = Histories::new(1);
        let hung = histories.begin(0);
        for _ in 0..3 {
            let seq = histories.begin(0);
            histories.end(0, seq, true);
        }
        assert_eq!(seqs(&histories), [hung, 4]);
    }
}
