//! When to look at the rings for a while before going to sleep.
//!
//! A sleep costs a wake-up: a system call of the driver, a switch of context, often an interrupt
//! to an idle processor. If the next request is a few microseconds away it is cheaper, and quicker
//! for the guest, to wait for it with open eyes. If it is not, or if somebody else needs the
//! processor, looking is waste. So the thread keeps an account: each look that found something
//! earns what a sleep would have cost, each nanosecond of looking is paid for, and a thread whose
//! account is empty sleeps at once, for twice as many sleeps each time, before it tries again.
//! The idea is that of KVM's halt polling (Linux, Documentation/virt/kvm/halt-polling.rst), with
//! processor time instead of latency as the measure.

use std::time::Duration;

/// What a sleep and its wake-up are worth, in ns: about 5 µs of processor time at both ends, and
/// the latency that the guest does not see, valued at as much again.
const SLEEP_WORTH: i64 = 40_000;
/// The most that an account can hold: a few looks in vain after a long good time.
const MOST: i64 = 120_000;
/// The shortest look, in ns.
const SHORTEST: u64 = 2_000;
/// Sleeps without a look, at most.
const LONGEST_PAUSE: u32 = 1024;
/// Between two readings of the clock within a look lies far less, unless somebody else was given
/// the processor; in ns.
pub(crate) const PREEMPTED: u64 = 30_000;

/// One thread's account. All times in ns.
#[derive(Debug)]
pub(crate) struct Poller {
    limit: u64,
    /// How long a look takes that finds something: a decaying mean.
    gap: u64,
    credit: i64,
    /// Sleeps left before the next look.
    pause: u32,
    next_pause: u32,
}

impl Poller {
    /// Looks for at most `limit`; zero never looks.
    pub(crate) fn new(limit: Duration) -> Self {
        let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        Self { limit, gap: limit / 4, credit: 0, pause: 0, next_pause: 1 }
    }

    /// How long to look now, at most `most`; 0: sleep at once.
    pub(crate) fn window(&mut self, most: u64) -> u64 {
        if self.limit == 0 {
            return 0;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        (4 * self.gap).max(SHORTEST).min(self.limit).min(most)
    }

    /// Whether looks pay at present, which also tells that driver and device have a processor each.
    pub(crate) fn pays(&self) -> bool {
        self.credit > 0 && self.pause == 0
    }

    /// Something was found after `looked`.
    pub(crate) fn hit(&mut self, looked: u64) {
        self.gap = (7 * self.gap + looked) / 8;
        self.credit = (self.credit + SLEEP_WORTH - cost(looked)).min(MOST);
        self.next_pause = (self.next_pause / 2).max(1);
        self.settle();
    }

    /// Nothing was found.
    pub(crate) fn miss(&mut self, looked: u64) {
        self.credit -= cost(looked);
        self.settle();
    }

    /// Somebody else was given the processor during a look.
    pub(crate) fn preempted(&mut self) {
        self.credit = -1;
        self.next_pause = (4 * self.next_pause).min(LONGEST_PAUSE);
        self.settle();
    }

    fn settle(&mut self) {
        if self.credit < 0 {
            self.credit = 0;
            self.pause = self.next_pause;
            self.next_pause = (2 * self.next_pause).min(LONGEST_PAUSE);
            self.gap = self.gap.max(self.limit / 4);
        }
    }
}

fn cost(looked: u64) -> i64 {
    i64::try_from(looked).unwrap_or(i64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(20);

    /// Requests arrive `gap` ns after the thread has nothing to do; gives (time looked, hits) for
    /// each sleep or look.
    fn run(poller: &mut Poller, gap: u64, times: u32) -> (u64, u32) {
        let (mut looked, mut hits) = (0, 0);
        for _ in 0..times {
            let window = poller.window(u64::MAX);
            if window > gap {
                poller.hit(gap);
                looked += gap;
                hits += 1;
            } else if window > 0 {
                poller.miss(window);
                looked += window;
            }
        }
        (looked, hits)
    }

    #[test]
    fn requests_that_come_at_once_are_always_found() {
        let mut poller = Poller::new(LIMIT);
        assert_eq!(run(&mut poller, 3_000, 1000).1, 1000);
        assert!(poller.pays() && poller.window(u64::MAX) < 13_000);
    }

    #[test]
    fn looking_for_a_slow_disk_or_an_idle_guest_costs_next_to_nothing() {
        let mut poller = Poller::new(LIMIT);
        let (looked, hits) = run(&mut poller, 80_000, 100_000);
        assert_eq!(hits, 0);
        assert!(looked / 100_000 < 50, "{looked} ns for 100,000 sleeps");
    }

    #[test]
    fn a_guest_that_becomes_quick_is_noticed_again() {
        let mut poller = Poller::new(LIMIT);
        run(&mut poller, 80_000, 10_000);
        let (_, hits) = run(&mut poller, 3_000, 4_000);
        assert!(hits > 2_000, "{hits}");
    }

    #[test]
    fn who_needs_the_processor_gets_it() {
        let mut poller = Poller::new(LIMIT);
        run(&mut poller, 3_000, 1000);
        poller.preempted();
        assert!(!poller.pays());
        assert_eq!(poller.window(u64::MAX), 0);
        let looks = (0..1000).filter(|_| poller.window(u64::MAX) > 0).count();
        assert!(looks > 0, "it must try again");
    }

    #[test]
    fn zero_never_looks() {
        let mut poller = Poller::new(Duration::ZERO);
        assert_eq!(run(&mut poller, 1, 1000), (0, 0));
    }
}
