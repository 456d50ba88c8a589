//! Dying at a named point, or in the middle of a message, in builds for tests; nothing at all in
//! others.

#[cfg(not(any(test, feature = "crash-points")))]
pub(crate) type CrashHook = semper_inflight::NoHook;

// Unit tests die in a model.
#[cfg(test)]
pub(crate) use crate::worker::model::Watcher as CrashHook;

#[cfg(all(not(test), feature = "crash-points"))]
pub(crate) use armed::CrashHook;

#[cfg(all(not(test), feature = "crash-points"))]
mod armed {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::sync::atomic::{AtomicBool, Ordering};

    use semper_inflight::{Hook, Point};

    static DYING: AtomicBool = AtomicBool::new(false);

    /// `SEMPER_DIE_AT=point[:nth[:deaths]],…` with `SEMPER_DIE_LOG=file`: SIGKILL at the nth
    /// passage of the first point in this process, until that many have died so (the log has a
    /// line for each death, by which the processes that follow each other know), then likewise at
    /// the second point, and so on.
    #[derive(Clone, Default)]
    pub(crate) struct CrashHook {
        plan: Option<Option<Plan>>,
    }

    #[derive(Clone)]
    struct Plan {
        point: Point,
        nth: u64,
        passed: u64,
        log: String,
    }

    fn plan_from_environment() -> Option<Plan> {
        let steps = std::env::var("SEMPER_DIE_AT").ok()?;
        let log = std::env::var("SEMPER_DIE_LOG").ok()?;
        let mut died = std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
        for step in steps.split(',') {
            let mut parts = step.split(':');
            let point = Point::from_name(parts.next()?)?;
            let mut number = || parts.next().and_then(|n| n.parse().ok()).unwrap_or(1);
            let (nth, deaths): (u64, usize) = (number(), number() as usize);
            if died < deaths {
                return Some(Plan { point, nth, passed: 0, log });
            }
            died -= deaths;
        }
        None
    }

    impl Hook for CrashHook {
        fn at(&mut self, point: Point) {
            // Read late: a spare learns only when it serves how often its elders have died.
            let Some(plan) = self.plan.get_or_insert_with(plan_from_environment) else { return };
            if plan.point != point {
                return;
            }
            plan.passed += 1;
            if plan.passed != plan.nth {
                return;
            }
            // One process, one line: a second thread that comes here meanwhile waits for the end.
            if DYING.swap(true, Ordering::Relaxed) {
                loop {
                    std::thread::park();
                }
            }
            let line = format!("{} {}\n", point.name(), std::process::id());
            if let Ok(mut log) = OpenOptions::new().append(true).create(true).open(&plan.log) {
                let _ = log.write_all(line.as_bytes());
            }
            // SAFETY: a signal to ourselves.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}

/// Dies after this act of a snapshot or merge, if that is the place: `SEMPER_DIE_AFTER=act`.
#[cfg(any(test, not(feature = "crash-points")))]
pub(crate) fn after(_act: &str) {}

#[cfg(all(not(test), feature = "crash-points"))]
pub(crate) fn after(act: &str) {
    if std::env::var("SEMPER_DIE_AFTER").is_ok_and(|place| place == act) {
        // SAFETY: a signal to ourselves.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// Dies behind this step of a request, if that is the place: `SEMPER_DIE_IN=request:step`.
#[cfg(any(test, not(feature = "crash-points")))]
pub(crate) fn behind(_step: &str, _request: u32) {}

#[cfg(all(not(test), feature = "crash-points"))]
pub(crate) fn behind(step: &str, request: u32) {
    if std::env::var("SEMPER_DIE_IN").is_ok_and(|place| place == format!("{request}:{step}")) {
        // SAFETY: a signal to ourselves.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}
