//! From a piece of the stream to the frame that carries it: hashing and packing, which take most of
//! a source's time, need nothing but the piece itself. So several threads may do it at once.

use std::io;

use zstd::bulk::Compressor;

use crate::format::{FIXED_HEAD, FLAG_PACKED, FRAME_HEADER, HEAD_ROOM, Kind};
use crate::index::BlockRef;
use crate::ledger::{Held, charge};
use crate::{Hash, PAGE_SIZE, hash_page};

/// Packing must save one byte of so many, or it is not worth the other end's time.
const WORTH: usize = 64;
/// Of a body that follows one that was not worth it, so much is tried before all of it is.
const SAMPLE: usize = 4096;
/// Every so many bytes.
const SAMPLE_STEP: usize = 16 * SAMPLE;

/// A piece of the stream, in columns, not yet hashed and packed. Made by [`crate::Encoder::pop`].
#[derive(Debug)]
pub struct Draft {
    /// The numbers at the beginning of a BATCH.
    pub(crate) counts: [u32; 8],
    pub(crate) stream_len: usize,
    /// [`HEAD_ROOM`] bytes, and the body.
    pub(crate) body: Vec<u8>,
    pub(crate) refs: Vec<BlockRef>,
    /// The pages of `refs`.
    pub(crate) held: Vec<u8>,
}

/// One BATCH.
#[derive(Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    start: usize,
    /// What to keep until its verdict comes; none if there will be none.
    pub held: Option<Held>,
}

impl Draft {
    /// What it takes of the window.
    pub fn charge(&self) -> u64 {
        charge(self.stream_len)
    }
}

impl Batch {
    /// The frame.
    pub fn frame(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

/// Makes frames of drafts, in any order.
pub struct Packer {
    key: [u8; 32],
    zstd: Option<Compressor<'static>>,
    sample: Vec<u8>,
    packed: Vec<u8>,
    /// The last body was not worth it.
    idle: bool,
}

impl Packer {
    /// With the key of all hashes, and zstd's level; none where the peer does not unpack.
    ///
    /// # Errors
    /// No memory.
    pub fn new(key: [u8; 32], level: Option<i32>) -> io::Result<Self> {
        let zstd = level.map(Compressor::new).transpose()?;
        Ok(Self { key, zstd, sample: Vec::new(), packed: Vec::new(), idle: false })
    }

    /// Hashes what is referred to and packs the rest.
    pub fn pack(&mut self, draft: Draft) -> Batch {
        let Draft { mut counts, body, refs, held, .. } = draft;
        let head = FIXED_HEAD + refs.len() * size_of::<Hash>();
        let packed = self.compress(&body[HEAD_ROOM..], head);
        let (mut bytes, start) = match packed {
            Some(bytes) => {
                counts[2] = FLAG_PACKED;
                (bytes, 0)
            }
            None => (body, HEAD_ROOM - head),
        };
        let length = bytes.len() - start - FRAME_HEADER;
        let (fixed, hashes) = bytes[start..start + head].split_at_mut(FIXED_HEAD);
        fixed[..FRAME_HEADER].copy_from_slice(&[Kind::Batch as u8, 0, 0, 0, 0, 0, 0, 0]);
        fixed[4..FRAME_HEADER].copy_from_slice(&(length as u32).to_le_bytes());
        for (place, count) in fixed[FRAME_HEADER..].chunks_exact_mut(4).zip(counts) {
            place.copy_from_slice(&count.to_le_bytes());
        }
        let pages = held.chunks_exact(PAGE_SIZE).filter_map(|page| page.first_chunk());
        for (place, page) in hashes.chunks_exact_mut(size_of::<Hash>()).zip(pages) {
            place.copy_from_slice(&hash_page(&self.key, page));
        }
        let held = (!refs.is_empty()).then_some(Held { batch: counts[0], refs, pages: held });
        Batch { bytes, start, held }
    }

    /// A packed body after a head's room, where that is worth it.
    fn compress(&mut self, body: &[u8], head: usize) -> Option<Vec<u8>> {
        let zstd = self.zstd.as_mut()?;
        let limit = body.len() - body.len().div_ceil(WORTH);
        if self.idle && body.len() > 2 * SAMPLE_STEP {
            self.sample.clear();
            for piece in body.chunks(SAMPLE_STEP) {
                self.sample.extend_from_slice(&piece[..piece.len().min(SAMPLE)]);
            }
            let limit = self.sample.len() - self.sample.len().div_ceil(WORTH);
            self.packed.resize(limit, 0);
            if zstd.compress_to_buffer(&self.sample, &mut self.packed[..]).is_err() {
                return None;
            }
        }
        self.packed.resize(limit, 0);
        let length = zstd.compress_to_buffer(body, &mut self.packed[..]);
        self.idle = length.is_err();
        let mut bytes = Vec::with_capacity(head + *length.as_ref().ok()?);
        bytes.resize(head, 0);
        bytes.extend_from_slice(&self.packed[..length.ok()?]);
        Some(bytes)
    }
}
