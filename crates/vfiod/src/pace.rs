//! How long to sleep while nobody tells of what is to come: a guest that rings a direct doorbell writes
//! to memory.
//!
//! A look that finds nothing costs some µs of processor time, a doorbell that is found late costs the
//! guest time. So the gap between the end of one thing and the beginning of the next is reckoned as a
//! decaying mean. After half of that gap the looks begin, and each further sleep is a quarter of the time
//! for which nothing has come. A mean that is too long corrects itself: what is there at the end of the
//! first sleep has a gap of half the mean. Where gaps are shorter than a sleep, looking takes its place.

use std::time::{Duration, Instant};

use semper_device::Activity;

/// Gaps below it are waited for without sleeping.
const QUICK: Duration = Duration::from_micros(40);
/// The shortest sleep.
const SHORTEST: Duration = Duration::from_micros(20);
/// While requests are on their way, which nobody tells of.
const IN_FLIGHT: Duration = Duration::from_micros(50);
/// While a guest may ring, however long it has not: an idle one costs 250 looks in a second.
const LONGEST: Duration = Duration::from_millis(4);
/// A gap counts as no more than that.
const GAP_MOST: Duration = Duration::from_millis(1);
/// A sleep is so much shorter than the time for which nothing has come.
const PATIENT: u32 = 4;

/// What to do after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another turn at once.
    Turn,
    /// A sleep, until there is an event at the latest; without a time until there is one.
    Sleep(Option<Duration>),
}

/// The pace of one thread.
#[derive(Debug)]
pub(crate) struct Pace {
    /// When something was done last.
    busy: Instant,
    /// Since then there was a turn with nothing to do.
    idle: bool,
    gap: Duration,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self { busy: now, idle: false, gap: QUICK }
    }

    /// A turn had this activity. `watches`: a guest may ring, of which nobody tells.
    pub(crate) fn after(&mut self, activity: Activity, watches: bool, now: Instant) -> Next {
        let past = now.saturating_duration_since(self.busy);
        let most = match activity {
            Activity::Busy => {
                if std::mem::take(&mut self.idle) {
                    self.gap = (3 * self.gap + past.min(GAP_MOST)) / 4;
                }
                self.busy = now;
                return Next::Turn;
            }
            Activity::Waiting => IN_FLIGHT,
            Activity::Idle if watches => LONGEST,
            Activity::Idle => return Next::Sleep(None),
        };
        self.idle = true;
        if self.gap < QUICK && past < 2 * QUICK {
            std::hint::spin_loop();
            return Next::Turn;
        }
        let first = (self.gap / 2).saturating_sub(past);
        Next::Sleep(Some(first.max(past / PATIENT).clamp(SHORTEST, most)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that rings `gap` after it was served, so many times: looks for each, and how late it is
    /// found in µs, of the last ones.
    fn run(pace: &mut Pace, gap: Duration, times: u32) -> (u32, u128) {
        /// A look takes so long, and a sleep so much longer than it was asked for.
        const LOOK: Duration = Duration::from_micros(1);
        let mut now = pace.busy;
        let (mut looks, mut late) = (0, 0);
        for _ in 0..times {
            let rings = now + gap;
            (looks, late) = (0, 0);
            while now < rings {
                looks += 1;
                now += match pace.after(Activity::Idle, true, now) {
                    Next::Turn => LOOK,
                    Next::Sleep(time) => LOOK + time.unwrap(),
                };
            }
            late = (now - rings).as_micros().max(late);
            assert_eq!(pace.after(Activity::Busy, true, now), Next::Turn);
        }
        (looks, late)
    }

    #[test]
    fn a_quick_guest_is_found_at_once() {
        let mut pace = Pace::new(Instant::now());
        assert!(run(&mut pace, Duration::from_micros(15), 100).1 <= 1);
        // Also after it was slow for a time.
        run(&mut pace, Duration::from_millis(2), 100);
        assert!(run(&mut pace, Duration::from_micros(15), 100).1 <= 1);
    }

    #[test]
    fn a_slow_guest_costs_a_few_looks_and_is_found_soon() {
        for gap in [100, 200, 500, 900] {
            let mut pace = Pace::new(Instant::now());
            let (looks, late) = run(&mut pace, Duration::from_micros(gap), 100);
            assert!(looks <= 8 && late <= u128::from(gap) / 3, "{gap}: {looks} looks, {late} late");
        }
    }

    #[test]
    fn an_idle_guest_costs_next_to_nothing() {
        let mut pace = Pace::new(Instant::now());
        let (looks, late) = run(&mut pace, Duration::from_secs(10), 1);
        assert!(looks < 2600 && late <= 4001, "{looks} looks, {late} late");
    }

    #[test]
    fn where_everything_is_told_it_sleeps_until_then() {
        let now = Instant::now();
        assert_eq!(Pace::new(now).after(Activity::Idle, false, now), Next::Sleep(None));
        let later = now + Duration::from_secs(1);
        let most = Next::Sleep(Some(IN_FLIGHT));
        assert_eq!(Pace::new(now).after(Activity::Waiting, false, later), most);
    }
}
