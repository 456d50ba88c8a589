//! What outlives a backend: the guest and its memory, the in-flight region, the disk, and what the
//! kernel still carries out for a process that is dead.

use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::panic::resume_unwind;
use std::sync::Arc;

use semper_inflight::format::{
    ENTRY_COUNTER, ENTRY_INFLIGHT, ENTRY_SIZE, HEADER_SIZE, OFFSET_DESC_NUM,
    OFFSET_LAST_BATCH_HEAD, OFFSET_USED_IDX, queue_stride,
};
use semper_inflight::{Point, QueueRegion};
use semper_ring::{GuestMemory, RingAddresses};

use crate::choices::Choices;
use crate::fingerprint::Fingerprint;
use crate::guest::{Format, Guest, Misbehaviour, Wakeup};
use crate::history::{MAX_BLOCKS, Request, Verb};

/// Guest address of the memory.
const GUEST_ADDR: u64 = 0x1000;

/// How a world begins.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Entries of the queue.
    pub size: u16,
    /// Where the ring's indices start.
    pub start_idx: u16,
    /// Whether a process died while it set up the region, before the first that is explored.
    pub half_made_region: bool,
    /// What the guest does.
    pub program: Vec<Request>,
    /// How its requests look.
    pub format: Format,
    /// How many processes die at most, one after the other.
    pub deaths: u32,
    /// How the guest learns of completions.
    pub wakeup: Wakeup,
    /// Whether heads are used again at once.
    pub last_freed_first: bool,
    /// Whether a request that the kernel carries out for a dead process may end half done.
    pub tearing: bool,
    /// Whether I/O of a dead process can still land when the next one is at work, as it could
    /// without an image lock.
    pub haunted: bool,
}

/// The device broke a promise; travels as the payload of a panic, and ends the exploration.
#[derive(Debug)]
pub struct Violation(pub String);

/// A request, or the rest of one, that the kernel carries out.
#[derive(Clone, Debug, Hash)]
pub struct KernelIo {
    /// What the device calls it.
    pub token: u64,
    /// What it does.
    pub request: Request,
    /// Its data buffer.
    pub data: *mut u8,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Which of its blocks are done, counted from its first.
    pub done: u8,
}

impl KernelIo {
    /// Does one block (counted from the request's first).
    ///
    /// # Panics
    /// When the guest's bytes of one block differ.
    pub fn carry_out(&mut self, block: usize, disk: &mut [u8; MAX_BLOCKS]) {
        self.done |= 1 << block;
        let on_disk = &mut disk[self.request.first + block];
        // SAFETY: the device vouches for the data buffer as it would to a kernel; nobody else
        // uses it meanwhile.
        let in_memory = unsafe {
            let start = self.data.add(block * self.block_bytes);
            std::slice::from_raw_parts_mut(start, self.block_bytes)
        };
        match self.request.verb {
            Verb::Read => in_memory.fill(*on_disk),
            // The guest's memory is read when the I/O happens, not when it was submitted.
            Verb::Write(_) => {
                *on_disk = in_memory[0];
                assert!(in_memory.iter().all(|byte| byte == on_disk), "a torn buffer");
            }
        }
    }

    /// Does all blocks that are not done.
    pub fn finish(&mut self, disk: &mut [u8; MAX_BLOCKS]) {
        for block in 0..self.request.count {
            if self.done & (1 << block) == 0 {
                self.carry_out(block, disk);
            }
        }
    }

    /// Whether the order of the two makes a difference.
    pub fn conflicts_with(&self, other: &KernelIo) -> bool {
        self.token != other.token && self.request.conflicts_with(&other.request)
    }

    /// The first byte of each block in the data buffer.
    pub(crate) fn buffer(&self) -> [u8; MAX_BLOCKS] {
        let mut values = [0; MAX_BLOCKS];
        for (block, value) in values.iter_mut().enumerate().take(self.request.count) {
            // SAFETY: as in `carry_out`.
            *value = unsafe { self.data.add(block * self.block_bytes).read() };
        }
        values
    }

    /// Fills the data buffer, block by block.
    pub(crate) fn set_buffer(&self, values: &[u8; MAX_BLOCKS]) {
        for (block, value) in values.iter().enumerate().take(self.request.count) {
            let start = block * self.block_bytes;
            // SAFETY: as in `carry_out`.
            unsafe { self.data.add(start).write_bytes(*value, self.block_bytes) };
        }
    }
}

/// Everything but the process.
pub struct World {
    /// The decisions of the present run.
    pub choices: Choices,
    /// The guest.
    pub guest: Guest,
    /// The disk: the value of each block.
    pub disk: [u8; MAX_BLOCKS],
    /// I/O that the living process has submitted and not taken back.
    pub kernel: Vec<KernelIo>,
    /// I/O of dead processes that can still land; only in a haunted world.
    pub ghosts: Vec<KernelIo>,
    /// The guest has kicked the device since it last looked.
    pub kicked: bool,
    /// How often a process may still die.
    pub deaths_left: u32,
    /// How many deaths were looked at, for each point.
    pub deaths: [u64; Point::ALL.len()],
    /// Fingerprints of all worlds that dead processes have left.
    pub graves: HashSet<u128>,
    /// Those that are still to be explored.
    pub unexplored: Vec<Snapshot>,
    pub(crate) tearing: bool,
    pub(crate) haunted: bool,
    block_bytes: usize,
    memory: Arc<GuestMemory>,
    bytes: *mut u8,
    len: usize,
    region: Box<[u64]>,
    size: u16,
}

/// A copy of what outlives a backend.
#[derive(Clone)]
pub struct Snapshot {
    guest: Guest,
    disk: [u8; MAX_BLOCKS],
    ghosts: Vec<KernelIo>,
    deaths_left: u32,
    memory: Box<[u8]>,
    region: Box<[u64]>,
}

impl World {
    /// The world before the first backend.
    ///
    /// # Panics
    /// When the system has no memory left.
    pub fn new(setup: &Setup) -> Self {
        let len = Guest::memory_needed(setup.size, setup.format);
        let memory = Arc::new(GuestMemory::anonymous(GUEST_ADDR, len).expect("memory"));
        let bytes = memory.translate(GUEST_ADDR, len as u64).expect("the guest's memory");
        let manners = (setup.format, setup.wakeup, setup.last_freed_first);
        let (size, idx, program) = (setup.size, setup.start_idx, &setup.program);
        // SAFETY: the mapping is page-aligned and has `len` bytes; `memory` keeps it.
        let guest = unsafe { Guest::new(bytes, GUEST_ADDR, size, idx, program, manners) };
        let mut world = Self {
            choices: Choices::new(),
            guest,
            disk: [0; MAX_BLOCKS],
            kernel: Vec::new(),
            ghosts: Vec::new(),
            kicked: false,
            deaths_left: setup.deaths,
            deaths: [0; Point::ALL.len()],
            graves: HashSet::new(),
            unexplored: Vec::new(),
            tearing: setup.tearing,
            haunted: setup.haunted,
            block_bytes: setup.format.block_bytes,
            memory,
            bytes,
            len,
            region: vec![0; queue_stride(size) / 8].into_boxed_slice(),
            size,
        };
        if setup.half_made_region {
            // The version comes last.
            world.set_region_u16(OFFSET_DESC_NUM, size);
            world.set_region_u16(OFFSET_USED_IDX, idx.wrapping_sub(1));
            world.set_region_u16(OFFSET_LAST_BATCH_HEAD, size - 1);
        }
        world
    }

    /// The guest's memory.
    pub fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Where the queue stands.
    pub fn addresses(&self) -> RingAddresses {
        let layout = self.guest.ring().layout();
        let at = |offset: usize| GUEST_ADDR + offset as u64;
        RingAddresses { desc: at(layout.desc), avail: at(layout.avail), used: at(layout.used) }
    }

    /// The in-flight region. The world must outlive it.
    pub fn region(&mut self) -> QueueRegion {
        // SAFETY: 8-aligned and of the right size; only used while the world lives, and the world
        // itself touches the bytes only between two calls of the device, in the same thread.
        unsafe { QueueRegion::new(self.region.as_mut_ptr().cast(), self.size) }
    }

    /// Reads two bytes of the region.
    pub fn region_u16(&self, at: usize) -> u16 {
        (self.region[at / 8] >> (at % 8 * 8)) as u16
    }

    /// Overwrites two bytes of the region, as only a faulty backend would.
    pub fn set_region_u16(&mut self, at: usize, value: u16) {
        let (word, shift) = (&mut self.region[at / 8], at % 8 * 8);
        *word = *word & !(0xffff << shift) | u64::from(value) << shift;
    }

    /// Whether the region says that `head` is in flight.
    pub fn is_marked(&self, head: u16) -> bool {
        self.region[(HEADER_SIZE + ENTRY_SIZE * usize::from(head) + ENTRY_INFLIGHT) / 8] & 1 == 1
    }

    /// Clears the mark of `head`, as only a faulty backend would.
    pub fn unmark(&mut self, head: u16) {
        self.region[(HEADER_SIZE + ENTRY_SIZE * usize::from(head) + ENTRY_INFLIGHT) / 8] &= !0xff;
    }

    fn counter(&self, head: u16) -> u64 {
        self.region[(HEADER_SIZE + ENTRY_SIZE * usize::from(head) + ENTRY_COUNTER) / 8]
    }

    /// Keeps a copy.
    pub fn snapshot(&self) -> Snapshot {
        // SAFETY: the mapping has `len` bytes, and no other thread writes them.
        let memory = unsafe { std::slice::from_raw_parts(self.bytes, self.len) };
        Snapshot {
            guest: self.guest,
            disk: self.disk,
            ghosts: self.ghosts.clone(),
            deaths_left: self.deaths_left,
            memory: memory.into(),
            region: self.region.clone(),
        }
    }

    /// Goes back to a copy; nothing is in the kernel.
    pub fn restore(&mut self, from: &Snapshot) {
        self.guest = from.guest;
        self.disk = from.disk;
        self.ghosts.clone_from(&from.ghosts);
        self.kernel.clear();
        self.kicked = false;
        self.deaths_left = from.deaths_left;
        self.region.copy_from_slice(&from.region);
        // SAFETY: both have `len` bytes.
        unsafe { self.bytes.copy_from_nonoverlapping(from.memory.as_ptr(), self.len) };
    }

    /// Hashes everything that the future depends on, as far as it is outside the process. The
    /// counters of the region count only by their order: the code under test does nothing but
    /// sort by them.
    pub fn fingerprint(&self, state: &mut Fingerprint) {
        self.deaths_left.hash(state);
        self.disk.hash(state);
        self.kernel.hash(state);
        self.ghosts.hash(state);
        self.guest.fingerprint(state);
        // SAFETY: as in `snapshot`.
        state.write(unsafe { std::slice::from_raw_parts(self.bytes, self.len) });
        state.write_u64(self.region[1]);
        for head in 0..self.size {
            state.write_u64(self.region[2 + 2 * usize::from(head)]);
            let earlier = |other: &u16| self.counter(*other) < self.counter(head);
            let marked = (0..self.size).filter(|other| self.is_marked(*other));
            let rank = if self.is_marked(head) { marked.filter(earlier).count() } else { 0 };
            state.write_u8(rank as u8);
        }
    }

    /// Ends the run: the device broke a promise.
    pub fn violation(&self, what: String) -> ! {
        resume_unwind(Box::new(Violation(what)))
    }

    /// The guest looks at what is completed, and may answer it with new requests at once.
    pub fn guest_looks(&mut self, look: fn(&mut Guest) -> Result<usize, Misbehaviour>) {
        match look(&mut self.guest) {
            Err(what) => self.violation(format!("the guest was told nonsense: {what:?}")),
            Ok(0) => {}
            Ok(_) => self.guest_may_submit(),
        }
    }

    /// The guest submits as many requests as it likes.
    pub fn guest_may_submit(&mut self) {
        while self.guest.can_submit() && self.choices.choose(2) == 1 {
            self.kicked |= self.guest.submit();
        }
    }

    /// The process has come to `point`: a guest that polls looks, and the process may die.
    pub fn pass(&mut self, point: Point) {
        if self.guest.polls() {
            self.guest_looks(Guest::observe);
        }
        self.deaths[point as usize] += self.die();
    }

    /// What is wrong when nothing is left to do, if anything is.
    pub fn judge(&self, writes_in_order: bool) -> Option<String> {
        let history = self.guest.history();
        let disk = &self.disk;
        let explained = || match self.tearing {
            false => history.some_order_explains(disk),
            true => history.some_order_explains_each_block(disk),
        };
        let wrong = if !history.is_finished() {
            "requests hang"
        } else if !explained() {
            "no legal order explains the end"
        } else if writes_in_order && !history.writes_took_effect_in_order(disk) {
            "overlapping writes were reordered"
        } else {
            return None;
        };
        Some(format!("{wrong}: disk {disk:?}, {history:?}"))
    }
}
