//! For tests, benchmarks and fuzzers: streams as QEMU would write them, disks in memory, and both
//! ends joined without a network.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use crate::decoder::{Decoder, Disks, Judged};
use crate::draft::Packer;
use crate::encoder::{Counters, Encoder, EncoderOptions};
use crate::format::{FRAME_HEADER, Frame, Kind, credit, end, first_frame, parse_number};
use crate::index::{BlockRef, PageIndex};
use crate::ledger::Ledger;
use crate::window::Window;
use crate::{PAGE_SIZE, Page, WireError};

/// Key of all hashes here.
pub const KEY: [u8; 32] = *b"a key that no guest can ever see";
/// Name of the only block of the guest's memory.
const RAM: &[u8] = b"pc.ram";

/// Writes a stream.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    /// What was written.
    pub bytes: Vec<u8>,
    named: bool,
}

impl Stream {
    /// Up to the first page: magic, configuration, RAM's start with a table of one block.
    pub fn begin(pages: u64) -> Self {
        let mut stream = Self::default();
        stream.put(b"QEVM\0\0\0\x03");
        stream.put(b"\x07\0\0\0\x0bpc-q35-10.0");
        stream.put(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x09postcopy!");
        stream.put(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        let total = pages * PAGE_SIZE as u64;
        stream.be64(total | 4);
        stream.name();
        stream.be64(total);
        stream.eos();
        stream
    }

    /// Anything.
    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn be64(&mut self, value: u64) {
        self.put(&value.to_be_bytes());
    }

    fn name(&mut self) {
        self.put(&[RAM.len() as u8]);
        self.put(RAM);
    }

    fn eos(&mut self) {
        self.be64(0x10);
        self.put(b"\x7e\0\0\0\x02");
        self.named = false;
    }

    fn header(&mut self, number: u64, flag: u64) {
        let address = number * PAGE_SIZE as u64;
        self.be64(address | flag | if self.named { 0x20 } else { 0 });
        if !self.named {
            self.name();
        }
        self.named = true;
    }

    /// The pages that follow belong to a new part of the section.
    pub fn part(&mut self) {
        self.put(b"\x02\0\0\0\x02");
    }

    /// The part ends.
    pub fn end_part(&mut self) {
        self.eos();
    }

    /// A page of zeros.
    pub fn zero(&mut self, number: u64) {
        self.header(number, 2);
        self.put(&[0]);
    }

    /// A page.
    pub fn page(&mut self, number: u64, page: &Page) {
        self.header(number, 8);
        self.put(page);
    }

    /// RAM's end, devices, and the description of the machine.
    pub fn finish(mut self) -> Vec<u8> {
        self.put(b"\x08\0\x0b\0\0\x03\0\0\0\x02");
        self.eos();
        self.put(b"\x04\0\0\0\x07\x04apic\0\0\0\0\0\0\0\x03");
        self.put(&[0x5a; 3000]);
        self.put(b"\0\x06\0\0\0\x02{}");
        self.bytes
    }
}

/// Bytes that look like no others, from a number: xorshift.
pub fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    page
}

/// Bytes that zstd makes about a third of, from a number.
pub fn prose(seed: u64) -> Page {
    let mut page = noise(seed);
    for (at, byte) in page.iter_mut().enumerate() {
        *byte = if at % 4 == 0 { *byte } else { b' ' + *byte % 3 };
    }
    page
}

/// A disk in memory that its test can change at any time, and that calls before each read.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    /// Its blocks.
    pub blocks: Rc<RefCell<Vec<Page>>>,
    /// Called before each run of blocks is read, and once after.
    pub on_read: Option<Rc<dyn Fn(BlockRef, bool)>>,
    read: Vec<u8>,
}

impl MemoryDisk {
    /// With these blocks.
    pub fn new(blocks: Vec<Page>) -> Self {
        Self { blocks: Rc::new(RefCell::new(blocks)), ..Self::default() }
    }
}

impl Disks for MemoryDisk {
    fn read(&mut self, first: BlockRef, count: usize) -> Option<&[u8]> {
        if let Some(on_read) = &self.on_read {
            on_read(first, false);
        }
        let from = first.block as usize;
        self.read = self.blocks.borrow().get(from..from + count)?.concat();
        if let Some(on_read) = &self.on_read {
            on_read(first, true);
        }
        Some(&self.read)
    }
}

/// What went over the wire, and what came out.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// The stream, at the destination.
    pub bytes: Vec<u8>,
    /// Bytes from source to destination, and back.
    pub wire: (u64, u64),
    /// The source's figures.
    pub counters: Counters,
    /// The destination's figures.
    pub judged: Judged,
}

/// Both ends, joined. Frames to the destination wait in a queue until [`Pair::deliver`].
pub struct Pair<I, D> {
    /// The source.
    pub encoder: Encoder<I>,
    /// The destination.
    pub decoder: Decoder<D>,
    packer: Packer,
    ledger: Ledger,
    window: Window,
    queue: std::collections::VecDeque<Vec<u8>>,
    rest: Vec<u8>,
    credit: u64,
    carried: Carried,
}

impl<I: PageIndex, D: Disks> Pair<I, D> {
    /// At the beginning of a stream.
    pub fn new(index: I, disks: D, blocks: u64) -> Self {
        const WINDOW: u64 = *crate::format::WINDOWS.start();
        let options = EncoderOptions { batch_pages: 8, ..EncoderOptions::new(KEY, vec![true]) };
        Self {
            packer: options.packer().expect("memory"),
            encoder: Encoder::new(index, options),
            decoder: Decoder::new(disks, vec![blocks], KEY, WINDOW).expect("memory"),
            ledger: Ledger::default(),
            window: Window::new(WINDOW),
            queue: std::collections::VecDeque::new(),
            rest: Vec::new(),
            credit: 0,
            carried: Carried::default(),
        }
    }

    /// Bytes from QEMU; batches that are full are put in the queue.
    ///
    /// # Errors
    /// None that two honest ends would see.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.rest.extend_from_slice(bytes);
        let taken = self.encoder.feed(&self.rest);
        self.rest.drain(..taken);
        assert!(self.rest.len() < crate::MAX_ITEM, "{} bytes wait", self.rest.len());
        self.send()
    }

    /// What was fed is put in the queue.
    ///
    /// # Errors
    /// As [`Pair::feed`].
    pub fn flush(&mut self) -> Result<(), WireError> {
        self.encoder.flush();
        self.send()
    }

    fn send(&mut self) -> Result<(), WireError> {
        while let Some(draft) = self.encoder.pop() {
            while !self.window.has_room(draft.charge()) {
                assert!(self.deliver()?, "no room, and nothing under way");
            }
            self.window.send(draft.charge(), Duration::ZERO);
            let batch = self.packer.pack(draft);
            self.queue.push_back(batch.frame().to_vec());
            batch.held.into_iter().for_each(|held| self.ledger.hold(held));
        }
        Ok(())
    }

    /// The destination takes one frame, and the source its answer; false if there was none.
    ///
    /// # Errors
    /// As [`Pair::feed`].
    pub fn deliver(&mut self) -> Result<bool, WireError> {
        let Some(bytes) = self.queue.pop_front() else { return Ok(false) };
        self.carried.wire.0 += bytes.len() as u64;
        let (frame, length) = first_frame(&bytes)?.expect("a whole frame");
        assert_eq!(length, bytes.len());
        if let Some(answer) = self.decoder.frame(&frame)? {
            self.carried.wire.1 += answer.len() as u64;
            let repairs = self.ledger.verdict(&answer[FRAME_HEADER..])?;
            self.encoder.mismatched(&repairs.mismatched);
            self.queue.extend(repairs.frames);
        }
        while let Some(piece) = self.decoder.pop() {
            self.carried.bytes.extend_from_slice(&piece.bytes);
            self.credit += piece.charge;
        }
        self.decoder.grant(self.credit);
        let credit = credit(self.credit);
        self.window.credit(parse_number(&credit[FRAME_HEADER..])?, Duration::ZERO)?;
        Ok(true)
    }

    /// The stream has ended: everything is delivered.
    ///
    /// # Errors
    /// As [`Pair::feed`].
    pub fn finish(mut self) -> Result<Carried, WireError> {
        let rest = std::mem::take(&mut self.rest);
        self.encoder.finish(&rest);
        self.send()?;
        while self.deliver()? {}
        let counters = self.encoder.counters();
        let end = end(counters.stream_bytes);
        let frame = Frame { kind: Some(Kind::End), payload: &end[FRAME_HEADER..] };
        assert_eq!(self.decoder.frame(&frame)?, None);
        assert!(self.decoder.is_complete() && self.ledger.is_empty());
        self.carried.counters = counters;
        self.carried.judged = self.decoder.judged();
        Ok(self.carried)
    }
}
