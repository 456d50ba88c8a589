//! A process that dies at each of its stores in turn, and the next one that goes on.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::rc::Rc;
use std::sync::Arc;

use semper_block::{Image, OpenOptions, SyncEngine};
use semper_device::ledger::Ledger;
use semper_device::page::Page;
use semper_device::{Activity, Bus, Device, Route, Unreachable};
use semper_ring::GuestMemory;
use tempfile::NamedTempFile;

use crate::command::command;
use crate::spec::{Status, admin, io, register};
use crate::{Controller, Settings, Store};

type AtStore = Box<dyn FnMut()>;

thread_local! {
    static AT_STORE: RefCell<Option<AtStore>> = const { RefCell::new(None) };
}

/// The process has stored something that the next one may read.
pub(crate) fn at_a_store() {
    let hook = AT_STORE.with(|at| at.borrow_mut().take());
    if let Some(mut hook) = hook {
        hook();
        AT_STORE.with(|at| *at.borrow_mut() = Some(hook));
    }
}

struct Death;

const ENTRIES: u32 = 4;
const QUEUES: [(u64, u64); 2] = [(0x1000, 0x2000), (0x3000, 0x4000)];
const DATA: u64 = 0x1_0000;

struct Memory(Arc<GuestMemory>);

impl Bus for Memory {
    fn memory(&self) -> &Arc<GuestMemory> {
        &self.0
    }

    fn route(&self) -> Route {
        Route::Direct
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Unreachable> {
        let len = into.len() as u64;
        let from = self.0.translate(address, len).ok_or(Unreachable { address, len })?;
        // SAFETY: `translate` checked the range.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Unreachable> {
        let len = bytes.len() as u64;
        let to = self.0.translate(address, len).ok_or(Unreachable { address, len })?;
        // SAFETY: `translate` checked the range.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    fn wrote(&mut self, _: u64, _: u64) {}

    fn interrupt(&mut self, _: u16) {}

    fn is_congested(&self) -> bool {
        false
    }
}

/// What survives the process: the guest, what is shared with it, and the ledger.
struct World {
    image: NamedTempFile,
    bus: Memory,
    page: Page,
    ledger: Arc<Ledger>,
    tails: [u32; 2],
    heads: [u32; 2],
    phases: [bool; 2],
    next_id: u16,
    /// Of each command: how often it was told of, and how.
    told: HashMap<(usize, u16), Vec<u16>>,
}

impl World {
    fn new() -> Self {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        Self {
            image,
            bus: Memory(Arc::new(GuestMemory::anonymous(0, 1 << 18).unwrap())),
            page: Page::new(0x4000, 0x1000).unwrap(),
            ledger: Arc::new(Ledger::new(crate::journal::WORDS).unwrap()),
            tails: [0; 2],
            heads: [0; 2],
            phases: [true; 2],
            next_id: 1,
            told: HashMap::new(),
        }
    }

    fn controller(&self) -> Controller {
        let image = Arc::new(Image::open(self.image.path(), OpenOptions::default()).unwrap());
        let engine = SyncEngine::new(image.fd()).unwrap();
        let settings = Settings { serial: "s".to_owned(), queues: 1 };
        let mut controller = Controller::new(settings, Box::new(Store::new(image, engine)));
        controller.keep_in(Arc::clone(&self.ledger));
        controller
    }

    fn submit(&mut self, queue: usize, mut entry: [u8; 64]) {
        entry[2..4].copy_from_slice(&self.next_id.to_le_bytes());
        self.told.insert((queue, self.next_id), Vec::new());
        self.next_id += 1;
        let at = QUEUES[queue].0 + u64::from(self.tails[queue]) * 64;
        self.bus.write(at, &entry).unwrap();
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES;
        self.page.store(2 * queue, self.tails[queue]);
    }

    /// The driver takes what it was told. What was written to memory may be written again by then.
    fn look(&mut self) {
        for (queue, (_, base)) in QUEUES.into_iter().enumerate() {
            loop {
                let mut entry = [0; 16];
                let at = base + u64::from(self.heads[queue]) * 16;
                self.bus.read(at, &mut entry).unwrap();
                let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
                if (half(14) & 1 == 1) != self.phases[queue] {
                    break;
                }
                let times = self.told.get_mut(&(queue, half(12))).expect("a command of ours");
                times.push(half(14) >> 1);
                self.heads[queue] = (self.heads[queue] + 1) % ENTRIES;
                self.phases[queue] ^= self.heads[queue] == 0;
                self.page.store(2 * queue + 1, self.heads[queue]);
            }
        }
    }

    fn all_told(&self) -> bool {
        self.told.values().all(|times| !times.is_empty())
    }
}

fn transfer(opcode: u8, first: u32, address: u64) -> [u8; 64] {
    command(opcode, 0, &[(1, 1), (6, address as u32), (10, first), (12, 7)])
}

/// What the driver does, step by step: the commands of one step are rung for together.
fn steps() -> Vec<Vec<(usize, [u8; 64])>> {
    let size = (ENTRIES - 1) << 16;
    let at = |address: u64| (6, address as u32);
    let create_cq = [at(QUEUES[1].1), (10, size | 1), (11, 1 << 16 | 3)];
    let create_sq = [at(QUEUES[1].0), (10, size | 1), (11, 1 << 16 | 1)];
    let (write, read) = (transfer(io::WRITE, 0, DATA), transfer(io::READ, 0, DATA + 0x4000));
    vec![
        vec![(0, command(admin::CREATE_CQ, 0, &create_cq))],
        vec![(0, command(admin::CREATE_SQ, 0, &create_sq))],
        vec![(1, write), (1, transfer(io::WRITE, 8, DATA + 0x1000))],
        vec![
            (1, read),
            (1, command(io::FLUSH, 0, &[(1, 1)])),
            (1, transfer(io::READ, u32::MAX, 0)),
        ],
        vec![(0, command(admin::IDENTIFY, 0, &[at(DATA + 0x8000), (10, 1)])), (1, write)],
        vec![(0, command(admin::DELETE_SQ, 0, &[(10, 1)]))],
        vec![(0, command(admin::CREATE_SQ, 0, &create_sq))],
    ]
}

/// Turns until nothing is to be done; false when the process has died.
fn settle(world: &Rc<RefCell<World>>, controller: &mut Controller) -> bool {
    let lived = catch_unwind(AssertUnwindSafe(|| {
        for _ in 0..100 {
            // The driver is another processor, and looks while this one is at it.
            let (page, mut bus) = {
                let world = world.borrow();
                (std::ptr::from_ref(&world.page), Memory(Arc::clone(&world.bus.0)))
            };
            // SAFETY: the page lives as long as the world, which outlives this call.
            let activity = controller.step(unsafe { &*page }, &mut bus);
            world.borrow_mut().look();
            if activity == Activity::Idle {
                return;
            }
        }
        panic!("busy for ever");
    }));
    match lived {
        Ok(()) => true,
        Err(cause) if cause.is::<Death>() => false,
        Err(cause) => std::panic::resume_unwind(cause),
    }
}

/// The whole life of a driver, whose controller's process dies at store `die_at`. `quick`: the driver
/// takes what it was told at once. False when there was no such store any more.
fn live(die_at: usize, quick: bool) -> bool {
    let world = Rc::new(RefCell::new(World::new()));
    for at in 0..2u8 {
        let bytes = [at + 1; 4096];
        world.borrow_mut().bus.write(DATA + 0x1000 * u64::from(at), &bytes).unwrap();
    }
    let mut controller = world.borrow().controller();
    let (mut stores, eyes) = (0, Rc::clone(&world));
    let hook: AtStore = Box::new(move || {
        stores += 1;
        if quick {
            eyes.borrow_mut().look();
        }
        if stores == die_at {
            panic_any(Death);
        }
    });
    let mut died = false;
    AT_STORE.with(|at| *at.borrow_mut() = Some(hook));
    let sizes = (ENTRIES - 1) << 16 | (ENTRIES - 1);
    let registers = [
        (register::AQA, u64::from(sizes), 4),
        (register::ASQ, QUEUES[0].0, 8),
        (register::ACQ, QUEUES[0].1, 8),
        (register::CC, 0x0046_0001, 4),
    ];
    let next = |controller: &mut Controller| {
        AT_STORE.with(|at| *at.borrow_mut() = None);
        *controller = world.borrow().controller();
        controller.recover(&world.borrow().page).unwrap();
        assert!(settle(&world, controller));
    };
    for (offset, value, len) in registers {
        let bytes = &value.to_le_bytes()[..len];
        let lived = catch_unwind(AssertUnwindSafe(|| controller.write(offset, bytes))).is_ok();
        if !lived {
            died = true;
            next(&mut controller);
            // Nobody has answered the write: it is done again.
            controller.write(offset, bytes);
        }
    }
    if !settle(&world, &mut controller) {
        died = true;
        next(&mut controller);
    }
    for step in steps() {
        for (queue, entry) in step {
            world.borrow_mut().submit(queue, entry);
        }
        if !settle(&world, &mut controller) {
            died = true;
            next(&mut controller);
        }
        assert!(
            world.borrow().all_told(),
            "{die_at}: somebody waits for ever: {:?} {:?} {:?}",
            world.borrow().told,
            controller.submissions,
            controller.completions
        );
    }
    AT_STORE.with(|at| *at.borrow_mut() = None);
    let world = world.borrow();
    for ((queue, id), times) in &world.told {
        let expected = if (*queue, *id) == (1, 7) { Status::RANGE.0 } else { 0 };
        assert_eq!(times[..], [expected], "{die_at}: queue {queue}, command {id}");
    }
    let disk = std::fs::read(world.image.path()).unwrap();
    assert!(disk[..4096].iter().all(|byte| *byte == 1), "{die_at}");
    assert!(disk[4096..8192].iter().all(|byte| *byte == 2), "{die_at}");
    let mut read = [0; 4096];
    world.bus.read(DATA + 0x4000, &mut read).unwrap();
    assert_eq!(read, [1; 4096], "{die_at}");
    died
}

#[test]
fn whoever_goes_on_after_a_death_tells_the_driver_of_each_command_once() {
    // Deaths are meant, and say nothing.
    std::panic::set_hook(Box::new(|info| {
        if !info.payload().is::<Death>() {
            eprintln!("{info}");
        }
    }));
    for quick in [false, true] {
        let mut die_at = 1;
        while live(die_at, quick) {
            die_at += 1;
        }
        assert!(die_at > 100, "{die_at} stores");
    }
}

/// The guest's memory, to which so much is on its way that no command is begun.
struct Congested(Memory);

impl Bus for Congested {
    fn memory(&self) -> &Arc<GuestMemory> {
        self.0.memory()
    }

    fn route(&self) -> Route {
        self.0.route()
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Unreachable> {
        self.0.read(address, into)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Unreachable> {
        self.0.write(address, bytes)
    }

    fn wrote(&mut self, _: u64, _: u64) {}

    fn interrupt(&mut self, _: u16) {}

    fn is_congested(&self) -> bool {
        true
    }
}

/// A controller with its queues, and a command that another process had taken.
fn with_one_left(world: &Rc<RefCell<World>>) -> Controller {
    let mut controller = world.borrow().controller();
    let sizes = (ENTRIES - 1) << 16 | (ENTRIES - 1);
    controller.write(register::AQA, &sizes.to_le_bytes());
    controller.write(register::ASQ, &QUEUES[0].0.to_le_bytes());
    controller.write(register::ACQ, &QUEUES[0].1.to_le_bytes());
    controller.write(register::CC, &0x0046_0001u32.to_le_bytes());
    assert!(settle(world, &mut controller));
    for step in steps().into_iter().take(2) {
        for (queue, entry) in step {
            world.borrow_mut().submit(queue, entry);
        }
        assert!(settle(world, &mut controller));
    }
    let left = command(io::FLUSH, 77, &[(1, 1)]).into();
    let journal = controller.journal.as_mut().unwrap();
    let slot = journal.take((1, controller.submissions[&1].generation, 0), &left).unwrap();
    controller.again.push_back((1, slot, left));
    controller
}

#[test]
fn a_queue_is_deleted_after_the_commands_that_another_process_had_taken() {
    let world = Rc::new(RefCell::new(World::new()));
    let mut controller = with_one_left(&world);
    world.borrow_mut().told.insert((1, 77), Vec::new());
    world.borrow_mut().submit(0, command(admin::DELETE_SQ, 0, &[(10, 1)]));
    let page = std::ptr::from_ref(&world.borrow().page);
    let mut bus = Congested(Memory(Arc::clone(&world.borrow().bus.0)));
    for _ in 0..10 {
        // SAFETY: the page lives as long as the world.
        controller.step(unsafe { &*page }, &mut bus);
    }
    world.borrow_mut().look();
    assert!(!world.borrow().all_told(), "deleted before");
    assert!(settle(&world, &mut controller));
    assert!(
        world.borrow().told.values().all(|times| times[..] == [0]),
        "{:?}",
        world.borrow().told
    );
}

#[test]
fn of_a_controller_that_has_failed_nothing_is_left_in_flight() {
    let world = Rc::new(RefCell::new(World::new()));
    let mut controller = with_one_left(&world);
    controller.registers.csts |= crate::spec::csts::CFS;
    assert_eq!(controller.in_flight(), 1);
    let mut bus = Memory(Arc::clone(&world.borrow().bus.0));
    controller.step(&world.borrow().page, &mut bus);
    assert_eq!(controller.in_flight(), 0);
}

#[test]
fn a_flush_that_failed_fails_in_the_next_process_as_well() {
    let world = Rc::new(RefCell::new(World::new()));
    let mut first = world.borrow().controller();
    first.storage.lose();
    assert!(settle(&world, &mut first));
    let mut next = world.borrow().controller();
    assert!(!next.has_lost());
    next.recover(&world.borrow().page).unwrap();
    assert!(next.has_lost());
}
