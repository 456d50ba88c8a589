//! The last word of a run: every block is read back once more and judged.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Serialize;

use crate::buffer::Buffer;
use crate::clock::now_ns;
use crate::ledger::Entry;
use crate::shared::{Op, Shared};

/// Bytes of one read.
const CHUNK: usize = 256 << 10;
/// Up to here, blocks that were never written are read too: a write that went astray may be there.
const EVERYTHING: u64 = 1 << 30;

/// What the final verification found, beside what it added to the run's counts.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Blocks that were written and judged.
    pub blocks: u64,
    /// Blocks that were never written, looked at for strays.
    pub untouched: u64,
    /// Blocks that could not be read.
    pub unreadable: u64,
    /// Blocks found wrong now, whether or not they were counted before.
    pub wrong: u64,
    /// Every block of the span was read.
    pub complete: bool,
    /// The verification itself did not come back in time.
    pub hung: bool,
    /// How long it took.
    pub seconds: f64,
}

fn errno_of(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// A lane that hung may come back at any time: what was acknowledged before the read is the least
/// that must be there, what was tried until after it is the most that may be.
fn check(shared: &Shared, index: usize, before: &Entry, bytes: &[u8], report: &mut Report) {
    let attempted = shared.ledger.entry(index).attempted;
    let expect = shared.expectation(index, Entry { attempted, ..before.clone() });
    *(if expect.acked > 0 { &mut report.blocks } else { &mut report.untouched }) += 1;
    if shared.check(index, bytes, &expect).is_some() {
        report.wrong += 1;
    }
}

fn read_singly(shared: &Shared, file: &File, first: usize, chunk: &mut [u8], report: &mut Report) {
    let block_size = shared.config.block_size as usize;
    for (slot, bytes) in chunk.chunks_exact_mut(block_size).enumerate() {
        let index = first + slot;
        let before = shared.ledger.entry(index);
        let offset = shared.offset_of(index);
        match file.read_exact_at(bytes, offset) {
            Ok(()) => check(shared, index, &before, bytes, report),
            Err(error) => {
                report.unreadable += 1;
                shared.failed(Op::Read, index, errno_of(&error));
            }
        }
    }
}

/// Reads back every block. May take for ever if the device hangs: run it on a thread of its own.
pub fn verify(shared: &Shared) -> Report {
    let started = now_ns();
    let mut report = Report::default();
    let block_size = shared.config.block_size as usize;
    let blocks = shared.ledger.blocks();
    let step = (CHUNK / block_size).max(1);
    let mut buffer = Buffer::new(step * block_size);
    let file = match shared.device.open(false) {
        Ok(file) => file,
        Err(error) => {
            shared.failed(Op::Open, 0, errno_of(&error));
            report.unreadable = blocks as u64;
            return report;
        }
    };
    for first in (0..blocks).step_by(step) {
        let count = step.min(blocks - first);
        let before: Vec<Entry> =
            (first..first + count).map(|index| shared.ledger.entry(index)).collect();
        let written = before.iter().any(|entry| entry.attempted > 0);
        if !written && shared.config.span_bytes > EVERYTHING {
            continue;
        }
        let chunk = &mut buffer[..count * block_size];
        let offset = shared.offset_of(first);
        if file.read_exact_at(chunk, offset).is_err() {
            read_singly(shared, &file, first, chunk, &mut report);
            continue;
        }
        for (slot, bytes) in chunk.chunks_exact(block_size).enumerate() {
            check(shared, first + slot, &before[slot], bytes, &mut report);
        }
    }
    report.complete = report.unreadable == 0;
    report.seconds = (now_ns() - started) as f64 / 1e9;
    report
}
