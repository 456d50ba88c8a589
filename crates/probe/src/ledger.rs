//! The ledger: what the writers know about each block, one atomic word a block.
//!
//! ```text
//!   bit 63..33  acked      newest acknowledged write (0 = none)
//!   bit 32      reported   this block was already counted as wrong
//!   bit 31..0   attempted  newest write that was tried
//! ```
//!
//! One lane owns a block and is the only one to write it. The words are atomic so that the final
//! verification can read those of a lane that never came back. In mode `overlap` nobody owns a block:
//! then its [history](crate::history) says what it may hold, and `acked` is only known to be
//! zero or not.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::history::{Allowed, Histories};

const REPORTED: u64 = 1 << 32;

/// What is known about one block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Newest acknowledged write; 0 = none.
    pub acked: u32,
    /// Newest write that was tried.
    pub attempted: u32,
    /// Where writes overlap: exactly which ones the block may hold.
    pub allowed: Option<Allowed>,
}

impl Entry {
    /// Whether a write may have been under way between this entry and a later one of the same
    /// block. A read in the meantime may have seen half a sector of it, which is nobody's fault.
    pub fn is_disturbed(&self, later: &Self) -> bool {
        let in_flight = self.allowed.as_ref().is_some_and(|allowed| allowed.in_flight);
        in_flight || self.attempted != later.attempted
    }
}

/// One entry for each block of the span.
#[derive(Debug)]
pub struct Ledger {
    /// Goes into each stamp, so that sequences of different ledgers are never confused.
    pub run: u32,
    words: Box<[AtomicU64]>,
    histories: Option<Histories>,
}

impl Ledger {
    /// An empty ledger: nothing is known about any block.
    pub fn new(run: u32, blocks: usize, overlap: bool) -> Self {
        let words = (0..blocks).map(|_| AtomicU64::new(0)).collect();
        Self { run, words, histories: overlap.then(|| Histories::new(blocks)) }
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> usize {
        self.words.len()
    }

    /// What is known about `block`.
    pub fn entry(&self, block: usize) -> Entry {
        if let Some(histories) = &self.histories {
            let (allowed, known) = histories.allowed(block);
            let entry = Entry { acked: u32::from(known), attempted: allowed.newest, allowed: None };
            return Entry { allowed: Some(allowed), ..entry };
        }
        let word = self.words[block].load(Ordering::Acquire);
        Entry { acked: (word >> 33) as u32, attempted: word as u32, allowed: None }
    }

    /// Notes that a write is about to be issued, and gives its sequence number.
    pub fn begin(&self, block: usize) -> u32 {
        match &self.histories {
            Some(histories) => histories.begin(block),
            None => self.words[block].fetch_add(1, Ordering::AcqRel) as u32 + 1,
        }
    }

    /// Notes that write number `seq` came back. If it was acknowledged, everything older is history;
    /// if it failed, both states stay open.
    pub fn end(&self, block: usize, seq: u32, acked: bool) {
        if let Some(histories) = &self.histories {
            histories.end(block, seq, acked);
            if acked {
                self.words[block].store(0, Ordering::Release);
            }
        } else if acked {
            self.words[block].store(u64::from(seq) << 33 | u64::from(seq), Ordering::Release);
        }
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

    fn pair(ledger: &Ledger, block: usize) -> (u32, u32) {
        let entry = ledger.entry(block);
        (entry.acked, entry.attempted)
    }

    #[test]
    fn a_failed_write_leaves_both_states_open() {
        let ledger = Ledger::new(1, 4, false);
        assert_eq!(ledger.begin(2), 1);
        assert_eq!(pair(&ledger, 2), (0, 1));
        ledger.end(2, 1, true);
        assert_eq!(ledger.begin(2), 2);
        ledger.end(2, 2, false);
        assert_eq!(ledger.begin(2), 3);
        assert_eq!(pair(&ledger, 2), (1, 3));
        ledger.end(2, 3, true);
        assert_eq!(pair(&ledger, 2), (3, 3));
        assert_eq!(pair(&ledger, 1), (0, 0));
    }

    #[test]
    fn a_wrong_block_is_reported_once_until_it_is_written_again() {
        for overlap in [false, true] {
            let ledger = Ledger::new(1, 1, overlap);
            let first = ledger.begin(0);
            ledger.end(0, first, true);
            assert!(ledger.report(0));
            assert!(!ledger.report(0));
            let seq = ledger.begin(0);
            assert!(!ledger.report(0));
            ledger.end(0, seq, true);
            assert_eq!(pair(&ledger, 0), (if overlap { 1 } else { 2 }, 2));
            assert!(ledger.report(0));
            ledger.forget_reports();
            assert!(ledger.report(0));
            assert_eq!(ledger.entry(0).attempted, 2);
        }
    }
}
