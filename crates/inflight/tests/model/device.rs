//! The loop of a backend's thread, reduced to its decisions.
//!
//! It does what `crates/blkd/src/queue.rs` does, in the same order and with the same points, but
//! where that loop has one fixed way to go on, this one may take any: one request or several, a
//! completion first or a publication first. `crates/blkd/src/model.rs` explores the loop itself.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hash::Hash;
use std::rc::Rc;

use semper_inflight::format::{OFFSET_DESC_NUM, OFFSET_USED_IDX, OFFSET_VERSION, VERSION};
use semper_inflight::{Hook, Point, TrackedQueue};
use semper_ring::{Segment, SplitQueue};
use semper_testbed::{Fingerprint, Guest, KernelIo, Request, Wakeup, World};

use crate::scenario::{Fault, Scenario};

/// How a life ends if the process does not die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// There is nothing left to do.
    Done,
    /// It came to a state from which everything was explored before.
    Known,
}

#[derive(Clone, Copy)]
enum Action {
    /// The guest submits its next request.
    Submit,
    /// The oldest request of an earlier process is started again.
    Replay,
    /// The next request is taken from the ring and started.
    Take,
    /// The request that waits for an overlapping one is started.
    Enter,
    /// The n-th request in the kernel is carried out, but not taken back yet.
    CarryOut(usize),
    /// The n-th request in the kernel is taken back and answered.
    TakeBack(usize),
    /// Everything answered is shown to the guest.
    Publish,
    /// The n-th request of a dead process is carried out.
    Haunt(usize),
}

/// The hook that the code under test calls at each of its points.
#[derive(Clone)]
pub struct Watcher {
    world: Rc<RefCell<World>>,
    fault: Fault,
}

impl Hook for Watcher {
    fn at(&mut self, point: Point) {
        let mut world = self.world.borrow_mut();
        if self.fault == Fault::RegionIndexFirst && point == Point::UsedIndex {
            let used_idx = world.guest.ring().used_idx();
            world.set_region_u16(OFFSET_USED_IDX, used_idx);
        }
        world.pass(point);
    }
}

/// One backend process.
pub struct Device {
    world: Rc<RefCell<World>>,
    tracked: TrackedQueue<Watcher>,
    concurrent: bool,
    fault: Fault,
    replay: VecDeque<u16>,
    replaying: bool,
    held: Option<KernelIo>,
    /// Status bytes that are still to be written; only with [`Fault::StatusLate`].
    statuses: Vec<*mut u8>,
    /// Whether the thread looks at the ring without being kicked.
    awake: bool,
    /// Mirrors of private fields of the code under test, for the fingerprint.
    avail_seen: u16,
    signalled: Option<u16>,
}

impl Device {
    /// A process starts, and recovers what the one before it has left.
    pub fn start(world: &Rc<RefCell<World>>, scenario: &Scenario) -> Self {
        let (ring, region) = {
            let mut world = world.borrow_mut();
            prepare_fault(&mut world, scenario);
            let event_idx = scenario.setup.wakeup == Wakeup::Interrupts { event_idx: true };
            let (memory, addresses) = (world.memory(), world.addresses());
            let ring =
                SplitQueue::new(memory, addresses, u32::from(scenario.setup.size), event_idx);
            (ring.expect("the ring is sound"), world.region())
        };
        let fresh = world.borrow().region_u16(OFFSET_VERSION) == 0;
        // Without a region a front end gives the ring's used index as the base, as QEMU does.
        let (region, base) = match scenario.fault {
            Fault::Untracked => (None, ring.published_used_idx()),
            _ => (Some(region), 0xbad),
        };
        let watcher = Watcher { world: Rc::clone(world), fault: scenario.fault };
        let recovered = TrackedQueue::recover(ring, region, base, watcher);
        let (mut tracked, mut replay) = match recovered {
            Ok(recovered) => recovered,
            Err(error) => world.borrow().violation(format!("recovery refused: {error}")),
        };
        match scenario.fault {
            Fault::FreshIndexForgotten if fresh => {
                world.borrow_mut().set_region_u16(OFFSET_USED_IDX, 0);
            }
            Fault::ReplayBackwards => replay.reverse(),
            Fault::FirstCallForgotten => _ = tracked.needs_call(),
            Fault::InFlightNotCounted => {
                let used_idx = tracked.ring().used_idx();
                tracked.ring_mut().resume_at(used_idx, 0);
            }
            _ => {}
        }
        let avail_seen = tracked.ring().last_avail();
        Self {
            world: Rc::clone(world),
            tracked,
            concurrent: scenario.concurrent,
            fault: scenario.fault,
            replaying: !replay.is_empty(),
            replay: replay.into(),
            held: None,
            statuses: Vec::new(),
            awake: true,
            avail_seen,
            signalled: None,
        }
    }

    /// Lives on until nothing is left to do, or until `known` says that this state is an old one.
    pub fn live(&mut self, mut known: impl FnMut(u128) -> bool) -> Life {
        loop {
            self.settle();
            if self.world.borrow().choices.is_new_ground() && known(self.fingerprint()) {
                return Life::Known;
            }
            let actions = self.actions();
            if actions.is_empty() {
                return Life::Done;
            }
            let choice = self.world.borrow_mut().choices.choose(actions.len());
            self.act(actions[choice]);
        }
    }

    /// Does what the thread does without a decision: the end of the replay, going to sleep.
    fn settle(&mut self) {
        self.awake |= std::mem::take(&mut self.world.borrow_mut().kicked);
        if self.replaying
            && self.replay.is_empty()
            && self.held.is_none()
            && self.world.borrow().kernel.is_empty()
        {
            self.publish();
            self.replaying = false;
        }
        if !self.world.borrow().guest.polls() {
            while self.awake && !self.replaying && !self.available() {
                self.call();
                self.awake = self.tracked.ring_mut().enable_kicks();
            }
        }
    }

    fn available(&self) -> bool {
        self.tracked.ring().has_available()
    }

    fn actions(&self) -> Vec<Action> {
        let world = self.world.borrow();
        let mut actions = Vec::new();
        if world.guest.can_submit() {
            actions.push(Action::Submit);
        }
        match &self.held {
            Some(io) if !self.must_wait(&world, io.request) => actions.push(Action::Enter),
            Some(_) => {}
            None => {
                if !self.replay.is_empty() {
                    actions.push(Action::Replay);
                }
                let takes_new = !self.replaying || self.fault == Fault::NewBeforeReplay;
                if takes_new && self.awake && self.available() {
                    actions.push(Action::Take);
                }
            }
        }
        let requests = world.kernel.iter().enumerate();
        for (n, io) in requests {
            let conflicts = |other: &KernelIo| io.conflicts_with(other);
            // Without a conflict nobody can tell when exactly it was carried out.
            if io.done == 0 && (world.kernel.iter().any(conflicts) || !world.ghosts.is_empty()) {
                actions.push(Action::CarryOut(n));
            }
            actions.push(Action::TakeBack(n));
        }
        if self.tracked.staged() > 0 {
            actions.push(Action::Publish);
        }
        actions.extend((0..world.ghosts.len()).map(Action::Haunt));
        actions
    }

    fn must_wait(&self, world: &World, request: Request) -> bool {
        self.concurrent
            && self.fault != Fault::OverlapsIgnored
            && world.kernel.iter().any(|other| request.conflicts_with(&other.request))
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Submit => {
                let kicked = self.world.borrow_mut().guest.submit();
                self.awake |= kicked;
            }
            Action::Replay => {
                if let Some(head) = self.replay.pop_front() {
                    self.tracked.passed(Point::ReplaySubmit);
                    self.start_request(head);
                }
            }
            Action::Take => self.take(),
            Action::Enter => {
                if let Some(io) = self.held.take() {
                    self.submit(io);
                }
            }
            Action::CarryOut(n) => {
                let world = &mut *self.world.borrow_mut();
                world.kernel[n].finish(&mut world.disk);
            }
            Action::TakeBack(n) => self.take_back(n),
            Action::Publish => self.publish(),
            Action::Haunt(n) => {
                let world = &mut *self.world.borrow_mut();
                world.ghosts.remove(n).finish(&mut world.disk);
            }
        }
    }

    fn take(&mut self) {
        if self.avail_seen == self.tracked.ring().last_avail() {
            self.avail_seen = self.world.borrow().guest.ring().avail_idx();
        }
        match self.tracked.pop() {
            Ok(Some(head)) => self.start_request(head),
            other => self.world.borrow().violation(format!("pop gave {other:?}")),
        }
    }

    fn start_request(&mut self, head: u16) {
        let Some(io) = self.parse(head) else {
            // Not a request (any more): it is given back unanswered.
            self.tracked.complete(head, 0);
            return;
        };
        let wait = self.must_wait(&self.world.borrow(), io.request);
        if wait { self.held = Some(io) } else { self.submit(io) }
    }

    /// Reads the chain as `crates/blkd/src/request.rs` does: header, data, status byte.
    fn parse(&self, head: u16) -> Option<KernelIo> {
        let mut segments = Vec::new();
        self.tracked.walk(head, |segment| segments.push(segment)).ok()?;
        let [header, Segment { ptr, len, writable }, status] = segments[..] else { return None };
        assert_eq!((header.len, status.len), (16, 1));
        // SAFETY: a header of 16 bytes and at least one byte of data, in mapped memory.
        let (kind, first, value) =
            unsafe { (header.ptr.read(), header.ptr.add(8).read(), ptr.read()) };
        assert_eq!(writable, kind == 0);
        let request = match kind {
            0 => Request::read(usize::from(first), len),
            _ => Request::write(usize::from(first), len, value),
        };
        Some(KernelIo { token: u64::from(head), request, data: ptr, block_bytes: 1, done: 0 })
    }

    fn submit(&mut self, io: KernelIo) {
        self.world.borrow_mut().kernel.push(io);
        if self.concurrent {
            self.tracked.passed(Point::IoSubmitted);
            return;
        }
        // In the middle of a system call.
        self.world.borrow_mut().die();
        {
            let world = &mut *self.world.borrow_mut();
            world.kernel[0].finish(&mut world.disk);
        }
        self.tracked.passed(Point::IoSubmitted);
        self.take_back(0);
    }

    fn take_back(&mut self, n: usize) {
        let io = {
            let world = &mut *self.world.borrow_mut();
            let mut io = world.kernel.remove(n);
            io.finish(&mut world.disk);
            io
        };
        self.awake = true;
        self.tracked.passed(Point::IoDone);
        let (mut status, mut written) = (std::ptr::null_mut(), 0);
        let walked = self.tracked.walk(io.token as u16, |segment| {
            status = segment.ptr;
            written += if segment.writable { segment.len as u32 } else { 0 };
        });
        assert!(walked.is_ok() && !status.is_null());
        if self.fault == Fault::StatusLate {
            self.statuses.push(status);
        } else {
            // SAFETY: the last segment of the chain is the status byte, in mapped memory.
            unsafe { status.write_volatile(0) };
        }
        self.tracked.passed(Point::StatusStored);
        self.tracked.complete(io.token as u16, written);
    }

    fn publish(&mut self) {
        if self.tracked.staged() > 0 {
            if self.fault == Fault::ClearBeforePublish {
                self.clear_staged();
            }
            self.tracked.publish();
            // SAFETY: as in `take_back`.
            self.statuses.drain(..).for_each(|status| unsafe { status.write_volatile(0) });
            if self.replaying {
                self.tracked.passed(Point::ReplayPublished);
            }
        }
        self.call();
    }

    fn call(&mut self) {
        self.signalled = Some(self.tracked.ring().used_idx());
        if self.tracked.needs_call() {
            let mut world = self.world.borrow_mut();
            if !world.guest.polls() {
                world.guest_looks(Guest::interrupt);
            }
        }
    }

    fn clear_staged(&mut self) {
        let ring = *self.world.borrow().guest.ring();
        for n in 0..self.tracked.staged() as u16 {
            let (head, _) = ring.used_element(self.tracked.ring().used_idx().wrapping_add(n));
            self.world.borrow_mut().unmark(head as u16);
        }
        self.world.borrow_mut().die();
    }

    fn fingerprint(&self) -> u128 {
        let mut state = Fingerprint::new();
        self.world.borrow().fingerprint(&mut state);
        let ring = self.tracked.ring();
        (ring.last_avail(), ring.used_idx(), ring.staged(), self.avail_seen).hash(&mut state);
        (&self.replay, self.replaying, &self.held, self.awake, self.signalled).hash(&mut state);
        state.value()
    }
}

/// What a faulty backend does to the region before it recovers.
fn prepare_fault(world: &mut World, scenario: &Scenario) {
    if scenario.fault == Fault::BatchForgotten && world.region_u16(OFFSET_VERSION) == VERSION {
        assert_eq!(world.region_u16(OFFSET_DESC_NUM), scenario.setup.size);
        let used_idx = world.guest.ring().used_idx();
        world.set_region_u16(OFFSET_USED_IDX, used_idx);
    }
}
