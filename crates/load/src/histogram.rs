//! A log-linear histogram of latencies: constant memory, no allocation on the hot path.
//!
//! Each power of two is cut into `SUB` equal parts, so a reported value is off by at most
//! 1 / (2 * SUB) of itself (1.6 %). Values are nanoseconds; what exceeds the range is counted in
//! the last bucket, and the maximum is kept exactly.

/// Parts of one power of two.
const SUB: usize = 1 << SUB_BITS;
const SUB_BITS: u32 = 5;
/// 2^40 ns are 18 minutes.
const MAX_BITS: u32 = 40;
const BUCKETS: usize = SUB * (MAX_BITS - SUB_BITS + 1) as usize;

/// Counts of latencies in nanoseconds.
#[derive(Clone)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    total: u64,
    sum: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: Box::new([0; BUCKETS]), total: 0, sum: 0, max: 0 }
    }
}

/// The bucket of a value: below `SUB` one for each value, above it `SUB` for each power of two.
fn bucket(value: u64) -> usize {
    if value < SUB as u64 {
        return value as usize;
    }
    let exponent = value.ilog2();
    if exponent >= MAX_BITS {
        return BUCKETS - 1;
    }
    let shift = exponent - SUB_BITS;
    (shift as usize + 1) * SUB + ((value >> shift) as usize - SUB)
}

/// The lowest value of a bucket and its width.
fn bounds(index: usize) -> (u64, u64) {
    if index < SUB {
        return (index as u64, 1);
    }
    let shift = index / SUB - 1;
    (((index % SUB + SUB) as u64) << shift, 1 << shift)
}

impl Histogram {
    /// Adds one value.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.total += 1;
        self.sum = self.sum.wrapping_add(value);
        self.max = self.max.max(value);
    }

    /// Adds all values of another histogram.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts.iter()) {
            *mine += theirs;
        }
        self.total += other.total;
        self.sum = self.sum.wrapping_add(other.sum);
        self.max = self.max.max(other.max);
    }

    /// How many values there are.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The largest value, exact; 0 without values.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The arithmetic mean, exact; 0 without values.
    pub fn mean(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.sum as f64 / self.total as f64 }
    }

    /// The value below or at which the fraction `quantile` (0..=1) of all values lies: the middle
    /// of its bucket, never above the maximum; 0 without values.
    pub fn quantile(&self, quantile: f64) -> u64 {
        let rank = ((quantile * self.total as f64).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                let (low, width) = bounds(index);
                return (low + width / 2).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn empty_histogram_has_zeros() {
        let empty = Histogram::default();
        assert_eq!((empty.total(), empty.max(), empty.quantile(0.5)), (0, 0, 0));
        assert_eq!(empty.mean(), 0.0);
    }

    #[test]
    fn buckets_are_adjacent_and_cover_the_range() {
        let mut expected = 0;
        for index in 0..BUCKETS {
            let (low, width) = bounds(index);
            assert_eq!(low, expected);
            assert_eq!(bucket(low), index);
            assert_eq!(bucket(low + width - 1), index);
            expected = low + width;
        }
        assert_eq!(expected, 1 << MAX_BITS);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_a_ramp() {
        let mut histogram = Histogram::default();
        (1..=100_000).for_each(|value| histogram.record(value));
        for (quantile, exact) in [(0.0, 1.0), (0.5, 50_000.0), (0.99, 99_000.0), (1.0, 100_000.0)] {
            let found = histogram.quantile(quantile) as f64;
            assert!((found - exact).abs() <= exact * 0.017 + 1.0, "{quantile}: {found}");
        }
        assert_eq!(histogram.mean(), 50_000.5);
    }

    proptest! {
        #[test]
        fn a_value_is_reported_within_its_precision(value in 0u64..1 << MAX_BITS) {
            let (low, width) = bounds(bucket(value));
            prop_assert!(low <= value && value < low + width);
            prop_assert!(width == 1 || (width as f64) <= low as f64 / SUB as f64);
        }

        #[test]
        fn merge_equals_recording_everything_in_one(
            left in proptest::collection::vec(0u64..u64::MAX >> 20, 0..200),
            right in proptest::collection::vec(0u64..u64::MAX >> 20, 0..200),
        ) {
            let (mut one, mut two, mut all) =
                (Histogram::default(), Histogram::default(), Histogram::default());
            left.iter().for_each(|&value| { one.record(value); all.record(value); });
            right.iter().for_each(|&value| { two.record(value); all.record(value); });
            one.merge(&two);
            prop_assert_eq!(one.counts, all.counts);
            prop_assert_eq!((one.total, one.sum, one.max), (all.total, all.sum, all.max));
        }
    }
}
