//! The kernel's log, read as it comes, with its errors counted.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::Serialize;

const LINES_KEPT: usize = 4096;

/// What a line must contain to count as an error. The first match counts.
const ERRORS: [&str; 13] = [
    "is not a head",
    "I/O error",
    "critical target error",
    "critical space allocation error",
    "blocked for more than",
    "soft lockup",
    "detected stalls",
    "BUG:",
    "Oops",
    "WARNING:",
    "Kernel panic",
    "Out of memory",
    "Remounting filesystem read-only",
];

/// One line of the log.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Line {
    /// Number of the line since boot.
    pub seq: u64,
    /// 0 = emergency to 7 = debug.
    pub level: u8,
    /// Microseconds since boot.
    pub time_us: u64,
    /// The text.
    pub text: String,
}

/// Lines that contain one of the error texts.
#[derive(Clone, Debug, Serialize)]
pub struct ErrorCount {
    pattern: &'static str,
    count: u64,
    last: String,
}

/// The errors since boot, for whoever reports them.
#[derive(Clone, Debug, Default)]
pub struct Tally(Arc<Mutex<Vec<ErrorCount>>>);

impl Tally {
    /// Counts a line if it is an error.
    fn note(&self, text: &str) {
        let Some(pattern) = ERRORS.iter().find(|pattern| text.contains(**pattern)) else { return };
        let mut errors = self.0.lock().expect("a thread that panics ends the probe");
        match errors.iter_mut().find(|error| error.pattern == *pattern) {
            Some(error) => {
                error.count += 1;
                text.clone_into(&mut error.last);
            }
            None => errors.push(ErrorCount { pattern, count: 1, last: text.to_owned() }),
        }
    }

    /// What was counted so far.
    pub fn counts(&self) -> Vec<ErrorCount> {
        self.0.lock().expect("a thread that panics ends the probe").clone()
    }
}

/// The log since boot, as far as it is kept.
pub struct KernelLog {
    file: File,
    lines: VecDeque<Line>,
    tally: Tally,
}

/// Parses a record of /dev/kmsg: `level,seq,time,flags;text`, then lines of details.
fn parse(record: &str) -> Option<Line> {
    let (prefix, text) = record.split_once(';')?;
    let mut fields = prefix.split(',');
    let facility_and_level: u32 = fields.next()?.parse().ok()?;
    let seq = fields.next()?.parse().ok()?;
    let time_us = fields.next()?.parse().ok()?;
    let text = text.lines().next().unwrap_or_default().to_owned();
    Some(Line { seq, level: (facility_and_level & 7) as u8, time_us, text })
}

impl KernelLog {
    /// Opens the log at its beginning.
    pub fn open(tally: Tally) -> io::Result<Self> {
        let flags = OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new().read(true).custom_flags(flags).open("/dev/kmsg")?;
        Ok(Self { file, lines: VecDeque::new(), tally })
    }

    /// Reads what is new.
    pub fn drain(&mut self) {
        let mut record = [0; 8192];
        loop {
            match rustix::io::read(&self.file, &mut record) {
                Ok(count) if count > 0 => {
                    if let Some(line) = parse(&String::from_utf8_lossy(&record[..count])) {
                        self.note(line);
                    }
                }
                // Records were overwritten before they were read: go on with the oldest there is.
                Err(Errno::PIPE | Errno::INTR) => {}
                _ => return,
            }
        }
    }

    fn note(&mut self, line: Line) {
        self.tally.note(&line.text);
        if self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// Kept lines from number `since` on.
    pub fn since(&self, since: u64) -> Vec<&Line> {
        self.lines.iter().filter(|line| line.seq >= since).collect()
    }
}

impl AsFd for KernelLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_parsed() {
        let record = "3,771,5140900,-,caller=T1;I/O error, dev vda\n SUBSYSTEM=block\n";
        let line =
            Line { seq: 771, level: 3, time_us: 5_140_900, text: "I/O error, dev vda".to_owned() };
        assert_eq!(parse(record), Some(line));
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn errors_are_counted_by_kind() {
        let tally = Tally::default();
        for text in ["req.0:id 3 is not a head!", "I/O error, dev vda", "all well", "I/O error 2"] {
            tally.note(text);
        }
        let counts = tally.counts();
        let kinds: Vec<_> = counts.iter().map(|error| (error.pattern, error.count)).collect();
        assert_eq!(kinds, [("is not a head", 1), ("I/O error", 2)]);
        assert_eq!(counts[1].last, "I/O error 2");
    }
}
