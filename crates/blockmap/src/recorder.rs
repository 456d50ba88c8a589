//! The hot path: what a queue's thread does for the map at each request.
//!
//! ```text
//!   start    every block of the range is touched; a write moves its versions on
//!   (the request is done)
//!   finish   a write is in flight no more; each whole page of the guest's buffers is associated
//!            with its sectors, stamped as they were at the start
//! ```
//!
//! A read stamps with the versions that it saw at its start, a write with those that it made at its
//! end. A write that ends later makes another version, and the association is dead, perhaps before
//! it was stored; until that write has ended nothing of the block is believed. Writes of a block
//! that were in flight together get no stamp, for nobody knows which came last.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::counters::Counters;
use crate::map::{BlockMap, Layout, View};
use crate::versions::both;
use crate::{PAGE_SHIFT, PAGE_SIZE, SECTOR_SIZE, SECTORS_PER_BLOCK};

/// No stamp: the page's association cannot be told.
const NONE: u64 = u64::MAX;

/// What a request does to the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Nothing (a flush): not recorded.
    #[default]
    None,
    /// Disk to memory.
    Read,
    /// Memory to disk.
    Write,
    /// The range is discarded or zeroed.
    Trim,
}

/// Room for what the map has to know of one request; reused, so that nothing is allocated.
///
/// Small, because a queue has one for each of its requests in flight and they compete for the
/// processor's cache with everything else.
#[derive(Debug, Default)]
pub struct Note {
    kind: Kind,
    /// A single page: where it is.
    view: u16,
    page: u32,
    /// A single block.
    block: u64,
    seen: Seen,
    any: Option<Box<Any>>,
}

/// What was begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Nothing,
    /// The usual request: one aligned block of the disk, one aligned page of the guest.
    Single { write: bool },
    /// Any other; see [`Any`].
    Any,
}

/// A request of any shape.
#[derive(Debug, Default)]
struct Any {
    access: Access,
    offset: u64,
    len: u64,
    /// Guest buffers: address in this process, length.
    segments: Vec<(usize, usize)>,
    /// One for each block of the range.
    seen: Vec<Seen>,
    /// What came of them.
    stamps: Vec<u64>,
}

/// What a block was like when the request began: its stamp (a read), or the flight (a write).
type Seen = u64;

/// Records for one queue.
#[derive(Debug)]
pub struct Recorder {
    map: Arc<BlockMap>,
    layout: Option<Arc<Layout>>,
    counters: Arc<Counters>,
}

fn first_and_last(offset: u64, len: u64) -> (u64, u64) {
    (offset >> PAGE_SHIFT, (offset + len.max(1) - 1) >> PAGE_SHIFT)
}

impl BlockMap {
    /// A recorder for one queue's thread, good for the present memory table.
    pub fn recorder(self: &Arc<Self>, counters: &Arc<Counters>) -> Recorder {
        let layout = self.enlist(counters);
        Recorder { map: Arc::clone(self), layout, counters: Arc::clone(counters) }
    }
}

impl Recorder {
    /// Before the first byte of the request moves. `segments` are the guest's buffers in this
    /// process, in order; `len` is not 0 and the range is on the disk. Each call must be followed
    /// by one of [`Self::finish`] with the same note.
    #[inline]
    pub fn start(
        &self,
        note: &mut Note,
        access: Access,
        (offset, len): (u64, u64),
        segments: &[libc::iovec],
    ) {
        if let [one] = segments
            && len == PAGE_SIZE as u64
            && offset % PAGE_SIZE as u64 == 0
            && one.iov_len == PAGE_SIZE
            && let Some((view, page)) = self.place(one.iov_base.addr())
        {
            let (block, write) = (offset >> PAGE_SHIFT, access == Access::Write);
            note.kind = Kind::Single { write };
            (note.view, note.page, note.block) = (view, page, block);
            note.seen = self.enter(write, block);
        } else if access != Access::None {
            note.kind = Kind::Any;
            self.start_any(note.any.get_or_insert_default(), access, (offset, len), segments);
        }
        // A write is marked before its data moves.
        fence(Ordering::Release);
    }

    /// The request begins to use the block.
    #[inline]
    fn enter(&self, write: bool, block: u64) -> Seen {
        self.map.touched.set(block);
        if write { self.map.versions.begin_write(block) } else { self.map.versions.get(block) }
    }

    /// It is done with the block: the block's stamp for this request, or `NONE`.
    #[inline]
    fn leave(&self, write: bool, block: u64, seen: Seen) -> u64 {
        if write { self.map.versions.end_write(block, seen).unwrap_or(NONE) } else { seen }
    }

    /// The page that begins at this address.
    #[inline]
    fn place(&self, address: usize) -> Option<(u16, u32)> {
        if address % PAGE_SIZE != 0 {
            return None;
        }
        let views = &self.layout.as_ref()?.views;
        let (view, at) = views.iter().enumerate().find_map(|(index, view)| {
            let at = address.wrapping_sub(view.host);
            (at < view.len).then_some((index, at >> PAGE_SHIFT))
        })?;
        Some((u16::try_from(view).ok()?, u32::try_from(at).ok()?))
    }

    fn start_any(
        &self,
        any: &mut Any,
        access: Access,
        (offset, len): (u64, u64),
        segments: &[libc::iovec],
    ) {
        (any.access, any.offset, any.len) = (access, offset, len);
        any.seen.clear();
        any.segments.clear();
        if access == Access::Trim {
            self.map.versions.begin_trim();
            return;
        }
        let (first, last) = first_and_last(offset, len);
        any.segments.extend(segments.iter().map(|s| (s.iov_base.addr(), s.iov_len)));
        let write = access == Access::Write;
        any.seen.extend((first..=last).map(|block| self.enter(write, block)));
    }

    /// After the last byte of the request moved, or it failed.
    #[inline]
    pub fn finish(&self, note: &mut Note, ok: bool) {
        match std::mem::take(&mut note.kind) {
            Kind::Nothing => {}
            Kind::Single { write } => self.finish_single(note, write, ok),
            Kind::Any => {
                if let Some(any) = &mut note.any {
                    self.finish_any(any, ok);
                }
            }
        }
    }

    #[inline]
    fn finish_single(&self, note: &Note, write: bool, ok: bool) {
        let stamp = self.leave(write, note.block, note.seen);
        let views = self.layout.as_ref().map_or(&[][..], |layout| &layout.views);
        let Some(view) = views.get(usize::from(note.view)) else { return };
        if ok && stamp != NONE {
            view.table.store(note.page as usize, note.block * SECTORS_PER_BLOCK, stamp);
            self.counters.add(1, 0);
        } else if !write {
            // A page may be half filled.
            view.table.clear(note.page as usize);
            self.counters.add(0, 1);
        }
    }

    fn finish_any(&self, any: &mut Any, ok: bool) {
        let (first, last) = first_and_last(any.offset, any.len);
        match any.access {
            Access::None => {}
            Access::Trim => self.map.versions.end_trim(self.map.touched.iter(first, last)),
            access => {
                let write = access == Access::Write;
                let left = (first..=last).zip(&any.seen);
                any.stamps.clear();
                any.stamps.extend(left.map(|(block, seen)| self.leave(write, block, *seen)));
                if !ok {
                    // A page may be half filled, a block half written.
                    any.stamps.fill(NONE);
                }
                self.associate(any, !write);
            }
        }
    }

    /// Stores the association of every whole page of the buffers. What the disk filled and cannot
    /// be told is dropped; what the guest wrote out is as it was.
    #[inline]
    fn associate(&self, any: &Any, filled: bool) {
        let Some(layout) = &self.layout else { return };
        let (mut recorded, mut dropped) = (0, 0);
        let mut at = any.offset;
        for &(address, len) in &any.segments {
            if let Some(view) = view_at(layout, address) {
                let start = address - view.host;
                let end = start + len;
                let mut page = start >> PAGE_SHIFT;
                if start % PAGE_SIZE != 0 {
                    if filled {
                        view.table.clear(page);
                        dropped += 1;
                    }
                    page += 1;
                }
                while (page + 1) << PAGE_SHIFT <= end {
                    let disk = at + ((page << PAGE_SHIFT) - start) as u64;
                    match stamp_of(any, disk) {
                        Some(stamp) => {
                            view.table.store(page, disk / SECTOR_SIZE, stamp);
                            recorded += 1;
                        }
                        None if filled => {
                            view.table.clear(page);
                            dropped += 1;
                        }
                        None => {}
                    }
                    page += 1;
                }
                if filled && page << PAGE_SHIFT < end {
                    view.table.clear(page);
                    dropped += 1;
                }
            }
            at += len as u64;
        }
        self.counters.add(recorded, dropped);
    }
}

#[inline]
fn view_at(layout: &Layout, address: usize) -> Option<&View> {
    layout.views.iter().find(|v| address.wrapping_sub(v.host) < v.len)
}

/// The stamp of a page's worth of the disk from byte `disk`, which is inside the request's range.
#[inline]
fn stamp_of(any: &Any, disk: u64) -> Option<u64> {
    let index = ((disk >> PAGE_SHIFT) - (any.offset >> PAGE_SHIFT)) as usize;
    let first = any.stamps.get(index).copied().filter(|stamp| *stamp != NONE)?;
    if disk % PAGE_SIZE as u64 == 0 {
        return Some(first);
    }
    if disk % SECTOR_SIZE != 0 {
        return None;
    }
    let second = any.stamps.get(index + 1).copied().filter(|stamp| *stamp != NONE)?;
    Some(both(first, second))
}
