//! The controller with a driver of a few lines: a bus over memory of our own, a real image.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use semper_block::{Engine, Image, Io, Op, OpenOptions, Submission, SyncEngine};
use semper_device::page::Page;
use semper_device::{Activity, Bus, Device, Route, Unreachable};
use semper_ring::GuestMemory;
use tempfile::NamedTempFile;

use crate::command::command;
use crate::spec::{admin, csts, io, register};
use crate::{Controller, Settings, Store};

const MEMORY: usize = 1 << 20;
const IMAGE: u64 = 1 << 20;
const ASQ: u64 = 0x1000;
const ACQ: u64 = 0x2000;
const SQ: u64 = 0x3000;
const CQ: u64 = 0x4000;
const DATA: u64 = 0x1_0000;
const ENTRIES: u32 = 16;

struct Memory {
    memory: Arc<GuestMemory>,
    route: Route,
    interrupts: Vec<u16>,
    wrote: Vec<(u64, u64)>,
}

impl Bus for Memory {
    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn route(&self) -> Route {
        self.route
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Unreachable> {
        let len = into.len() as u64;
        let from = self.memory.translate(address, len).ok_or(Unreachable { address, len })?;
        // SAFETY: `translate` checked the range.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Unreachable> {
        let len = bytes.len() as u64;
        let to = self.memory.translate(address, len).ok_or(Unreachable { address, len })?;
        // SAFETY: `translate` checked the range.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    fn wrote(&mut self, address: u64, len: u64) {
        self.wrote.push((address, len));
    }

    fn interrupt(&mut self, vector: u16) {
        self.interrupts.push(vector);
    }

    fn is_congested(&self) -> bool {
        false
    }
}

/// An engine whose flushes fail while it is told so.
struct Failing(SyncEngine, Arc<AtomicBool>);

impl Engine for Failing {
    const CONCURRENT: bool = SyncEngine::CONCURRENT;

    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        if io.op == Op::Flush && self.1.load(Ordering::Relaxed) {
            return Submission::Done(-libc::EIO);
        }
        // SAFETY: the caller's.
        unsafe { self.0.submit(token, io) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }

    fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        self.0.reap(into);
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    fn add_waker(&mut self, fd: RawFd) -> std::io::Result<()> {
        self.0.add_waker(fd)
    }

    fn remove_waker(&mut self, fd: RawFd) {
        self.0.remove_waker(fd);
    }

    fn wait(&mut self) -> std::io::Result<()> {
        self.0.wait()
    }
}

/// A machine with one controller, and what its driver knows.
struct Machine {
    controller: Controller,
    page: Page,
    bus: Memory,
    image: NamedTempFile,
    /// Tail of each submission queue, head of each completion queue.
    tails: [u32; 3],
    heads: [u32; 3],
    next_id: u16,
}

fn controller(image: &NamedTempFile) -> Controller {
    let image = Arc::new(Image::open(image.path(), OpenOptions::default()).unwrap());
    let engine = SyncEngine::new(image.fd()).unwrap();
    let settings = Settings { serial: "serial-1".to_owned(), queues: 2 };
    Controller::new(settings, Box::new(Store::new(image, engine)))
}

impl Machine {
    fn off() -> Self {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(IMAGE).unwrap();
        let memory = Arc::new(GuestMemory::anonymous(0, MEMORY).unwrap());
        Self {
            controller: controller(&image),
            page: Page::new(0x4000, 0x1000).unwrap(),
            bus: Memory { memory, route: Route::Direct, interrupts: Vec::new(), wrote: Vec::new() },
            image,
            tails: [0; 3],
            heads: [0; 3],
            next_id: 1,
        }
    }

    /// Enabled, with one pair of I/O queues.
    fn on() -> Self {
        let mut machine = Self::off();
        machine.begin();
        machine
    }

    fn begin(&mut self) {
        self.enable();
        let size = ENTRIES - 1;
        assert_eq!(
            self.admin(admin::CREATE_CQ, CQ, &[(10, size << 16 | 1), (11, 1 << 16 | 3)]).0,
            0
        );
        assert_eq!(
            self.admin(admin::CREATE_SQ, SQ, &[(10, size << 16 | 1), (11, 1 << 16 | 1)]).0,
            0
        );
    }

    fn enable(&mut self) {
        let sizes = (ENTRIES - 1) << 16 | (ENTRIES - 1);
        self.controller.write(register::AQA, &sizes.to_le_bytes());
        self.controller.write(register::ASQ, &ASQ.to_le_bytes());
        self.controller.write(register::ACQ, &ACQ.to_le_bytes());
        self.controller.write(register::CC, &0x0046_0001u32.to_le_bytes());
        self.settle();
        assert_eq!(self.status(), csts::RDY);
    }

    fn status(&mut self) -> u32 {
        let mut bytes = [0; 4];
        self.controller.read(register::CSTS, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.controller.step(&self.page, &mut self.bus) == Activity::Idle {
                return;
            }
        }
        panic!("the controller is busy for ever");
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        self.bus.write(address, bytes).unwrap();
    }

    fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.bus.read(address, &mut bytes).unwrap();
        bytes
    }

    /// Puts a command into a queue without ringing; gives its number.
    fn submit(&mut self, queue: usize, entry: [u8; 64]) -> u16 {
        let mut entry = entry;
        entry[2..4].copy_from_slice(&self.next_id.to_le_bytes());
        let base = [ASQ, SQ, 0][queue];
        self.put(base + u64::from(self.tails[queue]) * 64, &entry);
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES;
        self.next_id += 1;
        self.next_id - 1
    }

    fn ring(&self, queue: usize) {
        self.page.store(2 * queue, self.tails[queue]);
    }

    /// The next completion: number, status, result. The phase has to be the one that is due.
    fn completion(&mut self, queue: usize, phase: bool) -> Option<(u16, u16, u32)> {
        let at = [ACQ, CQ, 0][queue] + u64::from(self.heads[queue]) * 16;
        let entry = self.get(at, 16);
        let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        if (half(14) & 1 == 1) != phase {
            return None;
        }
        self.heads[queue] = (self.heads[queue] + 1) % ENTRIES;
        self.page.store(2 * queue + 1, self.heads[queue]);
        let result = u32::from_le_bytes(entry[..4].try_into().unwrap());
        Some((half(12), half(14) >> 1, result))
    }

    fn one(&mut self, queue: usize, entry: [u8; 64]) -> (u16, u32) {
        let phase = self.phase(queue);
        let id = self.submit(queue, entry);
        self.ring(queue);
        self.settle();
        let (told, status, result) = self.completion(queue, phase).expect("a completion");
        assert_eq!(told, id);
        (status, result)
    }

    /// The phase that is due next: the queue's own says so.
    fn phase(&self, queue: usize) -> bool {
        self.controller.completions[&(queue as u16)].phase
    }

    fn admin(&mut self, opcode: u8, prp: u64, dwords: &[(usize, u32)]) -> (u16, u32) {
        let mut all = vec![(6, prp as u32), (7, (prp >> 32) as u32)];
        all.extend(dwords);
        self.one(0, command(opcode, 0, &all))
    }

    fn io(&mut self, opcode: u8, first: u32, blocks: u32, prps: [u64; 2]) -> u16 {
        self.one(1, transfer(opcode, first, blocks, prps)).0
    }

    fn on_disk(&self, offset: usize, len: usize) -> Vec<u8> {
        std::fs::read(self.image.path()).unwrap()[offset..offset + len].to_vec()
    }
}

fn transfer(opcode: u8, first: u32, blocks: u32, [prp1, prp2]: [u64; 2]) -> [u8; 64] {
    let dwords = [
        (1, 1),
        (6, prp1 as u32),
        (7, (prp1 >> 32) as u32),
        (8, prp2 as u32),
        (9, (prp2 >> 32) as u32),
        (10, first),
        (12, blocks - 1),
    ];
    command(opcode, 0, &dwords)
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31).wrapping_add(at.to_le_bytes()[1]) ^ seed)
        .collect()
}

#[test]
fn what_was_written_is_on_the_image_and_is_read_again() {
    let mut machine = Machine::on();
    let data = pattern(4096, 1);
    machine.put(DATA, &data);
    assert_eq!(machine.io(io::WRITE, 8, 8, [DATA, 0]), 0);
    assert_eq!(machine.on_disk(4096, 4096), data);
    assert_eq!(machine.io(io::READ, 8, 8, [DATA + 0x1_0000, 0]), 0);
    assert_eq!(machine.get(DATA + 0x1_0000, 4096), data);
    assert_eq!(machine.bus.interrupts.last(), Some(&1));
    assert_eq!(machine.bus.wrote, [(DATA + 0x1_0000, 4096)]);
    assert_eq!(machine.io(io::FLUSH, 0, 1, [0, 0]), 0);
    let counters = machine.controller.counters();
    assert_eq!((counters.reads, counters.writes, counters.flushes, counters.errors), (1, 1, 1, 0));
}

#[test]
fn data_may_lie_on_two_pages_or_behind_a_list_or_an_sgl() {
    let mut machine = Machine::on();
    let data = pattern(0x4000, 2);
    // Two pages, the first not from its beginning.
    machine.put(DATA + 0xe00, &data[..0x200]);
    machine.put(DATA + 0x3000, &data[0x200..0x400]);
    assert_eq!(machine.io(io::WRITE, 0, 2, [DATA + 0xe00, DATA + 0x3000]), 0);
    assert_eq!(machine.on_disk(0, 0x400), data[..0x400]);
    // A list, which ends at the end of its page: its last entry leads to another list.
    let (list, second) = (DATA + 0x8ff0, DATA + 0x9000);
    machine.put(list, &[DATA + 0x1000, second].map(u64::to_le_bytes).concat());
    machine.put(second, &[DATA + 0x2000, DATA + 0x3000].map(u64::to_le_bytes).concat());
    for (page, part) in [0, 0x1000, 0x2000, 0x3000].into_iter().zip(data.chunks(0x1000)) {
        machine.put(DATA + page, part);
    }
    assert_eq!(machine.io(io::WRITE, 16, 32, [DATA, list]), 0);
    assert_eq!(machine.on_disk(0x2000, 0x4000), data);
    // An SGL of a segment with three pieces.
    let piece = |address: u64, len: u32, kind: u8| {
        [&address.to_le_bytes()[..], &len.to_le_bytes(), &[0, 0, 0, kind]].concat()
    };
    let pieces =
        [piece(DATA + 0x2000, 0x10, 0), piece(DATA + 0x2010, 0x1ff0, 0), piece(DATA, 0x2000, 0)];
    machine.put(DATA + 0x9000, &pieces.concat());
    let mut entry = transfer(io::WRITE, 64, 32, [0, 0]);
    entry[1] = 0x40;
    entry[24..40].copy_from_slice(&piece(DATA + 0x9000, 48, 0x30));
    assert_eq!(machine.one(1, entry).0, 0);
    assert_eq!(machine.on_disk(0x8000, 0x2000), data[0x2000..]);
    assert_eq!(machine.on_disk(0xa000, 0x2000), data[..0x2000]);
}

#[test]
fn lists_that_loop_or_lead_nowhere_end_the_command_and_nothing_else() {
    let mut machine = Machine::on();
    // A list of one entry that leads to itself.
    let loops = DATA + 0x8ff8;
    machine.put(loops, &loops.to_le_bytes());
    for prps in [
        [DATA, loops],
        [DATA, u64::MAX - 7],
        [DATA, MEMORY as u64 * 4],
        [MEMORY as u64 * 4, 0],
        [DATA + 1, 0],
        [DATA, DATA + 4],
    ] {
        assert_ne!(machine.io(io::READ, 0, 32, prps), 0, "{prps:x?}");
    }
    assert_eq!(machine.io(io::READ, 0, 8, [DATA, 0]), 0);
}

#[test]
fn what_lies_beyond_the_namespace_and_what_is_unknown_is_refused() {
    let mut machine = Machine::on();
    let blocks = (IMAGE / 512) as u32;
    assert_eq!(machine.io(io::READ, blocks - 1, 1, [DATA, 0]), 0);
    assert_eq!(machine.io(io::READ, blocks - 1, 2, [DATA, 0]), 0x4080);
    assert_eq!(machine.io(io::WRITE, u32::MAX, 1, [DATA, 0]), 0x4080);
    assert_eq!(machine.io(0x77, 0, 1, [DATA, 0]), 0x4001);
    let mut other = transfer(io::READ, 0, 1, [DATA, 0]);
    other[4] = 2;
    assert_eq!(machine.one(1, other).0, 0x400b);
}

#[test]
fn zeroes_and_discards_take_what_was_there() {
    let mut machine = Machine::on();
    machine.put(DATA, &pattern(0x3000, 3));
    machine.put(DATA + 0x8000, &(DATA + 0x1000).to_le_bytes());
    machine.put(DATA + 0x8008, &(DATA + 0x2000).to_le_bytes());
    assert_eq!(machine.io(io::WRITE, 0, 24, [DATA, DATA + 0x8000]), 0);
    assert_eq!(machine.io(io::WRITE_ZEROES, 0, 8, [0, 0]), 0);
    assert_eq!(machine.on_disk(0, 0x1000), vec![0; 0x1000]);
    let range = |blocks: u32, first: u64| {
        [&[0; 4][..], &blocks.to_le_bytes(), &first.to_le_bytes()].concat()
    };
    machine.put(DATA, &[range(8, 8), range(8, 16)].concat());
    let entry = command(io::DSM, 0, &[(1, 1), (6, DATA as u32), (10, 1), (11, 4)]);
    assert_eq!(machine.one(1, entry).0, 0);
    assert_eq!(machine.on_disk(0, 0x3000), vec![0; 0x3000]);
    machine.put(DATA, &range(8, IMAGE));
    let entry = command(io::DSM, 0, &[(1, 1), (6, DATA as u32), (10, 0), (11, 4)]);
    assert_eq!(machine.one(1, entry).0, 0x4080);
}

#[test]
fn it_tells_what_it_is() {
    let mut machine = Machine::on();
    assert_eq!(machine.admin(admin::IDENTIFY, DATA, &[(10, 1)]).0, 0);
    assert_eq!(machine.get(DATA + 4, 8), b"serial-1");
    assert_eq!(machine.admin(admin::IDENTIFY, DATA, &[(1, 1), (10, 0)]).0, 0);
    assert_eq!(machine.get(DATA, 8), (IMAGE / 512).to_le_bytes());
    assert_eq!(machine.admin(admin::IDENTIFY, DATA, &[(10, 2)]).0, 0);
    assert_eq!(machine.get(DATA, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(machine.admin(admin::IDENTIFY, DATA, &[(1, 1), (10, 3)]).0, 0);
    assert_eq!(machine.get(DATA, 2), [3, 16]);
    assert_eq!(machine.admin(admin::IDENTIFY, DATA, &[(1, 2), (10, 0)]).0, 0x400b);
    assert_eq!(machine.admin(admin::SET_FEATURES, 0, &[(10, 7), (11, 0x00ff_00ff)]), (0, 0x1_0001));
    assert_eq!(machine.admin(admin::GET_FEATURES, 0, &[(10, 6)]), (0, 1));
    assert_eq!(machine.admin(admin::GET_FEATURES, 0, &[(10, 0x77)]).0, 0x4002);
    assert_eq!(machine.admin(admin::GET_LOG, DATA, &[(10, 127 << 16 | 2)]).0, 0);
    assert_eq!(machine.get(DATA + 3, 1), [100]);
    assert_eq!(machine.admin(admin::GET_LOG, DATA, &[(10, 0x55)]).0, 0x4109);
    assert_eq!(machine.admin(admin::ABORT, 0, &[(10, 1)]), (0, 1));
}

#[test]
fn queues_are_made_and_deleted_as_the_specification_has_it() {
    let mut machine = Machine::on();
    let size = (ENTRIES - 1) << 16;
    let create = |machine: &mut Machine, opcode, id: u32, eleven| {
        machine.admin(opcode, SQ, &[(10, size | id), (11, eleven)]).0
    };
    assert_eq!(create(&mut machine, admin::CREATE_CQ, 1, 3), 0x4101);
    assert_eq!(create(&mut machine, admin::CREATE_CQ, 0, 3), 0x4101);
    assert_eq!(create(&mut machine, admin::CREATE_CQ, 3, 3), 0x4101);
    assert_eq!(create(&mut machine, admin::CREATE_CQ, 2, 9 << 16 | 3), 0x4108);
    assert_eq!(create(&mut machine, admin::CREATE_SQ, 2, 2 << 16 | 1), 0x4100);
    assert_eq!(machine.admin(admin::CREATE_CQ, SQ, &[(10, 2), (11, 3)]).0, 0x4102);
    assert_eq!(machine.admin(admin::CREATE_CQ, SQ + 4, &[(10, size | 2), (11, 3)]).0, 0x4013);
    assert_eq!(machine.admin(admin::DELETE_CQ, 0, &[(10, 1)]).0, 0x410c);
    assert_eq!(machine.admin(admin::DELETE_SQ, 0, &[(10, 1)]).0, 0);
    assert_eq!(machine.admin(admin::DELETE_SQ, 0, &[(10, 1)]).0, 0x4101);
    assert_eq!(machine.admin(admin::DELETE_CQ, 0, &[(10, 1)]).0, 0);
    // The doorbell of the next queue of that number begins at 0.
    assert_eq!(machine.page.load(2), 0);
}

#[test]
fn a_wrong_doorbell_is_an_event_and_an_event_waits_for_its_request() {
    let mut machine = Machine::on();
    machine.page.store(2, ENTRIES);
    machine.settle();
    let entry = command(admin::EVENT, 0, &[]);
    let (status, event) = machine.one(0, entry);
    assert_eq!((status, event), (0, 0x1_0100));
    machine.page.store(4, 1);
    machine.settle();
    // Not again before the log was read.
    let phase = machine.phase(0);
    machine.submit(0, entry);
    machine.ring(0);
    machine.settle();
    assert_eq!(machine.completion(0, phase), None);
    assert_eq!(machine.admin(admin::GET_LOG, DATA, &[(10, 15 << 16 | 1)]).0, 0);
    machine.page.store(4, 2);
    let phase = machine.phase(0);
    machine.settle();
    assert_eq!(machine.completion(0, phase).unwrap().2, 0x1_0000);
}

#[test]
fn queues_that_are_no_memory_fail_the_controller_and_a_reset_helps() {
    let mut machine = Machine::off();
    machine.enable();
    let size = (ENTRIES - 1) << 16;
    let nowhere = MEMORY as u64 * 16;
    assert_eq!(machine.admin(admin::CREATE_CQ, nowhere, &[(10, size | 1), (11, 3)]).0, 0);
    assert_eq!(machine.admin(admin::CREATE_SQ, SQ, &[(10, size | 1), (11, 1 << 16 | 1)]).0, 0);
    machine.submit(1, command(io::FLUSH, 0, &[(1, 1)]));
    machine.ring(1);
    machine.settle();
    assert_eq!(machine.status() & csts::CFS, csts::CFS);
    machine.controller.write(register::CC, &[0; 4]);
    machine.settle();
    assert_eq!(machine.status(), 0);
    machine.put(ACQ, &[0; 0x1000]);
    (machine.tails, machine.heads) = ([0; 3], [0; 3]);
    machine.enable();
    assert_eq!(machine.admin(admin::IDENTIFY, DATA, &[(10, 1)]).0, 0);
}

#[test]
fn a_controller_without_sensible_admin_queues_fails() {
    let mut machine = Machine::off();
    machine.controller.write(register::CC, &0x0046_0001u32.to_le_bytes());
    machine.settle();
    assert_eq!(machine.status() & csts::CFS, csts::CFS);
    machine.controller.reset();
    machine.settle();
    assert_eq!(machine.status(), 0);
}

#[test]
fn a_shutdown_is_told_of() {
    let mut machine = Machine::on();
    machine.controller.write(register::CC, &0x0046_4001u32.to_le_bytes());
    machine.settle();
    assert_eq!(machine.status(), csts::RDY | csts::SHST_DONE);
}

#[test]
fn mediated_reads_go_by_the_bus_alone() {
    let mut machine = Machine::on();
    machine.put(DATA, &pattern(4096, 4));
    assert_eq!(machine.io(io::WRITE, 0, 8, [DATA, 0]), 0);
    machine.bus.route = Route::Mediated;
    assert_eq!(machine.io(io::READ, 0, 8, [DATA + 0x2000, 0]), 0);
    assert_eq!(machine.get(DATA + 0x2000, 4096), pattern(4096, 4));
    assert_eq!(machine.bus.wrote, []);
}

#[test]
fn a_completion_queue_that_nobody_empties_holds_its_commands() {
    let mut machine = Machine::on();
    let flush = command(io::FLUSH, 0, &[(1, 1)]);
    for _ in 0..ENTRIES - 1 {
        machine.submit(1, flush);
    }
    machine.ring(1);
    machine.settle();
    for _ in 0..5 {
        machine.submit(1, flush);
    }
    machine.ring(1);
    machine.settle();
    // Full: one place of a queue is always free.
    let queue = &machine.controller.completions[&1];
    assert_eq!((queue.tail, queue.waiting.len()), (ENTRIES - 1, 5));
    let told = (0..ENTRIES - 1).filter(|_| machine.completion(1, true).is_some()).count();
    assert_eq!(told, ENTRIES as usize - 1);
    machine.settle();
    assert!(machine.completion(1, true).is_some());
    let told = (0..4).filter(|_| machine.completion(1, false).is_some()).count();
    assert_eq!(told, 4);
}

#[test]
fn a_driver_that_takes_no_completion_has_its_commands_wait_and_the_state_stay_small() {
    let mut machine = Machine::on();
    let unknown = command(0x7f, 0, &[(1, 1)]);
    for _ in 0..400 {
        machine.submit(1, unknown);
        machine.ring(1);
        machine.settle();
    }
    let queue = &machine.controller.completions[&1];
    assert_eq!((queue.tail, queue.waiting.len()), (ENTRIES - 1, 8));
    assert!(machine.controller.save().len() < 4096);
    // Once the driver looks, it goes on.
    let told = (0..ENTRIES - 1).filter(|_| machine.completion(1, true).is_some()).count();
    assert_eq!(told, ENTRIES as usize - 1);
    machine.settle();
    assert_eq!(machine.completion(1, true).unwrap().1, 0x4001);
}

#[test]
fn a_queue_is_deleted_once() {
    let mut machine = Machine::on();
    let delete = command(admin::DELETE_SQ, 0, &[(10, 1)]);
    let phase = machine.phase(0);
    let (first, second) = (machine.submit(0, delete), machine.submit(0, delete));
    machine.ring(0);
    machine.settle();
    let mut told: Vec<_> = (0..2).map(|_| machine.completion(0, phase).unwrap()).collect();
    told.sort_unstable();
    assert_eq!(told, [(first, 0, 0), (second, 0x4101, 0)]);
}

#[test]
fn a_flush_that_has_failed_fails_all_that_follow_and_the_device_stays() {
    let mut machine = Machine::off();
    let image = Arc::new(Image::open(machine.image.path(), OpenOptions::default()).unwrap());
    let fails = Arc::new(AtomicBool::new(false));
    let engine = Failing(SyncEngine::new(image.fd()).unwrap(), Arc::clone(&fails));
    machine.controller.storage = Box::new(Store::new(image, engine));
    machine.begin();
    for (broken, status) in [(false, 0), (true, 0x280), (false, 0x280)] {
        fails.store(broken, Ordering::Relaxed);
        assert_eq!(machine.io(io::FLUSH, 0, 1, [0, 0]), status);
        assert_eq!(machine.controller.has_lost(), status != 0);
    }
}

#[test]
fn zeroes_that_are_forced_are_flushed() {
    let mut machine = Machine::off();
    let image = Arc::new(Image::open(machine.image.path(), OpenOptions::default()).unwrap());
    let fails = Arc::new(AtomicBool::new(true));
    let engine = Failing(SyncEngine::new(image.fd()).unwrap(), Arc::clone(&fails));
    machine.controller.storage = Box::new(Store::new(image, engine));
    machine.begin();
    let zeroes = |forced: u32| command(io::WRITE_ZEROES, 0, &[(1, 1), (12, forced << 30 | 7)]);
    assert_eq!(machine.one(1, zeroes(0)).0, 0);
    assert_eq!(machine.one(1, zeroes(1)).0, 0x280);
    assert!(machine.controller.has_lost());
}

/// What a move does: hold, save, restore elsewhere, go on.
fn moved(mut machine: Machine, replayed: bool, replay: &[(usize, u32)]) -> (Machine, usize) {
    machine.controller.hold(true);
    machine.settle();
    assert_eq!(machine.controller.in_flight(), 0);
    let state = machine.controller.save();
    let mut other = controller(&machine.image);
    let page = Page::new(0x4000, 0x1000).unwrap();
    other.hold(true);
    if !replay.is_empty() {
        other.write(register::CC, &0x0046_0001u32.to_le_bytes());
    }
    replay.iter().for_each(|(at, value)| page.tell(*at, *value));
    let differing = other.restore(&state, &page, replayed).unwrap();
    other.hold(false);
    (Machine { controller: other, page, ..machine }, differing)
}

#[test]
fn a_moved_controller_goes_on_with_commands_that_nobody_has_taken() {
    let mut machine = Machine::on();
    machine.put(DATA, &pattern(512, 5));
    assert_eq!(machine.io(io::WRITE, 3, 1, [DATA, 0]), 0);
    let event = machine.submit(0, command(admin::EVENT, 0, &[]));
    machine.ring(0);
    machine.settle();
    machine.controller.hold(true);
    let id = machine.submit(1, transfer(io::READ, 3, 1, [DATA + 0x5000, 0]));
    machine.ring(1);
    let (mut machine, differing) = moved(machine, false, &[]);
    assert!(differing > 0);
    machine.settle();
    assert_eq!(machine.completion(1, true).unwrap(), (id, 0, 0));
    assert_eq!(machine.get(DATA + 0x5000, 512), pattern(512, 5));
    // The event request has come along.
    machine.page.store(4, 1);
    machine.settle();
    let phase = machine.phase(0);
    assert_eq!(machine.completion(0, phase).unwrap().0, event);
}

#[test]
fn a_moved_controller_whose_doorbells_were_not_replayed_stalls() {
    for goes_on in [true, false] {
        let mut machine = Machine::on();
        assert_eq!(machine.io(io::FLUSH, 0, 1, [0, 0]), 0);
        let head = machine.heads[1];
        machine.controller.hold(true);
        machine.submit(1, command(io::FLUSH, 0, &[(1, 1)]));
        machine.ring(1);
        let mut replay = vec![(0, machine.tails[0]), (1, machine.heads[0]), (3, head)];
        if goes_on {
            replay.push((2, machine.tails[1]));
        }
        let (mut machine, differing) = moved(machine, true, &replay);
        machine.settle();
        assert_eq!(machine.completion(1, true).is_some(), goes_on);
        // Registers beside doorbells were not replayed here.
        assert_eq!(differing, 3 + usize::from(!goes_on));
    }
}

#[test]
fn a_moved_controller_to_which_nothing_was_replayed_does_nothing() {
    let mut machine = Machine::on();
    assert_eq!(machine.io(io::FLUSH, 0, 1, [0, 0]), 0);
    let (mut machine, _) = moved(machine, true, &[]);
    machine.submit(1, command(io::FLUSH, 0, &[(1, 1)]));
    machine.ring(1);
    machine.settle();
    assert_eq!(machine.completion(1, true), None);
}

#[test]
fn completions_that_the_driver_has_not_taken_are_owed() {
    let mut machine = Machine::on();
    machine.settle();
    assert_eq!(machine.controller.owed(), [0; 0]);
    machine.submit(1, command(io::FLUSH, 0, &[(1, 1)]));
    machine.ring(1);
    machine.settle();
    let (mut machine, _) = moved(machine, false, &[]);
    assert_eq!(machine.controller.owed(), [1]);
    machine.completion(1, true).unwrap();
    machine.settle();
    assert_eq!(machine.controller.owed(), [0; 0]);
}

#[test]
fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
    let mut machine = Machine::on();
    let state = machine.controller.save();
    let page = Page::new(0x4000, 0x1000).unwrap();
    let before = machine.controller.save();
    for (from, to) in [
        ("\"version\":1", "\"version\":2"),
        ("\"kind\":\"nvme\"", "\"kind\":\"edu\""),
        ("\"queues\":2", "\"queues\":3"),
        ("\"blocks\":2048", "\"blocks\":2049"),
        ("\"block_size\":512", "\"block_size\":4096"),
        ("\"size\":16", "\"size\":1"),
        ("\"head\":0", "\"head\":16"),
        ("\"vector\":1", "\"vector\":7"),
        ("\"completes_in\":1", "\"completes_in\":2"),
        ("\"doorbells\":[", "\"doorbells\":[0,"),
        ("\"base\":12288", "\"base\":18446744073709551615"),
        ("\"postponed\":[]", "\"postponed\":[{\"id\":1,\"queue\":60000}]"),
        ("\"postponed\":[]", "\"postponed\":[{\"id\":1,\"queue\":2}]"),
        ("\"postponed\":[]", "\"postponed\":[{\"id\":1,\"queue\":0}]"),
        ("{", ""),
    ] {
        assert!(state.contains(from), "{from} in {state}");
        let wrong = state.replacen(from, to, 1);
        assert!(machine.controller.restore(&wrong, &page, false).is_err(), "{to}");
    }
    assert_eq!(machine.controller.save(), before);
    let deleting = state.replacen("\"postponed\":[]", "\"postponed\":[{\"id\":1,\"queue\":1}]", 1);
    machine.controller.restore(&deleting, &page, false).unwrap();
    machine.controller.restore(&state, &page, false).unwrap();
}
