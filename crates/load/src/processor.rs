//! Processor time and context switches of a process, this one or another.

use std::fs;
use std::io;
use std::time::Duration;

/// A snapshot of what a process has used since it started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User and system time of all threads, ended ones included, to the nanosecond.
    pub cpu: Duration,
    /// The system part of it; the kernel counts it in ticks and scales it.
    pub system: Duration,
    /// Times a living thread gave the processor up.
    pub voluntary_switches: u64,
    /// Times a living thread lost the processor.
    pub involuntary_switches: u64,
}

impl Usage {
    /// Reads the usage of process `pid`.
    ///
    /// # Errors
    /// The process does not exist (any more).
    pub fn of(pid: u32) -> io::Result<Self> {
        let (voluntary_switches, involuntary_switches) = switches(pid)?;
        Ok(Self { cpu: cpu(pid)?, system: system(pid)?, voluntary_switches, involuntary_switches })
    }

    /// What was used from `earlier` to here.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(earlier.cpu),
            system: self.system.saturating_sub(earlier.system),
            voluntary_switches: self.voluntary_switches.saturating_sub(earlier.voluntary_switches),
            involuntary_switches: self
                .involuntary_switches
                .saturating_sub(earlier.involuntary_switches),
        }
    }
}

/// The process's own clock: the sum of schedstat over its threads, and of those that ended.
fn cpu(pid: u32) -> io::Result<Duration> {
    let pid =
        libc::pid_t::try_from(pid).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut clock = 0;
    // SAFETY: `clock` is a valid place for the answer.
    let error = unsafe { libc::clock_getcpuclockid(pid, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the answer.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

fn system(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses and may hold anything.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let ticks: u64 = fields.split_whitespace().nth(12).and_then(|s| s.parse().ok()).unwrap_or(0);
    Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second().max(1)))
}

fn switches(pid: u32) -> io::Result<(u64, u64)> {
    let (mut voluntary, mut involuntary) = (0, 0);
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the listing and the reading.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else { continue };
        for line in status.lines() {
            let number = |text: &str| text.trim().parse().unwrap_or(0);
            if let Some(count) = line.strip_prefix("voluntary_ctxt_switches:") {
                voluntary += number(count);
            } else if let Some(count) = line.strip_prefix("nonvoluntary_ctxt_switches:") {
                involuntary += number(count);
            }
        }
    }
    Ok((voluntary, involuntary))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hint::black_box;

    #[test]
    fn own_work_is_seen() {
        let before = Usage::of(std::process::id()).unwrap();
        let work = Duration::from_millis(20);
        let mut sum = 0u64;
        while Usage::of(std::process::id()).unwrap().since(&before).cpu < work {
            (0..10_000u64).for_each(|i| sum = black_box(sum.wrapping_add(i)));
        }
        let used = Usage::of(std::process::id()).unwrap().since(&before);
        assert!(used.cpu >= work);
    }

    #[test]
    fn a_missing_process_is_an_error() {
        assert!(Usage::of(u32::MAX).is_err());
        assert!(Usage::of(i32::MAX as u32).is_err());
    }
}
