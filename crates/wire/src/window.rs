//! How much of the stream may be under way: sent, and not yet taken by the other QEMU.
//!
//! What was agreed upon bounds memory. In force is usually less: what the way to the other QEMU
//! carries in its own time and some slack. More would only wait in queues; and QEMU, which measures
//! how fast its socket takes bytes, would think the way faster than it is, stop the guest too early,
//! and keep it stopped until the queues are empty.
//!
//! Most of the first pass nobody waits for: there the slack is large, so that the link has something
//! to carry whatever the machines are busy with. Where the guest may be stopped it is small
//! ([`Window::hurry`]).

use std::collections::VecDeque;
use std::time::Duration;

use crate::format::WireError;

/// How long what is under way may wait, beyond the time that the way itself takes.
const SLACK: Duration = Duration::from_millis(40);
/// The same in a hurry.
const HURRY: Duration = Duration::from_millis(4);
/// How long the fastest rate counts.
const MEMORY: Duration = Duration::from_millis(500);
/// The same in a hurry, at least: then it is four times the way's own time. A stream's next pages
/// may be of a kind that takes ten times as long, and the queue shall not be ten times as long then.
const HURRIED_MEMORY: Duration = Duration::from_millis(20);
/// In force at the beginning, and at least.
const LEAST: u64 = 4 << 20;
/// The same in a hurry: two full batches, one that is carried and one that is waited for.
const HURRIED_LEAST: u64 = 1 << 20;

/// One batch under way.
#[derive(Clone, Copy, Debug)]
struct Sent {
    /// All charges up to this one.
    end: u64,
    /// What was credited when it was sent.
    credited: u64,
    at: Duration,
}

/// The source's side of the window. Time is a value: since any moment, never backwards.
#[derive(Clone, Debug)]
pub struct Window {
    agreed: u64,
    limit: u64,
    sent: u64,
    credited: u64,
    under_way: VecDeque<Sent>,
    /// Shortest time from sending to credit.
    shortest: Duration,
    /// Bytes a second, and when that was measured; the fastest first, then what came after it.
    rates: VecDeque<(u64, Duration)>,
    hurry: bool,
}

impl Window {
    /// Of so many bytes at most.
    pub fn new(agreed: u64) -> Self {
        Self {
            agreed,
            limit: LEAST.min(agreed),
            sent: 0,
            credited: 0,
            under_way: VecDeque::new(),
            shortest: Duration::MAX,
            rates: VecDeque::new(),
            hurry: false,
        }
    }

    /// Bytes that were sent and not yet taken.
    pub fn under_way(&self) -> u64 {
        self.sent - self.credited
    }

    /// Whether a batch of this charge may be sent now: the limit is reached with it. With nothing
    /// under way one always may.
    pub fn has_room(&self, charge: u64) -> bool {
        let under_way = self.under_way();
        under_way == 0 || under_way < self.limit && under_way + charge <= self.agreed
    }

    /// It was.
    pub fn send(&mut self, charge: u64, now: Duration) {
        self.sent += charge;
        self.under_way.push_back(Sent { end: self.sent, credited: self.credited, at: now });
    }

    /// The number of a CREDIT.
    ///
    /// # Errors
    /// Less than before, or more than was sent.
    pub fn credit(&mut self, total: u64, now: Duration) -> Result<(), WireError> {
        if total < self.credited || total > self.sent {
            return Err(WireError::Protocol("credit for what was not sent"));
        }
        self.credited = total;
        let mut last = None;
        while let Some(sent) = self.under_way.front().filter(|sent| sent.end <= total) {
            last = Some(*sent);
            self.under_way.pop_front();
        }
        if let Some(sent) = last {
            self.learn(total - sent.credited, now.saturating_sub(sent.at), now);
        }
        Ok(())
    }

    /// So many bytes arrived in that time.
    fn learn(&mut self, bytes: u64, took: Duration, now: Duration) {
        let micros = took.as_micros().max(1) as u64;
        self.shortest = self.shortest.min(took);
        let rate = bytes.saturating_mul(1_000_000) / micros;
        while self.rates.back().is_some_and(|&(known, _)| known <= rate) {
            self.rates.pop_back();
        }
        self.rates.push_back((rate, now));
        while self.rates.len() > 1 && self.rates[0].1 + MEMORY < now {
            self.rates.pop_front();
        }
        self.decide(now);
    }

    /// From now on nothing shall wait for long, or again it may.
    pub fn hurry(&mut self, hurry: bool, now: Duration) {
        if self.hurry != hurry {
            self.hurry = hurry;
            self.decide(now);
        }
    }

    fn decide(&mut self, now: Duration) {
        let (slack, memory, least) = match self.hurry {
            true => {
                let memory = HURRIED_MEMORY.max(self.shortest.saturating_mul(4)).min(MEMORY);
                (HURRY, memory, HURRIED_LEAST)
            }
            false => (SLACK, MEMORY, LEAST),
        };
        let fresh = |&&(_, at): &&(u64, Duration)| at + memory >= now;
        let rate = self.rates.iter().find(fresh).or(self.rates.back());
        let Some(&(rate, _)) = rate else { return };
        let time = (self.shortest + self.shortest / 4 + slack).as_micros() as u64;
        let limit = (rate / 1000).saturating_mul(time) / 1000;
        self.limit = limit.clamp(least.min(self.agreed), self.agreed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 128 pages with their headers.
    const BATCH: u64 = 128 * 4104;

    /// A way that carries so many bytes a second after half a round trip; how many bytes it has
    /// carried in three seconds, and the longest that a batch has waited in the last of them.
    fn carry(rate: u64, round_trip: Duration, hurry: bool) -> (u64, Duration) {
        let mut window = Window::new(256 << 20);
        window.hurry(hurry, Duration::ZERO);
        let (mut now, mut free) = (Duration::ZERO, Duration::ZERO);
        let mut credits = VecDeque::new();
        let (mut sent, mut longest) = (0, Duration::ZERO);
        while now < Duration::from_secs(3) {
            while let Some(&(total, at)) = credits.front().filter(|(_, at)| *at <= now) {
                window.credit(total, at).unwrap();
                credits.pop_front();
            }
            while window.has_room(BATCH) {
                window.send(BATCH, now);
                sent += BATCH;
                free = free.max(now) + Duration::from_micros(BATCH * 1_000_000 / rate);
                credits.push_back((sent, free + round_trip));
                if now > Duration::from_secs(2) {
                    longest = longest.max(free - now);
                }
            }
            now += Duration::from_micros(200);
        }
        (window.credited, longest)
    }

    #[test]
    fn the_way_is_used_and_nothing_waits_for_long() {
        for megabytes in [12, 120, 1000, 4000] {
            for round_trip in [0, 1, 20, 50].map(Duration::from_millis) {
                for (hurry, slack, least) in [(true, HURRY, HURRIED_LEAST), (false, SLACK, LEAST)] {
                    let rate = megabytes * 1_000_000;
                    let (carried, longest) = carry(rate, round_trip, hurry);
                    let what = format!("{megabytes} MB/s, {round_trip:?}: {carried}, {longest:?}");
                    // The beginning is slow where the way is long.
                    assert!(carried > 3 * rate * 7 / 10, "{what}");
                    let least = Duration::from_micros(least * 1_000_000 / rate);
                    let batch = Duration::from_micros(BATCH * 1_000_000 / rate);
                    assert!(longest < least.max(2 * slack + round_trip) + 2 * batch, "{what}");
                }
            }
        }
    }

    #[test]
    fn credit_is_not_believed_blindly() {
        let mut window = Window::new(8 << 20);
        window.send(100, Duration::ZERO);
        assert!(window.credit(101, Duration::ZERO).is_err());
        window.credit(100, Duration::ZERO).unwrap();
        assert!(window.credit(99, Duration::ZERO).is_err());
    }
}
