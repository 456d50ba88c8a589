//! A log-linear histogram of latencies: constant memory, no allocation when a value is counted.
//!
//! Each power of two is cut into `1 << bits` equal parts, so a reported value is off by at most half
//! a part: 1.6 % with the default of 5 bits (9 KiB), 12.5 % with 2 (1.2 KiB). Values are nanoseconds;
//! what exceeds the range is counted in the last bucket, and the maximum is kept exactly.
//!
//! All that is counted for each power of two can be told as well ([`Histogram::octaves`]), exactly:
//! a reader with buckets of its own, as Prometheus is, can merge those of any histograms.

use std::sync::atomic::{AtomicU64, Ordering};

const BITS: u32 = 5;
/// 2^40 ns are 18 minutes.
const MAX_BITS: u32 = 40;

/// Counts of latencies in nanoseconds.
#[derive(Debug)]
pub struct Histogram {
    bits: u32,
    counts: Box<[AtomicU64]>,
    total: AtomicU64,
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new(BITS)
    }
}

/// The bucket of a value: below `1 << bits` one for each value, above it so many for each power of two.
fn bucket(bits: u32, value: u64) -> usize {
    if value < 1 << bits {
        return value as usize;
    }
    let exponent = value.ilog2();
    if exponent >= MAX_BITS {
        return buckets(bits) - 1;
    }
    let shift = exponent - bits;
    ((shift as usize + 1) << bits) + ((value >> shift) as usize - (1 << bits))
}

/// The lowest value of a bucket and its width.
fn bounds(bits: u32, index: usize) -> (u64, u64) {
    let parts = 1 << bits;
    if index < parts {
        return (index as u64, 1);
    }
    let shift = index / parts - 1;
    (((index % parts + parts) as u64) << shift, 1 << shift)
}

fn buckets(bits: u32) -> usize {
    ((MAX_BITS - bits + 1) as usize) << bits
}

/// Adds to a counter of which this thread is the only writer.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl Histogram {
    /// One whose powers of two are cut into `1 << bits` parts.
    ///
    /// # Panics
    /// With more than 16 bits.
    pub fn new(bits: u32) -> Self {
        assert!(bits <= 16);
        let counts = (0..buckets(bits)).map(|_| AtomicU64::new(0)).collect();
        let [total, sum, max] = [0; 3].map(AtomicU64::new);
        Self { bits, counts, total, sum, max }
    }

    /// Adds one value; any thread may.
    #[inline]
    pub fn record(&self, value: u64) {
        self.counts[bucket(self.bits, value)].fetch_add(1, Ordering::Relaxed);
        self.total.fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
        self.max.fetch_max(value, Ordering::Relaxed);
    }

    /// Adds one value, of the only thread that adds values.
    #[inline]
    pub fn record_alone(&self, value: u64) {
        add(&self.counts[bucket(self.bits, value)], 1);
        add(&self.total, 1);
        add(&self.sum, value);
        if value > self.max() {
            self.max.store(value, Ordering::Relaxed);
        }
    }

    /// Adds all values of another histogram with as many parts.
    pub fn merge(&self, other: &Self) {
        debug_assert_eq!(self.bits, other.bits);
        for (mine, theirs) in self.counts.iter().zip(other.counts.iter()) {
            mine.fetch_add(theirs.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.total.fetch_add(other.total(), Ordering::Relaxed);
        self.sum.fetch_add(other.sum(), Ordering::Relaxed);
        self.max.fetch_max(other.max(), Ordering::Relaxed);
    }

    /// How many values there are.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// All values, added up.
    pub fn sum(&self) -> u64 {
        self.sum.load(Ordering::Relaxed)
    }

    /// The largest value, exact; 0 without values.
    pub fn max(&self) -> u64 {
        self.max.load(Ordering::Relaxed)
    }

    /// The arithmetic mean, exact; 0 without values.
    pub fn mean(&self) -> f64 {
        if self.total() == 0 { 0.0 } else { self.sum() as f64 / self.total() as f64 }
    }

    /// The value below or at which the fraction `quantile` (0..=1) of all values lies: the middle
    /// of its bucket, never above the maximum; 0 without values.
    pub fn quantile(&self, quantile: f64) -> u64 {
        let total = self.total();
        let rank = ((quantile * total as f64).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count.load(Ordering::Relaxed);
            if seen >= rank {
                let (low, width) = bounds(self.bits, index);
                return (low + width / 2).min(self.max());
            }
        }
        self.max()
    }

    /// How many values lie in each power of two: below 2, from 2 to 3, from 4 to 7 …, up to the
    /// last that has any; one at least.
    pub fn octaves(&self) -> Vec<u64> {
        let mut octaves = vec![0; MAX_BITS as usize];
        for (index, count) in self.counts.iter().enumerate() {
            let (low, _) = bounds(self.bits, index);
            octaves[low.max(1).ilog2() as usize] += count.load(Ordering::Relaxed);
        }
        let used = octaves.iter().rposition(|&count| count > 0).map_or(1, |last| last + 1);
        octaves.truncate(used);
        octaves
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(values: &[u64]) -> Histogram {
        let histogram = Histogram::default();
        values.iter().for_each(|&value| histogram.record_alone(value));
        histogram
    }

    fn contents(histogram: &Histogram) -> (Vec<u64>, u64, u64, u64) {
        let counts = histogram.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        (counts, histogram.total(), histogram.sum(), histogram.max())
    }

    #[test]
    fn empty_histogram_has_zeros() {
        let empty = Histogram::default();
        assert_eq!((empty.total(), empty.max(), empty.quantile(0.5)), (0, 0, 0));
        assert_eq!((empty.mean(), empty.octaves()), (0.0, vec![0]));
    }

    #[test]
    fn buckets_are_adjacent_and_cover_the_range() {
        for bits in [0, 2, BITS] {
            let mut expected = 0;
            for index in 0..buckets(bits) {
                let (low, width) = bounds(bits, index);
                assert_eq!(low, expected);
                assert_eq!(bucket(bits, low), index);
                assert_eq!(bucket(bits, low + width - 1), index);
                expected = low + width;
            }
            assert_eq!(expected, 1 << MAX_BITS);
            assert_eq!(bucket(bits, u64::MAX), buckets(bits) - 1);
        }
    }

    #[test]
    fn quantiles_of_a_ramp() {
        let histogram = of(&(1..=100_000).collect::<Vec<_>>());
        for (quantile, exact) in [(0.0, 1.0), (0.5, 50_000.0), (0.99, 99_000.0), (1.0, 100_000.0)] {
            let found = histogram.quantile(quantile) as f64;
            assert!((found - exact).abs() <= exact * 0.017 + 1.0, "{quantile}: {found}");
        }
        assert_eq!(histogram.mean(), 50_000.5);
    }

    #[test]
    fn octaves_are_exact() {
        assert_eq!(of(&[0, 1, 2, 3, 4, 1023, 1024]).octaves(), [2, 2, 1, 0, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(of(&[u64::MAX]).octaves().len(), MAX_BITS as usize);
    }

    proptest! {
        #[test]
        fn a_value_is_reported_within_its_precision(value in 0u64..1 << MAX_BITS) {
            let (low, width) = bounds(BITS, bucket(BITS, value));
            prop_assert!(low <= value && value < low + width);
            prop_assert!(width == 1 || (width as f64) <= low as f64 / (1 << BITS) as f64);
        }

        #[test]
        fn quantiles_are_close(mut values in prop::collection::vec(0u64..1 << 39, 1..500), quantile in 0.0f64..=1.0) {
            let histogram = of(&values);
            values.sort_unstable();
            let rank = ((values.len() as f64 * quantile).ceil() as usize).max(1) - 1;
            let (exact, told) = (values[rank], histogram.quantile(quantile));
            prop_assert!(told.abs_diff(exact) <= exact >> BITS, "{} for {}", told, exact);
            prop_assert_eq!(histogram.max(), *values.last().unwrap());
            let octaves = histogram.octaves();
            prop_assert_eq!(octaves.iter().sum::<u64>(), values.len() as u64);
        }

        #[test]
        fn merge_equals_recording_everything_in_one(
            left in prop::collection::vec(0u64..u64::MAX >> 20, 0..200),
            right in prop::collection::vec(0u64..u64::MAX >> 20, 0..200),
        ) {
            let one = of(&left);
            one.merge(&of(&right));
            prop_assert_eq!(contents(&one), contents(&of(&[left, right].concat())));
        }

        #[test]
        fn many_threads_count_as_one_does(values in prop::collection::vec(0u64..u64::MAX >> 20, 0..200)) {
            let shared = Histogram::default();
            std::thread::scope(|scope| for part in values.chunks(50) {
                scope.spawn(|| part.iter().for_each(|&value| shared.record(value)));
            });
            prop_assert_eq!(contents(&shared), contents(&of(&values)));
        }
    }
}
