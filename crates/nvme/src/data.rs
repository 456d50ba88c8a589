//! Where a command's data is: PRP lists [4.3] and SGLs [4.4], into ranges of guest memory.
//!
//! Lists are the guest's: they may loop, lead nowhere, and change while they are read. So the number of
//! ranges and of lists is bounded by what the data needs, each list is read once, and nothing of an
//! address is believed before the bus has looked it up.

use semper_device::{Bus, PAGE};

use crate::command::Command;
use crate::spec::Status;

/// Ranges of one command: as many as one system call takes.
const RANGES_MOST: usize = 1024;
/// Lists, or segments, of one command.
const LISTS_MOST: usize = 64;

/// A range of guest memory: address and bytes.
pub type Range = (u64, u64);

/// The ranges of a command's data, `len` bytes in all.
///
/// # Errors
/// The status that the command ends with.
pub fn ranges(command: &Command, len: u64, bus: &dyn Bus) -> Result<Vec<Range>, Status> {
    match command.transfer() {
        0 => prp(command.prp1(), command.prp2(), len, bus),
        1 | 2 => sgl(command.sgl(), len, bus),
        _ => Err(Status::FIELD),
    }
}

/// Adds a range, to the one before if it follows that.
fn push(ranges: &mut Vec<Range>, address: u64, len: u64) -> Result<(), Status> {
    if address.checked_add(len).is_none() {
        return Err(Status::TRANSFER);
    }
    let full = ranges.len() == RANGES_MOST;
    match ranges.last_mut() {
        Some((first, before)) if *first + *before == address => *before += len,
        _ if full => return Err(Status::SGL_COUNT),
        _ => ranges.push((address, len)),
    }
    Ok(())
}

fn prp(first: u64, second: u64, len: u64, bus: &dyn Bus) -> Result<Vec<Range>, Status> {
    let mut ranges = Vec::new();
    if len == 0 {
        return Ok(ranges);
    }
    if first % 4 != 0 {
        return Err(Status::PRP_OFFSET);
    }
    let here = len.min(PAGE - first % PAGE);
    push(&mut ranges, first, here)?;
    let left = len - here;
    match left {
        0 => {}
        1..=PAGE if second % PAGE != 0 => return Err(Status::PRP_OFFSET),
        1..=PAGE => push(&mut ranges, second, left)?,
        _ => prp_list(second, left, bus, &mut ranges)?,
    }
    Ok(ranges)
}

fn prp_list(
    list: u64,
    mut left: u64,
    bus: &dyn Bus,
    ranges: &mut Vec<Range>,
) -> Result<(), Status> {
    let mut list = list;
    let mut entries = [0u8; PAGE as usize];
    for _ in 0..LISTS_MOST {
        if list % 8 != 0 {
            return Err(Status::PRP_OFFSET);
        }
        let room = ((PAGE - list % PAGE) / 8) as usize;
        let needed = left.div_ceil(PAGE) as usize;
        let count = needed.min(room);
        let entries = &mut entries[..count * 8];
        bus.read(list, entries).map_err(|_| Status::TRANSFER)?;
        for (index, entry) in entries.chunks_exact(8).enumerate() {
            let address = u64::from_le_bytes(std::array::from_fn(|i| entry[i]));
            // The last entry of a list that is full leads to the next one.
            if index + 1 == room && left > PAGE {
                list = address;
                break;
            }
            if address % PAGE != 0 {
                return Err(Status::PRP_OFFSET);
            }
            let here = left.min(PAGE);
            push(ranges, address, here)?;
            left -= here;
        }
        if left == 0 {
            return Ok(());
        }
    }
    Err(Status::FIELD)
}

/// Types of SGL descriptors, without subtypes [4.4].
mod descriptor {
    pub const DATA: u8 = 0x00;
    pub const BIT_BUCKET: u8 = 0x10;
    pub const SEGMENT: u8 = 0x20;
    pub const LAST_SEGMENT: u8 = 0x30;
}

fn parse(descriptor: &[u8]) -> (u64, u64, u8) {
    let address = u64::from_le_bytes(std::array::from_fn(|i| descriptor[i]));
    let len = u32::from_le_bytes(std::array::from_fn(|i| descriptor[8 + i]));
    (address, u64::from(len), descriptor[15])
}

fn sgl(first: [u8; 16], len: u64, bus: &dyn Bus) -> Result<Vec<Range>, Status> {
    let mut ranges = Vec::new();
    let mut left = len;
    let mut next = match parse(&first) {
        (address, bytes, descriptor::DATA) => {
            if bytes < left {
                return Err(Status::SGL_LENGTH);
            }
            push(&mut ranges, address, left)?;
            return Ok(ranges);
        }
        (address, bytes, kind @ (descriptor::SEGMENT | descriptor::LAST_SEGMENT)) => {
            Some((address, bytes, kind == descriptor::LAST_SEGMENT))
        }
        (.., descriptor::BIT_BUCKET) => return Err(Status::SGL_TYPE),
        _ => return Err(Status::SGL_TYPE),
    };
    let mut descriptors = [0u8; PAGE as usize];
    for _ in 0..LISTS_MOST {
        let Some((mut at, bytes, last)) = next.take() else { break };
        if bytes == 0 || bytes % 16 != 0 || bytes / 16 > RANGES_MOST as u64 {
            return Err(Status::SGL_SEGMENT);
        }
        let mut unread = bytes;
        while unread > 0 {
            let part = &mut descriptors[..unread.min(PAGE) as usize];
            bus.read(at, part).map_err(|_| Status::TRANSFER)?;
            (at, unread) = (at.wrapping_add(part.len() as u64), unread - part.len() as u64);
            let count = part.len() / 16;
            for (index, descriptor) in part.chunks_exact(16).enumerate() {
                let is_end = unread == 0 && index + 1 == count;
                match parse(descriptor) {
                    (address, bytes, descriptor::DATA) => {
                        let here = bytes.min(left);
                        if here > 0 {
                            push(&mut ranges, address, here)?;
                        }
                        left -= here;
                    }
                    (address, bytes, kind @ (descriptor::SEGMENT | descriptor::LAST_SEGMENT))
                        if is_end && !last =>
                    {
                        next = Some((address, bytes, kind == descriptor::LAST_SEGMENT));
                    }
                    (.., descriptor::SEGMENT | descriptor::LAST_SEGMENT) => {
                        return Err(Status::SGL_SEGMENT);
                    }
                    _ => return Err(Status::SGL_TYPE),
                }
            }
        }
        if left == 0 {
            return Ok(ranges);
        }
    }
    Err(Status::SGL_LENGTH)
}
