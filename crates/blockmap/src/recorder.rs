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
//! end: what is written later, or began meanwhile, makes another version, and the association is
//! dead, perhaps before it was stored. What was in flight together with a write of the same block
//! gets no stamp, for nobody knows which came last.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::map::{BlockMap, Layout, View};
use crate::versions::{Flight, both};
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
#[derive(Debug, Default)]
pub struct Note {
    access: Access,
    /// The request is one block in one page: only `place` is used.
    single: bool,
    place: Place,
    offset: u64,
    len: u64,
    /// Guest buffers: address in this process, length.
    segments: Vec<(usize, usize)>,
    /// One for each block of the range.
    seen: Vec<Seen>,
    /// What came of them.
    stamps: Vec<u64>,
}

/// The usual request: an aligned block of the disk, an aligned page of the guest.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    view: u32,
    page: u32,
    block: u64,
    seen: Seen,
}

/// What a block was like when the request began.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// A read: its stamp, or `NONE`.
    Stamp(u64),
    /// A write.
    Flight(Flight),
}

impl Default for Seen {
    fn default() -> Self {
        Self::Stamp(NONE)
    }
}

/// Counts of one queue; one thread writes them.
#[derive(Debug, Default)]
pub struct Counters {
    recorded: AtomicU64,
    dropped: AtomicU64,
}

impl Counters {
    pub(crate) fn get(&self) -> (u64, u64) {
        (self.recorded.load(Ordering::Relaxed), self.dropped.load(Ordering::Relaxed))
    }

    fn add(&self, recorded: u64, dropped: u64) {
        let add = |counter: &AtomicU64, n| {
            if n > 0 {
                counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
            }
        };
        add(&self.recorded, recorded);
        add(&self.dropped, dropped);
    }
}

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

impl Recorder {
    pub(crate) fn new(
        map: Arc<BlockMap>,
        layout: Option<Arc<Layout>>,
        counters: Arc<Counters>,
    ) -> Self {
        Self { map, layout, counters }
    }

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
        note.access = access;
        note.single = false;
        if access == Access::None {
            return;
        }
        if let [one] = segments
            && len == PAGE_SIZE as u64
            && offset % PAGE_SIZE as u64 == 0
            && one.iov_len == PAGE_SIZE
            && let Some((view, page)) = self.place(one.iov_base.addr())
        {
            let block = offset >> PAGE_SHIFT;
            let seen = self.enter(access, block);
            note.single = true;
            note.place = Place { view, page, block, seen };
            // The versions move before the data does.
            fence(Ordering::Release);
            return;
        }
        self.start_any(note, access, (offset, len), segments);
    }

    /// The request begins to use the block.
    #[inline]
    fn enter(&self, access: Access, block: u64) -> Seen {
        self.map.touched.set(block);
        if access == Access::Write {
            return Seen::Flight(self.map.versions.begin_write(block));
        }
        Seen::Stamp(self.map.versions.quiet(block).unwrap_or(NONE))
    }

    /// It is done with the block; the block's stamp for this request, or `NONE`.
    #[inline]
    fn leave(&self, block: u64, seen: Seen) -> u64 {
        match seen {
            Seen::Stamp(stamp) => stamp,
            Seen::Flight(begun) => self.map.versions.end_write(block, begun).unwrap_or(NONE),
        }
    }

    /// The page that begins at this address.
    #[inline]
    fn place(&self, address: usize) -> Option<(u32, u32)> {
        if address % PAGE_SIZE != 0 {
            return None;
        }
        let views = &self.layout.as_ref()?.views;
        let (view, at) = views.iter().enumerate().find_map(|(index, view)| {
            let at = address.wrapping_sub(view.host) >> PAGE_SHIFT;
            (at < view.table.pages()).then_some((index, at))
        })?;
        Some((u32::try_from(view).ok()?, u32::try_from(at).ok()?))
    }

    fn start_any(
        &self,
        note: &mut Note,
        access: Access,
        (offset, len): (u64, u64),
        segments: &[libc::iovec],
    ) {
        (note.offset, note.len) = (offset, len);
        note.seen.clear();
        note.segments.clear();
        let (first, last) = first_and_last(offset, len);
        if access == Access::Trim {
            self.map.versions.begin_trim();
            return;
        }
        note.segments.extend(segments.iter().map(|s| (s.iov_base.expose_provenance(), s.iov_len)));
        note.seen.extend((first..=last).map(|block| self.enter(access, block)));
        fence(Ordering::Release);
    }

    /// After the last byte of the request moved, or it failed.
    #[inline]
    pub fn finish(&self, note: &mut Note, ok: bool) {
        if note.single {
            self.finish_single(note, ok);
        } else {
            self.finish_any(note, ok);
        }
    }

    #[inline]
    fn finish_single(&self, note: &mut Note, ok: bool) {
        let Place { view, page, block, seen } = note.place;
        let written = std::mem::take(&mut note.access) == Access::Write;
        let stamp = self.leave(block, seen);
        let view = self.layout.as_ref().and_then(|layout| layout.views.get(view as usize));
        let Some(view) = view else { return };
        if ok && stamp != NONE {
            view.table.store(page as usize, block * SECTORS_PER_BLOCK, stamp);
            self.counters.add(1, 0);
        } else if !written {
            view.table.clear(page as usize);
            self.counters.add(0, 1);
        }
    }

    fn finish_any(&self, note: &mut Note, ok: bool) {
        let (first, last) = first_and_last(note.offset, note.len);
        let access = std::mem::take(&mut note.access);
        note.stamps.clear();
        match access {
            Access::None => {}
            Access::Read | Access::Write => {
                let left = (first..=last).zip(&note.seen);
                note.stamps.extend(left.map(|(block, seen)| self.leave(block, *seen)));
                if !ok {
                    // A page may be half filled, a block half written.
                    note.stamps.fill(NONE);
                }
                self.associate(note, access == Access::Read);
            }
            Access::Trim => self.map.versions.end_trim(self.map.touched.iter(first, last)),
        }
    }

    /// Stores the association of every whole page of the buffers. What the disk filled and cannot
    /// be told is dropped; what the guest wrote out is as it was.
    #[inline]
    fn associate(&self, note: &Note, filled: bool) {
        let Some(layout) = &self.layout else { return };
        let (mut recorded, mut dropped) = (0, 0);
        let mut at = note.offset;
        for &(address, len) in &note.segments {
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
                    match stamp_of(note, disk) {
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
    layout.views.iter().find(|v| address.wrapping_sub(v.host) < v.table.pages() << PAGE_SHIFT)
}

/// The stamp of a page's worth of the disk from byte `disk`, which is inside the note's range.
#[inline]
fn stamp_of(note: &Note, disk: u64) -> Option<u64> {
    let index = ((disk >> PAGE_SHIFT) - (note.offset >> PAGE_SHIFT)) as usize;
    let first = note.stamps.get(index).copied().filter(|stamp| *stamp != NONE)?;
    if disk % PAGE_SIZE as u64 == 0 {
        return Some(first);
    }
    if disk % SECTOR_SIZE != 0 {
        return None;
    }
    let second = note.stamps.get(index + 1).copied().filter(|stamp| *stamp != NONE)?;
    Some(both(first, second))
}
