//! Completions over time: what a backend does in its first moments, and after another one's death.

use serde::Serialize;

/// Intervals at most; what comes later is counted in the last.
const MOST: usize = 100_000;

/// How many requests were complete in each interval, and the longest time without any.
#[derive(Clone, Debug, Default)]
pub struct Series {
    interval_ns: u64,
    counts: Vec<u64>,
    last_ns: u64,
    /// Its length and its end.
    gap_ns: (u64, u64),
}

/// The series as it is printed.
#[derive(Debug, Serialize)]
pub struct Told {
    /// When the first interval began, by CLOCK_MONOTONIC.
    started_ns: u64,
    interval_ms: u64,
    completed: Vec<u64>,
    /// The longest time without a completion, of one queue.
    gap_ms: f64,
    /// When that ended.
    gap_end_ms: f64,
}

impl Series {
    /// Nothing yet, in intervals of this length.
    pub fn new(interval_ns: u64) -> Self {
        Self { interval_ns: interval_ns.max(1), ..Self::default() }
    }

    /// A request was complete at `now`, counted from the start of the load.
    #[inline]
    pub fn record(&mut self, now: u64) {
        let place = ((now / self.interval_ns) as usize).min(MOST - 1);
        if place >= self.counts.len() {
            self.counts.resize(place + 1, 0);
        }
        self.counts[place] += 1;
        // Before the first completion the backend starts, which is no gap.
        if self.last_ns > 0 {
            self.gap_ns = self.gap_ns.max((now.saturating_sub(self.last_ns), now));
        }
        self.last_ns = now;
    }

    /// Adds what happened on another queue.
    pub fn merge(&mut self, other: &Self) {
        self.interval_ns = self.interval_ns.max(other.interval_ns);
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        self.counts.iter_mut().zip(&other.counts).for_each(|(sum, count)| *sum += count);
        self.gap_ns = self.gap_ns.max(other.gap_ns);
    }

    /// For the report.
    pub fn told(&self, started_ns: u64) -> Told {
        let ms = |ns: u64| (ns / 1000) as f64 / 1e3;
        Told {
            started_ns,
            interval_ms: self.interval_ns / 1_000_000,
            completed: self.counts.clone(),
            gap_ms: ms(self.gap_ns.0),
            gap_end_ms: ms(self.gap_ns.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_are_counted_where_they_fall_and_the_longest_gap_is_told() {
        let (mut one, mut other) = (Series::new(10_000_000), Series::new(10_000_000));
        [3, 9, 31].iter().for_each(|ms| one.record(ms * 1_000_000));
        [8, 12].iter().for_each(|ms| other.record(ms * 1_000_000));
        one.merge(&other);
        let told = one.told(0);
        assert_eq!(told.completed, [3, 1, 0, 1]);
        assert_eq!((told.interval_ms, told.gap_ms, told.gap_end_ms), (10, 22.0, 31.0));
        one.record(u64::MAX);
        assert_eq!(one.told(0).completed.len(), MOST, "a clock that runs wild takes no memory");
    }
}
