//! A virtual machine without a processor: guest memory, queues, and a vhost-user front end that
//! behaves as QEMU does (same order of messages, one in-flight region kept for all connections).

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::pager::Pager;
use semper_testbed::{Buffer, DriverRing, Layout};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::backend::{Backend, DEADLINE};

const GUEST_ADDR: u64 = 0x4000_0000;
const USER_ADDR: u64 = 0x7000_0000_0000;
const QUEUE_SPACE: usize = 8 << 20;
const CHUNK_SPACE: usize = 16 << 10;
const FIRST_CHUNK: usize = 64 << 10;
const TABLE_ENTRIES: usize = 32;
const HEADER_AT: usize = 16 * TABLE_ENTRIES;
const STATUS_AT: usize = HEADER_AT + 16;
const DATA_AT: usize = 4096;
const DATA_SPACE: usize = CHUNK_SPACE - DATA_AT;
const STATUS_UNTOUCHED: u8 = 0xff;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_GET_LIFETIME: u32 = 10;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;
pub const T_SECURE_ERASE: u32 = 14;

pub const F_BLK_RO: u64 = 1 << 5;
pub const F_EVENT_IDX: u64 = 1 << 29;
const F_LOG_ALL: u64 = 1 << 26;
const VRING_F_LOG: u32 = 1;

/// A request as it goes onto the ring.
#[derive(Clone, Debug)]
pub struct Ask {
    pub kind: u32,
    pub sector: u64,
    /// Bytes that the device reads.
    pub out: Vec<u8>,
    /// Bytes that the device writes.
    pub room: usize,
}

impl Ask {
    pub fn read(sector: u64, len: usize) -> Self {
        Self { kind: T_IN, sector, out: Vec::new(), room: len }
    }

    pub fn write(sector: u64, data: impl Into<Vec<u8>>) -> Self {
        Self { kind: T_OUT, sector, out: data.into(), room: 0 }
    }

    pub fn flush() -> Self {
        Self { kind: T_FLUSH, sector: 0, out: Vec::new(), room: 0 }
    }

    pub fn get_id() -> Self {
        Self { kind: T_GET_ID, sector: 0, out: Vec::new(), room: 20 }
    }

    pub fn trim(kind: u32, sector: u64, sectors: u32, flags: u32) -> Self {
        let mut out = sector.to_le_bytes().to_vec();
        out.extend(sectors.to_le_bytes());
        out.extend(flags.to_le_bytes());
        Self { kind, sector: 0, out, room: 0 }
    }
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status byte; 255 = the device did not touch it.
    pub status: u8,
    /// Bytes written, as the used element says.
    pub written: u32,
    /// What the device read into the request's room.
    pub data: Vec<u8>,
}

/// Names a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    pub queue: usize,
    number: u64,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    Answered,
    BackendDied,
}

struct Lane {
    ring: DriverRing,
    free: Vec<u16>,
    avail_idx: u16,
    last_used: u16,
    kick: EventFd,
    call: EventFd,
    pending: HashMap<u16, (Ticket, usize)>,
}

/// The machine.
pub struct Machine {
    memory: *mut u8,
    len: usize,
    file: File,
    lanes: Vec<Lane>,
    queue_size: u16,
    session: Option<Frontend>,
    inflight: Option<(VhostUserInflight, File)>,
    /// The bitmap of pages that the device writes, while it is to log them.
    dirty: Option<File>,
    /// Where the device's page faults are told.
    pager: Option<Pager>,
    answers: HashMap<Ticket, Answer>,
    next_ticket: u64,
    /// Features to acknowledge, out of what is offered.
    pub features: u64,
    /// Whether to track requests in flight.
    pub track: bool,
    /// Whether the next connection is the receiving end of a postcopy.
    pub listen: bool,
    /// Whether the next connection is told that there may be a postcopy, which then is none.
    pub advise: bool,
    /// Into how many pieces data buffers are cut.
    pub pieces: usize,
    /// What SET_VRING_BASE gives instead of the used index.
    pub base: Option<u16>,
    /// Entries for each queue that the in-flight region is asked for; by default the queue's size.
    pub region_entries: Option<u16>,
    /// What SET_VRING_ADDR gives as the descriptor table instead of its address.
    pub ring_addr: Option<u64>,
}

fn dirty_region(file: &File) -> VhostUserDirtyLogRegion {
    let size = file.metadata().unwrap().len();
    VhostUserDirtyLogRegion { mmap_size: size, mmap_offset: 0, mmap_handle: file.as_raw_fd() }
}

fn memfd(len: usize) -> File {
    // SAFETY: the name is a C string; the result is checked and then owned.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len as u64).unwrap();
    file
}

impl Machine {
    /// With zeroed memory and idle queues.
    pub fn new(num_queues: usize, queue_size: u16) -> Self {
        assert!(FIRST_CHUNK + CHUNK_SPACE * usize::from(queue_size) <= QUEUE_SPACE);
        let len = QUEUE_SPACE * num_queues;
        let file = memfd(len);
        // SAFETY: a new shared mapping; unmapped when the machine goes.
        let memory = unsafe {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), 0)
        };
        assert_ne!(memory, libc::MAP_FAILED);
        let memory = memory.cast::<u8>();
        let lanes = (0..num_queues).map(|index| Lane {
            // SAFETY: page-aligned, and each queue's space is inside the mapping.
            ring: unsafe {
                DriverRing::new(memory.add(QUEUE_SPACE * index), Layout::packed(0, queue_size))
            },
            free: (0..queue_size).rev().collect(),
            avail_idx: 0,
            last_used: 0,
            kick: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap(),
            pending: HashMap::new(),
        });
        Self {
            memory,
            len,
            file,
            lanes: lanes.collect(),
            queue_size,
            session: None,
            inflight: None,
            dirty: None,
            pager: None,
            answers: HashMap::new(),
            next_ticket: 0,
            features: u64::MAX,
            track: true,
            listen: false,
            advise: false,
            pieces: 1,
            base: None,
            region_entries: None,
            ring_addr: None,
        }
    }

    /// The vhost-user connection.
    pub fn session(&mut self) -> &mut Frontend {
        self.session.as_mut().expect("connected")
    }

    /// Closes the connection; memory, rings and region stay.
    pub fn disconnect(&mut self) {
        self.session = None;
    }

    /// Forgets the region, as QEMU does when the guest resets the device; the rings start anew.
    pub fn reset(&mut self) {
        self.inflight = None;
        for lane in &mut self.lanes {
            assert!(lane.ring.layout().end <= FIRST_CHUNK);
            // SAFETY: the queue's own space, which no device serves now.
            unsafe { lane.ring.clear() };
            lane.free = (0..self.queue_size).rev().collect();
            (lane.avail_idx, lane.last_used) = (0, 0);
            lane.pending.clear();
        }
    }

    /// The in-flight region's descriptor, if there is one.
    pub fn inflight(&self) -> Option<&(VhostUserInflight, File)> {
        self.inflight.as_ref()
    }

    /// Connects, negotiates and starts all queues, in QEMU's order.
    ///
    /// # Errors
    /// What the connection says; a backend that dies in the middle is an error like any other.
    pub fn connect(&mut self, socket: &Path) -> vhost::Result<()> {
        self.negotiate(socket)?;
        for index in 0..self.lanes.len() {
            self.start(index)?;
        }
        Ok(())
    }

    /// Connects and negotiates; no queue runs.
    ///
    /// # Errors
    /// As for [`Machine::connect`].
    pub fn negotiate(&mut self, socket: &Path) -> vhost::Result<()> {
        let stream = UnixStream::connect(socket).expect("the socket that outlives its backends");
        stream.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        let mut session = Frontend::from_stream(stream, self.lanes.len() as u64);
        let offered = session.get_features()?;
        let protocol = session.get_protocol_features()?;
        let mut wanted = protocol;
        if !self.track {
            wanted.remove(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        }
        session.set_protocol_features(wanted)?;
        session.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(session.get_queue_num()? >= self.lanes.len() as u64);
        session.set_owner()?;
        let unlogged = if self.dirty.is_some() { 0 } else { F_LOG_ALL };
        session.set_features(offered & self.features & !unlogged)?;
        let advise = self.listen || self.advise;
        let faults = advise.then(|| session.postcopy_advise()).transpose()?.filter(|_| self.listen);
        if self.listen {
            session.postcopy_listen()?;
        }
        if wanted.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            if self.inflight.is_none() {
                let entries = self.region_entries.unwrap_or(self.queue_size);
                let asked = VhostUserInflight::new(0, 0, self.lanes.len() as u16, entries);
                self.inflight = Some(session.get_inflight_fd(&asked)?);
            }
            let (shape, file) = self.inflight.as_ref().expect("just made");
            session.set_inflight_fd(shape, file.as_raw_fd())?;
        }
        let bases = session.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_ADDR,
            memory_size: self.len as u64,
            userspace_addr: USER_ADDR,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }])?;
        self.pager = faults.zip(bases).map(|(faults, bases)| Pager::new(faults, bases[0]));
        if self.listen {
            session.postcopy_ack_mem_regions(FrontendReq::SET_MEM_TABLE)?;
        }
        if let Some(file) = &self.dirty {
            session.set_log_base(0, Some(dirty_region(file)))?;
        }
        self.session = Some(session);
        Ok(())
    }

    fn more_memory(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_ADDR + (1 << 40),
            memory_size: self.len as u64,
            userspace_addr: USER_ADDR + (1 << 40),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Plugs memory in, which nobody uses.
    ///
    /// # Errors
    /// What the connection says.
    pub fn add_memory(&mut self) -> vhost::Result<()> {
        let region = self.more_memory();
        self.session().add_mem_region(&region).map(drop)
    }

    /// Unplugs it.
    ///
    /// # Errors
    /// As for [`Machine::add_memory`].
    pub fn remove_memory(&mut self) -> vhost::Result<()> {
        let region = self.more_memory();
        self.session().remove_mem_region(&region)
    }

    /// Has the device log the pages that it writes from now on, in QEMU's order; or not any more.
    pub fn set_logging(&mut self, on: bool) {
        let bytes = (GUEST_ADDR + self.len as u64) / 4096 / 8;
        self.dirty = on.then(|| memfd(bytes as usize));
        let features = self.session().get_features().unwrap() & self.features;
        if let Some(file) = &self.dirty {
            let region = dirty_region(file);
            self.session().set_log_base(0, Some(region)).unwrap();
        }
        let unlogged = if on { 0 } else { F_LOG_ALL };
        self.session().set_features(features & !unlogged).unwrap();
        for index in 0..self.lanes.len() {
            let config = self.vring_config(index);
            self.session().set_vring_addr(index, &config).unwrap();
        }
    }

    /// Guest-physical page numbers that the device has logged, counted from the memory's start.
    pub fn logged(&self) -> std::collections::BTreeSet<u64> {
        let file = self.dirty.as_ref().expect("logging is on");
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).unwrap();
        let pages =
            (0..8 * bytes.len() as u64).filter(|n| bytes[*n as usize / 8] >> (n % 8) & 1 != 0);
        pages
            .map(|page| page.checked_sub(GUEST_ADDR / 4096).expect("a page of the guest"))
            .collect()
    }

    /// Pages that the device writes when it answers `ask` on the chunk of `head`: the status byte's
    /// and those of the data.
    pub fn writes_of(&self, queue: usize, head: u16, ask: &Ask) -> std::collections::BTreeSet<u64> {
        let chunk = self.chunk(queue, head) as u64;
        let data = chunk + (DATA_AT + ask.out.len()) as u64;
        let rooms = (data..data + ask.room as u64).map(|byte| byte / 4096);
        rooms.chain([(chunk + STATUS_AT as u64) / 4096]).collect()
    }

    /// Pages of a queue's used ring.
    pub fn used_pages(&self, queue: usize) -> std::collections::BTreeSet<u64> {
        let start = (QUEUE_SPACE * queue + self.lanes[queue].ring.layout().used) as u64;
        (start / 4096..=(start + 6 + 8 * u64::from(self.queue_size) - 1) / 4096).collect()
    }

    fn vring_config(&self, index: usize) -> VringConfigData {
        let layout = self.lanes[index].ring.layout();
        let at = |offset: usize| USER_ADDR + (QUEUE_SPACE * index + offset) as u64;
        let logs = self.dirty.is_some();
        VringConfigData {
            queue_max_size: self.queue_size,
            queue_size: self.queue_size,
            flags: if logs { VRING_F_LOG } else { 0 },
            desc_table_addr: self.ring_addr.unwrap_or(at(layout.desc)),
            used_ring_addr: at(layout.used),
            avail_ring_addr: at(layout.avail),
            log_addr: logs.then(|| GUEST_ADDR + (QUEUE_SPACE * index + layout.used) as u64),
        }
    }

    /// Starts one queue.
    ///
    /// # Errors
    /// As for [`Machine::connect`].
    pub fn start(&mut self, index: usize) -> vhost::Result<()> {
        let (size, base) = (self.queue_size, self.base);
        let config = self.vring_config(index);
        let session = self.session.as_mut().expect("connected");
        let lane = &self.lanes[index];
        session.set_vring_num(index, size)?;
        session.set_vring_base(index, base.unwrap_or(lane.ring.used_idx()))?;
        session.set_vring_addr(index, &config)?;
        session.set_vring_kick(index, &lane.kick)?;
        session.set_vring_call(index, &lane.call)?;
        session.set_vring_enable(index, true)
    }

    /// Gives the device another eventfd for kicks while the queue runs.
    pub fn replace_kick(&mut self, index: usize) {
        let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        self.session().set_vring_kick(index, &kick).unwrap();
        self.lanes[index].kick = kick;
    }

    /// The configuration space.
    pub fn config(&mut self) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.session().get_config(0, 60, flags, &[0; 60]).unwrap().1
    }

    /// Switches the write cache, as a guest does through the configuration space.
    pub fn set_write_cache(&mut self, on: bool) {
        self.session().set_config(32, VhostUserConfigFlags::WRITABLE, &[u8::from(on)]).unwrap();
    }

    /// The ring of a queue, for what no sane driver does.
    pub fn ring(&self, queue: usize) -> DriverRing {
        self.lanes[queue].ring
    }

    /// Guest-physical address of a byte in the chunk of `head`.
    pub fn chunk_addr(&self, queue: usize, head: u16, offset: usize) -> u64 {
        GUEST_ADDR + self.chunk(queue, head) as u64 + offset as u64
    }

    fn chunk(&self, queue: usize, head: u16) -> usize {
        QUEUE_SPACE * queue + FIRST_CHUNK + CHUNK_SPACE * usize::from(head)
    }

    /// Puts a request on the ring and kicks the device if it wants that.
    pub fn submit(&mut self, queue: usize, ask: &Ask) -> Ticket {
        let ticket = self.prepare(queue, ask);
        self.show(queue);
        ticket
    }

    /// Puts a request on the ring; the device does not see it before [`Machine::show`].
    pub fn prepare(&mut self, queue: usize, ask: &Ask) -> Ticket {
        let head = self.lanes[queue].free.pop().expect("a free descriptor");
        let chunk = self.chunk(queue, head);
        assert!(ask.out.len() + ask.room <= DATA_SPACE);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&ask.kind.to_le_bytes());
        header[8..].copy_from_slice(&ask.sector.to_le_bytes());
        // SAFETY: everything is inside the head's chunk, which the device does not have now.
        unsafe {
            let chunk = self.memory.add(chunk);
            chunk.add(HEADER_AT).copy_from(header.as_ptr(), 16);
            chunk.add(STATUS_AT).write(STATUS_UNTOUCHED);
            chunk.add(DATA_AT).copy_from(ask.out.as_ptr(), ask.out.len());
            chunk.add(DATA_AT + ask.out.len()).write_bytes(0xee, ask.room);
        }
        let at = |offset: usize| self.chunk_addr(queue, head, offset);
        let mut buffers = vec![Buffer { addr: at(HEADER_AT), len: 16, writable: false }];
        let out_end = DATA_AT + ask.out.len();
        self.cut(&mut buffers, at(DATA_AT), ask.out.len(), false);
        self.cut(&mut buffers, at(out_end), ask.room, true);
        buffers.push(Buffer { addr: at(STATUS_AT), len: 1, writable: true });
        assert!(buffers.len() <= TABLE_ENTRIES);
        let table = self.chunk(queue, head) - QUEUE_SPACE * queue;
        // SAFETY: the table is at the start of the chunk, with room for its entries.
        unsafe { self.lanes[queue].ring.write_indirect(head, table, at(0), &buffers) };
        self.offer(queue, head, ask.room)
    }

    /// Cuts a buffer into the machine's number of pieces.
    fn cut(&self, buffers: &mut Vec<Buffer>, addr: u64, len: usize, writable: bool) {
        let piece = len.div_ceil(self.pieces).max(1);
        for start in (0..len).step_by(piece) {
            let len = piece.min(len - start) as u32;
            buffers.push(Buffer { addr: addr + start as u64, len, writable });
        }
    }

    /// Takes a free head for a chain that the caller writes; see [`Machine::offer`].
    pub fn take_head(&mut self, queue: usize) -> u16 {
        self.lanes[queue].free.pop().expect("a free descriptor")
    }

    /// The head that the next request will get.
    pub fn next_head(&self, queue: usize) -> u16 {
        *self.lanes[queue].free.last().expect("a free descriptor")
    }

    /// Writes into the chunk of `head`.
    pub fn poke(&mut self, queue: usize, head: u16, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= CHUNK_SPACE);
        // SAFETY: inside the chunk, which is inside the mapping.
        unsafe {
            let at = self.memory.add(self.chunk(queue, head) + offset);
            at.copy_from(bytes.as_ptr(), bytes.len());
        }
    }

    /// Takes the first page of the data of `head` away, as if it had not arrived.
    pub fn take_page(&mut self, queue: usize, head: u16) {
        let at = (self.chunk(queue, head) + DATA_AT) as i64;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is passed; the pages of the mapping become zeros.
        let status = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, 4096) };
        assert_eq!(status, 0);
    }

    /// Waits until the device touches that page.
    pub fn wait_fault(&self, queue: usize, head: u16) {
        let pager = self.pager.as_ref().expect("a postcopy");
        assert_eq!(pager.wait_fault(), self.data_at(queue, head));
    }

    /// Puts `bytes` into that page, and lets the device go on.
    pub fn end_fault(&mut self, queue: usize, head: u16, bytes: &[u8; 4096]) {
        self.place_page(queue, head, bytes);
        self.pager.as_ref().expect("a postcopy").wake(self.data_at(queue, head));
    }

    /// That page in the device's address space.
    fn data_at(&self, queue: usize, head: u16) -> u64 {
        let pager = self.pager.as_ref().expect("a postcopy");
        pager.base + (self.chunk(queue, head) + DATA_AT) as u64
    }

    /// Puts `bytes` into that page.
    pub fn place_page(&mut self, queue: usize, head: u16, bytes: &[u8; 4096]) {
        self.poke(queue, head, DATA_AT, bytes);
    }

    /// Lets all pages arrive that are missing, as zeros.
    pub fn place_all(&mut self) {
        for page in (0..self.len).step_by(4096) {
            // SAFETY: inside the mapping; a look makes the page.
            unsafe { self.memory.add(page).read_volatile() };
        }
    }

    /// Puts `head` into the available ring; not shown yet.
    pub fn offer(&mut self, queue: usize, head: u16, room: usize) -> Ticket {
        let ticket = Ticket { queue, number: self.next_ticket };
        self.next_ticket += 1;
        let lane = &mut self.lanes[queue];
        lane.ring.write_avail(lane.avail_idx, head);
        lane.avail_idx = lane.avail_idx.wrapping_add(1);
        lane.pending.insert(head, (ticket, room));
        ticket
    }

    /// Shows what was prepared to the device, and kicks it if it wants that.
    pub fn show(&mut self, queue: usize) {
        let event_idx = self.features & F_EVENT_IDX != 0;
        let lane = &mut self.lanes[queue];
        let old = lane.ring.avail_idx();
        lane.ring.set_avail_idx(lane.avail_idx);
        if lane.ring.needs_kick(old, lane.avail_idx, event_idx) {
            lane.kick.write(1).unwrap();
        }
    }

    /// Kicks the device whatever it wants.
    pub fn kick(&self, queue: usize) {
        self.lanes[queue].kick.write(1).unwrap();
    }

    /// Requests that are not answered yet.
    pub fn pending(&self) -> usize {
        self.lanes.iter().map(|lane| lane.pending.len()).sum()
    }

    /// Takes what the device has given back, without waiting.
    ///
    /// # Panics
    /// When the device gives back what it does not have ("is not a head!").
    pub fn reap(&mut self) {
        for queue in 0..self.lanes.len() {
            loop {
                self.reap_queue(queue);
                let lane = &self.lanes[queue];
                lane.ring.set_used_event(lane.last_used);
                if lane.ring.used_idx() == lane.last_used {
                    break;
                }
            }
        }
    }

    /// Takes what the device has given back on one queue.
    pub fn reap_queue(&mut self, queue: usize) {
        while self.lanes[queue].last_used != self.lanes[queue].ring.used_idx() {
            let lane = &mut self.lanes[queue];
            let (id, written) = lane.ring.used_element(lane.last_used);
            lane.last_used = lane.last_used.wrapping_add(1);
            let head = id as u16;
            let pending = lane.pending.remove(&head);
            let (ticket, room) = pending.unwrap_or_else(|| panic!("{id} is not a head!"));
            lane.free.push(head);
            let chunk = self.chunk(queue, head);
            // SAFETY: inside the chunk of a head that the device has given back.
            let (status, data) = unsafe {
                let chunk = self.memory.add(chunk);
                let data = std::slice::from_raw_parts(chunk.add(DATA_AT), room);
                (chunk.add(STATUS_AT).read(), data.to_vec())
            };
            self.answers.insert(ticket, Answer { status, written, data });
        }
    }

    /// Waits, by interrupts alone, until everything is answered or the backend has died.
    ///
    /// # Panics
    /// When neither happens by the deadline.
    pub fn wait_all(&mut self, backend: &Backend) -> Waited {
        self.wait_for_pending(0, backend)
    }

    /// Waits, by interrupts alone, until no more than `most` requests are unanswered, or the
    /// backend has died.
    ///
    /// # Panics
    /// When neither happens by the deadline.
    pub fn wait_for_pending(&mut self, most: usize, backend: &Backend) -> Waited {
        let end = Instant::now() + DEADLINE;
        loop {
            self.reap();
            if self.pending() <= most {
                return Waited::Answered;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} requests hang", self.pending());
            if self.sleep(backend, left) {
                self.reap();
                return if self.pending() <= most { Waited::Answered } else { Waited::BackendDied };
            }
        }
    }

    /// Sleeps until an interrupt or the end of the backend; true if it has ended.
    fn sleep(&self, backend: &Backend, time: Duration) -> bool {
        let calls = self.lanes.iter().map(|lane| lane.call.as_raw_fd());
        let mut fds: Vec<_> = calls
            .chain([backend.pidfd()])
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        // SAFETY: the kernel reads and writes exactly these entries.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as u64, time.as_millis() as i32) };
        for (lane, fd) in self.lanes.iter().zip(&fds) {
            if fd.revents != 0 {
                lane.call.read().unwrap();
            }
        }
        fds.last().is_some_and(|fd| fd.revents != 0)
    }

    /// Submits one request and waits for its answer.
    pub fn ask(&mut self, backend: &Backend, ask: &Ask) -> Answer {
        let ticket = self.submit(0, ask);
        assert_eq!(self.wait_all(backend), Waited::Answered, "the backend died");
        self.answer(ticket)
    }

    /// So many bytes from the beginning of the disk.
    pub fn read_first(&mut self, backend: &Backend, bytes: usize) -> Vec<u8> {
        let mut got = Vec::new();
        while got.len() < bytes {
            let len = (bytes - got.len()).min(12 << 10);
            let answer = self.ask(backend, &Ask::read(got.len() as u64 / 512, len));
            assert_eq!(answer.status, 0);
            got.extend(answer.data);
        }
        got
    }

    /// The answer to a request that was answered.
    pub fn answer(&mut self, ticket: Ticket) -> Answer {
        self.answers.remove(&ticket).unwrap_or_else(|| panic!("{ticket:?} is not answered"))
    }

    /// Requests of one queue that are not answered yet.
    pub fn pending_on(&self, queue: usize) -> usize {
        self.lanes[queue].pending.len()
    }

    /// Whether a request was answered.
    pub fn is_answered(&self, ticket: Ticket) -> bool {
        self.answers.contains_key(&ticket)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: what `new` mapped; rings are not used any more.
        unsafe { libc::munmap(self.memory.cast(), self.len) };
    }
}
