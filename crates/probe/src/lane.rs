//! One lane: a thread that writes and reads its own blocks, one request at a time.
//!
//! The order of each write is what makes the ledger true: the attempt is noted before the request is
//! issued, and the acknowledgement only after the kernel reported success.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::buffer::Buffer;
use crate::clock::now_ns;
use crate::config::{MAX_STRETCH, Mode};
use crate::judge::Expectation;
use crate::ledger::Entry;
use crate::shared::{LaneState, Op, Shared};

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
    recent: [Range<usize>; RECENT],
    written: usize,
    unflushed: u32,
}

/// Starts lane `index` of a run.
pub fn spawn(shared: Arc<Shared>, state: Arc<LaneState>, index: u32) -> io::Result<()> {
    let lanes = u64::from(shared.config.lanes());
    let total = shared.config.blocks();
    let config = &shared.config;
    let stretch = if config.mode == Mode::Overlap { MAX_STRETCH as usize } else { 1 };
    let seed = if config.seed == 0 { now_ns() } else { config.seed };
    let mut lane = Lane {
        buffer: Buffer::new(stretch * config.block_size as usize),
        random: seed.wrapping_add(u64::from(index) << 32) | 1,
        blocks: total / lanes + u64::from(total % lanes > u64::from(index)),
        shared,
        state,
        file: None,
        index,
        recent: std::array::from_fn(|_| 0..0),
        written: 0,
        unflushed: 0,
    };
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

fn count(counter: &AtomicU64, more: u64) {
    // The lane is the only writer of its counters.
    counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

impl Lane {
    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A block of this lane; in mode `overlap` a stretch of blocks anywhere.
    fn any_stretch(&mut self) -> Range<usize> {
        let config = &self.shared.config;
        let (lanes, total) = (u64::from(config.lanes()), config.blocks());
        if config.mode == Mode::Overlap {
            let length = 1 + (self.next() >> 16) % MAX_STRETCH.min(total);
            let first = (self.next() >> 16) % (total - length + 1);
            return first as usize..(first + length) as usize;
        }
        let block = ((self.next() >> 16) % self.blocks * lanes + u64::from(self.index)) as usize;
        block..block + 1
    }

    fn work(&mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            let share = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
            let config = &self.shared.config;
            let read = match config.mode {
                Mode::Write => false,
                Mode::Read => true,
                Mode::Mixed | Mode::Overlap => share < config.verify_ratio,
            };
            let done = if read { self.read() } else { self.write() };
            if !done {
                // A device that was unbound and bound again is a new one behind the same name.
                self.file = None;
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
        // From here on, for a device that hangs may hang already when it is opened.
        let issued = now_ns();
        self.state.issued_ns.store(issued, Ordering::Release);
        let done = self.open().and_then(|()| match &self.file {
            Some(file) => request(file, &mut self.buffer).map_err(|errno| (op, errno)),
            None => Err((Op::Open, 0)),
        });
        let now = now_ns();
        self.state.issued_ns.store(0, Ordering::Release);
        if now - issued > self.shared.config.hang_ns() {
            count(&self.state.late, 1);
        }
        if let Err((op, errno)) = done {
            self.shared.failed(op, block, errno);
            return false;
        }
        self.shared.gaps.record(now);
        self.shared.timeline.record(now);
        self.shared.latency.record(now - issued);
        true
    }

    fn open(&mut self) -> Result<(), (Op, i32)> {
        if self.file.is_none() {
            let opened = self.shared.device.open(self.shared.config.mode != Mode::Read);
            let failed = |error: io::Error| (Op::Open, error.raw_os_error().unwrap_or(0));
            self.file = Some(opened.map_err(failed)?);
        }
        Ok(())
    }

    fn write(&mut self) -> bool {
        let blocks = self.any_stretch();
        let block_size = self.shared.config.block_size as usize;
        let offset = self.shared.offset_of(blocks.start);
        let length = blocks.len() * block_size;
        let mut seqs = [0; MAX_STRETCH as usize];
        for (slot, block) in blocks.clone().enumerate() {
            seqs[slot] = self.shared.ledger.begin(block);
            let nothing = Entry::default();
            let expect =
                Expectation { writer: self.index, ..self.shared.expectation(block, nothing) };
            let bytes = &mut self.buffer[slot * block_size..(slot + 1) * block_size];
            expect.stamp(seqs[slot], bytes);
        }
        let done = self.timed(Op::Write, blocks.start, |file, buffer| {
            short_is_error(file.write_at(&buffer[..length], offset), length)
        });
        for (slot, block) in blocks.clone().enumerate() {
            self.shared.ledger.end(block, seqs[slot], done);
        }
        if !done {
            return false;
        }
        count(&self.state.writes, 1);
        self.unflushed += 1;
        let flush_every = self.shared.config.flush_every;
        let flushed = flush_every == 0 || self.unflushed < flush_every || self.flush(blocks.start);
        self.recent[self.written % RECENT] = blocks;
        self.written += 1;
        flushed
    }

    fn flush(&mut self, block: usize) -> bool {
        self.unflushed = 0;
        let done = self.timed(Op::Flush, block, |file, _| {
            file.sync_data().map_err(|error| error.raw_os_error().unwrap_or(0))
        });
        if done {
            count(&self.state.flushes, 1);
        }
        done
    }

    fn read(&mut self) -> bool {
        let recent = self.written.min(RECENT) as u64;
        let blocks = if recent > 0 && self.next() & (1 << 40) != 0 {
            let pick = (self.next() >> 16) % recent;
            self.recent[pick as usize].clone()
        } else {
            self.any_stretch()
        };
        let block_size = self.shared.config.block_size as usize;
        let offset = self.shared.offset_of(blocks.start);
        let length = blocks.len() * block_size;
        let before: Vec<Entry> =
            blocks.clone().map(|block| self.shared.ledger.entry(block)).collect();
        let done = self.timed(Op::Read, blocks.start, |file, buffer| {
            short_is_error(file.read_at(&mut buffer[..length], offset), length)
        });
        if !done {
            return false;
        }
        count(&self.state.reads, 1);
        let chunks = self.buffer[..length].chunks_exact(block_size);
        for ((block, entry), bytes) in blocks.zip(before).zip(chunks) {
            if entry.is_disturbed(&self.shared.ledger.entry(block)) {
                continue;
            }
            count(&self.state.verified, u64::from(entry.acked > 0));
            self.shared.check(block, bytes, &self.shared.expectation(block, entry));
        }
        true
    }
}
