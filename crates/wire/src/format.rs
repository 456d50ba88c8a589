//! The wire format, version 1: frames and their limits. Little endian. The whole conversation is
//! drawn in `docs/reference/wire-format.md`.
//!
//! ```text
//!   frame     kind u8 | zero 3 bytes | length u32 | payload of that length, at most MAX_PAYLOAD
//!
//!   1 HELLO      both   magic "SEMPRWIR" | oldest u16 | newest u16 | role u8 | zero 3 bytes
//!                       features u64 | window u64 | migration text | program text
//!   2 START      S → D  version u16 | zero u16 | features u64 | key 32 bytes
//!                       disks u16 | of each: size u64, name text
//!   3 READY      D → S  disks u16 | of each: 1 it can be referred to, 0 it cannot
//!   4 BATCH      S → D  a piece of the stream, in columns; see below
//!   5 REPAIR     S → D  batch u32 | n u32 | n times: reference u32 | n pages
//!   6 END        S → D  length of the whole stream u64
//!   7 VERDICT    D → S  batch u32 | n u32 | n times: reference that did not match u32
//!   8 CREDIT     D → S  charge of all batches that QEMU has taken u64
//!   9 RETURN     D → S  bytes of QEMU's return path, at most MAX_RETURN
//!  10 RETURN_END D → S  QEMU's end of the return path is closed
//!  11 DONE       D → S  length of the whole stream u64: QEMU has taken it all
//!  12 ABORT      both   text: why
//!
//!   text      length u16 | UTF-8
//! ```
//!
//! A batch:
//!
//! ```text
//!   BATCH     id u32 | stream_len u32 | flags u32 (bit 0: the body is packed)
//!             pages u32 | references u32 | ops_len u32 | blocks_len u32 | raw_len u32
//!             references times: hash 16 bytes
//!             body: pages times 4096 bytes | ops | blocks | raw, one zstd frame if packed
//!
//!   ops       each: op + 8 * n as a number; n from 1
//!             1 RAW n      the next n bytes of `raw`
//!             2 ZEROS n    n zero pages with headers      address|ZERO|CONTINUE, and a byte 0
//!             3 PAGES n    n of the pages with headers    address|PAGE|CONTINUE
//!             4 BLOCKS n   n of the references with such headers
//!             5 BARE_PAGES n, 6 BARE_BLOCKS n   the same without headers, which RAW has given
//!             7 SEEK n     the next address is (n - 1) * 4096; it is 0 at first, and each of
//!                          2, 3 and 4 moves it one page further
//!   blocks    each: zigzag(block - expected) * 2 + d as a number, and if d is 1 the disk as a
//!             number; expected is the block after the last; disk and block are 0 at first
//! ```
//!
//! Numbers are of seven bits a byte (`varint`).
//!
//! **Version rule.** Each end says the oldest and the newest version that it speaks; the newest
//! that both speak is spoken, and named in START. The version changes when a peer of the old one
//! would misunderstand the new one. What a peer may ignore does not change it: more bytes at the
//! end of HELLO, START and READY; bits of `features`, in force only where both set them; and frames
//! of kinds from 128 on. Kind 0 is invalid.

use crate::{Hash, PAGE_SIZE};

/// First bytes of a HELLO.
pub const MAGIC: &[u8; 8] = b"SEMPRWIR";
/// The oldest version that this release speaks.
pub const OLDEST: u16 = 1;
/// The newest version that this release speaks.
pub const NEWEST: u16 = 1;

/// Bytes before a payload.
pub const FRAME_HEADER: usize = 8;
/// Longest piece of the stream in one batch, in bytes.
pub const MAX_STREAM: usize = 2 << 20;
/// Longest payload: a batch whose body cannot be packed, with room for its heads.
pub const MAX_PAYLOAD: usize = 2 * MAX_STREAM + (64 << 10);
/// Most references in one batch.
pub const MAX_REFERENCES: usize = MAX_STREAM / PAGE_SIZE;
/// In the flags of a batch: its body is one zstd frame.
pub(crate) const FLAG_PACKED: u32 = 1;
/// Bytes of a batch before its hashes: the frame's header and eight numbers.
pub(crate) const FIXED_HEAD: usize = FRAME_HEADER + 32;
/// Bytes of a batch before its body, at most.
pub(crate) const HEAD_ROOM: usize = FIXED_HEAD + MAX_REFERENCES * size_of::<Hash>();

/// What a batch's `ops` say.
pub(crate) mod op {
    pub(crate) const RAW: u8 = 1;
    pub(crate) const ZEROS: u8 = 2;
    pub(crate) const PAGES: u8 = 3;
    pub(crate) const BLOCKS: u8 = 4;
    pub(crate) const BARE_PAGES: u8 = 5;
    pub(crate) const BARE_BLOCKS: u8 = 6;
    pub(crate) const SEEK: u8 = 7;
}

/// Most pages in one REPAIR.
pub const MAX_REPAIRS: usize = 64;
/// Most bytes of the return path in one frame.
pub const MAX_RETURN: usize = 64 << 10;
/// Longest text, in bytes.
pub const MAX_TEXT: usize = 1024;
/// Most disks.
pub const MAX_DISKS: usize = 256;
/// What a batch is charged at least, in bytes: bounds how many can be under way.
pub const MIN_CHARGE: u64 = 4096;
/// Smallest and largest window, in bytes.
pub const WINDOWS: std::ops::RangeInclusive<u64> = 2 * MAX_STREAM as u64..=1 << 30;

/// References to disk blocks are understood.
pub const FEATURE_REFERENCES: u64 = 1;
/// Packed batches are understood.
pub const FEATURE_ZSTD: u64 = 2;
/// What this release can do.
pub const FEATURES: u64 = FEATURE_REFERENCES | FEATURE_ZSTD;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)] // the table above
pub enum Kind {
    Hello = 1,
    Start = 2,
    Ready = 3,
    Batch = 4,
    Repair = 5,
    End = 6,
    Verdict = 7,
    Credit = 8,
    Return = 9,
    ReturnEnd = 10,
    Done = 11,
    Abort = 12,
}

/// Why a peer cannot be spoken with any longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It does not speak this protocol, or not now.
    #[error("the peer sent what the wire format forbids: {0}")]
    Protocol(&'static str),
    /// No version in common.
    #[error(
        "the peer ({program}) speaks versions {} to {} of the wire format, this end {OLDEST} to \
         {NEWEST}; bring the older of the two up to date", theirs.0, theirs.1
    )]
    Version {
        /// Oldest and newest of the peer.
        theirs: (u16, u16),
        /// What the peer says that it is.
        program: String,
    },
    /// The two ends belong to different migrations.
    #[error("the peer belongs to migration {theirs:?}, this end to {ours:?}")]
    Migration {
        /// The peer's.
        theirs: String,
        /// This end's.
        ours: String,
    },
    /// The peer gave up.
    #[error("the peer gave up: {0}")]
    Aborted(String),
}

/// A whole frame, borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// None for one that may be ignored.
    pub kind: Option<Kind>,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: &'a [u8],
}

/// Kind and payload length of a frame whose header this is.
///
/// # Errors
/// An unknown kind that may not be ignored, or a payload that is too long.
pub fn parse_header(header: &[u8; FRAME_HEADER]) -> Result<(Option<Kind>, usize), WireError> {
    let kind = match header[0] {
        1 => Some(Kind::Hello),
        2 => Some(Kind::Start),
        3 => Some(Kind::Ready),
        4 => Some(Kind::Batch),
        5 => Some(Kind::Repair),
        6 => Some(Kind::End),
        7 => Some(Kind::Verdict),
        8 => Some(Kind::Credit),
        9 => Some(Kind::Return),
        10 => Some(Kind::ReturnEnd),
        11 => Some(Kind::Done),
        12 => Some(Kind::Abort),
        128.. => None,
        _ => return Err(WireError::Protocol("a frame of an unknown kind")),
    };
    let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    if length > MAX_PAYLOAD {
        return Err(WireError::Protocol("a frame that is too long"));
    }
    Ok((kind, length))
}

/// Takes the first frame of `bytes`: the frame and how many bytes it has; none if more are needed.
///
/// # Errors
/// As [`parse_header`].
pub fn first_frame(bytes: &[u8]) -> Result<Option<(Frame<'_>, usize)>, WireError> {
    let Some((header, rest)) = bytes.split_first_chunk() else { return Ok(None) };
    let (kind, length) = parse_header(header)?;
    let payload = rest.get(..length);
    Ok(payload.map(|payload| (Frame { kind, payload }, FRAME_HEADER + length)))
}

/// Begins a frame; [`finish`] ends it.
pub(crate) fn begin(kind: Kind) -> Vec<u8> {
    vec![kind as u8, 0, 0, 0, 0, 0, 0, 0]
}

/// Writes the length into a frame that is complete.
pub(crate) fn finish(mut frame: Vec<u8>) -> Vec<u8> {
    let length = frame.len() - FRAME_HEADER;
    debug_assert!(length <= MAX_PAYLOAD);
    frame[4..8].copy_from_slice(&(length as u32).to_le_bytes());
    frame
}

/// A frame of one number.
pub(crate) fn number(kind: Kind, value: u64) -> Vec<u8> {
    let mut frame = begin(kind);
    frame.extend_from_slice(&value.to_le_bytes());
    finish(frame)
}

/// The number of such a frame.
///
/// # Errors
/// A payload that is none.
pub fn parse_number(payload: &[u8]) -> Result<u64, WireError> {
    let bytes = payload.try_into().map_err(|_| WireError::Protocol("a number of a wrong size"))?;
    Ok(u64::from_le_bytes(bytes))
}

/// END: the whole stream has so many bytes.
pub fn end(stream_len: u64) -> Vec<u8> {
    number(Kind::End, stream_len)
}

/// DONE: so many bytes were given to QEMU, and that was all.
pub fn done(stream_len: u64) -> Vec<u8> {
    number(Kind::Done, stream_len)
}

/// CREDIT: QEMU has taken batches of this charge, in all.
pub fn credit(total: u64) -> Vec<u8> {
    number(Kind::Credit, total)
}

/// RETURN: at most [`MAX_RETURN`] bytes of the return path.
pub fn return_path(bytes: &[u8]) -> Vec<u8> {
    debug_assert!(bytes.len() <= MAX_RETURN);
    let mut frame = begin(Kind::Return);
    frame.extend_from_slice(bytes);
    finish(frame)
}

/// RETURN_END.
pub fn return_end() -> Vec<u8> {
    begin(Kind::ReturnEnd)
}

/// ABORT, with as much of the reason as fits.
pub fn abort(why: &str) -> Vec<u8> {
    let mut frame = begin(Kind::Abort);
    put_text(&mut frame, why);
    finish(frame)
}

/// The reason of an ABORT, fit to be shown.
pub fn parse_abort(payload: &[u8]) -> WireError {
    let why = Reader(payload).text();
    let why = why.unwrap_or_else(|_| "without a reason".to_owned());
    WireError::Aborted(why.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Beside the QEMU that the VM leaves.
    Source = 1,
    /// Beside the QEMU that it goes to.
    Destination = 2,
}

/// What each end says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest and newest version that it speaks.
    pub versions: (u16, u16),
    /// Which end it is.
    pub role: Role,
    /// What it can do.
    pub features: u64,
    /// Bytes of the stream that may be under way, as far as this end is concerned.
    pub window: u64,
    /// Which migration: the same words at both ends.
    pub migration: String,
    /// What it is, for people.
    pub program: String,
}

impl Hello {
    /// This release's.
    pub fn new(role: Role, window: u64, migration: &str) -> Self {
        Self {
            versions: (OLDEST, NEWEST),
            role,
            features: FEATURES,
            window,
            migration: migration.to_owned(),
            program: concat!("sempervirt ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }

    /// The frame.
    pub fn to_frame(&self) -> Vec<u8> {
        let mut frame = begin(Kind::Hello);
        frame.extend_from_slice(MAGIC);
        frame.extend_from_slice(&self.versions.0.to_le_bytes());
        frame.extend_from_slice(&self.versions.1.to_le_bytes());
        frame.extend_from_slice(&[self.role as u8, 0, 0, 0]);
        frame.extend_from_slice(&self.features.to_le_bytes());
        frame.extend_from_slice(&self.window.to_le_bytes());
        put_text(&mut frame, &self.migration);
        put_text(&mut frame, &self.program);
        finish(frame)
    }

    /// From a payload that nobody vouches for.
    ///
    /// # Errors
    /// Another protocol, or fields that cannot be.
    pub fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader(payload);
        if &reader.array::<8>()? != MAGIC {
            return Err(WireError::Protocol("no greeting"));
        }
        let versions = (reader.u16()?, reader.u16()?);
        let [role, ..] = reader.array::<4>()?;
        let role = match role {
            1 => Role::Source,
            2 => Role::Destination,
            _ => return Err(WireError::Protocol("an unknown role")),
        };
        let (features, window) = (reader.u64()?, reader.u64()?);
        let (migration, program) = (reader.text()?, reader.text()?);
        if versions.0 == 0 || versions.0 > versions.1 {
            return Err(WireError::Protocol("versions that cannot be"));
        }
        if !WINDOWS.contains(&window) {
            return Err(WireError::Protocol("a window that is too small or too large"));
        }
        Ok(Self { versions, role, features, window, migration, program })
    }
}

pub(crate) fn put_text(out: &mut Vec<u8>, text: &str) {
    let mut length = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    out.extend_from_slice(&(length as u16).to_le_bytes());
    out.extend_from_slice(&text.as_bytes()[..length]);
}

/// Takes fields from the front of a payload.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(WireError::Protocol("a payload that was cut off"))?;
        self.0 = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn text(&mut self) -> Result<String, WireError> {
        let length = usize::from(self.u16()?);
        if length > MAX_TEXT {
            return Err(WireError::Protocol("a text that is too long"));
        }
        let bytes = self.take(length)?.to_vec();
        String::from_utf8(bytes).map_err(|_| WireError::Protocol("a text that is not UTF-8"))
    }
}
