//! The profile of NVMe controllers: a guest's own driver works with the real one, whose state can be moved
//! to another that leads to the same namespaces.
//!
//! ```text
//!   running     doorbells: the guest's stores reach the function; nobody looks at a request
//!               registers: messages, kept and handed on; admin commands: looked at as they end (`admin`)
//!   captured    doorbells: by the shim to us, and on; of each command the pages that it writes are noted
//!   on hold     no doorbell goes on; once every command that was fetched has ended, the state is known (`rings`)
//!   take over   another function: reset, the same queues made anew, and brought to where they were (`own`)
//!   running     doorbells are direct again: the queues are the guest's, with no copy between
//! ```
//!
//! A doorbell page that is not captured during a move would go unseen; then completions and doorbells do not
//! fit each other, and the device does not come to rest: the move is refused, and nothing is lost.

mod admin;
mod own;
pub mod rings;
pub mod spec;
pub mod state;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use semper_device::hardware::Hardware;
use semper_device::page::{Page, WORDS};
use semper_device::registers::{Kind, Register};
use semper_device::{Activity, Bus, Counters, Device, Identity, Unreachable, Window};
use semper_nvme::command::Command;
use semper_nvme::data;
use semper_ring::GuestMemory;

use self::admin::Admin;
use self::spec::{CQE, SQE, cc, register};
use self::state::{Namespace, Pair, Registers, Ring, State};
use crate::function::{Function, OpenError};
use crate::profile::{errno, set_master, set_memory, take};

/// The name of this kind of device.
pub const KIND: &str = "nvme-pci";

/// A queue whose doorbell was not seen since the capture began has been silent for so long before it is
/// believed to be.
const SILENT: Duration = Duration::from_secs(1);

/// A controller.
pub struct Nvme {
    function: Function,
    memory: Arc<GuestMemory>,
    capabilities: u64,
    namespaces: Vec<Namespace>,
    registers: Registers,
    /// Writes that are still to reach the function.
    writes: VecDeque<(u64, u64, usize)>,
    admin: Option<Admin>,
    /// Doorbells that are still to reach it, by their word on the page.
    doorbells: VecDeque<(usize, u32)>,
    /// Of submission queues, as they were captured.
    tails: BTreeMap<u16, u32>,
    captured: Option<Instant>,
    /// Requests of before the capture are still to be looked at.
    sweep: bool,
    /// The device has written nobody knows where.
    everywhere: bool,
    hold: bool,
    /// Nothing reaches the function before it has taken a state over.
    incoming: bool,
    restored: Option<State>,
    saved: Option<State>,
    counters: Counters,
}

impl Nvme {
    /// Opens the controller at this address; see [`Function::open`]. With `incoming` its state comes later.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        container: File,
        group: File,
        address: &str,
        incoming: bool,
    ) -> Result<Self, OpenError> {
        let direct = Some(register::DOORBELLS);
        let mut function = Function::open(container, group, address, direct)?;
        let unfit =
            |why: &str| OpenError::Unfit { address: address.to_owned(), why: why.to_owned() };
        if function.identity().class != [2, 8, 1] {
            return Err(unfit("it is no NVMe controller"));
        }
        let capabilities = function.read_long(register::CAP);
        if capabilities & spec::STRIDE != 0 || capabilities >> 48 & 0xf != 0 {
            return Err(unfit("its doorbells are not on one page, or its pages are not of 4 KiB"));
        }
        let namespaces = own::probe(&mut function).map_err(|why| unfit(&why))?;
        log::info!("opened an NVMe controller address={address} namespaces={}", namespaces.len());
        Ok(Self {
            function,
            memory: Arc::new(GuestMemory::empty()),
            capabilities: capabilities & !spec::MEMORY_BUFFERS,
            namespaces,
            registers: Registers::default(),
            writes: VecDeque::new(),
            admin: None,
            doorbells: VecDeque::new(),
            tails: BTreeMap::new(),
            captured: None,
            sweep: false,
            everywhere: false,
            hold: incoming,
            incoming,
            restored: None,
            saved: None,
            counters: Counters::default(),
        })
    }

    /// Carries out a write of the guest.
    fn carry_out(&mut self, (offset, value, size): (u64, u64, usize), bus: &dyn Bus) {
        if offset == register::CC {
            let on = value as u32 & cc::EN != 0;
            if !on {
                // With it goes all that commands have set up.
                self.admin = None;
                self.tails.clear();
            } else if self.admin.is_none() {
                self.admin = Admin::new(&self.registers, bus).ok();
            }
        }
        match size {
            8 => self.function.write_long(offset, value),
            _ => self.function.write(offset, value as u32),
        }
    }

    /// Notes the pages that a command has the device write.
    fn note(&mut self, queue: u16, command: &Command, bus: &mut dyn Bus) {
        if self.captured.is_none() || command.opcode() & spec::TO_HOST == 0 {
            return;
        }
        let len = match (queue, command.opcode()) {
            (0, spec::admin::IDENTIFY | spec::admin::GET_FEATURES) => Some(4096),
            (0, spec::admin::GET_LOG) => {
                let words = command.dword(10) >> 16 | (command.dword(11) & 0xffff) << 16;
                Some((u64::from(words) + 1) * 4)
            }
            // Of a namespace that came later nobody knows how large a block is.
            (1.., spec::READ) => state::bytes(&self.namespaces, command),
            _ => None,
        };
        match len.and_then(|len| data::ranges(command, len, bus).ok()) {
            Some(ranges) => ranges.into_iter().for_each(|(address, len)| bus.wrote(address, len)),
            None => self.everywhere = true,
        }
    }

    fn note_all(&mut self, queue: u16, commands: Vec<Command>, bus: &mut dyn Bus) {
        commands.iter().for_each(|command| self.note(queue, command, bus));
    }

    /// Notes what is in a part of a submission queue.
    fn note_places(
        &mut self,
        queue: u16,
        (from, to): (u32, u32),
        bus: &mut dyn Bus,
    ) -> Result<(), Unreachable> {
        let found = self.admin.as_ref().and_then(|admin| admin.submissions.get(&queue).copied());
        let Some(created) = found.filter(|created| from < created.size && to <= created.size)
        else {
            return Ok(());
        };
        let mut place = from;
        while place != to {
            let mut entry = [0; SQE as usize];
            bus.read(created.address + u64::from(place) * SQE, &mut entry)?;
            self.note(queue, &Command::from(entry), bus);
            place += 1;
            if place == created.size && to != created.size {
                place = 0;
            }
        }
        Ok(())
    }

    fn size(&self, queue: u16) -> u32 {
        let queues = self.admin.as_ref().map(|admin| &admin.submissions);
        queues.and_then(|queues| queues.get(&queue)).map_or(0, |created| created.size)
    }

    /// A doorbell that came by way of us.
    fn ring(&mut self, word: usize, value: u32, bus: &mut dyn Bus) -> Result<(), Unreachable> {
        let queue = (word / 2) as u16;
        if word % 2 == 0 {
            if queue == 0 {
                let admin = self.admin.as_mut().map(|admin| admin.rung(value, bus)).transpose()?;
                self.note_all(0, admin.unwrap_or_default(), bus);
            } else if self.captured.is_some() {
                // Of the first one nobody knows where it began.
                let all = (0, self.size(queue));
                let from = self.tails.get(&queue).map_or(all, |tail| (*tail, value));
                self.note_places(queue, from, bus)?;
            }
            self.tails.insert(queue, value);
        }
        self.function.write(register::DOORBELLS + 4 * word as u64, value);
        Ok(())
    }

    /// Looks at the admin commands that have ended.
    fn look(&mut self, bus: &mut dyn Bus) -> Result<(), Unreachable> {
        let Some(admin) = &mut self.admin else { return Ok(()) };
        let before = admin.count;
        let commands = admin.look(bus)?;
        self.counters.admin += admin.count - before;
        self.note_all(0, commands, bus);
        Ok(())
    }

    /// Everything that may be in flight when a capture begins is among all entries of all queues.
    fn sweep(&mut self, bus: &mut dyn Bus) -> Result<(), Unreachable> {
        let queues: Vec<_> =
            self.admin.iter().flat_map(|admin| admin.submissions.keys().copied()).collect();
        for queue in queues {
            self.note_places(queue, (0, self.size(queue)), bus)?;
        }
        Ok(())
    }

    /// Where a pair of I/O queues stands; `None` while a command has not ended.
    fn pair(&self, id: u16, bus: &dyn Bus) -> Result<Option<Pair>, Unreachable> {
        let Some(admin) = &self.admin else { return Ok(None) };
        let Some(from) = admin.submissions.get(&id) else { return Ok(None) };
        let completes_in = (from.word >> 16) as u16;
        let Some(to) = admin.completions.get(&completes_in) else { return Ok(None) };
        let mut ring = vec![0; (u64::from(to.size) * CQE) as usize];
        bus.read(to.address, &mut ring)?;
        let position = rings::position(&ring);
        let fetched = match position.last {
            Some((queue, _)) if queue != id => return Ok(None),
            last => last.map_or(0, |(_, head)| head),
        };
        let rest = match (self.tails.get(&id), self.captured) {
            (Some(tail), _) => *tail == fetched,
            (None, Some(since)) => since.elapsed() >= SILENT,
            (None, None) => false,
        };
        let pair = Pair {
            id,
            completes_in,
            submissions: Ring { address: from.address, size: from.size, at: fetched },
            completions: Ring { address: to.address, size: to.size, at: position.completed },
            flags: (from.word & 0xffff, to.word),
        };
        Ok((rest && State::commands(&pair, 0, 0).is_some()).then_some(pair))
    }

    /// The state, once nothing is in flight.
    fn rest(&mut self, bus: &mut dyn Bus) -> Result<Option<State>, Unreachable> {
        self.look(bus)?;
        let ids = self.function.identity().ids;
        let mut state = State::new(ids, self.capabilities, self.namespaces.clone());
        state.registers = self.registers;
        let tail_is_known = self.tails.contains_key(&0);
        let Some(admin) = &mut self.admin else { return Ok(Some(state)) };
        if !tail_is_known {
            let commands = admin.guess(bus)?;
            self.note_all(0, commands, bus);
        }
        let Some(admin) = &self.admin else { return Ok(None) };
        let Some(events) = admin.events() else { return Ok(None) };
        let pair = admin.pair();
        if State::commands(&pair, events.len() as u32, 0).is_none() {
            return Ok(None);
        }
        (state.admin, state.events, state.features) = (Some(pair), events, admin.features());
        let completions: Vec<_> = admin.completions.values().copied().collect();
        for id in admin.submissions.keys() {
            let Some(pair) = self.pair(*id, bus)? else { return Ok(None) };
            state.pairs.push(pair);
        }
        for queue in completions {
            bus.wrote(queue.address, u64::from(queue.size) * CQE);
        }
        bus.wrote(pair.completions.address, u64::from(pair.completions.size) * CQE);
        if self.everywhere {
            let memory = Arc::clone(bus.memory());
            memory.specs().for_each(|spec| bus.wrote(spec.guest_addr, spec.size));
        }
        Ok(Some(state))
    }

    fn work(&mut self, page: &Page, bus: &mut dyn Bus) -> Result<bool, Unreachable> {
        let mut busy = false;
        let woken = take(self.function.wake());
        while let Some(write) = self.writes.pop_front() {
            self.carry_out(write, bus);
            busy = true;
        }
        for word in 0..WORDS {
            if page.take_told(word) {
                self.doorbells.push_back((word, page.load(word)));
            }
        }
        if std::mem::take(&mut self.sweep) {
            self.sweep(bus)?;
        }
        while !self.hold {
            let Some((word, value)) = self.doorbells.pop_front() else { break };
            self.ring(word, value, bus)?;
            busy = true;
        }
        if woken {
            // Before the guest hears of it.
            self.look(bus)?;
            bus.interrupt(0);
            busy = true;
        }
        if self.hold && self.captured.is_some() && self.saved.is_none() {
            self.saved = self.rest(bus)?;
        }
        Ok(busy)
    }

    /// Makes event requests of before in the guest's own memory: their answers belong there.
    fn ask_for_events(&self, state: &State) -> Result<(), String> {
        let Some(pair) = state.admin.filter(|_| !state.events.is_empty()) else { return Ok(()) };
        let ring = pair.submissions;
        let first = ring.at + ring.size - state.events.len() as u32;
        for (index, id) in state.events.iter().enumerate() {
            let place = (first + index as u32) % ring.size;
            let mut entry = [0; SQE as usize];
            entry[0] = spec::admin::EVENT;
            entry[2..4].copy_from_slice(&id.to_le_bytes());
            let mut done = 0;
            let written = self.memory.for_each_slice(
                ring.address + u64::from(place) * SQE,
                SQE,
                |to, len| {
                    // SAFETY: `to` is mapped for so many bytes; the guest stands still.
                    unsafe { std::ptr::copy_nonoverlapping(entry[done..].as_ptr(), to, len) };
                    done += len;
                },
            );
            if !written {
                return Err("the admin queue is not in the guest's memory".to_owned());
            }
        }
        self.function.write(register::DOORBELLS, ring.at);
        Ok(())
    }

    fn read_memory(&self, address: u64, into: &mut [u8]) -> bool {
        let mut done = 0;
        self.memory.for_each_slice(address, into.len() as u64, |from, len| {
            let part = &mut into[done..done + len];
            // SAFETY: `from` is mapped for so many bytes; the guest stands still.
            unsafe { std::ptr::copy_nonoverlapping(from, part.as_mut_ptr(), len) };
            done += len;
        })
    }

    fn take_state_over(&mut self, state: &State) -> Result<(), String> {
        let master = self.function.is_master();
        let followed = self.follow(state);
        // As the guest has it, also where it is tried again.
        let set = self.function.set_master(master);
        followed.and(set.map_err(|error| format!("cannot set bus mastering: {error}")))
    }

    fn follow(&mut self, state: &State) -> Result<(), String> {
        let told = |what: &str, error: std::io::Error| format!("cannot {what}: {error}");
        self.function.reset().map_err(|error| told("reset the device", error))?;
        self.function.set_master(true).map_err(|error| told("allow DMA", error))?;
        let queues = state.admin.iter().chain(&state.pairs).flat_map(|pair| {
            let (from, to) = (pair.submissions, pair.completions);
            [(from.address, u64::from(from.size) * SQE), (to.address, u64::from(to.size) * CQE)]
        });
        // The page behind them is read into.
        let ranges: Vec<_> = queues.map(|(address, len)| (address, len + 4096 + 4095)).collect();
        self.function
            .iommu
            .follow_but(&self.memory, &ranges)
            .map_err(|error| told("take memory away", error))?;
        let followed = own::follow(&mut self.function, state);
        let memory = Arc::clone(&self.memory);
        let back = self.function.iommu.follow(&memory).map_err(|error| told("give memory", error));
        followed.and(back)?;
        self.ask_for_events(state)
    }
}

impl Device for Nvme {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn identity(&self) -> Identity {
        self.function.identity()
    }

    fn window(&self) -> Window {
        self.function.window()
    }

    fn registers(&self) -> Vec<Register> {
        // No doorbell: when the state is taken, every one was carried out.
        vec![
            Register::one("AQA", register::AQA, 4, Kind::Level),
            Register::one("ASQ", register::ASQ, 8, Kind::Level),
            Register::one("ACQ", register::ACQ, 8, Kind::Level),
            Register::one("CC", register::CC, 4, Kind::Event),
            Register::one("CAP", register::CAP, 8, Kind::Status),
            Register::one("CSTS", register::CSTS, 4, Kind::Status),
        ]
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) {
        let registers = self.registers;
        for (index, byte) in into.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64);
            let long = |start: u64, value: u64| value >> (8 * (at - start));
            let value = match at {
                0x00..0x08 => long(0, self.capabilities),
                0x14..0x18 => long(0x14, registers.cc.into()),
                0x24..0x28 => long(0x24, registers.aqa.into()),
                0x28..0x30 => long(0x28, registers.asq),
                0x30..0x38 => long(0x30, registers.acq),
                // Version, interrupt masks, status.
                0x08..0x14 | 0x1c..0x20 | spec::CRTO..0x6c => {
                    long(at & !3, self.function.read(at & !3).into())
                }
                // Memory of the controller's own, boot partitions: not handed on.
                _ => 0,
            };
            *byte = value as u8;
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let value = u64::from_le_bytes(std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0)));
        let low = |old: u64| old >> 32 << 32 | value;
        let high = |old: u64| value << 32 | old & 0xffff_ffff;
        let registers = &mut self.registers;
        match (offset, bytes.len()) {
            (register::INTMS | register::INTMC, 4) => {}
            (register::CC, 4) => registers.cc = value as u32,
            (register::AQA, 4) => registers.aqa = value as u32,
            (register::ASQ, 8) => registers.asq = value,
            (register::ACQ, 8) => registers.acq = value,
            (register::ASQ, 4) => registers.asq = low(registers.asq),
            (register::ACQ, 4) => registers.acq = low(registers.acq),
            (0x2c, 4) => registers.asq = high(registers.asq),
            (0x34, 4) => registers.acq = high(registers.acq),
            _ => return,
        }
        if !self.incoming {
            self.writes.push_back((offset, value, bytes.len()));
        }
    }

    fn step(&mut self, page: &Page, bus: &mut dyn Bus) -> Activity {
        if self.incoming {
            take(self.function.wake());
            return Activity::Idle;
        }
        match self.work(page, bus) {
            Ok(true) => Activity::Busy,
            Ok(false) if self.in_flight() > 0 => Activity::Waiting,
            Ok(false) => Activity::Idle,
            Err(error) => {
                self.counters.refused += 1;
                if let Some(admin) = &mut self.admin {
                    admin.unknown = Some("its driver has given it queues that are no memory");
                }
                log::debug!("a queue is not to be read error=\"{error}\"");
                Activity::Idle
            }
        }
    }

    fn reset(&mut self) {
        if let Err(error) = self.function.reset() {
            log::warn!("the function was not reset error=\"{error}\"");
        }
        self.registers = Registers::default();
        (self.admin, self.saved) = (None, None);
        self.writes.clear();
        self.doorbells.clear();
        self.tails.clear();
    }

    fn is_resetting(&self) -> bool {
        false
    }

    fn hold(&mut self, hold: bool) {
        self.hold = hold;
        self.saved = None;
    }

    fn in_flight(&self) -> usize {
        usize::from(self.hold && self.captured.is_some() && self.saved.is_none())
    }

    fn save(&self) -> String {
        // Strings, numbers and arrays: nothing that JSON does not have.
        self.saved.as_ref().and_then(|state| serde_json::to_string(state).ok()).unwrap_or_default()
    }

    fn restore(&mut self, state: &str, _page: &Page, replayed: bool) -> Result<usize, String> {
        if !self.incoming {
            return Err("it is in use".to_owned());
        }
        let ids = self.function.identity().ids;
        let mut state = State::read(state, ids, self.capabilities, &self.namespaces)?;
        let values = |r: &Registers| [r.cc.into(), r.aqa.into(), r.asq, r.acq];
        let pairs = values(&self.registers).into_iter().zip(values(&state.registers));
        let differing = pairs.filter(|(ours, theirs)| ours != theirs).count();
        if replayed {
            state.registers = self.registers;
        }
        self.restored = Some(state);
        Ok(differing)
    }

    fn owed(&self) -> Vec<u16> {
        // How far the driver has read its completions is known to the device alone.
        self.admin.as_ref().map(Admin::vectors).unwrap_or_default()
    }

    fn asserts_line(&self) -> bool {
        false
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn hardware(&self) -> Option<&dyn Hardware> {
        Some(self)
    }

    fn hardware_mut(&mut self) -> Option<&mut dyn Hardware> {
        Some(self)
    }
}

impl Hardware for Nvme {
    fn registers_file(&self) -> (BorrowedFd<'_>, u64) {
        self.function.registers_file()
    }

    fn wake(&self) -> BorrowedFd<'_> {
        self.function.wake().as_fd()
    }

    fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), i32> {
        set_memory(&mut self.function, &mut self.memory, memory)
    }

    fn set_master(&mut self, on: bool) {
        set_master(&mut self.function, on);
    }

    fn set_vectors(&mut self, vectors: Option<&[Option<File>]>) -> Result<(), i32> {
        self.function.set_vectors(vectors).map_err(errno)
    }

    fn capture(&mut self, on: bool) {
        self.captured = on.then(Instant::now);
        (self.sweep, self.everywhere) = (on, false);
        self.tails.clear();
    }

    fn unmovable(&self) -> Option<String> {
        let admin = self.admin.as_ref();
        if self.registers.cc & cc::EN != 0 && admin.is_none() && !self.incoming {
            return Some("its admin queue is no memory of the guest".to_owned());
        }
        let admin = admin?;
        let mut targets: Vec<_> = admin.submissions.values().map(|made| made.word >> 16).collect();
        targets.sort_unstable();
        targets.dedup();
        let paired = targets.len() == admin.submissions.len()
            && admin.submissions.len() == admin.completions.len();
        let why = match (admin.unknown, paired) {
            (Some(why), _) => why,
            (None, false) => "its queues are not in pairs",
            (None, true) => return None,
        };
        Some(format!(
            "the controller's state is not known: {why}; a restart of the guest clears it"
        ))
    }

    fn take_over(&mut self) -> Result<(), String> {
        let Some(state) = self.restored.clone() else {
            return Err("the device has no state yet".to_owned());
        };
        self.take_state_over(&state)?;
        self.registers = state.registers;
        self.admin = Admin::restored(&state, |address, into| self.read_memory(address, into));
        (self.incoming, self.restored) = (false, None);
        Ok(())
    }
}
