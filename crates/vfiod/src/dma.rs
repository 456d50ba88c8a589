//! The guest's memory as a device reaches it.
//!
//! ```text
//!   direct     the device ──► our mapping                       interrupts at once
//!   mediated   the device ──DMA_WRITE, no reply──► QEMU          interrupts when a DMA_READ behind the
//!                                                                writes was answered (the barrier)
//! ```
//!
//! QEMU carries out requests in order, so the answer to a read says that every write before it is in
//! the guest's memory, and marked as dirty where QEMU is moving the VM. No writer waits for it: what is
//! to be done afterwards, interrupts, is kept until the answer comes.
//!
//! Addresses come from a guest: only memory that QEMU has handed over as a file, and that the device
//! may write, is reached, so no access leads to registers of any device.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use semper_device::dirty::DirtySource;
use semper_device::{Bus, Route, Unreachable};
use semper_ring::{GuestMemory, RegionSpec};

use crate::interrupts::Interrupts;
use crate::message::{Command, Fields, Message, send};
use crate::vfio::dma;

/// Bytes on their way to QEMU from which on a device takes no new command.
const CONGESTED: u64 = 8 << 20;
/// Bytes of one write: what a socket takes as a whole, so that no part of it is there when this process
/// dies.
const PART_MOST: usize = 32 << 10;
/// Ranges of memory that a client may name.
const MAPS_MOST: usize = 4096;

/// What waits for the answer of a read that went behind the writes.
#[derive(Debug)]
struct Barrier {
    id: u16,
    bytes: u64,
    vectors: BTreeSet<u16>,
}

/// The way to the guest's memory.
pub(crate) struct Dma {
    memory: Arc<GuestMemory>,
    /// What QEMU has handed over, by address: a spare is told of it.
    handed_over: BTreeMap<u64, (Vec<u8>, File)>,
    stream: Option<Arc<UnixStream>>,
    route: Route,
    dirty: Option<Box<dyn DirtySource>>,
    barrier: Option<Barrier>,
    /// Written since the last barrier.
    unasked: u64,
    /// Where the last write went: what a barrier reads.
    last: u64,
    waiting: BTreeSet<u16>,
    next_id: u16,
    data_most: usize,
    /// No interrupt reaches the guest.
    pub quiet: bool,
    /// The guest allows its device to reach memory.
    pub master: bool,
    pub interrupts: Interrupts,
    /// Interrupts that were not made because of `quiet`.
    pub held_back: u64,
    /// Accesses to what is no memory.
    pub refused: u64,
    /// By QEMU.
    pub mediated_bytes: u64,
}

impl Dma {
    pub(crate) fn new(interrupts: Interrupts) -> Self {
        Self {
            memory: Arc::new(GuestMemory::empty()),
            handed_over: BTreeMap::new(),
            stream: None,
            route: Route::Direct,
            dirty: None,
            barrier: None,
            unasked: 0,
            last: 0,
            waiting: BTreeSet::new(),
            next_id: 0,
            data_most: PART_MOST,
            quiet: false,
            master: false,
            interrupts,
            held_back: 0,
            refused: 0,
            mediated_bytes: 0,
        }
    }

    /// A client is there, which takes so much data in a message.
    pub(crate) fn connect(&mut self, stream: Arc<UnixStream>) {
        self.stream = Some(stream);
    }

    /// What the client takes in one message, in bytes.
    pub(crate) fn limit_data(&mut self, most: u64) {
        self.data_most = usize::try_from(most).unwrap_or(PART_MOST).clamp(4096, PART_MOST);
    }

    /// DMA_MAP.
    ///
    /// # Errors
    /// An errno; nothing has changed.
    pub(crate) fn map(&mut self, body: &[u8], files: Vec<OwnedFd>) -> Result<(), i32> {
        let mut fields = Fields(body);
        let (_, flags) = (fields.word()?, fields.word()?);
        let (file_offset, guest_addr, size) = (fields.long()?, fields.long()?, fields.long()?);
        // What has no file (the ROM, registers of devices) or may not be written is never reached.
        let Some(file) = files.into_iter().next().filter(|_| flags & dma::WRITE != 0) else {
            return Ok(());
        };
        if self.memory.specs().count() >= MAPS_MOST {
            return Err(libc::ENOSPC);
        }
        let spec = RegionSpec { guest_addr, size, user_addr: guest_addr, file_offset };
        let file = File::from(file);
        // A process that died may have done it, and not said so.
        if self.handed_over.get(&guest_addr).is_some_and(|known| known.0 == body)
            && self.memory.specs().any(|known| known == spec)
        {
            return Ok(());
        }
        match self.memory.with_region(spec, &file) {
            Ok(memory) => {
                self.memory = Arc::new(memory);
                self.handed_over.insert(guest_addr, (body.to_vec(), file));
                Ok(())
            }
            Err(error) => {
                log::warn!("a range of the guest's memory was not taken error=\"{error}\"");
                Err(libc::EINVAL)
            }
        }
    }

    /// DMA_UNMAP; gives the body of the answer.
    ///
    /// # Errors
    /// An errno; nothing has changed.
    pub(crate) fn unmap(&mut self, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut fields = Fields(body);
        let (_, flags) = (fields.word()?, fields.word()?);
        let (address, size) = (fields.long()?, fields.long()?);
        let all = flags & dma::ALL != 0;
        let end = address.checked_add(size).filter(|_| !all);
        let gone = |spec: &RegionSpec| {
            all || (spec.guest_addr >= address
                && end.is_none_or(|end| spec.guest_addr + spec.size <= end))
        };
        let mut memory = GuestMemory::clone(&self.memory);
        for spec in self.memory.specs().filter(gone) {
            memory = memory.without_region(spec).map_err(|_| libc::EINVAL)?;
        }
        let there: BTreeSet<_> = memory.specs().map(|spec| spec.guest_addr).collect();
        self.handed_over.retain(|address, _| there.contains(address));
        self.memory = Arc::new(memory);
        Ok(body[..24.min(body.len())].to_vec())
    }

    /// What QEMU has handed over: the bodies of its messages, and their files.
    pub(crate) fn handed_over(&self) -> impl Iterator<Item = (&[u8], BorrowedFd<'_>)> {
        self.handed_over.values().map(|(body, file)| (&body[..], file.as_fd()))
    }

    /// The last number of a request of ours.
    pub(crate) fn last_id(&self) -> u16 {
        self.next_id
    }

    /// Goes on behind that number: answers to what another process has asked are nobody's.
    pub(crate) fn go_on_behind(&mut self, id: u16) {
        // As many as that process can have asked since it told.
        self.next_id = id.wrapping_add(0x2000) | 0x8000;
    }

    /// Which pages are noted, from now on; none without a source.
    pub(crate) fn track(&mut self, source: Option<Box<dyn DirtySource>>) {
        self.dirty = source;
    }

    /// Changes the way of writes. Nothing is in flight, and [`Dma::is_settled`].
    pub(crate) fn take_route(&mut self, route: Route) {
        self.route = route;
    }

    pub(crate) fn dirty_pages(&self) -> u64 {
        self.dirty.as_ref().map_or(0, |dirty| dirty.count())
    }

    /// The guest's pages that were written directly; they are forgotten.
    pub(crate) fn take_dirty(&mut self) -> Vec<u64> {
        self.dirty.as_mut().map(|dirty| dirty.take()).unwrap_or_default()
    }

    fn send(&mut self, command: Command, body: Vec<u8>, reply: bool) -> u16 {
        // Ids of ours have the high bit: a reader of a log can tell them from the client's.
        self.next_id = self.next_id.wrapping_add(1) | 0x8000;
        let message = Message::request(self.next_id, command, body, reply);
        if let Some(stream) = &self.stream
            && let Err(error) = send(stream, &message, None)
        {
            // Its end is told by the thread that reads.
            log::warn!("QEMU takes no message error=\"{error}\"");
            self.stream = None;
        }
        self.next_id
    }

    /// Asks QEMU to read its address space, memory or registers; gives the id of the request.
    pub(crate) fn ask_to_read(&mut self, address: u64, len: u64) -> u16 {
        let body = [address.to_le_bytes(), len.to_le_bytes()].concat();
        self.send(Command::DmaRead, body, true)
    }

    /// Asks QEMU to write its address space; gives the id of the request.
    pub(crate) fn ask_to_write(&mut self, address: u64, bytes: &[u8], reply: bool) -> u16 {
        let len = bytes.len() as u64;
        let mut body = [address.to_le_bytes(), len.to_le_bytes()].concat();
        body.extend(bytes);
        self.mediated_bytes += len;
        self.send(Command::DmaWrite, body, reply)
    }

    /// Has QEMU write what stands at an address already, so that it knows the page as dirty. Only
    /// while the VM stands still.
    pub(crate) fn touch(&mut self, address: u64) -> Result<(), Unreachable> {
        let mut byte = [0];
        self.read(address, &mut byte)?;
        self.ask_to_write(address, &byte, false);
        (self.unasked, self.last) = (self.unasked + 1, address);
        Ok(())
    }

    /// Sends a barrier if something waits for one.
    pub(crate) fn settle(&mut self) {
        if self.barrier.is_some() || (self.unasked == 0 && self.waiting.is_empty()) {
            return;
        }
        let vectors = std::mem::take(&mut self.waiting);
        let bytes = std::mem::take(&mut self.unasked);
        let id = self.ask_to_read(self.last, 1);
        self.barrier = Some(Barrier { id, bytes, vectors });
    }

    /// Whether everything that was written has arrived.
    pub(crate) fn is_settled(&self) -> bool {
        self.barrier.is_none() && self.unasked == 0 && self.waiting.is_empty()
    }

    /// Whether a reply is the barrier's; makes the interrupts that waited for it.
    pub(crate) fn take_reply(&mut self, id: u16) -> bool {
        if self.barrier.as_ref().is_none_or(|barrier| barrier.id != id) {
            return false;
        }
        for vector in self.barrier.take().map(|barrier| barrier.vectors).unwrap_or_default() {
            self.raise(vector);
        }
        true
    }

    /// Interrupts, whatever the route is.
    pub(crate) fn raise(&mut self, vector: u16) {
        match self.quiet {
            true => self.held_back += 1,
            false => self.interrupts.raise(vector),
        }
    }

    fn check(&mut self, address: u64, len: u64) -> Result<(), Unreachable> {
        let reachable = self.master && self.memory.for_each_slice(address, len, |_, _| ());
        if !reachable {
            self.refused += 1;
            return Err(Unreachable { address, len });
        }
        Ok(())
    }
}

/// Copies to memory that a guest looks at meanwhile: the last eight bytes are written last, and as a
/// whole where they are aligned, for there a completion entry has what says that it is one.
///
/// # Safety
/// `to` is mapped, for so many bytes.
unsafe fn copy_last_last(from: &[u8], to: *mut u8) {
    let Some(split) = from.len().checked_sub(8) else {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        return;
    };
    let last = u64::from_ne_bytes(std::array::from_fn(|i| from[split + i]));
    // SAFETY: the caller's; the last eight bytes are within.
    unsafe {
        std::ptr::copy_nonoverlapping(from.as_ptr(), to, split);
        fence(Ordering::Release);
        let place = to.add(split).cast::<u64>();
        if place.is_aligned() { place.write_volatile(last) } else { place.write_unaligned(last) }
    }
}

impl Bus for Dma {
    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn route(&self) -> Route {
        self.route
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Unreachable> {
        let len = into.len() as u64;
        let mut done = 0;
        let copied = self.master
            && self.memory.for_each_slice(address, len, |from, len| {
                let part = &mut into[done..done + len];
                // SAFETY: `from` is mapped for so many bytes; the guest may be writing them, and
                // what is copied is judged only after this one copy.
                unsafe { std::ptr::copy_nonoverlapping(from, part.as_mut_ptr(), len) };
                done += len;
            });
        if copied { Ok(()) } else { Err(Unreachable { address, len }) }
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Unreachable> {
        let len = bytes.len() as u64;
        self.check(address, len)?;
        match self.route {
            Route::Direct => {
                let mut done = 0;
                self.memory.for_each_slice(address, len, |to, len| {
                    // SAFETY: `to` is mapped for so many bytes.
                    unsafe { copy_last_last(&bytes[done..done + len], to) };
                    done += len;
                });
                self.wrote(address, len);
            }
            Route::Mediated => {
                let mut at = address;
                for part in bytes.chunks(self.data_most) {
                    self.ask_to_write(at, part, false);
                    at += part.len() as u64;
                }
                (self.unasked, self.last) = (self.unasked + len, address);
            }
        }
        Ok(())
    }

    fn wrote(&mut self, address: u64, len: u64) {
        if let Some(dirty) = &mut self.dirty {
            dirty.wrote(address, len);
        }
    }

    fn interrupt(&mut self, vector: u16) {
        match self.route {
            Route::Direct => self.raise(vector),
            Route::Mediated => {
                self.waiting.insert(vector);
            }
        }
    }

    fn is_congested(&self) -> bool {
        let asked = self.barrier.as_ref().map_or(0, |barrier| barrier.bytes);
        asked + self.unasked > CONGESTED
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use semper_device::dirty::Parsed;

    use super::*;
    use crate::message::receive;

    fn map_body(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
        let mut body = [32u32.to_le_bytes(), flags.to_le_bytes()].concat();
        for long in [offset, address, size] {
            body.extend(long.to_le_bytes());
        }
        body
    }

    fn memory(len: u64) -> OwnedFd {
        // SAFETY: a new descriptor, which is owned from here.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        File::from(fd.try_clone().unwrap()).set_len(len).unwrap();
        fd
    }

    fn dma() -> (Dma, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let mut dma = Dma::new(Interrupts::new(2));
        dma.master = true;
        dma.connect(Arc::new(near));
        dma.map(&map_body(3, 0x1000, 0x10_0000, 0x4000), vec![memory(0x5000)]).unwrap();
        (dma, far)
    }

    #[test]
    fn directly_it_writes_and_notes_the_page() {
        let (mut dma, _far) = dma();
        dma.track(Some(Box::<Parsed>::default()));
        dma.write(0x10_0ffc, b"12345678abc").unwrap();
        let mut back = [0; 11];
        dma.read(0x10_0ffc, &mut back).unwrap();
        assert_eq!(&back, b"12345678abc");
        assert_eq!(dma.take_dirty(), [0x10_0000, 0x10_1000]);
    }

    #[test]
    fn mediated_it_asks_qemu_and_interrupts_behind_the_barrier() {
        let (mut dma, far) = dma();
        dma.interrupts.set((2, 36), (0, 2), Vec::new()).unwrap();
        dma.take_route(Route::Mediated);
        dma.limit_data(1);
        dma.write(0x10_0000, &[7; 5000]).unwrap();
        dma.interrupt(1);
        assert!(!dma.is_settled());
        dma.settle();
        dma.settle();
        let sizes = [4096, 5000 - 4096].map(|size| {
            let message = receive(&far).unwrap().unwrap();
            assert_eq!((message.command, message.wants_reply()), (12, false));
            assert_eq!(message.body.len(), 16 + size);
            u64::from_le_bytes(message.body[8..16].try_into().unwrap())
        });
        assert_eq!(sizes, [4096, 904]);
        let barrier = receive(&far).unwrap().unwrap();
        assert_eq!((barrier.command, barrier.wants_reply()), (11, true));
        let mut bits = [0];
        dma.interrupts.pending(0, &mut bits);
        assert_eq!(bits, [0]);
        assert!(!dma.take_reply(barrier.id ^ 1) && dma.take_reply(barrier.id));
        dma.interrupts.pending(0, &mut bits);
        assert_eq!((bits, dma.is_settled()), ([2], true));
        // Nothing went to the memory itself.
        let mut back = [1; 4];
        dma.read(0x10_0000, &mut back).unwrap();
        assert_eq!(back, [0; 4]);
    }

    #[test]
    fn only_memory_that_was_handed_over_for_writing_is_reached() {
        let (mut dma, _far) = dma();
        dma.map(&map_body(1, 0, 0x20_0000, 0x1000), vec![memory(0x1000)]).unwrap();
        dma.map(&map_body(3, 0, 0x30_0000, 0x1000), Vec::new()).unwrap();
        for address in [0x20_0000, 0x30_0000, 0x10_4000, 0x10_3fff, u64::MAX] {
            assert!(dma.write(address, &[1, 2]).is_err(), "{address:#x}");
            assert!(dma.read(address, &mut [0; 2]).is_err(), "{address:#x}");
        }
        dma.master = false;
        assert!(dma.write(0x10_0000, &[1]).is_err() && dma.read(0x10_0000, &mut [0]).is_err());
        assert_eq!(dma.refused, 6);
    }

    #[test]
    fn ranges_that_cannot_be_are_refused_and_an_unmap_takes_what_lies_within() {
        let (mut dma, _far) = dma();
        for (address, size) in [(0x10_2000, 0x1000), (u64::MAX, 2), (0x40_0000, 0)] {
            let body = map_body(3, 0, address, size);
            assert_eq!(dma.map(&body, vec![memory(0x1000)]), Err(libc::EINVAL));
        }
        assert_eq!(
            dma.map(&map_body(3, 0, 0x40_0000, 0x2000), vec![memory(0x1000)]),
            Err(libc::EINVAL)
        );
        assert_eq!(dma.map(&[0; 31], vec![memory(0x1000)]), Err(libc::EINVAL));
        let unmap =
            |flags: u32, address: u64, size: u64| map_body(flags, address, size, 0)[..24].to_vec();
        dma.unmap(&unmap(0, 0x10_0000, 0x1000)).unwrap();
        assert!(dma.read(0x10_0000, &mut [0]).is_ok());
        dma.unmap(&unmap(0, 0, 0x20_0000)).unwrap();
        assert!(dma.read(0x10_0000, &mut [0]).is_err());
        dma.unmap(&unmap(2, 0, 0)).unwrap();
        assert_eq!(dma.unmap(&[0; 8]), Err(libc::EINVAL));
    }
}
