//! Completions over time: a ring of 10 ms bins, and the gaps between completions.
//!
//! Both are fed by every writer thread and cost two atomic operations for each completion.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Width of one bin.
pub const BIN_NS: u64 = 10_000_000;
/// Ten minutes of bins.
pub const BINS: u64 = 60_000;
/// The shortest interval without a completion that is recorded.
pub const GAP_NS: u64 = 2_000_000;
const GAPS_KEPT: usize = 100_000;

/// The ring: each word holds the bin's number (high 32 bits) and its count (low 32 bits).
///
/// A bin's number is its absolute time divided by [`BIN_NS`], modulo 2^32, so a word left over from
/// the previous turn of the ring is recognised and replaced.
#[derive(Debug)]
pub struct Timeline {
    words: Box<[AtomicU64]>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { words: (0..BINS).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl Timeline {
    /// Counts one completion.
    pub fn record(&self, now_ns: u64) {
        let bin = now_ns / BIN_NS;
        let tag = bin << 32;
        let word = &self.words[(bin % BINS) as usize];
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            let next = if seen & !0xffff_ffff == tag { seen + 1 } else { tag | 1 };
            match word.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return,
                Err(other) => seen = other,
            }
        }
    }

    /// The counts from the bin of `since_ns` to the bin of `now_ns`, both included, and the start
    /// of the first one; at most the ring's ten minutes.
    pub fn counts(&self, since_ns: u64, now_ns: u64) -> (u64, Vec<u32>) {
        let last = now_ns / BIN_NS;
        let first = (since_ns / BIN_NS).max((last + 1).saturating_sub(BINS));
        let counts = (first..=last).map(|bin| {
            let word = self.words[(bin % BINS) as usize].load(Ordering::Relaxed);
            if word & !0xffff_ffff == bin << 32 { word as u32 } else { 0 }
        });
        (first * BIN_NS, counts.collect())
    }
}

/// Intervals longer than [`GAP_NS`] between two consecutive completions of all writers.
#[derive(Debug, Default)]
pub struct Gaps {
    /// Time of the newest completion; 0 = the writers do not run.
    newest_ns: AtomicU64,
    recorded: Mutex<VecDeque<(u64, u64)>>,
    forgotten: AtomicU64,
}

impl Gaps {
    /// The writers start: the first gap begins here.
    pub fn start(&self, now_ns: u64) {
        self.newest_ns.store(now_ns, Ordering::Relaxed);
    }

    /// The writers stop: the time until the next start is no gap.
    pub fn stop(&self) {
        self.newest_ns.store(0, Ordering::Relaxed);
    }

    /// Notes one completion. Of several threads, the one that moves the newest time across the gap
    /// records it.
    pub fn record(&self, now_ns: u64) {
        let previous = self.newest_ns.fetch_max(now_ns, Ordering::Relaxed);
        if previous != 0 && now_ns > previous + GAP_NS {
            let mut recorded = self.recorded.lock().expect("no thread panics with the gaps");
            if recorded.len() == GAPS_KEPT {
                recorded.pop_front();
                self.forgotten.fetch_add(1, Ordering::Relaxed);
            }
            recorded.push_back((previous, now_ns));
        }
    }

    /// The gaps that ended after `since_ns`, oldest first, and how many were forgotten in all.
    pub fn since(&self, since_ns: u64) -> (Vec<(u64, u64)>, u64) {
        let recorded = self.recorded.lock().expect("no thread panics with the gaps");
        let gaps = recorded.iter().filter(|(_, end)| *end > since_ns).copied().collect();
        (gaps, self.forgotten.load(Ordering::Relaxed))
    }

    /// The start of the gap that is still open, if one is.
    pub fn open_since(&self, now_ns: u64) -> Option<u64> {
        let newest = self.newest_ns.load(Ordering::Relaxed);
        (newest != 0 && now_ns > newest + GAP_NS).then_some(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_fall_into_their_bins() {
        let timeline = Timeline::default();
        let start = 7 * BIN_NS;
        for offset in [0, 1, BIN_NS - 1, BIN_NS, 3 * BIN_NS] {
            timeline.record(start + offset);
        }
        assert_eq!(timeline.counts(start + 5, start + 4 * BIN_NS), (start, vec![3, 1, 0, 1, 0]));
    }

    #[test]
    fn the_ring_forgets_after_ten_minutes() {
        let timeline = Timeline::default();
        timeline.record(5 * BIN_NS);
        timeline.record((5 + BINS) * BIN_NS);
        let (start, counts) = timeline.counts(0, (6 + BINS) * BIN_NS);
        assert_eq!(start, 7 * BIN_NS);
        assert_eq!(counts.len() as u64, BINS);
        assert_eq!(counts.iter().sum::<u32>(), 1);
        assert_eq!(counts[counts.len() - 2], 1);
    }

    #[test]
    fn threads_lose_no_count() {
        let timeline = Timeline::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20_000u64).for_each(|n| timeline.record(n * 10_000)));
            }
        });
        let (_, counts) = timeline.counts(0, 20_000 * 10_000);
        assert_eq!(counts.iter().sum::<u32>(), 80_000);
    }

    #[test]
    fn a_gap_is_recorded_once() {
        let gaps = Gaps::default();
        gaps.start(1_000_000);
        gaps.record(2_000_000);
        gaps.record(5_000_001);
        gaps.record(4_000_000);
        gaps.record(5_500_000);
        assert_eq!(gaps.since(0), (vec![(2_000_000, 5_000_001)], 0));
        assert_eq!(gaps.since(5_000_001).0, vec![]);
        assert_eq!(gaps.open_since(6_000_000), None);
        assert_eq!(gaps.open_since(9_000_000), Some(5_500_000));
    }

    #[test]
    fn the_time_between_stop_and_start_is_no_gap() {
        let gaps = Gaps::default();
        gaps.start(1_000_000);
        gaps.stop();
        assert_eq!(gaps.open_since(900_000_000), None);
        gaps.start(500_000_000);
        gaps.record(501_000_000);
        assert_eq!(gaps.since(0).0, vec![]);
    }

    #[test]
    fn of_many_threads_one_records_the_gap() {
        let gaps = Gaps::default();
        gaps.start(1);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let gaps = &gaps;
                scope.spawn(move || gaps.record(10_000_000 + thread));
            }
        });
        assert_eq!(gaps.since(0).0.len(), 1);
    }
}
