//! One virtqueue under load: what is in flight on it, and what came of it.

use crate::memory::Memory;
use crate::offsets::{Blocks, Random};
use crate::options::Mode;
use crate::pace::Pace;
use crate::series::Series;
use crate::stamp::{self, Verdict};
use semper_histogram::Histogram;
use serde::Serialize;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_driver::{EventFd, QueueNotifier, VirtioBlkQueue};

/// What a lane issues.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Kind of requests.
    pub mode: Mode,
    /// Reads among 100 requests of a mixed load.
    pub read_percent: u64,
    /// Bytes of a request.
    pub block_size: usize,
    /// Requests in flight.
    pub depth: usize,
    /// A flush after so many requests.
    pub flush_every: Option<u64>,
    /// The nonce of the stamps; `None` without verification.
    pub nonce: Option<u64>,
    /// Completions after which the lane stops by itself, once it is measured.
    pub budget: Option<u64>,
    /// Nanoseconds between two arrivals on average; `None`: the next when one is complete.
    pub interval_ns: Option<f64>,
    /// Length of the intervals in which completions are told, in nanoseconds.
    pub series_ns: Option<u64>,
}

/// What happened on a lane, or on several.
#[derive(Default)]
pub struct Tally {
    /// Completed reads and writes, from publication to completion, in nanoseconds.
    pub latency: Histogram,
    /// Completed flushes, likewise.
    pub flush_latency: Histogram,
    /// Completed reads.
    pub reads: u64,
    /// Completed writes.
    pub writes: u64,
    /// Completed flushes.
    pub flushes: u64,
    /// Requests that the device failed.
    pub errors: u64,
    /// The first of them, in words.
    pub first_error: Option<String>,
    /// Notifications sent to the backend.
    pub kicks: u64,
    /// Times the thread slept until the backend notified it.
    pub sleeps: u64,
    /// What reading back showed.
    pub verified: Verified,
    /// Completions over time, measured or not.
    pub series: Option<Series>,
}

/// What reading back showed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verified {
    /// Blocks compared and found right.
    pub right: u64,
    /// An older write stood there.
    pub lost: u64,
    /// Parts of two writes.
    pub torn: u64,
    /// Another block's stamp.
    pub misplaced: u64,
    /// No stamp of this run.
    pub foreign: u64,
}

impl Verified {
    /// Blocks that were not right.
    pub fn wrong(&self) -> u64 {
        self.lost + self.torn + self.misplaced + self.foreign
    }

    fn count(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Right => self.right += 1,
            Verdict::Lost => self.lost += 1,
            Verdict::Torn => self.torn += 1,
            Verdict::Misplaced => self.misplaced += 1,
            Verdict::Foreign => self.foreign += 1,
        }
    }
}

impl Tally {
    /// Adds what happened elsewhere.
    pub fn merge(&mut self, other: &Self) {
        self.latency.merge(&other.latency);
        self.flush_latency.merge(&other.flush_latency);
        self.reads += other.reads;
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.errors += other.errors;
        self.first_error = self.first_error.take().or_else(|| other.first_error.clone());
        self.kicks += other.kicks;
        self.sleeps += other.sleeps;
        self.verified.right += other.verified.right;
        self.verified.lost += other.verified.lost;
        self.verified.torn += other.verified.torn;
        self.verified.misplaced += other.verified.misplaced;
        self.verified.foreign += other.verified.foreign;
        if let Some(other) = &other.series {
            self.series.get_or_insert_default().merge(other);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

/// A request in flight and its buffer.
#[derive(Clone, Copy)]
struct Slot {
    buffer: *mut u8,
    kind: Kind,
    /// Position among the lane's own blocks.
    index: u64,
    sequence: u32,
    started_ns: u64,
}

// SAFETY: the pointer leads into the run's memory, and each buffer belongs to one slot.
unsafe impl Send for Slot {}

/// The writes of a block that completed; `UNKNOWN` is added after one that failed.
const UNKNOWN: u32 = 1 << 31;

/// What verification remembers of the lane's blocks.
struct Memo {
    nonce: u64,
    sequence: Vec<u32>,
    busy: Vec<bool>,
}

/// One virtqueue under load.
pub struct Lane {
    queue: VirtioBlkQueue<'static, u16>,
    notifier: Box<dyn QueueNotifier>,
    /// What the backend signals completions with.
    pub call: Arc<EventFd>,
    load: Load,
    slots: Vec<Slot>,
    blocks: Blocks,
    random: Random,
    memo: Option<Memo>,
    pace: Option<Pace>,
    origin: Instant,
    in_flight: usize,
    /// Whether the backend is asked to notify.
    armed: bool,
    /// Whether completions are counted, and the budget applies.
    measured: bool,
    since_flush: u64,
    /// Position up to which the lane was read back.
    read_back: u64,
    /// What happened so far.
    pub tally: Tally,
}

/// Where a lane's requests come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The load as asked for.
    Load,
    /// Every block written, once.
    ReadBack,
    /// No new ones.
    Nothing,
}

impl Lane {
    /// A lane over a queue that is set up. Its buffers are `first_buffer..first_buffer + depth`.
    #[expect(clippy::too_many_arguments, reason = "each is another part of the set-up")]
    pub fn new(
        queue: VirtioBlkQueue<'static, u16>,
        notifier: Box<dyn QueueNotifier>,
        call: Arc<EventFd>,
        load: Load,
        memory: &Memory,
        first_buffer: usize,
        blocks: Blocks,
        random: Random,
    ) -> Self {
        let slot = |number| Slot {
            buffer: memory.buffer(first_buffer + number),
            kind: Kind::Flush,
            index: 0,
            sequence: 0,
            started_ns: 0,
        };
        let memo = load.nonce.map(|nonce| Memo {
            nonce,
            sequence: vec![0; blocks.count() as usize],
            busy: vec![false; blocks.count() as usize],
        });
        // A sequence of its own: the same blocks are visited in the same order at any rate.
        let arrivals = Random::new(random.clone().next_u64());
        Self {
            queue,
            notifier,
            call,
            load,
            slots: (0..load.depth).map(slot).collect(),
            blocks,
            random,
            memo,
            pace: load.interval_ns.map(|interval| Pace::new(interval, arrivals)),
            origin: Instant::now(),
            in_flight: 0,
            armed: true,
            measured: false,
            since_flush: 0,
            read_back: 0,
            tally: Tally { series: load.series_ns.map(Series::new), ..Tally::default() },
        }
    }

    /// Requests the backend has not answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Counts completions, or not. Errors and wrong blocks count at any time.
    pub fn measure(&mut self, measured: bool) {
        self.measured = measured;
    }

    /// Counts one more sleep until the backend's notification.
    pub fn count_sleep(&mut self) {
        self.tally.sleeps += u64::from(self.measured);
    }

    /// The instant from which the lane counts its time, the same for all lanes of a run.
    pub fn begin(&mut self, origin: Instant) {
        self.origin = origin;
    }

    /// Fills the queue from `source`; with a pace, the load begins to arrive instead.
    pub fn fill(&mut self, source: Source) -> io::Result<()> {
        let now = self.now();
        if let (Some(pace), Source::Load) = (&mut self.pace, source) {
            pace.free = (0..self.slots.len() as u16).collect();
            pace.begin(now);
            return Ok(());
        }
        for slot in self.in_flight..self.slots.len() {
            self.submit(slot as u16, source, now)?;
        }
        self.kick()
    }

    /// Whether the lane has completed as many requests as it should.
    pub fn is_spent(&self) -> bool {
        self.is_beyond_budget(self.tally.latency.total())
    }

    /// Takes completions, at most `depth` of them, and puts a request from `source` in the place
    /// of each; notifies the backend if it wants to be. Returns how many there were.
    pub fn pump(&mut self, source: Source) -> io::Result<usize> {
        self.disarm();
        let mut completed = 0;
        while completed < self.slots.len() {
            let Some(completion) = self.queue.completions().next() else { break };
            completed += 1;
            self.in_flight -= 1;
            let now = self.now();
            self.complete(completion.context, completion.ret, now);
            match &mut self.pace {
                Some(pace) if source == Source::Load => pace.free.push(completion.context),
                _ => self.submit(completion.context, source, now)?,
            }
        }
        if completed > 0 && source != Source::Nothing {
            self.kick()?;
        }
        Ok(completed)
    }

    /// Issues what has arrived, if the load has a pace.
    pub fn arrive(&mut self) -> io::Result<()> {
        let now = self.now();
        let mut arrived = false;
        while let Some((slot, at)) = self.pace.as_mut().and_then(|pace| pace.take(now)) {
            self.submit(slot, Source::Load, at)?;
            arrived = true;
        }
        if arrived { self.kick() } else { Ok(()) }
    }

    /// Whether requests arrive at a pace.
    pub fn is_paced(&self) -> bool {
        self.pace.is_some()
    }

    /// How long the lane can sleep if nothing completes; `None`: for ever.
    pub fn wait(&self) -> Option<Duration> {
        self.pace.as_ref()?.wait_ns(self.now()).map(Duration::from_nanos)
    }

    /// Asks to be notified of the next completion. False: there is one already, do not sleep.
    pub fn prepare_sleep(&mut self) -> bool {
        if !self.armed {
            self.queue.set_used_notif_enabled(true);
            self.armed = true;
        }
        !self.queue.completions().has_next()
    }

    /// Asks not to be notified. Only when a completion is there and not yet taken: the library
    /// stores the index of the next completion as the event to signal, which then lies behind.
    fn disarm(&mut self) {
        if self.armed && self.queue.completions().has_next() {
            self.queue.set_used_notif_enabled(false);
            self.armed = false;
        }
    }

    fn is_beyond_budget(&self, requests: u64) -> bool {
        self.measured && self.load.budget.is_some_and(|budget| requests >= budget)
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.queue.avail_notif_needed() {
            self.tally.kicks += u64::from(self.measured);
            self.notifier.notify()?;
        }
        Ok(())
    }

    /// Issues the next request from `source` in `slot`, if there is one.
    fn submit(&mut self, slot: u16, source: Source, now: u64) -> io::Result<()> {
        let next = match source {
            Source::Nothing => None,
            Source::ReadBack => self.next_to_read_back().map(|index| (Kind::Read, index)),
            Source::Load => self.next_of_load(),
        };
        let Some((kind, index)) = next else { return Ok(()) };
        let size = self.load.block_size;
        let block = self.blocks.block(index);
        let entry = &mut self.slots[usize::from(slot)];
        (entry.kind, entry.index, entry.started_ns) = (kind, index, now);
        if let Some(memo) = &mut self.memo {
            let place = index as usize;
            if kind != Kind::Flush {
                memo.busy[place] = true;
            }
            entry.sequence = memo.sequence[place];
            if kind == Kind::Write {
                entry.sequence = (entry.sequence & !UNKNOWN) + 1;
                // SAFETY: the buffer is this slot's own, and the device does not have it now.
                let data = unsafe { std::slice::from_raw_parts_mut(entry.buffer, size) };
                stamp::write(data, memo.nonce, block, u64::from(entry.sequence));
            }
        }
        let (buffer, offset) = (entry.buffer, block * size as u64);
        match kind {
            // SAFETY: the buffer is `size` bytes of shared memory that outlives the queue, and no
            // other request uses it.
            Kind::Read => unsafe { self.queue.read_raw(offset, buffer, size, slot) }?,
            // SAFETY: as above.
            Kind::Write => unsafe { self.queue.write_raw(offset, buffer, size, slot) }?,
            Kind::Flush => self.queue.flush(slot)?,
        }
        self.in_flight += 1;
        Ok(())
    }

    fn next_of_load(&mut self) -> Option<(Kind, u64)> {
        let started = self.tally.latency.total() + self.in_flight as u64;
        if self.is_beyond_budget(started) {
            return None;
        }
        if let Some(every) = self.load.flush_every {
            self.since_flush += 1;
            if self.since_flush > every {
                self.since_flush = 0;
                return Some((Kind::Flush, 0));
            }
        }
        let kind = match self.load.mode {
            Mode::Read | Mode::Randread => Kind::Read,
            Mode::Write | Mode::Randwrite => Kind::Write,
            Mode::Mixed if self.random.below(100) < self.load.read_percent => Kind::Read,
            Mode::Mixed => Kind::Write,
        };
        // Two requests for one block at a time have no defined outcome to compare with.
        loop {
            let index = self.blocks.next_index(&mut self.random);
            if !self.memo.as_ref().is_some_and(|memo| memo.busy[index as usize]) {
                return Some((kind, index));
            }
        }
    }

    fn next_to_read_back(&mut self) -> Option<u64> {
        let memo = self.memo.as_ref()?;
        let rest = memo.sequence.get(self.read_back as usize..)?;
        let step = rest.iter().position(|&sequence| sequence != 0 && sequence & UNKNOWN == 0)?;
        self.read_back += step as u64 + 1;
        Some(self.read_back - 1)
    }

    fn complete(&mut self, slot: u16, result: i32, now: u64) {
        let slot = self.slots[usize::from(slot)];
        if let (Some(series), true) = (&mut self.tally.series, slot.kind != Kind::Flush) {
            series.record(now);
        }
        if self.measured {
            let (count, latency) = match slot.kind {
                Kind::Flush => (&mut self.tally.flushes, &self.tally.flush_latency),
                Kind::Read => (&mut self.tally.reads, &self.tally.latency),
                Kind::Write => (&mut self.tally.writes, &self.tally.latency),
            };
            *count += 1;
            latency.record_alone(now.saturating_sub(slot.started_ns));
        }
        if result != 0 {
            self.tally.errors += 1;
            let block = self.blocks.block(slot.index);
            let error = io::Error::from_raw_os_error(-result);
            self.tally
                .first_error
                .get_or_insert_with(|| format!("{:?} of block {block}: {error}", slot.kind));
        }
        let Some(memo) = &mut self.memo else { return };
        let place = slot.index as usize;
        match slot.kind {
            Kind::Flush => return,
            Kind::Write if result == 0 => memo.sequence[place] = slot.sequence,
            Kind::Write => memo.sequence[place] = slot.sequence | UNKNOWN,
            Kind::Read => {
                let known = slot.sequence != 0 && slot.sequence & UNKNOWN == 0;
                if result == 0 && known {
                    let size = self.load.block_size;
                    // SAFETY: the device has given the buffer back.
                    let data = unsafe { std::slice::from_raw_parts(slot.buffer, size) };
                    let block = self.blocks.block(slot.index);
                    let sequence = u64::from(slot.sequence);
                    self.tally.verified.count(stamp::check(data, memo.nonce, block, sequence));
                }
            }
        }
        memo.busy[place] = false;
    }
}
