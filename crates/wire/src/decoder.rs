//! The destination's end: batches in, the stream out.
//!
//! ```text
//!   BATCH arrives ─► taken apart ─► its blocks are read and hashed at once ─► VERDICT
//!                                        │ all match        │ some do not
//!                                        ▼                  ▼
//!                                     complete ◄─REPAIR── incomplete
//! ```
//!
//! Pieces come out in the order of the stream: one that waits for its repair holds back all that
//! follow, so that no page is ever overtaken by an older version of itself. What waits is bounded by
//! the window, which a source may not exceed.

use std::collections::VecDeque;
use std::io;

use zstd::bulk::Decompressor;

use crate::batch::{Rebuilt, rebuild};
use crate::format::{self, Frame, Kind, MAX_REPAIRS, Reader, WireError};
use crate::index::BlockRef;
use crate::ledger::charge;
use crate::{Hash, PAGE_SIZE, Page, hash_page};

/// Blocks that are read in one piece.
const RUN: usize = 64;

/// Reads the disks.
pub trait Disks {
    /// `count` blocks (at most 64) from `first` on, coherently with what the guest's backend would
    /// read; none if they cannot be read. They are on the disk.
    fn read(&mut self, first: BlockRef, count: usize) -> Option<&[u8]>;
}

/// A piece of the stream for QEMU.
#[derive(Debug, PartialEq, Eq)]
pub struct Decoded {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// What it gives back to the window once QEMU has them.
    pub charge: u64,
}

/// Figures of the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// Bytes of the stream that came out.
    pub stream_bytes: u64,
    /// References.
    pub references: u64,
    /// Of these, blocks with another content, or unreadable.
    pub mismatches: u64,
    /// Pages that came as a repair.
    pub repaired: u64,
}

struct Missing {
    reference: u32,
    place: u32,
    hash: Hash,
}

struct Pending {
    id: u32,
    bytes: Vec<u8>,
    missing: Vec<Missing>,
}

/// Turns batches into the stream.
pub struct Decoder<D> {
    disks: D,
    /// Blocks of each disk; none where it may not be referred to.
    sizes: Vec<u64>,
    key: [u8; 32],
    verify: bool,
    unpacker: Decompressor<'static>,
    unpacked: Vec<u8>,
    window: u64,
    received: u64,
    granted: u64,
    next_id: u32,
    pending: VecDeque<Pending>,
    end: Option<u64>,
    taken: u64,
    judged: Judged,
}

impl<D: Disks> Decoder<D> {
    /// For disks of these sizes in blocks, 0 where there is none; `window` is what was agreed upon.
    ///
    /// # Errors
    /// No memory.
    pub fn new(disks: D, sizes: Vec<u64>, key: [u8; 32], window: u64) -> io::Result<Self> {
        Ok(Self {
            disks,
            sizes,
            key,
            verify: true,
            unpacker: Decompressor::new()?,
            unpacked: Vec::new(),
            window,
            received: 0,
            granted: 0,
            next_id: 0,
            pending: VecDeque::new(),
            end: None,
            taken: 0,
            judged: Judged::default(),
        })
    }

    /// Believes every block, to show what the verification is for.
    #[doc(hidden)]
    pub fn without_verification(mut self) -> Self {
        self.verify = false;
        self
    }

    /// Takes a BATCH, REPAIR or END. A frame to be sent back comes out, if there is one.
    ///
    /// # Errors
    /// The source breaks the protocol; nothing of this stream may be used any longer.
    pub fn frame(&mut self, frame: &Frame<'_>) -> Result<Option<Vec<u8>>, WireError> {
        match frame.kind {
            None => Ok(None),
            Some(Kind::Batch) if self.end.is_none() => self.batch(frame.payload),
            Some(Kind::Repair) => self.repair(frame.payload).map(|()| None),
            Some(Kind::End) if self.end.is_none() => {
                let pending = self.pending.iter().map(|pending| pending.bytes.len() as u64);
                let length = self.taken + pending.sum::<u64>();
                self.end = Some(format::parse_number(frame.payload)?);
                if self.end != Some(length) {
                    return Err(WireError::Protocol("an end before the end of the stream"));
                }
                Ok(None)
            }
            Some(Kind::Abort) => Err(format::parse_abort(frame.payload)),
            Some(_) => Err(WireError::Protocol("a frame out of turn")),
        }
    }

    fn batch(&mut self, payload: &[u8]) -> Result<Option<Vec<u8>>, WireError> {
        let rebuilt = rebuild(payload, &mut self.unpacker, &mut self.unpacked)?;
        if rebuilt.id != self.next_id {
            return Err(WireError::Protocol("a batch out of turn"));
        }
        self.next_id = self.next_id.wrapping_add(1);
        self.received += charge(rebuilt.bytes.len());
        if self.received - self.granted > self.window {
            return Err(WireError::Protocol("more under way than the window allows"));
        }
        let has = |block: &BlockRef| {
            self.sizes.get(usize::from(block.disk)).is_some_and(|&blocks| block.block < blocks)
        };
        if !rebuilt.refs.iter().all(has) {
            return Err(WireError::Protocol("a reference to a block that there is not"));
        }
        self.judge(rebuilt)
    }

    /// Reads and compares every block that the batch refers to.
    fn judge(&mut self, rebuilt: Rebuilt) -> Result<Option<Vec<u8>>, WireError> {
        let Rebuilt { id, mut bytes, places, refs, hashes } = rebuilt;
        let mut missing = Vec::new();
        let mut at = 0;
        while at < refs.len() {
            let first = refs[at];
            let follows = |(ahead, block): &(usize, &BlockRef)| {
                block.disk == first.disk && block.block == first.block + *ahead as u64
            };
            let count = refs[at..].iter().take(RUN).enumerate().take_while(follows).count();
            let blocks = self.disks.read(first, count);
            let mut blocks = blocks.map(|blocks| blocks.chunks_exact(PAGE_SIZE));
            for reference in at..at + count {
                let (place, hash) = (places[reference] as usize, hashes[reference]);
                let page = blocks.as_mut().and_then(Iterator::next);
                // What is hashed is the copy that QEMU gets, not the disk's changing one.
                let copy = bytes.get_mut(place..).and_then(<[u8]>::first_chunk_mut);
                let copy: &mut Page = copy.ok_or(WireError::Protocol("a page without its room"))?;
                if let Some(page) = page {
                    copy.copy_from_slice(page);
                }
                if page.is_none() || self.verify && hash_page(&self.key, copy) != hash {
                    missing.push(Missing {
                        reference: reference as u32,
                        place: place as u32,
                        hash,
                    });
                }
            }
            at += count;
        }
        self.judged.references += refs.len() as u64;
        self.judged.mismatches += missing.len() as u64;
        let verdict = (!refs.is_empty()).then(|| verdict(id, &missing));
        self.pending.push_back(Pending { id, bytes, missing });
        Ok(verdict)
    }

    fn repair(&mut self, payload: &[u8]) -> Result<(), WireError> {
        let wrong = WireError::Protocol("a repair of what was not asked for");
        let mut reader = Reader(payload);
        let (id, count) = (reader.u32()?, reader.u32()? as usize);
        if count == 0 || count > MAX_REPAIRS {
            return Err(wrong);
        }
        let places = reader.take(count * 4)?;
        let pending = self.pending.iter_mut().find(|pending| pending.id == id);
        let pending = pending.ok_or(wrong.clone())?;
        let mut places = Reader(places);
        for _ in 0..count {
            let reference = places.u32()?;
            let page = reader.array::<PAGE_SIZE>()?;
            let known = |missing: &Missing| missing.reference == reference;
            let at = pending.missing.iter().position(known).ok_or(wrong.clone())?;
            let missing = pending.missing.swap_remove(at);
            if self.verify && hash_page(&self.key, &page) != missing.hash {
                return Err(WireError::Protocol("a repair with another content than announced"));
            }
            let place = missing.place as usize;
            pending.bytes[place..place + PAGE_SIZE].copy_from_slice(&page);
            self.judged.repaired += 1;
        }
        if reader.0.is_empty() { Ok(()) } else { Err(wrong) }
    }

    /// The next piece of the stream, when it is complete.
    pub fn pop(&mut self) -> Option<Decoded> {
        let front = self.pending.front()?;
        if !front.missing.is_empty() {
            return None;
        }
        let bytes = self.pending.pop_front()?.bytes;
        self.taken += bytes.len() as u64;
        self.judged.stream_bytes = self.taken;
        Some(Decoded { charge: charge(bytes.len()), bytes })
    }

    /// The source is told (by a CREDIT) that this much, in all, is no longer under way.
    pub fn grant(&mut self, total: u64) {
        self.granted = total.min(self.received);
    }

    /// The whole stream came out.
    pub fn is_complete(&self) -> bool {
        self.end == Some(self.taken)
    }

    /// What came through so far.
    pub fn judged(&self) -> Judged {
        self.judged
    }
}

fn verdict(id: u32, missing: &[Missing]) -> Vec<u8> {
    let mut frame = format::begin(Kind::Verdict);
    frame.extend_from_slice(&id.to_le_bytes());
    frame.extend_from_slice(&(missing.len() as u32).to_le_bytes());
    missing.iter().for_each(|m| frame.extend_from_slice(&m.reference.to_le_bytes()));
    format::finish(frame)
}
