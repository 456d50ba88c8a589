//! Registers, doorbells, and one step of all.
//!
//! ```text
//!   disabled ──CC.EN──► ready ──CC.EN=0, or a reset──► resetting ──nothing in flight──► disabled
//!                         └──a queue is no memory, entry sizes are wrong──► failed (CSTS.CFS) ──► resetting
//! ```
//!
//! Accesses to registers change values alone ([`Device::write`]); all that follows from them is done by
//! [`Device::step`], so they can come at any time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use semper_block::Op;
use semper_device::ledger::Ledger;
use semper_device::page::Page;
use semper_device::registers::{Kind, Register};
use semper_device::{Activity, Bus, Counters, Device, Identity, Window};

use crate::admin::{Outcome, Postponed};
use crate::command::Command;
use crate::data;
use crate::features::Features;
use crate::identify::Told;
use crate::journal::{self, Journal};
use crate::queue::{ADMIN_MOST, Answer, Completion, Submission};
use crate::spec::{
    ALL_NAMESPACES, DATA_MOST, IO_QUEUES_MOST, NAMESPACE, QUEUE_MOST, Status, VERSION, cc, csts,
    io, register,
};
use crate::storage::{Ended, IN_FLIGHT_MOST, Job, Storage};

/// Commands of one queue that are taken before the next one's turn.
const BURST: usize = 32;
/// Completions that wait for room in one queue before its commands wait as well. Those that wait are a part
/// of the state, and what a move carries is bounded.
const WAITING_MOST: usize = 8;
/// Ranges of one dataset management command.
const DSM_RANGES: usize = 256;

/// What is decided when the controller is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// At most 20 bytes of ASCII.
    pub serial: String,
    /// I/O queues, from 1 to [`IO_QUEUES_MOST`].
    pub queues: u16,
}

/// Registers that hold what was written to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Registers {
    pub mask: u32,
    pub cc: u32,
    pub csts: u32,
    pub aqa: u32,
    pub asq: u64,
    pub acq: u64,
}

/// The controller.
pub struct Controller {
    pub(crate) queues: u16,
    pub(crate) told: Told,
    pub(crate) storage: Box<dyn Storage>,
    pub(crate) registers: Registers,
    pub(crate) submissions: BTreeMap<u16, Submission>,
    pub(crate) completions: BTreeMap<u16, Completion>,
    /// The doorbells as they were when last looked at.
    pub(crate) seen: Vec<u32>,
    /// Asynchronous event requests that wait for an event.
    pub(crate) event_requests: Vec<u16>,
    /// Events that wait for a request.
    pub(crate) events: VecDeque<u32>,
    /// Errors are not told of before the driver has read the log.
    pub(crate) errors_masked: bool,
    pub(crate) postponed: Vec<Postponed>,
    pub(crate) features: Features,
    pub(crate) counters: Counters,
    /// How often the guest has made it fail.
    failures: u64,
    pub(crate) resetting: bool,
    hold: bool,
    /// The queue whose turn it is.
    turn: u16,
    ended: Vec<Ended>,
    /// What the next process goes on from, if there is to be one.
    pub(crate) journal: Option<Journal>,
    /// What [`Controller::saved`] has is newer than what the journal has.
    pub(crate) changed: bool,
    /// Commands that another process has taken and not ended.
    pub(crate) again: VecDeque<(u16, u16, Command)>,
}

/// Where a doorbell is on its page: of a submission queue, or of a completion queue.
fn doorbell(queue: u16, completes: bool) -> usize {
    usize::from(queue) * 2 + usize::from(completes)
}

impl Controller {
    /// On this storage.
    pub fn new(settings: Settings, storage: Box<dyn Storage>) -> Self {
        let queues = settings.queues.clamp(1, IO_QUEUES_MOST);
        let told = Told {
            ids: IDENTITY.ids,
            serial: settings.serial,
            blocks: 0,
            block_size: 512,
            read_only: false,
        };
        Self {
            queues,
            told,
            storage,
            registers: Registers::default(),
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            seen: vec![0; 2 * (usize::from(queues) + 1)],
            event_requests: Vec::new(),
            events: VecDeque::new(),
            errors_masked: false,
            postponed: Vec::new(),
            features: Features::default(),
            counters: Counters::default(),
            failures: 0,
            resetting: false,
            hold: false,
            turn: 1,
            ended: Vec::new(),
            journal: None,
            changed: false,
            again: VecDeque::new(),
        }
    }

    /// Everything that is no part of each request: it changes seldom.
    fn keep(&mut self) {
        if std::mem::take(&mut self.changed)
            && let Some(journal) = &self.journal
        {
            journal.put(&self.saved());
        }
    }

    pub(crate) fn next_generation(&self) -> u64 {
        self.journal.as_ref().map_or(0, Journal::next_generation)
    }

    fn is_ready(&self) -> bool {
        self.registers.csts & (csts::RDY | csts::CFS) == csts::RDY
    }

    fn fail(&mut self, why: &str) {
        self.failures += 1;
        // A guest can do it as often as it likes, and the log is the host's.
        if self.failures.is_power_of_two() {
            let times = self.failures;
            log::warn!("the controller has failed, awaits its reset cause=\"{why}\" times={times}");
        }
        self.counters.refused += 1;
        self.changed = true;
        self.registers.csts |= csts::CFS;
    }

    /// The image's size counts from now on: it may have changed before it was taken.
    fn look_at_storage(&mut self) {
        self.told.block_size = self.storage.block_size();
        self.told.blocks = self.storage.capacity() / u64::from(self.told.block_size);
        self.told.read_only = self.storage.is_read_only();
    }

    fn enable(&mut self, page: &Page) {
        let Registers { cc, aqa, asq, acq, .. } = self.registers;
        self.look_at_storage();
        let sizes = [(aqa & 0xfff) + 1, (aqa >> 16 & 0xfff) + 1];
        let bases = [asq, acq];
        let queues_fit = sizes.iter().all(|size| (2..=ADMIN_MOST).contains(size))
            && bases.iter().all(|base| base % 4096 == 0 && base.checked_add(4096 * 64).is_some());
        if !queues_fit || cc & cc::ONLY_ZERO != 0 {
            return self.fail("the admin queues, or CC, are none that it can do");
        }
        self.changed = true;
        page.clear();
        self.seen.fill(0);
        self.submissions.insert(0, Submission::new(asq, sizes[0], 0));
        self.completions.insert(0, Completion::new(acq, sizes[1], 0, true));
        self.registers.csts = csts::RDY;
    }

    /// The end of a reset, with nothing in flight.
    fn disable(&mut self, page: &Page) {
        page.clear();
        self.seen.fill(0);
        self.submissions.clear();
        self.completions.clear();
        self.event_requests.clear();
        self.events.clear();
        self.postponed.clear();
        (self.errors_masked, self.turn, self.resetting) = (false, 1, false);
        self.features = Features::default();
        self.registers.csts = 0;
        self.again.clear();
        self.changed = true;
        // First: what is free is not done again, and of no queue is anything left.
        self.journal.iter_mut().for_each(Journal::free_all);
    }

    fn shut_down(&mut self) {
        let asked = self.registers.cc & cc::SHN != 0;
        if asked && self.registers.csts & csts::SHST == 0 && self.storage.in_flight() == 0 {
            self.storage.settle();
            self.registers.csts |= csts::SHST_DONE;
            self.changed = true;
        }
    }

    /// Looks at all doorbells. A driver that rings for a queue that is not there, or with a value
    /// beyond the queue's end, is told so as the specification has it.
    fn look_at_doorbells(&mut self, page: &Page) {
        for queue in 0..=self.queues {
            for completes in [false, true] {
                let at = doorbell(queue, completes);
                let value = page.load(at);
                if value == self.seen[at] {
                    continue;
                }
                self.seen[at] = value;
                self.counters.rung += u64::from(!page.take_told(at));
                let moved = match completes {
                    false => {
                        self.submissions.get_mut(&queue).map(|queue| (queue.size, &mut queue.tail))
                    }
                    true => {
                        self.completions.get_mut(&queue).map(|queue| (queue.size, &mut queue.head))
                    }
                };
                match moved {
                    Some((size, place)) if value < size => *place = value,
                    Some(_) => self.tell_error(1),
                    None => self.tell_error(0),
                }
            }
        }
    }

    /// Writes to registers that are no doorbells (0), or have no such value (1).
    fn tell_error(&mut self, information: u32) {
        self.counters.refused += 1;
        if !self.errors_masked {
            self.changed = true;
            self.errors_masked = true;
            self.events.push_back(1 << 16 | information << 8);
        }
    }

    fn tell_events(&mut self) {
        while !self.event_requests.is_empty() && !self.events.is_empty() {
            self.changed = true;
            let (id, event) = (self.event_requests.remove(0), self.events.pop_front());
            self.answer(Answer::new(0, id, Status::OK, event.unwrap_or(0)));
        }
    }

    pub(crate) fn answer(&mut self, answer: Answer) {
        let completes_in = self.submissions.get(&answer.queue).map(|queue| queue.completes_in);
        let queue = completes_in.and_then(|queue| self.completions.get_mut(&queue));
        match (queue, answer.slot.zip(self.journal.as_mut())) {
            (Some(queue), _) => queue.waiting.push_back(answer),
            // A queue that is gone has nobody who waits.
            (None, Some((slot, journal))) => journal.free(slot),
            (None, None) => {}
        }
    }

    /// Takes commands of one queue; whether there were any.
    fn take(&mut self, queue: u16, page: &Page, bus: &mut dyn Bus) -> bool {
        for taken in 0..BURST {
            // No more than can be told of: a completion queue that nobody empties stops its queues.
            let completes_in = self.submissions.get(&queue).map(|queue| queue.completes_in);
            let stuck = completes_in
                .and_then(|queue| self.completions.get(&queue))
                .is_none_or(|queue| queue.waiting.len() >= WAITING_MOST);
            let full = self.storage.in_flight() >= IN_FLIGHT_MOST
                || bus.is_congested()
                || !self.again.is_empty()
                || self.journal.as_ref().is_some_and(|journal| !journal.has_room());
            if stuck || (full && queue != 0) || !self.is_ready() {
                return taken > 0;
            }
            let Some(submission) = self.submissions.get_mut(&queue) else { return taken > 0 };
            match submission.pop(bus) {
                Ok(Some(command)) if queue == 0 => self.begin_admin(command, page, bus),
                Ok(Some(command)) => {
                    let taken = (queue, submission.generation, submission.taken - 1);
                    let slot = self.journal.as_mut().and_then(|journal| {
                        let slot = journal.take(taken, &command);
                        journal.count(queue, false, taken.2 + 1);
                        slot
                    });
                    self.begin(queue, command, slot, bus);
                }
                Ok(None) => return taken > 0,
                Err(_) => {
                    self.fail("a submission queue is no memory of the guest");
                    return true;
                }
            }
        }
        true
    }

    fn begin_admin(&mut self, command: Command, page: &Page, bus: &mut dyn Bus) {
        self.counters.admin += 1;
        self.changed = true;
        match self.carry_out(&command, page, bus) {
            Outcome::Answered(status, result) => {
                if status != Status::OK {
                    self.counters.refused += 1;
                }
                self.answer(Answer::new(0, command.id(), status, result));
            }
            Outcome::Postponed(postponed) => self.postponed.push(postponed),
            Outcome::Kept => {}
        }
    }

    fn begin(&mut self, queue: u16, command: Command, slot: Option<u16>, bus: &mut dyn Bus) {
        match self.job(queue, &command, bus) {
            Ok(job) => self.storage.begin(Job { slot, ..job }, bus),
            Err(status) => {
                self.counters.refused += 1;
                self.answer(Answer { slot, ..Answer::new(queue, command.id(), status, 0) });
            }
        }
    }

    /// Commands that another process has taken, as many as there is room for; whether there were any.
    fn begin_again(&mut self, bus: &mut dyn Bus) -> bool {
        let mut any = false;
        while self.storage.in_flight() < IN_FLIGHT_MOST && !bus.is_congested() {
            let Some((queue, slot, command)) = self.again.pop_front() else { break };
            self.begin(queue, command, Some(slot), bus);
            any = true;
        }
        any
    }

    /// For a controller that has failed: of what another process had taken, nobody is told any more.
    fn forget_again(&mut self) {
        for (_, slot, _) in self.again.drain(..) {
            self.journal.iter_mut().for_each(|journal| journal.free(slot));
        }
    }

    /// What a command of an I/O queue asks for.
    fn job(&self, queue: u16, command: &Command, bus: &dyn Bus) -> Result<Job, Status> {
        let flushes = command.opcode() == io::FLUSH;
        if command.is_fused() {
            return Err(Status::FIELD);
        }
        match command.namespace() {
            NAMESPACE => {}
            ALL_NAMESPACES if flushes => {}
            _ => return Err(Status::NAMESPACE),
        }
        let id = command.id();
        let job = |op, range| Job {
            queue,
            id,
            op,
            range,
            data: Vec::new(),
            more: VecDeque::new(),
            stable: false,
            slot: None,
        };
        let op = match command.opcode() {
            io::FLUSH => return Ok(job(Op::Flush, (0, 0))),
            io::READ => Op::Read,
            io::WRITE => Op::Write { stable: command.is_forced() },
            // Bit 25: the blocks may be given back.
            io::WRITE_ZEROES => Op::WriteZeroes { unmap: command.dword(12) >> 25 & 1 != 0 },
            io::DSM => return self.discards(job(Op::Discard, (0, 0)), command, bus),
            _ => return Err(Status::OPCODE),
        };
        if self.told.read_only && op != Op::Read {
            return Err(Status::WRITE_PROTECTED);
        }
        let range = self.range(command.first_block(), command.blocks())?;
        let mut job = job(op, range);
        job.stable = matches!(op, Op::WriteZeroes { .. }) && command.is_forced();
        if matches!(op, Op::Read | Op::Write { .. }) {
            if range.1 > DATA_MOST {
                return Err(Status::FIELD);
            }
            job.data = data::ranges(command, range.1, bus)?;
        }
        Ok(job)
    }

    /// Blocks as bytes of the image.
    fn range(&self, first: u64, blocks: u64) -> Result<(u64, u64), Status> {
        let end = first.checked_add(blocks).filter(|end| *end <= self.told.blocks);
        end.ok_or(Status::RANGE)?;
        let size = u64::from(self.told.block_size);
        Ok((first * size, blocks * size))
    }

    fn discards(&self, mut job: Job, command: &Command, bus: &dyn Bus) -> Result<Job, Status> {
        // Advice about how often what is used: nothing is to be done.
        let nothing = Job { op: Op::Discard, range: (0, 0), ..job.clone() };
        if command.dword(11) & 4 == 0 {
            return Ok(nothing);
        }
        if self.told.read_only {
            return Err(Status::WRITE_PROTECTED);
        }
        let count = (command.dword(10) & 0xff) as usize + 1;
        debug_assert!(count <= DSM_RANGES);
        let mut list = vec![0; count * 16];
        let mut at = 0;
        for (address, len) in data::ranges(command, list.len() as u64, bus)? {
            let part = &mut list[at..at + len as usize];
            bus.read(address, part).map_err(|_| Status::TRANSFER)?;
            at += part.len();
        }
        for range in list.chunks_exact(16) {
            let blocks = u32::from_le_bytes(std::array::from_fn(|i| range[4 + i]));
            let first = u64::from_le_bytes(std::array::from_fn(|i| range[8 + i]));
            if blocks > 0 {
                job.more.push_back(self.range(first, blocks.into())?);
            }
        }
        match job.more.pop_front() {
            Some(range) => Ok(Job { range, ..job }),
            None => Ok(nothing),
        }
    }

    fn end(&mut self, ended: Ended) {
        let counters = &mut self.counters;
        match ended.op {
            Op::Read => {
                (counters.reads, counters.bytes_read) =
                    (counters.reads + 1, counters.bytes_read + ended.len)
            }
            Op::Write { .. } => {
                (counters.writes, counters.bytes_written) =
                    (counters.writes + 1, counters.bytes_written + ended.len)
            }
            Op::Flush => counters.flushes += 1,
            Op::Discard | Op::WriteZeroes { .. } => counters.others += 1,
        }
        counters.errors += u64::from(ended.status != Status::OK);
        if !self.resetting {
            let answer = Answer::new(ended.queue, ended.id, ended.status, 0);
            self.answer(Answer { slot: ended.slot, ..answer });
        }
    }

    /// Writes completions and interrupts; whether there were any.
    fn publish(&mut self, bus: &mut dyn Bus) -> bool {
        let (mut any, mut failed) = (false, false);
        let waiting = |queue: &(&u16, &mut Completion)| !queue.1.waiting.is_empty();
        for (number, queue) in self.completions.iter_mut().filter(waiting) {
            match queue.publish(*number, &self.submissions, self.journal.as_mut(), bus) {
                Ok(true) => {
                    any = true;
                    // What the administrator was answered is in no slot.
                    self.changed |= *number == 0;
                    if queue.interrupts {
                        bus.interrupt(queue.vector);
                    }
                }
                Ok(false) => {}
                Err(_) => failed = true,
            }
        }
        if failed {
            self.fail("a completion queue is no memory of the guest");
        }
        any
    }

    /// Commands of all queues, each in its turn; whether there were any.
    fn take_all(&mut self, page: &Page, bus: &mut dyn Bus) -> bool {
        let mut any = self.take(0, page, bus);
        for step in 0..self.queues {
            let queue = (self.turn - 1 + step) % self.queues + 1;
            if self.submissions.contains_key(&queue) {
                any |= self.take(queue, page, bus);
            }
        }
        self.turn = self.turn % self.queues + 1;
        any
    }

    fn advance(&mut self, bus: &mut dyn Bus) -> bool {
        let mut ended = std::mem::take(&mut self.ended);
        self.storage.advance(bus, &mut ended);
        let any = !ended.is_empty();
        if let Some(journal) = self.journal.as_ref().filter(|_| self.storage.has_lost()) {
            journal.lose();
        }
        ended.drain(..).for_each(|ended| self.end(ended));
        self.ended = ended;
        any
    }
}

/// Of no maker: the vendor is the one that QEMU's own devices have, the device none of theirs, for a
/// driver knows some of theirs by what they do wrong.
pub(crate) const IDENTITY: Identity = Identity {
    ids: (0x1b36, 0x5e01),
    subsystem: (0x1af4, 0x5e01),
    // Mass storage, non-volatile memory, NVM Express.
    class: [0x02, 0x08, 0x01],
    revision: 1,
};

impl Device for Controller {
    fn kind(&self) -> &'static str {
        "nvme"
    }

    fn identity(&self) -> Identity {
        IDENTITY
    }

    fn window(&self) -> Window {
        Window {
            size: 0x4000,
            direct: Some(register::DOORBELLS),
            table: 0x2000,
            pending: 0x3000,
            vectors: self.queues + 1,
        }
    }

    fn registers(&self) -> Vec<Register> {
        let doorbells = 2 * (u64::from(self.queues) + 1);
        vec![
            Register::one("AQA", register::AQA, 4, Kind::Level),
            Register::one("ASQ", register::ASQ, 8, Kind::Level),
            Register::one("ACQ", register::ACQ, 8, Kind::Level),
            Register::one("INTMS", register::INTMS, 4, Kind::Mask),
            Register::one("INTMC", register::INTMC, 4, Kind::Mask),
            Register::one("CC", register::CC, 4, Kind::Event),
            Register {
                name: "doorbells",
                offset: register::DOORBELLS,
                size: 4,
                count: doorbells,
                kind: Kind::Level,
            },
            Register::one("CAP", register::CAP, 8, Kind::Status),
            Register::one("VS", register::VS, 4, Kind::Status),
            Register::one("CSTS", register::CSTS, 4, Kind::Status),
        ]
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) {
        let Registers { mask, cc, csts, aqa, asq, acq } = self.registers;
        // Queue entries (0's based), contiguous queues, 10 s until ready, the NVM command set.
        let cap = u64::from(QUEUE_MOST - 1) | 1 << 16 | 20 << 24 | 1 << 37;
        let mut all = [0u8; 0x38];
        let mut put = |at: u64, value: &[u8]| {
            all[at as usize..at as usize + value.len()].copy_from_slice(value);
        };
        put(register::CAP, &cap.to_le_bytes());
        put(register::VS, &VERSION.to_le_bytes());
        put(register::INTMS, &mask.to_le_bytes());
        put(register::INTMC, &mask.to_le_bytes());
        put(register::CC, &cc.to_le_bytes());
        put(register::CSTS, &csts.to_le_bytes());
        put(register::AQA, &aqa.to_le_bytes());
        put(register::ASQ, &asq.to_le_bytes());
        put(register::ACQ, &acq.to_le_bytes());
        for (index, byte) in into.iter_mut().enumerate() {
            let at = offset.checked_add(index as u64).and_then(|at| usize::try_from(at).ok());
            *byte = at.and_then(|at| all.get(at)).copied().unwrap_or(0);
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let word = |at: usize| {
            u32::from_le_bytes(std::array::from_fn(|i| bytes.get(at + i).copied().unwrap_or(0)))
        };
        let registers = &mut self.registers;
        let low = |long: &mut u64| *long = *long & !0xffff_ffff | u64::from(word(0));
        let high = |long: &mut u64, value: u32| {
            *long = *long & 0xffff_ffff | u64::from(value) << 32;
        };
        // Others the specification does not allow, and a controller may do with them what it likes.
        match (offset, bytes.len()) {
            (register::INTMS, 4) => registers.mask |= word(0),
            (register::INTMC, 4) => registers.mask &= !word(0),
            (register::AQA, 4) => registers.aqa = word(0) & 0x0fff_0fff,
            (register::ASQ, 4) => low(&mut registers.asq),
            (0x2c, 4) => high(&mut registers.asq, word(0)),
            (register::ACQ, 4) => low(&mut registers.acq),
            (0x34, 4) => high(&mut registers.acq, word(0)),
            (register::ASQ, 8) => {
                low(&mut registers.asq);
                high(&mut registers.asq, word(4));
            }
            (register::ACQ, 8) => {
                low(&mut registers.acq);
                high(&mut registers.acq, word(4));
            }
            (register::CC, 4) => {
                let was = registers.cc;
                registers.cc = word(0) & cc::WRITABLE;
                self.resetting |= was & cc::EN != 0 && registers.cc & cc::EN == 0;
            }
            _ => {}
        }
        self.changed = true;
        self.keep();
    }

    fn step(&mut self, page: &Page, bus: &mut dyn Bus) -> Activity {
        let mut any = false;
        if self.resetting {
            any |= self.advance(bus);
            if self.storage.in_flight() > 0 {
                return if any { Activity::Busy } else { Activity::Waiting };
            }
            self.disable(page);
        }
        let enabled = self.registers.cc & cc::EN != 0;
        if enabled && self.registers.csts & (csts::RDY | csts::CFS) == 0 && !self.hold {
            self.enable(page);
        }
        if self.is_ready() {
            self.look_at_doorbells(page);
            any |= self.begin_again(bus);
            if !self.hold {
                any |= self.take_all(page, bus);
                self.tell_events();
            }
        } else {
            self.forget_again();
        }
        any |= self.advance(bus);
        self.shut_down();
        if self.is_ready() {
            any |= self.end_postponed(page);
            // Before the driver is told of it.
            self.keep();
            any |= self.publish(bus);
        }
        self.keep();
        match (any, self.in_flight()) {
            (true, _) => Activity::Busy,
            (false, 0) => Activity::Idle,
            (false, _) => Activity::Waiting,
        }
    }

    fn reset(&mut self) {
        self.registers = Registers { csts: self.registers.csts, ..Registers::default() };
        self.resetting = true;
        self.changed = true;
        self.keep();
    }

    fn is_resetting(&self) -> bool {
        self.resetting
    }

    fn hold(&mut self, hold: bool) {
        self.hold = hold;
    }

    fn in_flight(&self) -> usize {
        self.storage.in_flight() + self.again.len()
    }

    fn save(&self) -> String {
        self.saved()
    }

    fn restore(&mut self, state: &str, page: &Page, replayed: bool) -> Result<usize, String> {
        self.take_saved(state, page, replayed)
    }

    fn owed(&self) -> Vec<u16> {
        let owed = self.completions.values().filter(|queue| queue.interrupts && queue.is_owed());
        let mut vectors: Vec<_> = owed.map(|queue| queue.vector).collect();
        vectors.sort_unstable();
        vectors.dedup();
        vectors
    }

    fn asserts_line(&self) -> bool {
        let masked = |vector: u16| {
            self.registers.mask.checked_shr(vector.into()).is_some_and(|mask| mask & 1 != 0)
        };
        self.completions
            .values()
            .any(|queue| queue.interrupts && queue.is_owed() && !masked(queue.vector))
    }

    fn has_lost(&self) -> bool {
        self.storage.has_lost()
    }

    fn ledger_words(&self) -> Option<usize> {
        Some(journal::WORDS)
    }

    fn keep_in(&mut self, ledger: Arc<Ledger>) {
        self.journal = Some(Journal::new(ledger));
    }

    fn recover(&mut self, page: &Page) -> Result<(), String> {
        self.take_over(page)
    }

    fn counters(&self) -> Counters {
        Counters { in_flight: self.storage.in_flight() as u64, ..self.counters }
    }
}
