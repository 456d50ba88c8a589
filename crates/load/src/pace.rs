//! Requests at a given rate, whether or not the backend keeps up: an open loop.
//!
//! Arrivals are those of many independent users: the time between two is distributed exponentially.
//! A request that arrives while all slots are taken waits, and its latency counts from its arrival;
//! measured from when it could be issued, a slow backend would look better than it is.

use crate::offsets::Random;

/// The arrivals of one lane, and the slots that are free for them.
pub struct Pace {
    interval_ns: f64,
    random: Random,
    next_ns: u64,
    /// Slots without a request.
    pub free: Vec<u16>,
}

impl Pace {
    /// One arrival in `interval_ns` on average, from time 0 on.
    pub fn new(interval_ns: f64, random: Random) -> Self {
        Self { interval_ns, random, next_ns: 0, free: Vec::new() }
    }

    /// Nothing that would have arrived before `now` does.
    pub fn begin(&mut self, now: u64) {
        self.next_ns = now;
        self.step();
    }

    /// The instant of the next arrival, if it is not after `now`; a slot must be free for it.
    pub fn take(&mut self, now: u64) -> Option<(u16, u64)> {
        if self.next_ns > now {
            return None;
        }
        let slot = self.free.pop()?;
        let at = self.next_ns;
        self.step();
        Some((slot, at))
    }

    /// Nanoseconds from `now` until a request can be issued; `None`: not before a completion.
    pub fn wait_ns(&self, now: u64) -> Option<u64> {
        (!self.free.is_empty()).then(|| self.next_ns.saturating_sub(now))
    }

    fn step(&mut self) {
        // In (0, 1]: the logarithm of zero is not a time.
        let uniform = ((self.random.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        self.next_ns += (-uniform.ln() * self.interval_ns) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_come_at_the_rate() {
        let mut pace = Pace::new(1000.0, Random::new(1));
        pace.free.push(0);
        pace.begin(5_000);
        let mut count = 0;
        while let Some((slot, at)) = pace.take(10_005_000) {
            assert!((5_000..=10_005_000).contains(&at));
            pace.free.push(slot);
            count += 1;
        }
        assert!((9_500..10_500).contains(&count), "{count} arrivals instead of 10,000");
        assert!(pace.wait_ns(10_005_000).is_some_and(|wait| wait > 0));
    }

    #[test]
    fn arrivals_without_a_slot_wait_and_keep_their_time() {
        let mut pace = Pace::new(1000.0, Random::new(2));
        pace.begin(0);
        assert_eq!(pace.take(1_000_000), None);
        assert_eq!(pace.wait_ns(1_000_000), None);
        pace.free.push(7);
        let (slot, at) = pace.take(1_000_000).unwrap();
        assert_eq!(slot, 7);
        assert!(at < 100_000, "it arrived long ago");
    }
}
