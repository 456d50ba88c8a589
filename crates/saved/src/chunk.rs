//! 128 pages of memory, packed. Pure: no files.
//!
//! A body, before zstd: the number of runs (u8), the runs, and the pages of the data runs.
//!
//! ```text
//!   zeros  1 u8, pages u8        data  2 u8, pages u8
//!   block  3 u8, pages u8, image u8, first block u64 (little-endian); further pages follow it
//! ```

use crate::format::{BODY_MAX, Entry, Kind};
use crate::{CHUNK, CHUNK_PAGES, Error, PAGE};

const LEVEL: i32 = 1;

/// Where a page can be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Which of the images.
    pub image: u8,
    /// Which of its blocks.
    pub block: u64,
}

/// Pages that are kept in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Nothing but zeros.
    Zeros(u8),
    /// In the body.
    Data(u8),
    /// In an image, from this block on.
    Blocks(u8, Block),
}

/// A packed chunk.
#[derive(Debug)]
pub struct Packed {
    /// Its place in the index, still without an offset.
    pub entry: Entry,
    /// What belongs into the file.
    pub body: Vec<u8>,
    /// Pages by kind.
    pub counts: Counts,
}

/// Pages by how they are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Nothing but zeros.
    pub zero: u64,
    /// Named by a block.
    pub block: u64,
    /// Kept.
    pub data: u64,
}

impl Run {
    fn pages(self) -> usize {
        match self {
            Self::Zeros(pages) | Self::Data(pages) | Self::Blocks(pages, _) => pages.into(),
        }
    }

    /// This run with one more page of the kind of `next`, if that continues it.
    fn with(self, next: Self) -> Option<Self> {
        match (self, next) {
            (Self::Zeros(pages), Self::Zeros(_)) => Some(Self::Zeros(pages + 1)),
            (Self::Data(pages), Self::Data(_)) => Some(Self::Data(pages + 1)),
            (Self::Blocks(pages, first), Self::Blocks(_, block)) => {
                let follows = block.image == first.image
                    && first.block.checked_add(pages.into()) == Some(block.block);
                follows.then_some(Self::Blocks(pages + 1, first))
            }
            _ => None,
        }
    }
}

/// Whether there is nothing but zeros.
pub fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    bytes.chunks(PAGE).all(|part| part == &ZEROS[..part.len()])
}

/// Of a chunk: which pages are zero, and the content of the others.
pub fn hash(pages: &[u8], zeros: u128) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&zeros.to_le_bytes());
    let mut first = 0;
    while first < CHUNK_PAGES {
        let rest = zeros >> first;
        if rest & 1 == 1 {
            first += 1;
            continue;
        }
        let count = (rest.trailing_zeros() as usize).min(CHUNK_PAGES - first);
        hasher.update(&pages[first * PAGE..(first + count) * PAGE]);
        first += count;
    }
    *hasher.finalize().as_bytes()
}

/// Packs a chunk; `find` knows the block that is equal to a page.
///
/// # Panics
/// If there are not [`CHUNK`] bytes.
pub fn pack(pages: &[u8], mut find: impl FnMut(&[u8]) -> Option<Block>) -> Packed {
    assert_eq!(pages.len(), CHUNK);
    let mut runs: Vec<Run> = Vec::with_capacity(8);
    let mut data: Vec<&[u8]> = Vec::new();
    let (mut counts, mut zeros) = (Counts::default(), 0u128);
    for (at, page) in pages.chunks_exact(PAGE).enumerate() {
        let next = if is_zero(page) {
            counts.zero += 1;
            zeros |= 1 << at;
            Run::Zeros(1)
        } else if let Some(block) = find(page) {
            counts.block += 1;
            Run::Blocks(1, block)
        } else {
            counts.data += 1;
            data.push(page);
            Run::Data(1)
        };
        match runs.last_mut().and_then(|last| last.with(next).map(|run| *last = run)) {
            Some(()) => {}
            None => runs.push(next),
        }
    }
    if zeros == u128::MAX {
        return Packed { entry: Entry::ZEROS, body: Vec::new(), counts };
    }
    let plain = write_body(&runs, &data);
    let (kind, body) = match zstd::bulk::compress(&plain, LEVEL) {
        Ok(packed) if packed.len() < plain.len() => (Kind::Zstd, packed),
        _ => (Kind::Plain, plain),
    };
    let entry = Entry { offset: 0, length: body.len() as u32, kind, hash: hash(pages, zeros) };
    Packed { entry, body, counts }
}

fn write_body(runs: &[Run], data: &[&[u8]]) -> Vec<u8> {
    let mut body = Vec::with_capacity(1 + runs.len() * 11 + data.len() * PAGE);
    body.push(runs.len() as u8);
    for run in runs {
        match run {
            Run::Zeros(pages) => body.extend_from_slice(&[1, *pages]),
            Run::Data(pages) => body.extend_from_slice(&[2, *pages]),
            Run::Blocks(pages, first) => {
                body.extend_from_slice(&[3, *pages, first.image]);
                body.extend_from_slice(&first.block.to_le_bytes());
            }
        }
    }
    for page in data {
        body.extend_from_slice(page);
    }
    body
}

/// The runs of a body, and where its pages begin.
pub fn read_runs(body: &[u8]) -> Result<(Vec<Run>, usize), Error> {
    let short = || Error::corrupt("a chunk is too short");
    let (count, mut rest) = body.split_first().ok_or_else(short)?;
    let (mut runs, mut pages, mut data) = (Vec::with_capacity((*count).into()), 0, 0);
    for _ in 0..*count {
        let (head, tail) = rest.split_first_chunk::<2>().ok_or_else(short)?;
        rest = tail;
        let run = match head[0] {
            1 => Run::Zeros(head[1]),
            2 => Run::Data(head[1]),
            3 => {
                let (image, tail) = rest.split_first().ok_or_else(short)?;
                let (block, tail) = tail.split_first_chunk::<8>().ok_or_else(short)?;
                rest = tail;
                let block = u64::from_le_bytes(*block);
                Run::Blocks(head[1], Block { image: *image, block })
            }
            other => return Err(Error::corrupt(format!("a run of kind {other}"))),
        };
        if run.pages() == 0 {
            return Err(Error::corrupt("a run without pages"));
        }
        pages += run.pages();
        data += if matches!(run, Run::Data(_)) { run.pages() } else { 0 };
        runs.push(run);
    }
    if pages != CHUNK_PAGES || rest.len() != data * PAGE {
        return Err(Error::corrupt("a chunk does not have its pages"));
    }
    Ok((runs, body.len() - rest.len()))
}

/// A chunk that was unpacked: which of its pages are zero, as a bit for each.
pub type Zeros = u128;

/// Unpacks a body into `pages`, which are [`CHUNK`] bytes; zero pages are left as they are.
///
/// `read` reads blocks of an image. What comes out is what went in, or an error.
pub fn unpack(
    entry: &Entry,
    body: &[u8],
    pages: &mut [u8],
    mut read: impl FnMut(Block, &mut [u8]) -> Result<(), Error>,
) -> Result<Zeros, Error> {
    let unpacked;
    let body = match entry.kind {
        Kind::Zeros => return Ok(Zeros::MAX),
        Kind::Plain => body,
        Kind::Zstd => {
            unpacked = zstd::bulk::decompress(body, BODY_MAX)
                .map_err(|error| Error::corrupt(format!("a chunk cannot be unpacked: {error}")))?;
            &unpacked
        }
    };
    let (runs, mut data) = read_runs(body)?;
    let (mut at, mut zeros) = (0, 0u128);
    for run in runs {
        let bytes = run.pages() * PAGE;
        let target = &mut pages[at * PAGE..][..bytes];
        match run {
            Run::Zeros(count) => zeros |= mask(count.into()) << at,
            Run::Data(_) => {
                target.copy_from_slice(&body[data..data + bytes]);
                data += bytes;
            }
            Run::Blocks(_, first) => read(first, target)?,
        }
        at += run.pages();
    }
    if hash(pages, zeros) != entry.hash {
        return Err(Error::corrupt("a chunk's content is not what was saved"));
    }
    Ok(zeros)
}

fn mask(pages: usize) -> u128 {
    if pages >= CHUNK_PAGES { u128::MAX } else { (1 << pages) - 1 }
}
