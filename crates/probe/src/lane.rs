//! One lane: a thread that writes and reads its own blocks, one request at a time.
//!
//! The order of each write is what makes the ledger true: the attempt is noted before the request is
//! issued, and the acknowledgement after the kernel reported success, before anything else.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::buffer::Buffer;
use crate::clock::now_ns;
use crate::writers::{LaneState, Mode, Op, Shared};

const STACK: usize = 128 << 10;
/// Blocks written lately, which half of the reads choose from: a stale answer is likeliest there.
const RECENT: usize = 32;
/// After an error a lane waits this long, so that a dead device does not cost all processor time.
const AFTER_ERROR: Duration = Duration::from_millis(2);

struct Lane {
    shared: Arc<Shared>,
    state: Arc<LaneState>,
    file: Option<File>,
    buffer: Buffer,
    random: u64,
    index: u32,
    blocks: u64,
    recent: [usize; RECENT],
    written: usize,
    unflushed: u32,
}

/// Starts lane `index` of a run.
pub fn spawn(shared: Arc<Shared>, state: Arc<LaneState>, index: u32) -> io::Result<()> {
    let lanes = u64::from(shared.config.lanes());
    let total = shared.config.blocks();
    let mut lane = Lane {
        buffer: Buffer::new(shared.config.block_size as usize),
        random: (shared.config.seed ^ now_ns()).wrapping_add(u64::from(index) << 32) | 1,
        blocks: total / lanes + u64::from(total % lanes > u64::from(index)),
        shared,
        state,
        file: None,
        index,
        recent: [0; RECENT],
        written: 0,
        unflushed: 0,
    };
    if lane.shared.config.seed != 0 {
        lane.random = lane.shared.config.seed.wrapping_add(u64::from(index) << 32) | 1;
    }
    thread::Builder::new().name(format!("lane-{index}")).stack_size(STACK).spawn(move || {
        lane.work();
        lane.shared.lane_ended(&lane.state);
    })?;
    Ok(())
}

fn short_is_error(done: io::Result<usize>, wanted: usize) -> Result<(), i32> {
    match done {
        Ok(count) if count == wanted => Ok(()),
        Ok(_) => Err(0),
        Err(error) => Err(error.raw_os_error().unwrap_or(0)),
    }
}

fn count(counter: &AtomicU64) {
    // The lane is the only writer of its counters.
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

impl Lane {
    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn any_block(&mut self) -> usize {
        let pick = (self.next() >> 16) % self.blocks;
        (pick * u64::from(self.shared.config.lanes()) + u64::from(self.index)) as usize
    }

    fn work(&mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            let share = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
            let config = &self.shared.config;
            let read = match config.mode {
                Mode::Write => false,
                Mode::Read => true,
                Mode::Mixed => share < config.verify_ratio,
            };
            let done = if read { self.read() } else { self.write() };
            if !done {
                self.reopen();
                thread::sleep(AFTER_ERROR);
            }
        }
    }

    /// Carries out one request and does its accounts; false if it failed.
    fn timed(
        &mut self,
        op: Op,
        block: usize,
        request: impl FnOnce(&File, &mut Buffer) -> Result<(), i32>,
    ) -> bool {
        if self.file.is_none() {
            match self.shared.device.open(self.shared.config.mode != Mode::Read) {
                Ok(file) => self.file = Some(file),
                Err(error) => {
                    self.shared.failed(Op::Open, block, error.raw_os_error().unwrap_or(0));
                    return false;
                }
            }
        }
        let Some(file) = &self.file else { return false };
        let issued = now_ns();
        self.state.issued_ns.store(issued, Ordering::Release);
        let done = request(file, &mut self.buffer);
        let now = now_ns();
        self.state.issued_ns.store(0, Ordering::Release);
        if now - issued > self.shared.config.hang_ns() {
            count(&self.state.late);
        }
        if let Err(errno) = done {
            self.shared.failed(op, block, errno);
            return false;
        }
        self.shared.gaps.record(now);
        self.shared.timeline.record(now);
        self.shared.latency.record(now - issued);
        true
    }

    fn write(&mut self) -> bool {
        let block = self.any_block();
        let expect = self.shared.expectation(block);
        let offset = expect.first_sector * 512;
        let seq = self.shared.ledger.begin(block);
        expect.stamp(seq, &mut self.buffer);
        let done = self.timed(Op::Write, block, |file, buffer| {
            short_is_error(file.write_at(buffer, offset), buffer.len())
        });
        if !done {
            return false;
        }
        self.shared.ledger.acknowledge(block, seq);
        count(&self.state.writes);
        self.recent[self.written % RECENT] = block;
        self.written += 1;
        self.unflushed += 1;
        let flush_every = self.shared.config.flush_every;
        flush_every == 0 || self.unflushed < flush_every || self.flush(block)
    }

    fn flush(&mut self, block: usize) -> bool {
        self.unflushed = 0;
        let done = self.timed(Op::Flush, block, |file, _| {
            file.sync_data().map_err(|error| error.raw_os_error().unwrap_or(0))
        });
        if done {
            count(&self.state.flushes);
        }
        done
    }

    fn read(&mut self) -> bool {
        let recent = self.written.min(RECENT) as u64;
        let block = if recent > 0 && self.next() & (1 << 40) != 0 {
            let pick = (self.next() >> 16) % recent;
            self.recent[pick as usize]
        } else {
            self.any_block()
        };
        let expect = self.shared.expectation(block);
        let offset = expect.first_sector * 512;
        let done = self.timed(Op::Read, block, |file, buffer| {
            short_is_error(file.read_at(buffer, offset), buffer.len())
        });
        if !done {
            return false;
        }
        count(&self.state.reads);
        if expect.acked > 0 {
            count(&self.state.verified);
        }
        self.shared.check(block, &self.buffer, &expect);
        true
    }

    /// A device that was unbound and bound again is a new one behind the same name.
    fn reopen(&mut self) {
        self.file = None;
    }
}
