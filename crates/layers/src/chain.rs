//! A chain at work: which file has a block, and what a flush has to write.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use semper_block::Target;

use crate::BLOCK;
use crate::bits::{Bits, CHUNK_BYTES, Chunk, Have, chunk_at, unite};
use crate::files::{Bytes, Key};
use crate::mistake::{Mistake, made};

/// Where the content of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the image.
    Base,
    /// In the file of this layer, counted from the lowest.
    Layer(usize),
    /// Nowhere: it is zeros.
    Zeros,
}

/// One layer, open.
pub struct Level {
    /// What its files are called by.
    pub key: Key,
    /// Its blocks.
    pub data: Arc<dyn Bytes>,
    /// Its map on the medium.
    pub map: Arc<dyn Bytes>,
    /// Its map in memory.
    pub bits: Arc<Bits>,
    /// How engines reach the blocks, and the map.
    pub(crate) targets: (Target, Target),
    /// One writes the map at a time: what one has written another may not take back.
    writing: Mutex<()>,
    /// A process that died may have written the map and not flushed it.
    stale: AtomicBool,
}

impl std::fmt::Debug for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Level").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Level {
    /// `stale`: the map may have been written and not flushed.
    pub fn new(
        key: Key,
        (data, map): (Arc<dyn Bytes>, Arc<dyn Bytes>),
        bits: Arc<Bits>,
        stale: bool,
    ) -> Self {
        let targets = (data.target(), map.target());
        let (writing, stale) = (Mutex::new(()), AtomicBool::new(stale));
        Self { key, data, map, bits, targets, writing, stale }
    }

    /// Notes what there is of blocks, in memory. True if it has to come to the medium.
    ///
    /// # Errors
    /// There is no memory for it.
    pub(crate) fn note(&self, first: u64, count: u64, have: Have) -> io::Result<bool> {
        let new = self.bits.set(first, count, have)?;
        if new && made(Mistake::OneMap) {
            self.write(&mut self.look())?;
        }
        Ok(new)
    }

    /// Whether a flush has to write the map.
    pub fn needs_map(&self) -> bool {
        self.stale.load(Ordering::SeqCst) || self.bits.any_dirty()
    }

    /// Whether a flush has to write the map before it is known to have these blocks.
    pub(crate) fn needs_map_of(&self, first: u64, last: u64) -> bool {
        self.stale.load(Ordering::SeqCst) || self.bits.is_dirty(first, last)
    }

    /// What a flush that begins now has to write of the map, after the data was flushed.
    pub fn look(&self) -> Look {
        let bits = &self.bits;
        let chunks = bits.dirty().into_iter().map(|chunk| (chunk, bits.copy(chunk))).collect();
        Look { chunks, stale: self.stale.load(Ordering::SeqCst) }
    }

    /// The data that `look` was taken before is on the medium: writes the map.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, look: &mut Look) -> io::Result<()> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        for (chunk, bits) in &mut look.chunks {
            if made(Mistake::LookAfterData) {
                *bits = self.bits.copy(*chunk);
            }
            let mut known: Chunk = [0; CHUNK_BYTES];
            self.map.read_at(&mut known, chunk_at(*chunk))?;
            unite(bits, &known);
            if *bits != known {
                self.map.write_at(&bits[..], chunk_at(*chunk))?;
            }
        }
        Ok(())
    }

    /// The map was flushed after [`Level::write`].
    pub fn flushed(&self, look: &Look) {
        look.chunks.iter().for_each(|(chunk, bits)| self.bits.cleaned(*chunk, bits));
        if look.stale {
            self.stale.store(false, Ordering::SeqCst);
        }
    }

    /// All of it: data, then map.
    ///
    /// # Errors
    /// The system's; what was not written is written at the next flush.
    pub fn sync(&self) -> io::Result<()> {
        let mut look = self.look();
        if made(Mistake::MapFirst) {
            self.write(&mut look)?;
            self.map.sync()?;
        }
        self.data.sync()?;
        if look.is_empty() {
            return Ok(());
        }
        self.write(&mut look)?;
        self.map.sync()?;
        self.flushed(&look);
        Ok(())
    }
}

/// Bits that are written once the data is on the medium that they stand for.
#[derive(Debug)]
pub struct Look {
    chunks: Vec<(usize, Chunk)>,
    stale: bool,
}

impl Look {
    /// Whether the map need not be flushed.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty() && !self.stale
    }
}

/// An image and the layers above it, the lowest first; at least one.
pub struct Chain {
    /// The image.
    pub base: Arc<dyn Bytes>,
    /// The layers.
    pub levels: Vec<Arc<Level>>,
    /// Bytes of the disk.
    pub size: u64,
    /// What lies below the highest layer is on the medium.
    pub(crate) settled: Arc<AtomicBool>,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain").field("levels", &self.levels).finish_non_exhaustive()
    }
}

impl Chain {
    /// An image that is all of the disk.
    pub fn of_image(base: Arc<dyn Bytes>, size: u64) -> Self {
        Self { base, levels: Vec::new(), size, settled: Arc::new(AtomicBool::new(true)) }
    }

    /// The layer that takes writes; none in a snapshot of the image alone.
    pub fn top(&self) -> Option<&Arc<Level>> {
        self.levels.last()
    }

    /// What counts of a block in the lowest `levels` layers.
    #[inline]
    fn source_in(&self, levels: usize, block: u64) -> Source {
        for (n, level) in self.levels[..levels].iter().enumerate().rev() {
            match level.bits.get(block) {
                Have::Absent => {}
                Have::Zeros => return Source::Zeros,
                Have::Data => return Source::Layer(n),
            }
        }
        Source::Base
    }

    /// What counts of a block.
    #[inline]
    pub fn source(&self, block: u64) -> Source {
        self.source_in(self.levels.len(), block)
    }

    /// What counts of a block that the highest layer does not have as data.
    pub(crate) fn source_below(&self, block: u64) -> Source {
        match self.top().map(|top| top.bits.get(block)) {
            Some(Have::Zeros) => Source::Zeros,
            _ => self.source_in(self.levels.len() - 1, block),
        }
    }

    /// What counts of a block, and how many of those that follow up to `last` are in the same place.
    #[inline]
    pub fn run(&self, first: u64, last: u64) -> (Source, u64) {
        let source = self.source(first);
        let mut next = first + 1;
        while next <= last && self.source(next) == source {
            next += 1;
        }
        (source, next - first)
    }

    /// The file of a source.
    pub fn file(&self, source: Source) -> Option<&Arc<dyn Bytes>> {
        match source {
            Source::Base => Some(&self.base),
            Source::Layer(n) => self.levels.get(n).map(|level| &level.data),
            Source::Zeros => None,
        }
    }

    /// Reads from the chain; less than asked for only at the end of the disk. What the image does not
    /// have of its last block reads as zeros.
    ///
    /// # Errors
    /// The system's.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let end = self.size.min(offset.saturating_add(into.len() as u64));
        let mut at = offset;
        while at < end {
            let (source, count) = self.run(at / BLOCK, (end - 1) / BLOCK);
            let stop = ((at / BLOCK + count) * BLOCK).min(end);
            let part = &mut into[(at - offset) as usize..(stop - offset) as usize];
            match self.file(source) {
                None => part.fill(0),
                Some(file) => {
                    let read = file.read_at(part, at)?;
                    part[read..].fill(0);
                }
            }
            at = stop;
        }
        Ok(end.saturating_sub(offset) as usize)
    }

    /// Whether a flush of the highest layer is a flush of the disk.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::SeqCst) || made(Mistake::TopOnly)
    }

    /// Everything that was completed is on the medium at the return.
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&self) -> io::Result<()> {
        let settled = self.is_settled();
        if !settled {
            self.base.sync()?;
        }
        let from = if settled { self.levels.len().saturating_sub(1) } else { 0 };
        self.levels[from..].iter().try_for_each(|level| level.sync())
    }
}

/// The chain that engines serve at this instant, or none: then the image is all there is.
#[derive(Debug, Default)]
pub struct Current {
    version: AtomicU64,
    chain: Mutex<Option<Arc<Chain>>>,
}

impl Current {
    /// Changes whenever the chain does.
    #[inline]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The chain.
    pub fn get(&self) -> Option<Arc<Chain>> {
        self.chain.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has engines serve another chain. If the highest layer is another one, no request may be in
    /// flight.
    pub fn set(&self, chain: Option<Arc<Chain>>) {
        *self.chain.lock().unwrap_or_else(PoisonError::into_inner) = chain;
        self.version.fetch_add(1, Ordering::Release);
    }
}
