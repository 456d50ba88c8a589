//! One virtio-blk request: from a descriptor chain to an [`Io`] (VIRTIO 1.2, 5.2.6).

use semper_block::{Image, Io, Op, Prepared, SECTOR_SIZE};
use semper_blockmap::Note;
use semper_inflight::{Hook, TrackedQueue};
use semper_ring::{ChainError, Segment};

use crate::config::MAX_TRIM_SECTORS;

/// Status byte: done.
pub(crate) const STATUS_OK: u8 = 0;
/// Status byte: failed.
pub(crate) const STATUS_IOERR: u8 = 1;
/// Status byte: not supported.
pub(crate) const STATUS_UNSUPPORTED: u8 = 2;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const HEADER_SIZE: usize = 16;
const TRIM_SEGMENT_SIZE: usize = 16;
/// Bytes of the serial number that GET_ID gives.
pub(crate) const ID_SIZE: usize = 20;
const FLAG_UNMAP: u32 = 1;

/// What a chain asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// I/O, described in the slot.
    Io,
    /// Answered at once with this status; `written` counts the bytes before the status byte.
    Answer {
        /// Status byte.
        status: u8,
        /// Bytes written into the guest's buffers.
        written: u32,
    },
    /// The chain has no place for a status byte; it is given back unanswered.
    Unanswerable,
}

/// Room for one request, reused for each that has the same head.
#[derive(Debug)]
pub(crate) struct Slot {
    /// The I/O that is to be done.
    pub io: Io,
    /// Where the status byte goes.
    pub status: *mut u8,
    /// Where the request began; `io` moves on with it, and may do other things on the way.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// What the page/block map remembers of it.
    pub note: Note,
    /// When it was taken, in ns of CLOCK_MONOTONIC.
    pub taken_ns: u64,
    readable: Vec<libc::iovec>,
}

// SAFETY: the pointers lead into guest memory that the queue keeps mapped.
unsafe impl Send for Slot {}

impl Default for Slot {
    fn default() -> Self {
        Self {
            io: Io::default(),
            status: std::ptr::null_mut(),
            offset: 0,
            len: 0,
            note: Note::default(),
            taken_ns: 0,
            readable: Vec::new(),
        }
    }
}

/// What a request is judged by, beside the chain.
#[derive(Clone, Copy)]
pub(crate) struct Rules<'a> {
    pub image: &'a Image,
    pub serial: &'a [u8; ID_SIZE],
    pub write_through: bool,
}

/// Reads the chain at `head` into `slot`.
///
/// # Errors
/// [`ChainError`]: the guest built a chain that makes no sense.
pub(crate) fn parse<H: Hook>(
    queue: &TrackedQueue<H>,
    head: u16,
    slot: &mut Slot,
    rules: Rules<'_>,
) -> Result<Parsed, ChainError> {
    slot.io.reset(Op::Flush);
    slot.readable.clear();
    slot.status = std::ptr::null_mut();
    let Slot { io, readable, .. } = slot;
    let walked = queue.walk(head, |Segment { ptr, len, writable }| {
        let segment = libc::iovec { iov_base: ptr.cast(), iov_len: len };
        if writable { io.iov.push(segment) } else { readable.push(segment) }
    });
    if let Err(error) = walked {
        // A driver may have set the status to "done" beforehand: say that it is not, wherever the
        // place for it is known.
        if matches!(error, ChainError::Buffer { last: false, .. })
            && let Some(status) = take_status(&mut slot.io.iov)
        {
            slot.status = status;
        }
        return Err(error);
    }
    let Some(status) = take_status(&mut slot.io.iov) else { return Ok(Parsed::Unanswerable) };
    slot.status = status;
    let mut header = [0u8; HEADER_SIZE];
    if !take_front(&mut slot.readable, &mut header) {
        return Ok(Parsed::Answer { status: STATUS_IOERR, written: 0 });
    }
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut sector = [0u8; 8];
    sector.copy_from_slice(&header[8..]);
    Ok(interpret(kind, u64::from_le_bytes(sector), slot, rules))
}

fn interpret(kind: u32, sector: u64, slot: &mut Slot, rules: Rules<'_>) -> Parsed {
    let refuse = |status| Parsed::Answer { status, written: 0 };
    match kind {
        T_IN => transfer(Op::Read, sector, slot, rules),
        T_OUT if rules.image.read_only() => refuse(STATUS_IOERR),
        T_OUT => {
            std::mem::swap(&mut slot.io.iov, &mut slot.readable);
            transfer(Op::Write { stable: rules.write_through }, sector, slot, rules)
        }
        T_FLUSH => {
            slot.io.iov.clear();
            (slot.offset, slot.len) = (0, 0);
            Parsed::Io
        }
        T_GET_ID => {
            let written = put_front(&slot.io.iov, rules.serial);
            Parsed::Answer { status: STATUS_OK, written }
        }
        T_DISCARD | T_WRITE_ZEROES if rules.image.read_only() => refuse(STATUS_IOERR),
        T_DISCARD | T_WRITE_ZEROES => trim(kind, slot, rules),
        _ => refuse(STATUS_UNSUPPORTED),
    }
}

fn transfer(op: Op, sector: u64, slot: &mut Slot, rules: Rules<'_>) -> Parsed {
    let len = slot.io.iov.iter().map(|s| s.iov_len as u64).sum::<u64>();
    begin(op, sector, len, slot, rules)
}

fn trim(kind: u32, slot: &mut Slot, rules: Rules<'_>) -> Parsed {
    slot.io.iov.clear();
    let mut segment = [0u8; TRIM_SEGMENT_SIZE];
    let bytes = slot.readable.iter().map(|s| s.iov_len).sum::<usize>();
    // One segment is what the configuration space allows; QEMU's own devices say the same to more.
    if bytes > TRIM_SEGMENT_SIZE && bytes % TRIM_SEGMENT_SIZE == 0 {
        return Parsed::Answer { status: STATUS_UNSUPPORTED, written: 0 };
    }
    if bytes != TRIM_SEGMENT_SIZE || !take_front(&mut slot.readable, &mut segment) {
        return Parsed::Answer { status: STATUS_IOERR, written: 0 };
    }
    let mut sector = [0u8; 8];
    sector.copy_from_slice(&segment[..8]);
    let count = u32::from_le_bytes([segment[8], segment[9], segment[10], segment[11]]);
    let flags = u32::from_le_bytes([segment[12], segment[13], segment[14], segment[15]]);
    let op = match kind {
        // VIRTIO 1.2, 5.2.6.2: unmap must be 0 for discard; unknown flags are not supported.
        T_DISCARD if flags != 0 => {
            return Parsed::Answer { status: STATUS_UNSUPPORTED, written: 0 };
        }
        T_DISCARD => Op::Discard,
        _ if flags & !FLAG_UNMAP != 0 => {
            return Parsed::Answer { status: STATUS_UNSUPPORTED, written: 0 };
        }
        _ => Op::WriteZeroes { unmap: flags & FLAG_UNMAP != 0 },
    };
    if count > MAX_TRIM_SECTORS {
        return Parsed::Answer { status: STATUS_IOERR, written: 0 };
    }
    begin(op, u64::from_le_bytes(sector), u64::from(count) * SECTOR_SIZE, slot, rules)
}

/// Checks the range; the request is I/O unless it is empty or wrong.
fn begin(op: Op, sector: u64, len: u64, slot: &mut Slot, rules: Rules<'_>) -> Parsed {
    let range = sector
        .checked_mul(SECTOR_SIZE)
        .filter(|offset| offset.checked_add(len).is_some_and(|end| end <= rules.image.capacity()))
        .filter(|offset| (offset | len) % SECTOR_SIZE == 0);
    let Some(offset) = range else {
        return Parsed::Answer { status: STATUS_IOERR, written: 0 };
    };
    if len == 0 {
        return Parsed::Answer { status: STATUS_OK, written: 0 };
    }
    (slot.offset, slot.len) = (offset, len);
    slot.io.op = op;
    slot.io.offset = offset;
    slot.io.len = len;
    match slot.io.prepare(rules.image, rules.write_through) {
        Prepared::Ready => Parsed::Io,
        Prepared::Nothing => Parsed::Answer { status: STATUS_OK, written: 0 },
        Prepared::TooLarge => Parsed::Answer { status: STATUS_IOERR, written: 0 },
    }
}

/// Takes the last writable byte off the segments.
fn take_status(segments: &mut Vec<libc::iovec>) -> Option<*mut u8> {
    let last = segments.last_mut()?;
    last.iov_len -= 1;
    // SAFETY: segments are never empty, so the byte is inside the segment.
    let status = unsafe { last.iov_base.cast::<u8>().add(last.iov_len) };
    if last.iov_len == 0 {
        segments.pop();
    }
    Some(status)
}

/// Moves the first `into.len()` bytes out of the segments; false if there are not so many.
fn take_front(segments: &mut Vec<libc::iovec>, into: &mut [u8]) -> bool {
    let (mut filled, mut finished) = (0, 0);
    for segment in segments.iter_mut() {
        let n = segment.iov_len.min(into.len() - filled);
        // SAFETY: n bytes are inside both; the guest may be writing them, and whatever is copied
        // is judged only after this one copy.
        unsafe {
            std::ptr::copy_nonoverlapping(
                segment.iov_base.cast::<u8>(),
                into[filled..].as_mut_ptr(),
                n,
            );
            segment.iov_base = segment.iov_base.cast::<u8>().add(n).cast();
        }
        segment.iov_len -= n;
        filled += n;
        if segment.iov_len > 0 {
            break;
        }
        finished += 1;
        if filled == into.len() {
            break;
        }
    }
    segments.drain(..finished);
    filled == into.len()
}

/// Copies as much of `bytes` into the segments as fits; gives the number of bytes.
fn put_front(segments: &[libc::iovec], bytes: &[u8]) -> u32 {
    let mut done = 0;
    for segment in segments {
        let n = segment.iov_len.min(bytes.len() - done);
        // SAFETY: n bytes are inside both.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), segment.iov_base.cast(), n);
        }
        done += n;
    }
    done as u32
}
