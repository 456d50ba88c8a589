//! Model checking of the very loop that serves queues: every death, every order of completions.
//!
//! **Real**: the thread's turn (`worker.rs`), the queue (`queue.rs`), parsing, overlaps, and below
//! them the tracked queue and the ring. **Modelled**: the kernel, as an [`Engine`] that completes
//! requests in any order, some of them short; the guest and everything else that outlives a
//! process (`semper_testbed::World`). The promises are those of `crates/inflight/tests/model`,
//! which explores more orders of everything on a loop of its own.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{FromRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use semper_block::{Image, Io, Op, OpenOptions, Submission};
use semper_inflight::{Hook, Point, TrackedQueue};
use semper_ring::SplitQueue;
use semper_testbed::{
    Choices, Format, Guest, KernelIo, Request, Setup, Snapshot, Violation, Wakeup, World,
};
use semper_title::Title;

use super::{Engine, EventFd, Mailbox, Order, Thread};
use crate::queue::{Disk, QueueSetup};
use crate::request::ID_SIZE;
use crate::state::Shared;
use crate::tenure::{Standing, Tenure};

/// Blocks 0 and 1 are in different 4 KiB granules, so that a request can lie in both.
const FORMAT: Format = Format { block_bytes: 512, sectors: [7, 8, 9, 10] };
/// More turns than any of these programs needs.
const MANY_TURNS: u32 = 500;

thread_local!(static WORLD: RefCell<Option<Rc<RefCell<World>>>> = const { RefCell::new(None) });

/// The hook of unit tests: every point is a chance to die in the world that is being explored.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Watcher(());

impl Hook for Watcher {
    fn at(&mut self, point: Point) {
        WORLD.with_borrow(|world| {
            if let Some(world) = world {
                world.borrow_mut().pass(point);
            }
        });
    }
}

/// How the kernel is used.
trait Manner {
    /// Requests are queued, and complete later.
    const QUEUES: bool;
    /// The loop is told that they can overtake each other.
    const CONFESSES: bool;
}

struct Uring;

impl Manner for Uring {
    const QUEUES: bool = true;
    const CONFESSES: bool = true;
}

struct Sync;

impl Manner for Sync {
    const QUEUES: bool = false;
    const CONFESSES: bool = false;
}

/// A negative control: nobody keeps overlapping requests apart.
struct Liar;

impl Manner for Liar {
    const QUEUES: bool = true;
    const CONFESSES: bool = false;
}

/// A kernel that completes requests when and in the order that the explorer chooses.
struct Kernel<M> {
    manner: PhantomData<M>,
    world: Rc<RefCell<World>>,
    /// Completions that the next reap gives.
    arrived: Vec<(u64, i32)>,
    call: Rc<File>,
}

impl<M: Manner> Kernel<M> {
    fn describe(world: &World, token: u64, io: &Io) -> KernelIo {
        let [segment] = io.segments() else { panic!("{} segments", io.segments().len()) };
        let bytes = world.block_bytes();
        let sector = io.offset / 512;
        let first = FORMAT.sectors.iter().position(|s| *s == sector).expect("a block of the disk");
        let (count, data) = (io.len as usize / bytes, segment.iov_base.cast::<u8>());
        assert_eq!((segment.iov_len, io.len as usize), (count * bytes, count * bytes));
        let request = match io.op {
            Op::Read => Request::read(first, count),
            // SAFETY: at least one block of data, which the caller of `submit` vouches for.
            Op::Write { .. } => Request::write(first, count, unsafe { data.read() }),
            other => panic!("{other:?} is not in the model"),
        };
        KernelIo { token, request, data, block_bytes: bytes, done: 0 }
    }

    /// Carries out the n-th request, or only its first block; gives token and result.
    fn carry_out(world: &mut World, n: usize) -> (u64, i32) {
        let mut io = world.kernel.remove(n);
        if io.request.count > 1 && world.choices.choose(2) == 1 {
            io.carry_out(0, &mut world.disk);
            return (io.token, io.block_bytes as i32);
        }
        io.finish(&mut world.disk);
        (io.token, (io.request.count * io.block_bytes) as i32)
    }

    /// Lets a sleeping guest look if it was called.
    fn deliver_call(&self, world: &mut World) {
        let mut count = [0u8; 8];
        let called = io::Read::read(&mut &*self.call, &mut count).is_ok();
        if called && !world.guest.polls() {
            world.guest_looks(Guest::interrupt);
        }
    }
}

impl<M: Manner> Engine for Kernel<M> {
    const CONCURRENT: bool = M::CONFESSES;

    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        let world = &mut *self.world.borrow_mut();
        world.kernel.push(Self::describe(world, token, io));
        if M::QUEUES {
            return Submission::Queued;
        }
        // In the middle of the system call.
        world.die();
        Submission::Done(Self::carry_out(world, 0).1)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        into.append(&mut self.arrived);
        let world = &mut *self.world.borrow_mut();
        self.deliver_call(world);
        while !world.kernel.is_empty() {
            match world.choices.choose(world.kernel.len() + 1) {
                0 => return,
                n => into.push(Self::carry_out(world, n - 1)),
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.world.borrow().kernel.len() + self.arrived.len()
    }

    fn add_waker(&mut self, _fd: RawFd) -> io::Result<()> {
        Ok(())
    }

    fn remove_waker(&mut self, _fd: RawFd) {}

    /// Sleeps until the guest kicks or a request ends; an error when neither will ever happen.
    fn wait(&mut self) -> io::Result<()> {
        let world = &mut *self.world.borrow_mut();
        loop {
            self.deliver_call(world);
            if std::mem::take(&mut world.kicked) {
                return Ok(());
            }
            let submits = usize::from(world.guest.can_submit());
            match world.kernel.len() + submits {
                0 => return Err(io::Error::other("idle")),
                options => match world.choices.choose(options) {
                    n if n < world.kernel.len() => {
                        self.arrived.push(Self::carry_out(world, n));
                        return Ok(());
                    }
                    _ => world.kicked |= world.guest.submit(),
                },
            }
        }
    }
}

/// What was explored.
#[derive(Debug, Default)]
struct Report {
    graves: usize,
    lives: u64,
    judged: u64,
    deaths: [u64; Point::ALL.len()],
}

/// What is explored.
#[derive(Clone)]
struct Case {
    setup: Setup,
    stops: bool,
    eager: bool,
    backwards: bool,
}

struct Explorer {
    setup: Setup,
    /// Whether the front end may stop and start the queue once in each life.
    stops: bool,
    /// Whether the guest submits as soon as it can, instead of at any time.
    eager: bool,
    /// A negative control: the oldest request is replayed last.
    backwards: bool,
    world: Rc<RefCell<World>>,
    disk: Arc<Disk>,
    /// The eventfd that calls the guest.
    call: Rc<File>,
    report: Report,
    _image: tempfile::NamedTempFile,
}

impl Explorer {
    fn new(case: Case) -> Self {
        let Case { setup, stops, eager, backwards } = case;
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 16).unwrap();
        let opened = Arc::new(Image::open(image.path(), OpenOptions::default()).unwrap());
        let shared = Arc::new(Shared::new(1));
        let (title, standing) = (Title::none(), Standing::Held);
        let snapshots = Arc::new(crate::snapshots::Snapshots::none(&opened, &shared));
        let (layers, theirs) = (Arc::clone(&snapshots), (Arc::clone(&opened), Arc::clone(&shared)));
        let tenure = Tenure::new(theirs.0, theirs.1, title, layers, standing);
        let disk = Arc::new(Disk {
            image: opened,
            serial: [0; ID_SIZE],
            shared,
            map: None,
            poll: Duration::ZERO,
            tenure,
            snapshots,
        });
        let world = Rc::new(RefCell::new(World::new(&setup)));
        WORLD.set(Some(Rc::clone(&world)));
        // SAFETY: no preconditions; the result is checked and then owned.
        let call = unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            assert!(fd >= 0);
            Rc::new(File::from_raw_fd(fd))
        };
        let report = Report::default();
        Self { setup, stops, eager, backwards, world, disk, call, report, _image: image }
    }

    fn explore<M: Manner>(mut self) -> Report {
        let start = self.world.borrow().snapshot();
        self.follow::<M>(&start);
        self.report.graves = self.world.borrow().graves.len();
        self.report.deaths = self.world.borrow().deaths;
        self.report
    }

    fn follow<M: Manner>(&mut self, start: &Snapshot) {
        let mut choices = Choices::new();
        loop {
            {
                let mut world = self.world.borrow_mut();
                world.restore(start);
                world.choices = choices;
            }
            self.report.lives += 1;
            match catch_unwind(AssertUnwindSafe(|| self.live::<M>())) {
                Ok(()) => self.judge(),
                Err(payload) => match payload.downcast::<Violation>() {
                    Ok(violation) => panic!("{}\n{:#?}", violation.0, self.setup),
                    Err(payload) => resume_unwind(payload),
                },
            }
            let unexplored = {
                let mut world = self.world.borrow_mut();
                choices = std::mem::take(&mut world.choices);
                std::mem::take(&mut world.unexplored)
            };
            unexplored.iter().for_each(|grave| self.follow::<M>(grave));
            if !choices.advance() {
                return;
            }
        }
    }

    /// A process from its start until nothing is left to do.
    fn live<M: Manner>(&self) {
        // A call that the guest of an earlier run has not heard.
        let _ = io::Read::read(&mut &*self.call, &mut [0; 8]);
        let (world, call) = (Rc::clone(&self.world), Rc::clone(&self.call));
        let engine = Kernel::<M> { manner: PhantomData, world, arrived: Vec::new(), call };
        let mailbox = Arc::new(Mailbox {
            orders: Mutex::default(),
            pending: AtomicBool::new(false),
            wake: EventFd::new().unwrap(),
        });
        let mut thread = Thread::new(engine, Arc::clone(&self.disk), mailbox);
        self.start_queue(&mut thread);
        let mut stopped = !self.stops;
        for _ in 0..MANY_TURNS {
            {
                let mut world = self.world.borrow_mut();
                while self.eager && world.guest.can_submit() {
                    world.kicked |= world.guest.submit();
                }
                world.guest_may_submit();
                if !stopped && world.choices.choose(2) == 1 {
                    stopped = true;
                    drop(world);
                    self.stop_queue(&mut thread);
                    self.start_queue(&mut thread);
                }
            }
            if thread.turn().is_err() {
                return;
            }
        }
        self.world.borrow().violation("the thread turns for ever".to_owned());
    }

    fn start_queue<E: Engine>(&self, thread: &mut Thread<E>) {
        let (ring, region) = {
            let mut world = self.world.borrow_mut();
            let event_idx = self.setup.wakeup == Wakeup::Interrupts { event_idx: true };
            let (memory, addresses) = (world.memory(), world.addresses());
            let ring = SplitQueue::new(memory, addresses, u32::from(self.setup.size), event_idx);
            (ring.unwrap(), world.region())
        };
        let recovered = TrackedQueue::recover(ring, Some(region), 0xbad, Watcher::default());
        let (tracked, mut replay) = match recovered {
            Ok(recovered) => recovered,
            Err(error) => self.world.borrow().violation(format!("recovery refused: {error}")),
        };
        if self.backwards {
            replay.reverse();
        }
        let setup = QueueSetup {
            index: 0,
            tracked,
            replay,
            kick: EventFd::new().unwrap(),
            call: Some(EventFd::from(self.call.try_clone().unwrap())),
            err: None,
            log: None,
            region: None,
        };
        thread.carry_out(Order::Start(Box::new(setup))).unwrap();
    }

    /// GET_VRING_BASE: when it is answered, nothing is in flight, and all is shown to the guest.
    fn stop_queue<E: Engine>(&self, thread: &mut Thread<E>) {
        let (reply, answer) = mpsc::channel();
        let request = Arc::new(Mutex::new(Some(reply)));
        thread.carry_out(Order::Stop { index: 0, request }).unwrap();
        let base = (0..MANY_TURNS).find_map(|_| {
            // The thread may find nothing else to do, once it has answered.
            let _ = thread.turn();
            answer.try_recv().ok()
        });
        let world = self.world.borrow();
        let used_idx = world.guest.ring().used_idx();
        let marked = (0..self.setup.size).any(|head| world.is_marked(head));
        if base != Some(used_idx) || marked || !world.kernel.is_empty() {
            world.violation(format!("stopped at {base:?}, used {used_idx}, marked {marked}"));
        }
    }

    fn judge(&mut self) {
        self.report.judged += 1;
        if let Some(wrong) = self.world.borrow().judge(true) {
            panic!("{wrong}\n{:#?}", self.setup);
        }
    }
}

/// Explores all cases with this kind of engine; prints the sum, and holds it to at least so many
/// worlds that the dead have left.
fn prove<M: Manner>(what: &str, cases: &[Case], least: usize) {
    let mut sum = Report::default();
    for case in cases {
        let report = Explorer::new(case.clone()).explore::<M>();
        sum.graves += report.graves;
        sum.lives += report.lives;
        sum.judged += report.judged;
        sum.deaths.iter_mut().zip(report.deaths).for_each(|(sum, n)| *sum += n);
    }
    WORLD.set(None);
    let Report { graves, lives, judged, deaths } = sum;
    let total: u64 = deaths.iter().sum();
    println!("{what}: {lives} lives, {total} deaths, {graves} worlds left by them, {judged} ends");
    assert!(graves >= least, "only {graves} worlds");
    for point in Point::ALL {
        assert!(deaths[point as usize] > 0, "nobody died at {}", point.name());
    }
}

fn case(size: u16, deaths: u32, program: &[Request]) -> Case {
    let setup = Setup {
        size,
        start_idx: 65534,
        half_made_region: false,
        program: program.to_vec(),
        format: FORMAT,
        deaths,
        wakeup: Wakeup::Polls,
        last_freed_first: true,
        tearing: true,
        haunted: false,
    };
    Case { setup, stops: false, eager: false, backwards: false }
}

impl Case {
    fn sleeping(mut self, event_idx: bool) -> Self {
        self.setup.wakeup = Wakeup::Interrupts { event_idx };
        self
    }

    fn eager(self) -> Self {
        Self { eager: true, ..self }
    }

    fn stopped(self) -> Self {
        Self { stops: true, ..self }
    }
}

const fn write(first: usize, count: usize, value: u8) -> Request {
    Request::write(first, count, value)
}

const fn read(first: usize, count: usize) -> Request {
    Request::read(first, count)
}

const TWO: [Request; 2] = [write(0, 1, 1), write(0, 2, 2)];
const THREE: [Request; 3] = [write(0, 1, 1), read(0, 2), write(1, 1, 2)];
const FOUR: [Request; 4] = [write(0, 1, 1), write(1, 1, 2), read(0, 2), write(0, 1, 3)];

#[test]
fn the_loop_with_many_requests_in_the_kernel() {
    let mut cases = vec![
        case(4, 3, &TWO),
        case(4, 3, &TWO).sleeping(true),
        case(4, 3, &THREE).eager(),
        case(4, 3, &THREE).eager().sleeping(false),
        case(4, 1, &FOUR).eager(),
        case(2, 1, &FOUR).eager().sleeping(true),
    ];
    // An unoptimised build has no time for these.
    if !cfg!(debug_assertions) {
        cases.extend([case(4, 1, &THREE), case(4, 2, &FOUR).eager()]);
    }
    prove::<Uring>("io_uring", &cases, 1_500);
}

#[test]
fn the_loop_with_many_requests_in_the_kernel_is_stopped_and_started() {
    let cases = [case(4, 2, &TWO).stopped(), case(4, 2, &THREE).eager().stopped().sleeping(true)];
    prove::<Uring>("io_uring, stopped", &cases, 400);
}

#[test]
fn the_loop_with_one_request_at_a_time() {
    let cases = [
        case(4, 3, &TWO),
        case(4, 4, &THREE).sleeping(false),
        case(4, 3, &FOUR),
        case(2, 3, &FOUR).sleeping(true),
        case(4, 3, &THREE).stopped(),
        case(4, 2, &FOUR).stopped().sleeping(true),
    ];
    prove::<Sync>("sync", &cases, 15_000);
}

#[test]
#[should_panic(expected = "overlapping writes were reordered")]
fn overlapping_requests_that_are_not_kept_apart_are_noticed() {
    prove::<Liar>("control", &[case(4, 0, &TWO)], 0);
}

#[test]
#[should_panic(expected = "overlapping writes were reordered")]
fn a_replay_in_the_wrong_order_is_noticed() {
    let backwards = Case { backwards: true, ..case(4, 1, &TWO) };
    prove::<Sync>("control", &[backwards], 0);
}
