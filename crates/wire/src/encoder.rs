//! The source's end: the stream in, drafts of batches out.

use std::collections::VecDeque;
use std::io;

use crate::batch::Builder;
use crate::draft::{Draft, Packer};
use crate::format::MAX_STREAM;
use crate::index::{BlockRef, PageIndex};
use crate::stream::{Parser, Sink};
use crate::trust::Trust;
use crate::{PAGE_SIZE, Page};

/// What an encoder works with.
#[derive(Clone, Debug)]
pub struct EncoderOptions {
    /// Of all hashes of this migration.
    pub key: [u8; 32],
    /// zstd's level; none where the peer does not unpack.
    pub level: Option<i32>,
    /// By disk: whether the destination can read it.
    pub readable: Vec<bool>,
    /// Pages, sent as they are, that fill a batch; or so many that are referred to.
    pub batch_pages: usize,
}

impl EncoderOptions {
    /// With references to these disks, and everything else packed.
    pub fn new(key: [u8; 32], readable: Vec<bool>) -> Self {
        Self { key, level: Some(1), readable, batch_pages: 128 }
    }

    /// What makes batches of the drafts; every thread that does so has its own.
    ///
    /// # Errors
    /// As [`Packer::new`].
    pub fn packer(&self) -> io::Result<Packer> {
        Packer::new(self.key, self.level)
    }
}

/// What went through an encoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes of QEMU's stream.
    pub stream_bytes: u64,
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

/// Turns the stream into drafts of batches. The caller takes them ([`Encoder::pop`]) after each piece.
pub struct Encoder<I> {
    parser: Parser,
    work: Work<I>,
}

struct Work<I> {
    index: I,
    options: EncoderOptions,
    builder: Builder,
    next_id: u32,
    ready: VecDeque<Draft>,
    trust: Vec<Trust>,
    counters: Counters,
}

impl<I: PageIndex> Encoder<I> {
    /// At the beginning of a stream.
    pub fn new(index: I, options: EncoderOptions) -> Self {
        let trust = vec![Trust::default(); options.readable.len()];
        let (builder, ready) = (Builder::default(), VecDeque::new());
        let counters = Counters::default();
        let work = Work { index, options, builder, next_id: 0, ready, trust, counters };
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

    /// The next draft: to be packed, and sent when the window has room for its charge.
    pub fn pop(&mut self) -> Option<Draft> {
        self.work.ready.pop_front()
    }

    /// The destination found other contents in these blocks.
    pub fn mismatched(&mut self, blocks: &[(BlockRef, Page)]) {
        self.work.mismatched(blocks);
    }

    /// The index, which may change at any time.
    pub fn index(&mut self) -> &mut I {
        &mut self.work.index
    }

    /// What went through so far.
    pub fn counters(&self) -> Counters {
        self.work.counters
    }

    /// Bytes of memory that are still to come before the first pass is over, as far as can be known.
    pub fn first_pass_left(&self) -> u64 {
        let Counters { zero_pages, references, pages, .. } = self.work.counters;
        let seen = (zero_pages + references + pages) * PAGE_SIZE as u64;
        self.parser.memory().saturating_sub(seen)
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
        self.counters.stream_bytes += self.builder.stream_len as u64;
        self.ready.push_back(self.builder.take(self.next_id));
        self.next_id = self.next_id.wrapping_add(1);
    }

    fn make_room(&mut self) {
        let (pages, referred) = self.builder.page_bytes();
        let full = self.options.batch_pages * PAGE_SIZE;
        if pages.max(referred) >= full || !self.builder.has_room() {
            self.close();
        }
    }

    fn find(&mut self, page: &Page) -> Option<BlockRef> {
        let block = self.index.find(page)?;
        let disk = usize::from(block.disk);
        let readable = self.options.readable.get(disk).is_some_and(|&readable| readable);
        let trust = self.trust.get_mut(disk)?;
        (readable && trust.refer(block.block)).then_some(block)
    }

    fn mismatched(&mut self, blocks: &[(BlockRef, Page)]) {
        for (block, page) in blocks {
            self.counters.mismatches += 1;
            self.index.forget(*block, page);
            if let Some(trust) = self.trust.get_mut(usize::from(block.disk)) {
                trust.mismatched(block.block);
            }
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
            self.builder.reference(address, header, page, block);
        } else {
            self.counters.pages += 1;
            self.builder.page(address, header, page);
        }
    }
}
