//! A log-linear histogram of latencies: 16 steps for each power of two, so at most 6 % off.

use std::sync::atomic::{AtomicU64, Ordering};

const STEPS: u64 = 16;
const STEP_BITS: u32 = STEPS.trailing_zeros();
const BUCKETS: usize = ((64 - STEP_BITS + 1) * STEPS as u32) as usize;

/// Counts values (nanoseconds); any thread may record.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self { buckets, max: AtomicU64::new(0) }
    }
}

fn bucket_of(value: u64) -> usize {
    if value < STEPS {
        return value as usize;
    }
    let shift = value.ilog2() - STEP_BITS;
    ((u64::from(shift) + 1) * STEPS + (value >> shift) - STEPS) as usize
}

/// The largest value that falls into a bucket.
fn upper_edge(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket;
    }
    let shift = (bucket / STEPS - 1) as u32;
    let next = u128::from(bucket % STEPS + STEPS + 1) << shift;
    (next - 1) as u64
}

impl Histogram {
    /// Counts one value.
    pub fn record(&self, value: u64) {
        self.buckets[bucket_of(value)].fetch_add(1, Ordering::Relaxed);
        self.max.fetch_max(value, Ordering::Relaxed);
    }

    /// The largest value, exactly.
    pub fn max(&self) -> u64 {
        self.max.load(Ordering::Relaxed)
    }

    /// The value that a share of `quantile` (0 to 1) of all values does not exceed; 0 if empty.
    pub fn quantile(&self, quantile: f64) -> u64 {
        let counts: Vec<u64> =
            self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let wanted = (total as f64 * quantile).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper_edge(bucket).min(self.max());
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_value_lies_in_its_bucket(value: u64) {
            let bucket = bucket_of(value);
            prop_assert!(bucket < BUCKETS);
            prop_assert!(value <= upper_edge(bucket));
            prop_assert!(bucket == 0 || value > upper_edge(bucket - 1));
            prop_assert!(upper_edge(bucket) - value <= value / STEPS);
        }

        #[test]
        fn quantiles_are_close(mut values in prop::collection::vec(0u64..1 << 40, 1..500), quantile in 0.0f64..=1.0) {
            let histogram = Histogram::default();
            values.iter().for_each(|value| histogram.record(*value));
            values.sort_unstable();
            let rank = ((values.len() as f64 * quantile).ceil() as usize).max(1) - 1;
            let (exact, told) = (values[rank], histogram.quantile(quantile));
            prop_assert!(told >= exact && told - exact <= exact / STEPS, "{} for {}", told, exact);
            prop_assert_eq!(histogram.max(), *values.last().unwrap());
        }
    }

    #[test]
    fn an_empty_histogram_says_zero() {
        assert_eq!(Histogram::default().quantile(0.5), 0);
    }
}
