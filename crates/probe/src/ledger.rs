//! The ledger: what the writers know about each block, one atomic word a block.
//!
//! ```text
//!   bit 63..33  acked      newest acknowledged write (0 = none)
//!   bit 32      reported   this block was already counted as wrong
//!   bit 31..0   attempted  newest write that was tried
//! ```
//!
//! One lane owns a block and is the only one to change its word while it runs. The words are atomic
//! so that the final verification can read those of a lane that never came back.

use std::sync::atomic::{AtomicU64, Ordering};

const REPORTED: u64 = 1 << 32;

/// What is known about one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Newest acknowledged write; 0 = none.
    pub acked: u32,
    /// Newest write that was tried.
    pub attempted: u32,
}

/// One entry for each block of the span.
#[derive(Debug)]
pub struct Ledger {
    /// Goes into each stamp, so that sequences of different ledgers are never confused.
    pub run: u32,
    words: Box<[AtomicU64]>,
}

impl Ledger {
    /// An empty ledger: nothing is known about any block.
    pub fn new(run: u32, blocks: usize) -> Self {
        Self { run, words: (0..blocks).map(|_| AtomicU64::new(0)).collect() }
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> usize {
        self.words.len()
    }

    /// What is known about `block`.
    pub fn entry(&self, block: usize) -> Entry {
        let word = self.words[block].load(Ordering::Acquire);
        Entry { acked: (word >> 33) as u32, attempted: word as u32 }
    }

    /// Notes that a write is about to be issued, and gives its sequence number.
    pub fn begin(&self, block: usize) -> u32 {
        self.words[block].fetch_add(1, Ordering::AcqRel) as u32 + 1
    }

    /// Notes that write number `seq` was acknowledged: everything older is history.
    pub fn acknowledge(&self, block: usize, seq: u32) {
        self.words[block].store(u64::from(seq) << 33 | u64::from(seq), Ordering::Release);
    }

    /// Marks a block as counted; true if it was not yet. A later acknowledged write clears the mark.
    pub fn report(&self, block: usize) -> bool {
        self.words[block].fetch_or(REPORTED, Ordering::AcqRel) & REPORTED == 0
    }

    /// Clears all marks: a run that begins counts for itself.
    pub fn forget_reports(&self) {
        for word in &self.words {
            word.fetch_and(!REPORTED, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_both_states_open() {
        let ledger = Ledger::new(1, 4);
        assert_eq!(ledger.begin(2), 1);
        assert_eq!(ledger.entry(2), Entry { acked: 0, attempted: 1 });
        ledger.acknowledge(2, 1);
        assert_eq!(ledger.begin(2), 2);
        assert_eq!(ledger.begin(2), 3);
        assert_eq!(ledger.entry(2), Entry { acked: 1, attempted: 3 });
        ledger.acknowledge(2, 3);
        assert_eq!(ledger.entry(2), Entry { acked: 3, attempted: 3 });
        assert_eq!(ledger.entry(1), Entry::default());
    }

    #[test]
    fn a_wrong_block_is_reported_once_until_it_is_written_again() {
        let ledger = Ledger::new(1, 1);
        ledger.begin(0);
        ledger.acknowledge(0, 1);
        assert!(ledger.report(0));
        assert!(!ledger.report(0));
        let seq = ledger.begin(0);
        assert!(!ledger.report(0));
        ledger.acknowledge(0, seq);
        assert_eq!(ledger.entry(0), Entry { acked: 2, attempted: 2 });
        assert!(ledger.report(0));
    }
}
