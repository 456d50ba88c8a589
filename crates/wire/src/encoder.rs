//! The source's end: the stream in, batches out.

use std::collections::VecDeque;

use zstd::bulk::Compressor;

use crate::batch::Builder;
use crate::format::MAX_STREAM;
use crate::index::{BlockRef, PageIndex};
use crate::ledger::{Held, charge};
use crate::stream::{Parser, Sink};
use crate::{PAGE_SIZE, Page, hash_page};

/// Mismatches of a disk that are taken for bad luck.
const LUCK: u64 = 64;
/// A disk is given up when more than one reference in so many does not match.
const TRUST: u64 = 2;

/// What an encoder works with.
#[derive(Clone, Debug)]
pub struct EncoderOptions {
    /// Of all hashes of this migration.
    pub key: [u8; 32],
    /// zstd's level; none where the peer does not unpack.
    pub level: Option<i32>,
    /// By disk: whether the destination can read it.
    pub readable: Vec<bool>,
    /// Pages, sent as they are, that fill a batch.
    pub batch_pages: usize,
}

impl EncoderOptions {
    /// With references to these disks, and everything else packed.
    pub fn new(key: [u8; 32], readable: Vec<bool>) -> Self {
        Self { key, level: Some(1), readable, batch_pages: 128 }
    }
}

/// What went through an encoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes of QEMU's stream.
    pub stream_bytes: u64,
    /// Bytes of the batches for it.
    pub wire_bytes: u64,
    /// Pages that QEMU found to be zero.
    pub zero_pages: u64,
    /// Pages that became references.
    pub references: u64,
    /// Pages that were packed.
    pub pages: u64,
    /// Bytes of all else.
    pub raw_bytes: u64,
    /// References that did not match.
    pub mismatches: u64,
}

/// One BATCH, to be sent when the window has room for its charge.
#[derive(Debug)]
pub struct Batch {
    /// The frame.
    pub frame: Vec<u8>,
    /// What it takes of the window.
    pub charge: u64,
    /// What to keep until its verdict comes; none if there will be none.
    pub held: Option<Held>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Trust {
    referred: u64,
    mismatched: u64,
    lost: bool,
}

/// Turns the stream into batches. The caller takes them ([`Encoder::pop`]) after each piece.
pub struct Encoder<I> {
    parser: Parser,
    work: Work<I>,
}

struct Work<I> {
    index: I,
    options: EncoderOptions,
    packer: Option<Compressor<'static>>,
    builder: Builder,
    next_id: u32,
    ready: VecDeque<Batch>,
    trust: Vec<Trust>,
    counters: Counters,
}

impl<I: PageIndex> Encoder<I> {
    /// At the beginning of a stream.
    ///
    /// # Panics
    /// When zstd has no memory.
    pub fn new(index: I, options: EncoderOptions) -> Self {
        let packer = options.level.map(|level| Compressor::new(level).expect("memory for zstd"));
        let trust = vec![Trust::default(); options.readable.len()];
        let (builder, ready) = (Builder::default(), VecDeque::new());
        let counters = Counters::default();
        let work = Work { index, options, packer, builder, next_id: 0, ready, trust, counters };
        Self { parser: Parser::default(), work }
    }

    /// Takes whole items from the front of `input`, and says how many bytes that were. The rest,
    /// less than [`crate::MAX_ITEM`], belongs before the next input.
    pub fn feed(&mut self, input: &[u8]) -> usize {
        self.parser.parse(input, &mut self.work)
    }

    /// Whatever was fed comes out now: nothing waits for a batch to be full.
    pub fn flush(&mut self) {
        self.work.close();
    }

    /// The stream has ended, with these bytes left over.
    pub fn finish(&mut self, rest: &[u8]) {
        self.work.raw(rest);
        self.work.close();
    }

    /// The next batch.
    pub fn pop(&mut self) -> Option<Batch> {
        self.work.ready.pop_front()
    }

    /// The destination found other contents in these blocks.
    pub fn mismatched(&mut self, blocks: &[(BlockRef, Page)]) {
        self.work.mismatched(blocks);
    }

    /// What went through so far.
    pub fn counters(&self) -> Counters {
        self.work.counters
    }

    /// Why the stream just passes through from some point on, if so.
    pub fn lost(&self) -> Option<&'static str> {
        self.parser.lost()
    }
}

impl<I: PageIndex> Work<I> {
    fn close(&mut self) {
        if self.builder.is_empty() {
            return;
        }
        let charge = charge(self.builder.stream_len);
        self.counters.stream_bytes += self.builder.stream_len as u64;
        let frame = self.builder.finish(self.next_id, self.packer.as_mut());
        self.counters.wire_bytes += frame.len() as u64;
        let refs = std::mem::take(&mut self.builder.refs);
        let pages = std::mem::take(&mut self.builder.held);
        let held = (!refs.is_empty()).then_some(Held { batch: self.next_id, refs, pages });
        self.next_id = self.next_id.wrapping_add(1);
        self.ready.push_back(Batch { frame, charge, held });
    }

    fn make_room(&mut self) {
        let full = self.builder.page_bytes() >= self.options.batch_pages * PAGE_SIZE;
        if full || !self.builder.has_room() {
            self.close();
        }
    }

    fn find(&mut self, page: &Page) -> Option<BlockRef> {
        let block = self.index.find(page)?;
        let disk = usize::from(block.disk);
        let readable = self.options.readable.get(disk).is_some_and(|&readable| readable);
        let trust = self.trust.get_mut(disk)?;
        if !readable || trust.lost {
            return None;
        }
        trust.referred += 1;
        Some(block)
    }

    fn mismatched(&mut self, blocks: &[(BlockRef, Page)]) {
        for (block, page) in blocks {
            self.counters.mismatches += 1;
            self.index.forget(*block, page);
            let Some(trust) = self.trust.get_mut(usize::from(block.disk)) else { continue };
            trust.mismatched += 1;
            trust.lost |= trust.mismatched > LUCK + trust.referred / TRUST;
        }
    }
}

impl<I: PageIndex> Sink for Work<I> {
    fn raw(&mut self, mut bytes: &[u8]) {
        self.counters.raw_bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            self.make_room();
            let (now, later) =
                bytes.split_at(bytes.len().min(MAX_STREAM - self.builder.stream_len));
            self.builder.raw(now);
            bytes = later;
        }
    }

    fn zero(&mut self, address: u64) {
        self.make_room();
        self.counters.zero_pages += 1;
        self.builder.zero(address);
    }

    fn page(&mut self, address: u64, header: Option<&[u8]>, page: &Page) {
        self.make_room();
        if let Some(block) = self.find(page) {
            self.counters.references += 1;
            let hash = hash_page(&self.options.key, page);
            self.builder.reference(address, header, page, (block, &hash));
        } else {
            self.counters.pages += 1;
            self.builder.page(address, header, page);
        }
    }
}
