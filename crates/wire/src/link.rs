//! What the link carries: bytes of batches that have arrived, over time.
//!
//! QEMU's own measure is of its stream, of which the wire carries a part: it says nothing of how
//! long pages take that are on no disk. This does, and errs to the careful side while the source has
//! less to send than the link could take.

use std::collections::VecDeque;
use std::time::Duration;

/// One measurement: shorter ones would see what queues take, not what the link carries.
const SPAN: Duration = Duration::from_millis(100);
/// How long the fastest counts.
const MEMORY: Duration = Duration::from_secs(10);

/// The source's measure of its link. Time is a value: since any moment, never backwards.
#[derive(Clone, Debug, Default)]
pub struct LinkRate {
    sent: u64,
    /// Of each batch under way: all charges up to it, and its bytes on the wire.
    under_way: VecDeque<(u64, u64)>,
    began: Option<Duration>,
    arrived: u64,
    /// Bytes a second, and when that was measured; the fastest first, then what came after it.
    rates: VecDeque<(u64, Duration)>,
}

impl LinkRate {
    /// A batch of this charge is being sent, in so many bytes.
    pub fn send(&mut self, charge: u64, wire_bytes: u64, now: Duration) {
        self.sent += charge;
        self.under_way.push_back((self.sent, wire_bytes));
        self.began.get_or_insert(now);
    }

    /// The number of a CREDIT.
    pub fn credit(&mut self, total: u64, now: Duration) {
        while let Some((_, bytes)) = self.under_way.front().filter(|(end, _)| *end <= total) {
            self.arrived += bytes;
            self.under_way.pop_front();
        }
        let Some(began) = self.began else { return };
        let took = now.saturating_sub(began);
        if took < SPAN {
            return;
        }
        let rate = self.arrived.saturating_mul(1_000_000) / took.as_micros().max(1) as u64;
        while self.rates.back().is_some_and(|&(known, _)| known <= rate) {
            self.rates.pop_back();
        }
        self.rates.push_back((rate, now));
        while self.rates.len() > 1 && self.rates[0].1 + MEMORY < now {
            self.rates.pop_front();
        }
        (self.began, self.arrived) = (Some(now), 0);
    }

    /// The fastest of late; none before the first measurement.
    pub fn bytes_per_second(&self) -> Option<u64> {
        self.rates.front().map(|&(rate, _)| rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_of_late_counts() {
        let mut link = LinkRate::default();
        let at = Duration::from_millis;
        let mut total = 0;
        let mut carry = |link: &mut LinkRate, wire: u64, from: u64, to: u64| {
            for now in (from..to).step_by(10) {
                // References: the stream is longer than what is sent.
                link.send(500_000, wire, at(now));
                total += 500_000;
                link.credit(total, at(now + 10));
            }
        };
        carry(&mut link, 100_000, 0, 50);
        assert_eq!(link.bytes_per_second(), None);
        carry(&mut link, 100_000, 50, 400);
        assert_eq!(link.bytes_per_second(), Some(10_000_000));
        carry(&mut link, 1_000, 400, 8_000);
        assert_eq!(link.bytes_per_second(), Some(10_000_000));
        carry(&mut link, 1_000, 8_000, 11_000);
        assert_eq!(link.bytes_per_second(), Some(100_000));
    }
}
