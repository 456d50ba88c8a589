//! What is explored: a guest's program, a kind of device, and what is wrong with it.

use semper_testbed::{Format, Request, Setup, Wakeup};

/// A deliberate mistake of the backend. Each is made by the test, around the code under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// None: the device as it is.
    None,
    /// The entries of a batch are cleared before `used.idx` shows the batch.
    ClearBeforePublish,
    /// Requests are replayed in the opposite of the order of their counters.
    ReplayBackwards,
    /// A fresh region gets no `used_idx`.
    FreshIndexForgotten,
    /// Recovery takes over `used_idx` without clearing the entries of the last batch.
    BatchForgotten,
    /// Requests that overlap are in the kernel together.
    OverlapsIgnored,
    /// The region's `used_idx` is stored before the entries of the batch are cleared.
    RegionIndexFirst,
    /// New requests are taken while old ones are still being replayed.
    NewBeforeReplay,
    /// The next process does not wait until the dead one's I/O is over.
    ImageNotLocked,
    /// The status byte is written when the driver has the request back already.
    StatusLate,
    /// Nobody wakes the guest for what an earlier process published.
    FirstCallForgotten,
    /// The available ring is taken up at the used index, whatever is in flight.
    InFlightNotCounted,
    /// There is no in-flight region at all.
    Untracked,
}

/// What holds when everything is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// Some order of the requests that respects time explains everything.
    SomeOrder,
    /// That, and the writes took effect in the order of submission.
    WritesInOrder,
}

/// One byte for each block is enough to tell values apart.
pub const FORMAT: Format = Format { block_bytes: 1, sectors: [0, 1, 2, 3] };

/// One exploration.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// How the world begins.
    pub setup: Setup,
    /// Whether the engine has many requests in the kernel at once.
    pub concurrent: bool,
    /// What is wrong with the device.
    pub fault: Fault,
    /// What is checked at the end.
    pub promise: Promise,
}

impl Scenario {
    /// A polling guest on a fresh device with a concurrent engine.
    pub fn new(size: u16, deaths: u32, program: &[Request]) -> Self {
        let setup = Setup {
            size,
            start_idx: 0,
            half_made_region: false,
            program: program.to_vec(),
            format: FORMAT,
            deaths,
            wakeup: Wakeup::Polls,
            last_freed_first: true,
            tearing: false,
            haunted: false,
        };
        let (fault, promise) = (Fault::None, Promise::WritesInOrder);
        Self { setup, concurrent: true, fault, promise }
    }

    /// One request at a time in the kernel, done before the next is taken.
    pub fn synchronous(self) -> Self {
        Self { concurrent: false, ..self }
    }

    /// The ring's indices start here.
    pub fn starting_at(self, start_idx: u16) -> Self {
        Self { setup: Setup { start_idx, ..self.setup }, ..self }
    }

    /// The region was left half made.
    pub fn on_half_made_region(self) -> Self {
        Self { setup: Setup { half_made_region: true, ..self.setup }, ..self }
    }

    /// Heads are used in turn.
    pub fn oldest_head_first(self) -> Self {
        Self { setup: Setup { last_freed_first: false, ..self.setup }, ..self }
    }

    /// The guest sleeps between interrupts.
    pub fn with_interrupts(self, event_idx: bool) -> Self {
        Self { setup: Setup { wakeup: Wakeup::Interrupts { event_idx }, ..self.setup }, ..self }
    }

    /// The kernel may leave a request half done. Then only each block is held to be whole,
    /// otherwise each request is.
    pub fn with_tearing(self) -> Self {
        Self { setup: Setup { tearing: true, ..self.setup }, ..self }
    }

    /// The device makes this mistake, and is held to no more than `promise`.
    pub fn with_fault(self, fault: Fault, promise: Promise) -> Self {
        let haunted = fault == Fault::ImageNotLocked;
        Self { setup: Setup { haunted, ..self.setup }, fault, promise, ..self }
    }
}
