//! The content index: keyed BLAKE3 of touched blocks, to find a page's block by what it contains.
//!
//! Built when somebody asks, and then brought up to date: only blocks that were touched or written
//! since are read again. [`BYTES_PER_BLOCK`] for each block in it, and no more blocks than the caller allows.

use std::ops::ControlFlow;

use crate::aligned::Page;
use crate::map::BlockMap;
use crate::pages::Blocks;
use crate::{PAGE_SIZE, SECTORS_PER_BLOCK};

/// The first half of a keyed BLAKE3 hash.
pub type Hash = [u8; 16];

/// Blocks read at once.
const RUN: usize = 64;
/// Blocks with equal content that are tried for one page.
const EQUALS: usize = 8;

/// The hash of a page or block.
pub fn hash_page(key: &[u8; 32], page: &Page) -> Hash {
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::keyed_hash(key, &page.0).as_bytes()[..16]);
    hash
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub hash: Hash,
    pub block: u64,
    pub stamp: u64,
}

/// What bringing the index up to date came to, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refreshed {
    /// In the index now.
    pub blocks: u64,
    /// Read and hashed for it.
    pub hashed: u64,
    /// Left out because they were being written.
    pub busy: u64,
    /// Left out because the index is as large as allowed.
    pub beyond_limit: u64,
    /// Left out because they could not be read.
    pub unreadable: u64,
}

/// Bytes of memory that the index takes for each block.
pub const BYTES_PER_BLOCK: u64 = size_of::<Record>() as u64 + 4;

/// Blocks by content.
#[derive(Clone)]
pub struct ContentIndex {
    key: [u8; 32],
    /// By block.
    records: Vec<Record>,
    /// Indices of `records`, by hash.
    order: Vec<u32>,
}

impl std::fmt::Debug for ContentIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key is for those who ask for an export.
        f.debug_struct("ContentIndex").field("blocks", &self.records.len()).finish_non_exhaustive()
    }
}

impl ContentIndex {
    /// An empty index under `key`, which nobody who chooses contents should know.
    pub fn new(key: [u8; 32]) -> Self {
        Self { key, records: Vec::new(), order: Vec::new() }
    }

    /// The key.
    pub fn key(&self) -> &[u8; 32] {
        &self.key
    }

    /// Blocks in it.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether it knows no block.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Bytes of memory that it takes.
    pub fn resident(&self) -> u64 {
        (self.records.capacity() * size_of::<Record>() + self.order.capacity() * 4) as u64
    }

    pub(crate) fn records(&self) -> &[Record] {
        &self.records
    }

    /// The hash of a block, if it is known and the block was not written since.
    pub fn hash_of(&self, map: &BlockMap, block: u64) -> Option<Hash> {
        let at = self.records.binary_search_by_key(&block, |r| r.block).ok()?;
        let record = self.records[at];
        (map.stamp(block * SECTORS_PER_BLOCK) == Some(record.stamp)).then_some(record.hash)
    }

    /// Blocks that had this content when they were last looked at: (first sector, stamp).
    pub fn find(&self, hash: &Hash) -> impl Iterator<Item = (u64, u64)> + '_ {
        let record = |index: &u32| &self.records[*index as usize];
        let start = self.order.partition_point(|index| record(index).hash < *hash);
        let hash = *hash;
        self.order[start..]
            .iter()
            .map(record)
            .take_while(move |r| r.hash == hash)
            .take(EQUALS)
            .map(|r| (r.block * SECTORS_PER_BLOCK, r.stamp))
    }

    /// Brings the index up to date with the map. `progress` is told the blocks that are done and
    /// may end it; what is known by then is kept.
    pub fn refresh(
        &mut self,
        map: &BlockMap,
        blocks: &impl Blocks,
        limit: usize,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Refreshed {
        let mut work = Refresh {
            key: &self.key,
            map,
            blocks,
            buffer: vec![Page::default(); RUN],
            records: Vec::new(),
            run: Vec::new(),
            result: Refreshed::default(),
        };
        let limit = limit.min(u32::MAX as usize);
        let whole = map.capacity() / PAGE_SIZE as u64;
        let mut old = self.records.iter().copied().peekable();
        let mut done = 0;
        for block in map.touched.iter(0, whole.saturating_sub(1)).filter(|block| *block < whole) {
            if work.records.len() + work.run.len() >= limit {
                work.result.beyond_limit += 1;
                continue;
            }
            while old.next_if(|r| r.block < block).is_some() {}
            let known = old.next_if(|r| r.block == block);
            match known.filter(|r| map.stamp(block * SECTORS_PER_BLOCK) == Some(r.stamp)) {
                Some(record) => {
                    work.finish_run();
                    work.records.push(record);
                }
                None => work.add(block),
            }
            done += 1;
            if done % RUN as u64 == 0 && progress(done).is_break() {
                break;
            }
        }
        work.finish_run();
        let Refresh { mut records, mut result, .. } = work;
        records.shrink_to_fit();
        result.blocks = records.len() as u64;
        self.order = (0..records.len() as u32).collect();
        self.order.sort_unstable_by_key(|index| records[*index as usize].hash);
        self.records = records;
        result
    }
}

struct Refresh<'a, B> {
    key: &'a [u8; 32],
    map: &'a BlockMap,
    blocks: &'a B,
    buffer: Vec<Page>,
    records: Vec<Record>,
    /// Adjacent blocks to be read, and their stamps.
    run: Vec<(u64, u64)>,
    result: Refreshed,
}

impl<B: Blocks> Refresh<'_, B> {
    fn add(&mut self, block: u64) {
        let adjacent = self.run.last().is_some_and(|(last, _)| last + 1 == block);
        if !adjacent || self.run.len() == RUN {
            self.finish_run();
        }
        match self.map.stamp(block * SECTORS_PER_BLOCK) {
            Some(stamp) => self.run.push((block, stamp)),
            None => self.result.busy += 1,
        }
    }

    fn finish_run(&mut self) {
        let run = std::mem::take(&mut self.run);
        let Some(&(first, _)) = run.first() else { return };
        let buffer = &mut self.buffer[..run.len()];
        if self.blocks.read(first * SECTORS_PER_BLOCK, buffer).is_err() {
            // One bad block shall not take its neighbours with it.
            if let [_] = run[..] {
                self.result.unreadable += 1;
            } else {
                for one in &run {
                    self.run.push(*one);
                    self.finish_run();
                }
            }
            return;
        }
        for ((block, stamp), content) in run.iter().copied().zip(&self.buffer) {
            // Written while it was read: what was read is perhaps half of it.
            if self.map.stamp(block * SECTORS_PER_BLOCK) != Some(stamp) {
                self.result.busy += 1;
                continue;
            }
            self.result.hashed += 1;
            self.records.push(Record { hash: hash_page(self.key, content), block, stamp });
        }
        self.run = run;
        self.run.clear();
    }
}
