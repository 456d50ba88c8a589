//! The file, version 1 (docs/reference/saved-format.md). All numbers are little-endian.
//!
//! ```text
//!   0  "SEMPERSV"      8  version u16 = 1    10  reserved u16 = 0    12  chunk pages u32 = 128
//!  16  memory bytes u64    24  description bytes u32    28  reserved u32 = 0
//!  32  device state bytes u64    40  offset of the index u64    48  BLAKE3 [16] of all but chunks
//!  64  description (JSON), device state, chunks in any order, index
//! ```
//!
//! The index has 48 bytes for each chunk of memory:
//!
//! ```text
//!   0  offset u64    8  length u32    12  kind u32: 1 zeros, 2 plain, 3 zstd    16  BLAKE3 [32]
//! ```
//!
//! The file ends with the index, so that one that is cut off shows.

use crate::{CHUNK, CHUNK_PAGES, Error};

/// The first bytes.
pub const MAGIC: [u8; 8] = *b"SEMPERSV";
/// Of the layout above.
pub const VERSION: u16 = 1;
/// Bytes before the description.
pub const HEADER: usize = 64;
/// Bytes of an entry of the index.
pub const ENTRY: usize = 48;
/// No packed chunk is larger before zstd: each page a run of its own (`chunk`), all of them data.
pub const BODY_MAX: usize = 1 + CHUNK_PAGES * 11 + CHUNK;
/// A description is a VM file and some figures.
pub const DESCRIPTION_MAX: usize = 16 << 20;
/// What devices come to is less than a MiB; some have a lot of memory of their own.
pub const STATE_MAX: u64 = 4 << 30;
/// Where what the header's hash covers ends.
const HASHED: usize = 48;

/// The fixed part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of memory, whole chunks.
    pub memory: u64,
    /// Bytes of the description.
    pub description: u32,
    /// Bytes of the device state.
    pub state: u64,
    /// Where the index begins.
    pub index: u64,
    /// Over everything but the chunks, which have hashes of their own.
    pub hash: [u8; 16],
}

/// How a chunk is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing but zeros; nothing is kept.
    Zeros,
    /// As it is.
    Plain,
    /// Under zstd.
    Zstd,
}

/// One chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where its body begins.
    pub offset: u64,
    /// Bytes of its body.
    pub length: u32,
    /// How it is kept.
    pub kind: Kind,
    /// Of its pages, see [`crate::chunk::hash`].
    pub hash: [u8; 32],
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

impl Header {
    /// The first [`HEADER`] bytes of the file.
    pub fn write(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(CHUNK_PAGES as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.memory.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.description.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.state.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.index.to_le_bytes());
        bytes[48..64].copy_from_slice(&self.hash);
        bytes
    }

    /// Reads what `write` wrote; `file` is the size of the whole file.
    pub fn read(bytes: &[u8], file: u64) -> Result<Self, Error> {
        if bytes.len() < 8 || bytes[..8] != MAGIC {
            return Err(Error::Foreign);
        }
        if bytes.len() < HEADER {
            return Err(Error::Truncated("in the header"));
        }
        let version = u16::from_le_bytes(array(bytes, 8));
        if version != VERSION {
            return Err(Error::Version(version));
        }
        if u32::from_le_bytes(array(bytes, 12)) != CHUNK_PAGES as u32 {
            return Err(Error::corrupt("chunks of an unknown size"));
        }
        if bytes[10..12] != [0; 2] || bytes[28..32] != [0; 4] {
            return Err(Error::corrupt("something where there is nothing"));
        }
        let header = Self {
            memory: u64::from_le_bytes(array(bytes, 16)),
            description: u32::from_le_bytes(array(bytes, 24)),
            state: u64::from_le_bytes(array(bytes, 32)),
            index: u64::from_le_bytes(array(bytes, 40)),
            hash: array(bytes, 48),
        };
        header.check(file)?;
        Ok(header)
    }

    fn check(&self, file: u64) -> Result<(), Error> {
        if self.memory == 0 || self.memory % CHUNK as u64 != 0 {
            return Err(Error::corrupt("the memory is no whole number of chunks"));
        }
        if self.description as usize > DESCRIPTION_MAX || self.state > STATE_MAX {
            return Err(Error::corrupt("a part is larger than can be"));
        }
        // None of these can overflow: the parts are bounded, and so is `chunks`.
        if self.index < self.chunks_begin() {
            return Err(Error::corrupt("the parts overlap"));
        }
        let end = self.index.checked_add(self.chunks() * ENTRY as u64);
        match end {
            Some(end) if end == file => Ok(()),
            Some(end) if end > file => Err(Error::Truncated("its index is missing")),
            _ => Err(Error::corrupt("it does not end with its index")),
        }
    }

    /// How many chunks of memory there are.
    pub fn chunks(&self) -> u64 {
        self.memory / CHUNK as u64
    }

    /// Where the first chunk can stand.
    pub fn chunks_begin(&self) -> u64 {
        HEADER as u64 + u64::from(self.description) + self.state
    }
}

/// The hash of everything that no chunk's hash covers.
pub fn hash_parts(
    header: &[u8; HEADER],
    description: &[u8],
    state: &[u8],
    index: &[u8],
) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..HASHED]).update(description).update(state).update(index);
    array(hasher.finalize().as_bytes(), 0)
}

impl Entry {
    /// A chunk of zeros.
    pub const ZEROS: Self = Self { offset: 0, length: 0, kind: Kind::Zeros, hash: [0; 32] };

    /// Appends it to an index.
    pub fn write(&self, index: &mut Vec<u8>) {
        let kind: u32 = match self.kind {
            Kind::Zeros => 1,
            Kind::Plain => 2,
            Kind::Zstd => 3,
        };
        index.extend_from_slice(&self.offset.to_le_bytes());
        index.extend_from_slice(&self.length.to_le_bytes());
        index.extend_from_slice(&kind.to_le_bytes());
        index.extend_from_slice(&self.hash);
    }

    /// Reads one whose body must lie where the header leaves room.
    pub fn read(bytes: &[u8; ENTRY], header: &Header) -> Result<Self, Error> {
        let entry = Self {
            offset: u64::from_le_bytes(array(bytes, 0)),
            length: u32::from_le_bytes(array(bytes, 8)),
            kind: match u32::from_le_bytes(array(bytes, 12)) {
                1 => Kind::Zeros,
                2 => Kind::Plain,
                3 => Kind::Zstd,
                other => return Err(Error::corrupt(format!("a chunk of kind {other}"))),
            },
            hash: array(bytes, 16),
        };
        if entry.kind == Kind::Zeros {
            return if entry == Self::ZEROS {
                Ok(entry)
            } else {
                Err(Error::corrupt("zeros with something in them"))
            };
        }
        let end = entry.offset.checked_add(entry.length.into());
        let within =
            entry.offset >= header.chunks_begin() && end.is_some_and(|e| e <= header.index);
        if !within || entry.length == 0 || entry.length as usize > BODY_MAX {
            return Err(Error::corrupt("a chunk outside of the file"));
        }
        Ok(entry)
    }
}
