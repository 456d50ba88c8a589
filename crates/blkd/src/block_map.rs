//! The page/block map of this disk: its recorders, and what the control socket asks of it.
//!
//! The data path only records ([`DiskMap::recorder`]). All else happens when somebody asks, in a
//! thread of its own with the lowest priority: bringing the content index up to date, verifying
//! every page of the guest, writing an export. One of these at a time.

use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

use semper_block::{Image, Op};
use semper_blockmap::format::Export;
use semper_blockmap::{
    Access, BYTES_PER_BLOCK, BlockMap, Blocks, ContentIndex, Counters, Layout, Memory, Page, Pair,
    Recorder, Refreshed, RegionKey, Reverse, SECTOR_SIZE, SECTORS_PER_BLOCK, Tally, Verifier,
};
use semper_layers::chain::Current;
use semper_ring::GuestMemory;

use crate::answers::{self, Found, MapCounts, MapMemory, Running};
use crate::state::seconds_of_now;

/// Bytes that the content index may take unless the caller allows more or less.
pub(crate) const DEFAULT_INDEX_BYTES: u64 = 128 << 20;
/// Pages between two notes of progress.
const STEP: usize = 256;
/// Blocks that are named unless the caller asks for more or less.
const DEFAULT_BLOCKS: u64 = 4 << 20;

/// What a request does to the disk, as the map sees it.
pub(crate) fn access(op: Op) -> Access {
    match op {
        Op::Flush => Access::None,
        Op::Read => Access::Read,
        Op::Write { .. } => Access::Write,
        Op::Discard | Op::WriteZeroes { .. } => Access::Trim,
    }
}

/// The map, and the work on it.
pub(crate) struct DiskMap {
    /// Of the disk in its present size.
    content: Mutex<Arc<Content>>,
    /// What the next process is to find.
    file: Option<PathBuf>,
    counters: Vec<Arc<Counters>>,
    image: Arc<Image>,
    /// What stands above it.
    current: Arc<Current>,
    /// The present memory table.
    memory: Mutex<Option<Arc<GuestMemory>>>,
    shared: AtomicBool,
    progress: Mutex<Progress>,
}

/// What is made anew when the disk has another size.
struct Content {
    map: Arc<BlockMap>,
    /// Held by whoever verifies or exports.
    index: Mutex<ContentIndex>,
    /// The touched blocks stand in the file.
    kept: bool,
}

/// What may be done with the file of touched blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeping {
    /// Another process may use it: one of this disk is used as well, any other is left alone.
    Shared,
    /// It is this process' own: one of another disk, or of another size of it, is made anew.
    Own,
}

/// A verification, running or the last.
#[derive(Clone, Default)]
struct Progress {
    running: Option<Running>,
    last: Option<Verification>,
    index_blocks: u64,
    index_bytes: u64,
    /// Entries that were good when they were last counted.
    associated: u64,
}

/// What a verification of all pages came to.
#[derive(Clone, Copy)]
struct Verification {
    tally: Tally,
    refreshed: Refreshed,
    seconds: f64,
    /// Seconds since 1970.
    time: f64,
}

/// The disk's blocks, from the image or the layers above it.
struct ImageBlocks<'a>(&'a Image, &'a Current);

impl Blocks for ImageBlocks<'_> {
    fn read(&self, sector: u64, into: &mut [Page]) -> io::Result<()> {
        let (bytes, offset) = (Page::bytes_mut(into), sector * SECTOR_SIZE);
        let Some(chain) = self.1.get() else {
            return self.0.file().read_exact_at(bytes, offset);
        };
        match chain.read_at(bytes, offset)? == bytes.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What tells one disk's touched blocks from another's.
fn identity(image: &Image) -> io::Result<[u8; 32]> {
    let metadata = image.file().metadata()?;
    let device = if metadata.file_type().is_block_device() { metadata.rdev() } else { 0 };
    let mut identity = [0; 32];
    for (into, value) in
        identity.chunks_exact_mut(8).zip([metadata.dev(), metadata.ino(), device, image.capacity()])
    {
        into.copy_from_slice(&value.to_le_bytes());
    }
    Ok(identity)
}

fn random_key() -> io::Result<[u8; 32]> {
    let mut key = [0; 32];
    // SAFETY: the kernel writes at most as many bytes as there are.
    let got = unsafe { libc::getrandom(key.as_mut_ptr().cast(), key.len(), 0) };
    if got == key.len() as isize { Ok(key) } else { Err(io::Error::last_os_error()) }
}

/// Background work shall not be felt.
fn step_back() {
    // SAFETY: no memory is passed. On Linux this is the calling thread's priority alone.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
}

fn attach(map: &BlockMap, memory: &Arc<GuestMemory>) {
    let regions = memory.mapped().map(|(spec, host, file)| {
        let key = RegionKey {
            guest_addr: spec.guest_addr,
            size: spec.size,
            file_offset: spec.file_offset,
            file,
        };
        (key, host.expose_provenance())
    });
    let memory = Memory { regions: regions.collect(), keep: Arc::clone(memory) as _ };
    if let Err(error) = map.attach(memory) {
        log::warn!("pages will not be associated with blocks error=\"{error}\"");
    }
}

impl Content {
    fn new(image: &Image, file: Option<&Path>, keeping: Keeping) -> io::Result<Self> {
        let kept = file.and_then(|path| {
            let make = match keeping {
                Keeping::Shared => BlockMap::with_existing,
                Keeping::Own => BlockMap::with_file,
            };
            let made = identity(image).and_then(|identity| make(image.capacity(), path, identity));
            made.inspect_err(|error| match keeping {
                // Tried again when the image is this process' own.
                Keeping::Shared => log::debug!("no map to share error=\"{error}\""),
                Keeping::Own => log::warn!(
                    "the map will not outlive this process file={} error=\"{error}\"",
                    path.display()
                ),
            })
            .ok()
        });
        let is_kept = kept.is_some();
        let map = Arc::new(kept.map_or_else(|| BlockMap::new(image.capacity()), Ok)?);
        Ok(Self { map, index: Mutex::new(ContentIndex::new(random_key()?)), kept: is_kept })
    }
}

impl DiskMap {
    /// A map for the image; the touched blocks stand in `file`, where one is given and has room.
    ///
    /// # Errors
    /// The kernel's, when it has no address space or no randomness.
    pub(crate) fn new(
        image: &Arc<Image>,
        queues: usize,
        file: Option<&Path>,
        keeping: Keeping,
    ) -> io::Result<Self> {
        Ok(Self {
            content: Mutex::new(Arc::new(Content::new(image, file, keeping)?)),
            file: file.map(Path::to_owned),
            counters: (0..queues).map(|_| Arc::default()).collect(),
            image: Arc::clone(image),
            current: Arc::default(),
            memory: Mutex::default(),
            shared: AtomicBool::new(true),
            progress: Mutex::default(),
        })
    }

    /// The same for an image with layers.
    pub(crate) fn above(self, current: &Arc<Current>) -> Self {
        Self { current: Arc::clone(current), ..self }
    }

    fn content(&self) -> Arc<Content> {
        Arc::clone(&locked(&self.content))
    }

    /// The image was taken: brings the map to its size, and the file into use. No queue runs; what
    /// was touched is kept, associations are not.
    pub(crate) fn follow_image(&self) {
        let old = self.content();
        let waits_for_file = self.file.is_some() && !old.kept;
        if old.map.capacity() == self.image.capacity() && !waits_for_file {
            return;
        }
        let new = match Content::new(&self.image, self.file.as_deref(), Keeping::Own) {
            Ok(new) => Arc::new(new),
            Err(error) => {
                // It stays right for the blocks that it knows of, and knows nothing of the others.
                log::warn!("the page/block map keeps its size error=\"{error}\"");
                return;
            }
        };
        old.map.touched_blocks().for_each(|block| new.map.touch(block, 1));
        new.map.set_shared(self.shared.load(Ordering::Relaxed));
        if let Some(memory) = &*locked(&self.memory) {
            attach(&new.map, memory);
        }
        *locked(&self.content) = new;
    }

    /// Whether several threads record; see [`BlockMap::set_shared`].
    pub(crate) fn set_shared(&self, shared: bool) {
        self.shared.store(shared, Ordering::Relaxed);
        self.content().map.set_shared(shared);
    }

    /// Puts a memory table into force; no queue runs. A map without memory records nothing.
    pub(crate) fn attach(&self, memory: &Arc<GuestMemory>) {
        *locked(&self.memory) = Some(Arc::clone(memory));
        attach(&self.content().map, memory);
    }

    /// The front end is gone.
    pub(crate) fn detach(&self) {
        *locked(&self.memory) = None;
        self.content().map.detach();
    }

    /// For one queue, good for the present memory table.
    pub(crate) fn recorder(&self, queue: u16) -> Option<Recorder> {
        Some(self.content().map.recorder(self.counters.get(usize::from(queue))?))
    }

    /// The two counts that cost nothing to tell.
    pub(crate) fn counts(&self) -> MapCounts {
        let (recorded, dropped) = self.content().map.recorded();
        MapCounts { recorded, dropped }
    }

    /// All that is known, at the cost of a look at every entry.
    pub(crate) fn stats(&self) -> answers::Map {
        let map = &self.content().map;
        let (recorded, dropped) = map.recorded();
        let layout = map.layout();
        let pages = layout.iter().flat_map(|l| l.regions()).map(|(_, n)| n as u64).sum::<u64>();
        let (touched, blocks) = map.touched();
        let (tables, versions, bits) = map.resident();
        let mut progress = locked(&self.progress).clone();
        // Who watches a verification asks often, and a large guest has many entries.
        if progress.running.is_none() {
            let good = layout.iter().flat_map(|l| l.associations(map)).count();
            progress.associated = good as u64;
            locked(&self.progress).associated = good as u64;
        }
        let Progress { running, last, index_blocks, index_bytes, associated } = progress;
        answers::Map {
            page_size: semper_blockmap::PAGE_SIZE,
            pages,
            associated,
            blocks,
            touched,
            recorded,
            dropped,
            index_blocks,
            memory: MapMemory {
                associations: tables,
                versions,
                touched: bits,
                index: index_bytes,
                total: tables + versions + bits + index_bytes,
                bound: map.bound() + DEFAULT_INDEX_BYTES,
            },
            running,
            verification: last.map(verification),
        }
    }

    /// Which sectors a page holds, or which pages hold a sector's block. Hints, by association.
    pub(crate) fn find(&self, address: Option<u64>, sector: Option<u64>) -> Result<Found, String> {
        let map = &self.content().map;
        let layout = map.layout().ok_or("no guest is connected")?;
        let regions = layout.regions();
        let page = semper_blockmap::PAGE_SIZE as u64;
        match (address, sector) {
            (Some(address), None) => {
                let inside = |key: &RegionKey| {
                    address >= key.guest_addr && address - key.guest_addr < key.size
                };
                let region = regions.iter().position(|(key, _)| inside(key)).ok_or_else(|| {
                    format!("no guest memory at address {address}; see the regions of the map")
                })?;
                let index = ((address - regions[region].0.guest_addr) / page) as usize;
                let found = layout.block_in(map, region, index);
                Ok(Found::Page { sector: found.map(|a| a.sector) })
            }
            (None, Some(sector)) => {
                let reverse = Reverse::build(map, &layout);
                let address = |region: usize, index: usize| {
                    regions[region].0.guest_addr + index as u64 * page
                };
                let found = reverse.pages_of(sector).iter();
                let addresses = found.map(|a| address(a.region, a.page)).collect();
                Ok(Found::Sector { addresses })
            }
            _ => Err("give either \"address\" (of a page in the guest) or \"sector\"".to_owned()),
        }
    }

    /// Starts a verification of all pages in a thread; false if one is running.
    pub(crate) fn start_verification(self: &Arc<Self>, index_bytes: u64) -> io::Result<bool> {
        {
            let mut progress = locked(&self.progress);
            if progress.running.is_some() {
                return Ok(false);
            }
            progress.running = Some(Running { step: "index", done: 0, total: 0 });
        }
        let this = Arc::clone(self);
        let work = move || {
            step_back();
            let Content { map, index, .. } = &*this.content();
            let layout = map.layout();
            drop(this.verify(map, layout.as_deref(), &mut locked(index), index_bytes));
        };
        let spawned = std::thread::Builder::new().name("map".into()).spawn(work);
        if spawned.is_err() {
            locked(&self.progress).running = None;
        }
        spawned.map(|_| true)
    }

    /// The map as bytes; verified, or as hints with whatever was indexed before.
    ///
    /// # Errors
    /// A sentence: somebody else works on the map.
    pub(crate) fn export(&self, verified: bool, index_bytes: u64) -> Result<Vec<u8>, String> {
        let Content { map, index, .. } = &*self.content();
        let mut index = match index.try_lock() {
            Ok(index) => index,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err("a verification or an export is running; try again later".to_owned());
            }
        };
        let layout = map.layout();
        let regions = layout.iter().flat_map(|l| l.regions()).map(|(key, _)| key).collect();
        let capacity = map.capacity();
        let export = if verified {
            step_back();
            let pairs = self.verify(map, layout.as_deref(), &mut index, index_bytes);
            Export::of_pairs(capacity, regions, &pairs, &index)
        } else {
            let hints: Vec<_> = layout.iter().flat_map(|l| l.associations(map)).collect();
            Export::of_hints(capacity, regions, &hints, &index)
        };
        Ok(export.to_bytes())
    }

    /// Touched blocks and the stamps of their contents, 16 bytes each: first those that stand in a
    /// page, whose number is told, then the others; nothing is read. A block that is being written
    /// is left out: it has no content.
    pub(crate) fn blocks(&self, limit: Option<u64>) -> (Vec<u8>, usize) {
        let limit = usize::try_from(limit.unwrap_or(DEFAULT_BLOCKS)).unwrap_or(usize::MAX);
        let map = &self.content().map;
        let layout = map.layout();
        let pages = layout.iter().flat_map(|l| l.associations(map));
        let whole = pages.filter(|page| page.sector % SECTORS_PER_BLOCK == 0);
        let mut held: Vec<u64> = whole.map(|page| page.sector / SECTORS_PER_BLOCK).collect();
        held.sort_unstable();
        held.dedup();
        let others = map.touched_blocks().filter(|block| held.binary_search(block).is_err());
        let stamped = |block: u64| Some((block, map.stamp(block * SECTORS_PER_BLOCK)?));
        let first: Vec<_> = held.iter().copied().filter_map(stamped).take(limit).collect();
        let rest = others.filter_map(stamped).take(limit - first.len());
        let count = first.len();
        let all = first.into_iter().chain(rest);
        let bytes = all.flat_map(|(block, stamp)| [block, stamp]).flat_map(u64::to_le_bytes);
        (bytes.collect(), count)
    }

    /// Marks blocks as touched that were so on another host: first block and number, of each run.
    pub(crate) fn touch(&self, runs: &[(u64, u64)]) {
        let map = &self.content().map;
        runs.iter().for_each(|&(first, count)| map.touch(first, count));
    }

    fn verify(
        &self,
        map: &BlockMap,
        layout: Option<&Layout>,
        index: &mut ContentIndex,
        index_bytes: u64,
    ) -> Vec<Pair> {
        let began = Instant::now();
        let blocks = ImageBlocks(&self.image, &self.current);
        let note = |step, done, total| {
            locked(&self.progress).running = Some(Running { step, done, total });
        };
        let (touched, _) = map.touched();
        let limit = usize::try_from(index_bytes / BYTES_PER_BLOCK).unwrap_or(usize::MAX);
        let refreshed = index.refresh(map, &blocks, limit, &mut |done| {
            note("index", done, touched);
            ControlFlow::Continue(())
        });
        let (tally, pairs) = layout.map_or_else(Default::default, |layout| {
            self.verify_pages(map, layout, index, &blocks, note)
        });
        let time = seconds_of_now();
        let seconds = began.elapsed().as_secs_f64();
        let mut progress = locked(&self.progress);
        progress.running = None;
        progress.last = Some(Verification { tally, refreshed, seconds, time });
        progress.index_blocks = index.len() as u64;
        progress.index_bytes = index.resident();
        drop(progress);
        pairs
    }

    fn verify_pages(
        &self,
        map: &BlockMap,
        layout: &Layout,
        index: &ContentIndex,
        blocks: &ImageBlocks<'_>,
        note: impl Fn(&'static str, u64, u64),
    ) -> (Tally, Vec<Pair>) {
        let (mut tally, mut pairs) = (Tally::default(), Vec::new());
        let memory = layout.pages();
        let mut verifier = Verifier::new((map, layout), index, blocks, &memory);
        let regions = layout.regions();
        let total = regions.iter().map(|(_, pages)| *pages as u64).sum();
        let mut done = 0;
        for (region, &(_, pages)) in regions.iter().enumerate() {
            for page in 0..pages {
                if page % STEP == 0 {
                    note("pages", done + page as u64, total);
                }
                let Some(outcome) = verifier.page(region, page) else { continue };
                tally.add(&outcome);
                pairs.extend(outcome.pair);
            }
            done += pages as u64;
        }
        (tally, pairs)
    }
}

fn verification(v: Verification) -> answers::Verification {
    let Verification { tally, refreshed, seconds, time } = v;
    answers::Verification {
        time,
        seconds,
        pages: tally.pages,
        zero: tally.zero,
        associated: tally.associated,
        verified_associated: tally.verified_associated,
        verified_content: tally.verified_content,
        verified_zero: tally.verified_zero,
        indexed: refreshed.blocks,
        hashed: refreshed.hashed,
        busy: refreshed.busy,
        beyond_limit: refreshed.beyond_limit,
        unreadable: refreshed.unreadable,
    }
}

#[cfg(test)]
mod tests {
    use semper_block::OpenOptions;
    use semper_control::{Answer, golden};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_verification_under_way_is_told() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let image = Arc::new(Image::open(image.path(), OpenOptions::default()).unwrap());
        let map = DiskMap::new(&image, 1, None, Keeping::Own).unwrap();
        locked(&map.progress).running = Some(Running { step: "pages", done: 256, total: 1024 });
        golden::check("blkd-map-verifying", &Answer::ok(&json!(1), map.stats()).line);
    }
}
