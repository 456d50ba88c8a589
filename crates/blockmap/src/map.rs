//! The map of one disk: its blocks' versions, and a table for each region of guest memory.

use std::any::Any;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::counters::Counters;
use crate::pages::HostPages;
use crate::table::{PageTable, kept};
use crate::touched::Touched;
use crate::versions::Versions;
use crate::{PAGE_SHIFT, PAGE_SIZE, SECTOR_SIZE, SECTORS_PER_BLOCK};

/// What makes a region of guest memory the same region in the next memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionKey {
    /// Guest-physical address of its first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Where in its file it begins.
    pub file_offset: u64,
    /// The file: device and inode.
    pub file: (u64, u64),
}

/// A memory table, mapped.
pub struct Memory {
    /// Each region, and the address of its first byte in this process.
    pub regions: Vec<(RegionKey, usize)>,
    /// Keeps the regions mapped.
    pub keep: Arc<dyn Any + Send + Sync>,
}

/// A region of the present memory table, and what is known of its pages.
#[derive(Debug)]
pub(crate) struct View {
    pub key: RegionKey,
    pub host: usize,
    /// Bytes, whole pages.
    pub len: usize,
    pub table: Arc<PageTable>,
}

/// A memory table in force, mapped for as long as this lives.
pub struct Layout {
    pub(crate) views: Vec<View>,
    keep: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.views).finish()
    }
}

impl Layout {
    /// The guest's memory.
    pub fn pages(&self) -> HostPages {
        let regions = self.views.iter().map(|v| (v.host, v.table.pages())).collect();
        HostPages::new(regions, Arc::clone(&self.keep))
    }

    /// The regions, with their pages.
    pub fn regions(&self) -> Vec<(RegionKey, usize)> {
        self.views.iter().map(|v| (v.key, v.table.pages())).collect()
    }

    /// Which sectors stand in this page, if they were not written since.
    pub fn block_in(&self, map: &BlockMap, region: usize, page: usize) -> Option<Association> {
        let stored = self.views.get(region)?.table.load(page)?;
        let live = map.stamp(stored.sector) == Some(stored.stamp);
        live.then_some(Association { region, page, sector: stored.sector, stamp: stored.stamp })
    }

    /// Every association that is still good, in order of region and page.
    pub fn associations<'a>(&'a self, map: &'a BlockMap) -> impl Iterator<Item = Association> + 'a {
        self.views.iter().enumerate().flat_map(move |(region, view)| {
            (0..view.table.pages()).filter_map(move |page| self.block_in(map, region, page))
        })
    }
}

/// A page, and the sectors that it was last filled from or written to. A hint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Association {
    /// Index of the region in the memory table.
    pub region: usize,
    /// Index of the page in the region.
    pub page: usize,
    /// First of the eight sectors.
    pub sector: u64,
    /// What identifies the sectors' content at that time.
    pub stamp: u64,
}

#[derive(Debug, Default)]
struct Tables {
    known: Vec<(RegionKey, Arc<PageTable>)>,
    layout: Option<Arc<Layout>>,
    counters: Vec<Arc<Counters>>,
}

/// The map of one disk.
#[derive(Debug)]
pub struct BlockMap {
    capacity: u64,
    pub(crate) versions: Versions,
    pub(crate) touched: Touched,
    tables: Mutex<Tables>,
}

impl BlockMap {
    /// For a disk of `capacity` bytes.
    ///
    /// # Errors
    /// The kernel's, when it has no address space left.
    pub fn new(capacity: u64) -> io::Result<Self> {
        Self::with(capacity, Touched::new(blocks(capacity))?)
    }

    /// The same, with the touched blocks in a file that outlives this process. `identity` says
    /// which disk the file belongs to; that of another disk is replaced.
    ///
    /// # Errors
    /// The system's; a file system without room for the whole file is told at once.
    pub fn with_file(capacity: u64, path: &Path, identity: [u8; 32]) -> io::Result<Self> {
        Self::with(capacity, Touched::of_file(path, identity, blocks(capacity))?)
    }

    /// The same for a process that waits, while another may use the file: that of another disk is
    /// left alone.
    ///
    /// # Errors
    /// The system's, and that there is no file of this disk.
    pub fn with_existing(capacity: u64, path: &Path, identity: [u8; 32]) -> io::Result<Self> {
        Self::with(capacity, Touched::of_existing(path, identity, blocks(capacity))?)
    }

    fn with(capacity: u64, touched: Touched) -> io::Result<Self> {
        let versions = Versions::new(blocks(capacity))?;
        Ok(Self { capacity, versions, touched, tables: Mutex::default() })
    }

    /// Bytes of the disk.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether recorders are used in several threads; at first they may be. Whoever says so of
    /// a map that one thread has recorded alone must make sure that this thread has seen it (by
    /// taking an order from a mailbox, say) before a second one records.
    pub fn set_shared(&self, shared: bool) {
        self.versions.set_shared(shared);
    }

    /// Puts a memory table into force. Regions that were in the last one keep what is known of
    /// them; the others are forgotten. Recorders of the last table must not be used any more for
    /// regions that have gone.
    ///
    /// # Errors
    /// The kernel's, when it has no address space left; the map is then without memory.
    pub fn attach(&self, memory: Memory) -> io::Result<()> {
        let mut tables = self.tables();
        tables.layout = None;
        let known = std::mem::take(&mut tables.known);
        let mut views = Vec::new();
        for (key, host) in memory.regions {
            // Pages of the guest must be pages here; QEMU's always are.
            let bits = key.guest_addr | key.size | host as u64;
            if bits % PAGE_SIZE as u64 != 0 {
                continue;
            }
            let old = known.iter().find(|(old, _)| *old == key).map(|(_, t)| Arc::clone(t));
            let table = match old {
                Some(table) => table,
                None => Arc::new(PageTable::new((key.size >> PAGE_SHIFT) as usize)?),
            };
            views.push(View { key, host, len: table.pages() << PAGE_SHIFT, table });
        }
        tables.known = views.iter().map(|v| (v.key, Arc::clone(&v.table))).collect();
        tables.layout = Some(Arc::new(Layout { views, keep: memory.keep }));
        Ok(())
    }

    /// The front end is gone: its memory is let go. What is known of it stays until the next
    /// memory table.
    pub fn detach(&self) {
        self.tables().layout = None;
    }

    /// The present memory table, if a front end is connected.
    pub fn layout(&self) -> Option<Arc<Layout>> {
        self.tables().layout.clone()
    }

    /// Has these counters summed up with the others; gives the present memory table.
    pub(crate) fn enlist(&self, counters: &Arc<Counters>) -> Option<Arc<Layout>> {
        let mut tables = self.tables();
        if !tables.counters.iter().any(|known| Arc::ptr_eq(known, counters)) {
            tables.counters.push(Arc::clone(counters));
        }
        tables.layout.clone()
    }

    /// What identifies the present content of the eight sectors from `sector`; none while
    /// something writes them, or when they are not all on the disk.
    pub fn stamp(&self, sector: u64) -> Option<u64> {
        let on_disk = sector.checked_add(SECTORS_PER_BLOCK)? <= self.capacity / SECTOR_SIZE;
        if on_disk { self.versions.stamp(sector).map(kept) } else { None }
    }

    /// Blocks that were ever read or written, and those of the disk.
    pub fn touched(&self) -> (u64, u64) {
        (self.touched.count(), self.touched.blocks())
    }

    /// Whole blocks that were ever read or written, in order.
    pub fn touched_blocks(&self) -> impl Iterator<Item = u64> + '_ {
        let whole = self.capacity / crate::PAGE_SIZE as u64;
        self.touched.iter(0, whole.saturating_sub(1)).filter(move |block| *block < whole)
    }

    /// Marks blocks as touched that were so elsewhere; what is beyond the disk is left out.
    pub fn touch(&self, first: u64, count: u64) {
        let end = first.saturating_add(count).min(self.touched.blocks());
        (first..end).for_each(|block| self.touched.set(block));
    }

    /// Sums of all recorders' counters: pages associated, pages whose association was dropped.
    pub fn recorded(&self) -> (u64, u64) {
        self.tables().counters.iter().map(|c| c.get()).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
    }

    /// Bytes of memory that [`Self::resident`] can come to with the present memory table.
    pub fn bound(&self) -> u64 {
        let pages: u64 = self.tables().known.iter().map(|(_, t)| t.pages() as u64).sum();
        let blocks = self.touched.blocks();
        pages * 16 + Versions::bound(blocks) + blocks.div_ceil(8)
    }

    /// Bytes of memory in use: page tables, versions, touched blocks.
    pub fn resident(&self) -> (u64, u64, u64) {
        let known: Vec<_> = self.tables().known.iter().map(|(_, t)| Arc::clone(t)).collect();
        let tables = known.iter().map(|table| table.resident()).sum();
        (tables, self.versions.resident(), self.touched.resident())
    }
}

fn blocks(capacity: u64) -> u64 {
    capacity.div_ceil(PAGE_SIZE as u64)
}
