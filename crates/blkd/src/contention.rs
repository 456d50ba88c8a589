//! Whether the host has a processor to spare.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// How long an observation holds, in ns. Reading it takes 2 µs.
const HOLDS: u64 = 2_000_000;

/// Counts what wants to run against the processors that there are.
pub(crate) struct Contention {
    /// None where it cannot be known; then preemption has to tell.
    loadavg: Option<File>,
    processors: u64,
    until: u64,
    present: bool,
}

impl Contention {
    pub(crate) fn new() -> Self {
        // SAFETY: sysconf has no preconditions.
        let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
        let processors = u64::try_from(online).unwrap_or(1).max(1);
        Self { loadavg: File::open("/proc/loadavg").ok(), processors, until: 0, present: false }
    }

    /// Whether more threads want to run than there are processors, this one included. `now` in ns.
    pub(crate) fn is_present(&mut self, now: u64) -> bool {
        if now >= self.until {
            let mut text = [0; 64];
            let read = self.loadavg.as_ref().and_then(|file| file.read_at(&mut text, 0).ok());
            let running = read.and_then(|len| running(&text[..len]));
            self.present = running.is_some_and(|running| running > self.processors);
            self.until = now + HOLDS;
        }
        self.present
    }
}

/// The number before the slash in `0.20 0.18 0.12 1/80 11206` (proc_loadavg(5)).
fn running(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.split(' ').nth(3)?.split('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_is_counted() {
        assert_eq!(running(b"0.20 0.18 0.12 3/80 11206\n"), Some(3));
        assert_eq!(running(b""), None);
        assert_eq!(running(b"\xff\xff"), None);
        let mut contention = Contention::new();
        contention.processors = 0;
        assert!(contention.is_present(1), "this thread runs");
        contention.processors = 1 << 20;
        assert!(contention.is_present(2), "an observation holds for a while");
        assert!(!contention.is_present(2 + HOLDS));
        contention.loadavg = None;
        contention.processors = 0;
        assert!(!contention.is_present(u64::MAX - HOLDS));
    }
}
