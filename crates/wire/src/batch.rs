//! A batch: a piece of the stream, in columns; drawn in `format`.

use zstd::bulk::Decompressor;

use crate::draft::Draft;
use crate::format::op::{BARE_BLOCKS, BARE_PAGES, BLOCKS, PAGES, RAW, SEEK, ZEROS};
use crate::format::{FLAG_PACKED, HEAD_ROOM, MAX_REFERENCES, MAX_STREAM, Reader, WireError};
use crate::index::BlockRef;
use crate::stream::{NEXT_PAGE, NEXT_ZERO};
use crate::varint;
use crate::{Hash, PAGE_SIZE, Page};

/// Longest body: no op takes more bytes than twice what it stands for.
const MAX_BODY: usize = 2 * MAX_STREAM;
/// Pages of zeros that are given as one piece take no more than this of the stream.
const ZERO_ITEM: usize = 9;
const PAGE_ITEM: usize = 8 + PAGE_SIZE;

/// Collects a piece of the stream.
#[derive(Default)]
pub(crate) struct Builder {
    /// Room for the head, then pages; at the end the other columns go behind them.
    body: Vec<u8>,
    ops: Vec<u8>,
    blocks: Vec<u8>,
    raw: Vec<u8>,
    /// The pages that are referred to, and where they stand.
    held: Vec<u8>,
    refs: Vec<BlockRef>,
    pub stream_len: usize,
    run: (u8, u64),
    next: u64,
    last: (u16, u64),
}

impl Builder {
    pub(crate) fn is_empty(&self) -> bool {
        self.stream_len == 0
    }

    /// Bytes of pages as they are, and of those that are referred to.
    pub(crate) fn page_bytes(&self) -> (usize, usize) {
        (self.body.len().saturating_sub(HEAD_ROOM), self.held.len())
    }

    /// Whether a page, or a short piece of something else, still fits.
    pub(crate) fn has_room(&self) -> bool {
        self.stream_len + crate::MAX_ITEM <= MAX_STREAM
    }

    fn op(&mut self, op: u8, count: u64) {
        if self.run.0 == op {
            self.run.1 += count;
            return;
        }
        self.end_run();
        self.run = (op, count);
    }

    fn end_run(&mut self) {
        let (op, count) = std::mem::take(&mut self.run);
        if count > 0 {
            varint::put(&mut self.ops, u64::from(op) + 8 * count);
        }
    }

    fn seek(&mut self, address: u64) {
        if self.next != address {
            self.end_run();
            varint::put(&mut self.ops, u64::from(SEEK) + 8 * (address / PAGE_SIZE as u64 + 1));
        }
        self.next = address.wrapping_add(PAGE_SIZE as u64);
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.op(RAW, bytes.len() as u64);
        self.raw.extend_from_slice(bytes);
        self.stream_len += bytes.len();
    }

    pub(crate) fn zero(&mut self, address: u64) {
        self.seek(address);
        self.op(ZEROS, 1);
        self.stream_len += ZERO_ITEM;
    }

    fn header(&mut self, address: u64, header: Option<&[u8]>, ops: (u8, u8)) {
        if let Some(header) = header {
            self.raw(header);
            self.op(ops.1, 1);
            self.stream_len += PAGE_SIZE;
        } else {
            self.seek(address);
            self.op(ops.0, 1);
            self.stream_len += PAGE_ITEM;
        }
    }

    pub(crate) fn page(&mut self, address: u64, header: Option<&[u8]>, page: &Page) {
        self.header(address, header, (PAGES, BARE_PAGES));
        if self.body.is_empty() {
            self.body.resize(HEAD_ROOM, 0);
        }
        self.body.extend_from_slice(page);
    }

    pub(crate) fn reference(
        &mut self,
        address: u64,
        header: Option<&[u8]>,
        page: &Page,
        block: BlockRef,
    ) {
        self.header(address, header, (BLOCKS, BARE_BLOCKS));
        let (disk, expected) = self.last;
        let step = varint::zigzag(block.block.wrapping_sub(expected) as i64);
        varint::put(&mut self.blocks, step << 1 | u64::from(block.disk != disk));
        if block.disk != disk {
            varint::put(&mut self.blocks, block.disk.into());
        }
        self.last = (block.disk, block.block + 1);
        self.held.extend_from_slice(page);
        self.refs.push(block);
    }

    /// What was collected; the builder is empty then.
    pub(crate) fn take(&mut self, id: u32) -> Draft {
        self.end_run();
        if self.body.is_empty() {
            self.body.resize(HEAD_ROOM, 0);
        }
        let counts = [
            id,
            self.stream_len as u32,
            0,
            ((self.body.len() - HEAD_ROOM) / PAGE_SIZE) as u32,
            self.refs.len() as u32,
            self.ops.len() as u32,
            self.blocks.len() as u32,
            self.raw.len() as u32,
        ];
        self.body.append(&mut self.ops);
        self.body.append(&mut self.blocks);
        self.body.append(&mut self.raw);
        (self.next, self.last) = (0, (0, 0));
        Draft {
            counts,
            stream_len: std::mem::take(&mut self.stream_len),
            body: std::mem::take(&mut self.body),
            refs: std::mem::take(&mut self.refs),
            held: std::mem::take(&mut self.held),
        }
    }
}

/// A batch, taken apart; the pages that are references are still missing.
pub(crate) struct Rebuilt {
    pub id: u32,
    /// The piece of the stream.
    pub bytes: Vec<u8>,
    /// Where in it the references belong.
    pub places: Vec<u32>,
    pub refs: Vec<BlockRef>,
    pub hashes: Vec<Hash>,
}

const fn damaged(what: &'static str) -> WireError {
    WireError::Protocol(what)
}

/// Takes a batch apart.
pub(crate) fn rebuild(
    payload: &[u8],
    unpacker: &mut Decompressor<'_>,
    unpacked: &mut Vec<u8>,
) -> Result<Rebuilt, WireError> {
    let mut reader = Reader(payload);
    let id = reader.u32()?;
    let mut count = || reader.u32().map(|count| count as usize);
    let (stream_len, flags) = (count()?, count()?);
    let (pages, references) = (count()?, count()?);
    let (ops_len, blocks_len, raw_len) = (count()?, count()?, count()?);
    if stream_len == 0 || stream_len > MAX_STREAM {
        return Err(damaged("a batch that is empty or too long"));
    }
    if flags & !(FLAG_PACKED as usize) != 0 {
        return Err(damaged("a batch with unknown flags"));
    }
    // Counts are of 32 bits: no sum overflows.
    let body_len = pages as u64 * PAGE_SIZE as u64 + (ops_len + blocks_len + raw_len) as u64;
    if body_len > MAX_BODY as u64 || references > MAX_REFERENCES {
        return Err(damaged("a batch whose body is too long"));
    }
    let body_len = body_len as usize;
    let hashes = reader.take(references * size_of::<Hash>())?.chunks_exact(size_of::<Hash>());
    let hashes = hashes.filter_map(|hash| hash.first_chunk().copied()).collect();
    let body = match flags as u32 & FLAG_PACKED {
        0 => reader.0,
        _ => {
            unpacked.resize(body_len.max(1), 0);
            let len = unpacker
                .decompress_to_buffer(reader.0, &mut unpacked[..])
                .map_err(|_| damaged("a batch that cannot be unpacked"))?;
            &unpacked[..len]
        }
    };
    if body.len() != body_len {
        return Err(damaged("a batch whose body has another length"));
    }
    let (pages, rest) = body.split_at(pages * PAGE_SIZE);
    let (ops, rest) = rest.split_at(ops_len);
    let (mut blocks, raw) = rest.split_at(blocks_len);
    let mut refs = Vec::with_capacity(references);
    let (mut disk, mut expected) = (0, 0u64);
    for _ in 0..references {
        let cut = damaged("a reference that was cut off");
        let step = varint::take(&mut blocks).ok_or(cut.clone())?;
        if step & 1 == 1 {
            let number = varint::take(&mut blocks).ok_or(cut)?;
            disk = u16::try_from(number).map_err(|_| damaged("a disk that cannot be"))?;
        }
        let block = expected.wrapping_add_signed(varint::unzigzag(step >> 1));
        refs.push(BlockRef { disk, block });
        expected = block.wrapping_add(1);
    }
    if !blocks.is_empty() {
        return Err(damaged("more blocks than references"));
    }
    let mut assembly = Assembly {
        bytes: Vec::with_capacity(stream_len),
        limit: stream_len,
        places: Vec::with_capacity(references),
        references,
        pages,
        raw,
        next: 0,
    };
    assembly.run(ops)?;
    let Assembly { bytes, places, pages, raw, .. } = assembly;
    if bytes.len() != stream_len
        || places.len() != references
        || !pages.is_empty()
        || !raw.is_empty()
    {
        return Err(damaged("a batch whose columns do not fit together"));
    }
    Ok(Rebuilt { id, bytes, places, refs, hashes })
}

/// Puts the columns together again.
struct Assembly<'a> {
    bytes: Vec<u8>,
    limit: usize,
    places: Vec<u32>,
    references: usize,
    pages: &'a [u8],
    raw: &'a [u8],
    next: u64,
}

impl Assembly<'_> {
    fn run(&mut self, mut ops: &[u8]) -> Result<(), WireError> {
        while !ops.is_empty() {
            let op = varint::take(&mut ops).ok_or(damaged("an op that was cut off"))?;
            let (op, count) = ((op & 7) as u8, op >> 3);
            if op == SEEK && count > 0 && count <= 1 << 52 {
                self.next = (count - 1) * PAGE_SIZE as u64;
                continue;
            }
            let each = match op {
                RAW => 1,
                ZEROS => ZERO_ITEM,
                PAGES | BLOCKS => PAGE_ITEM,
                BARE_PAGES | BARE_BLOCKS => PAGE_SIZE,
                _ => return Err(damaged("an unknown op")),
            };
            // Before anything is written: no op leads beyond the announced length.
            let room = ((self.limit - self.bytes.len()) / each) as u64;
            if count == 0 || count > room {
                return Err(damaged("an op of no length, or beyond the end of its batch"));
            }
            self.op(op, count as usize)?;
        }
        Ok(())
    }

    fn op(&mut self, op: u8, count: usize) -> Result<(), WireError> {
        match op {
            RAW => {
                let raw = split(&mut self.raw, count)?;
                self.bytes.extend_from_slice(raw);
            }
            ZEROS => {
                for _ in 0..count {
                    self.header(NEXT_ZERO);
                    self.bytes.push(0);
                }
            }
            PAGES => {
                for _ in 0..count {
                    self.header(NEXT_PAGE);
                    let page = split(&mut self.pages, PAGE_SIZE)?;
                    self.bytes.extend_from_slice(page);
                }
            }
            BARE_PAGES => {
                let pages = split(&mut self.pages, count * PAGE_SIZE)?;
                self.bytes.extend_from_slice(pages);
            }
            _ => {
                for _ in 0..count {
                    if op == BLOCKS {
                        self.header(NEXT_PAGE);
                    }
                    self.hole()?;
                }
            }
        }
        Ok(())
    }

    fn header(&mut self, flags: u64) {
        self.bytes.extend_from_slice(&(self.next | flags).to_be_bytes());
        self.next = self.next.wrapping_add(PAGE_SIZE as u64);
    }

    fn hole(&mut self) -> Result<(), WireError> {
        if self.places.len() == self.references {
            return Err(damaged("more references than were announced"));
        }
        self.places.push(self.bytes.len() as u32);
        self.bytes.resize(self.bytes.len() + PAGE_SIZE, 0);
        Ok(())
    }
}

fn split<'a>(column: &mut &'a [u8], len: usize) -> Result<&'a [u8], WireError> {
    let (head, rest) = column.split_at_checked(len).ok_or(damaged("a column that is too short"))?;
    *column = rest;
    Ok(head)
}
