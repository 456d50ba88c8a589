//! Which block of a disk has a page's content: asked for every page at the source.

use std::collections::HashMap;

use twox_hash::XxHash3_64;

use crate::Page;

/// A block of one of the disks that the source has offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRef {
    /// Its place in the list of disks.
    pub disk: u16,
    /// Index of the block, in pages.
    pub block: u64,
}

/// Finds blocks by content. An answer is a guess: the destination verifies it, and a wrong one
/// costs a round trip.
pub trait PageIndex {
    /// A block that should have this content.
    fn find(&mut self, page: &Page) -> Option<BlockRef>;
    /// The block has another content than this by now.
    fn forget(&mut self, block: BlockRef, page: &Page);
}

/// Knows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoIndex;

impl PageIndex for NoIndex {
    fn find(&mut self, _: &Page) -> Option<BlockRef> {
        None
    }

    fn forget(&mut self, _: BlockRef, _: &Page) {}
}

const EMPTY: u64 = 0;
const GONE: u64 = u64::MAX;
const DISK_SHIFT: u32 = 48;

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    fingerprint: u64,
    /// Disk and block plus one; [`EMPTY`] or [`GONE`] where there is none.
    place: u64,
}

/// What a page's content is found by: 64-bit XXH3 with a seed that the guest does not know. A guest
/// that found two pages with one fingerprint would only slow its own migration down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(u64);

/// Makes fingerprints, in any thread.
#[derive(Clone, Copy, Debug)]
pub struct Fingerprinter {
    seed: u64,
}

impl Fingerprinter {
    /// With a seed that the guest does not know.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Of a page; none of one of zeros, which QEMU finds itself.
    pub fn of(&self, page: &Page) -> Option<Fingerprint> {
        if page[..16] == [0; 16] && page.iter().all(|&byte| byte == 0) {
            return None;
        }
        Some(self.of_any(page))
    }

    fn of_any(&self, page: &Page) -> Fingerprint {
        Fingerprint(XxHash3_64::oneshot_with_seed(self.seed, page))
    }
}

/// A table of fingerprints.
#[derive(Clone, Debug)]
pub struct ContentIndex {
    fingerprints: Fingerprinter,
    slots: Vec<Slot>,
    len: usize,
    limit: usize,
}

/// Bytes of memory that a block in the index takes at most.
const BYTES_PER_BLOCK: usize = 4 * size_of::<Slot>();

impl ContentIndex {
    /// An empty index of at most so many bytes.
    pub fn new(seed: u64, limit_bytes: usize) -> Self {
        let limit = (limit_bytes / BYTES_PER_BLOCK).max(1);
        let fingerprints = Fingerprinter::new(seed);
        Self { fingerprints, slots: vec![Slot::default(); 1024], len: 0, limit }
    }

    /// What its fingerprints are made by.
    pub fn fingerprints(&self) -> Fingerprinter {
        self.fingerprints
    }

    /// Most blocks that it takes.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Makes room for so many more, so that it need not be made later.
    pub fn reserve(&mut self, blocks: usize) {
        let wanted = (self.len + blocks).min(self.limit);
        while wanted * 2 > self.slots.len() {
            self.grow();
        }
    }

    /// Blocks in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a block; of several with the same content the first stays. Not added are pages of
    /// zeros, and whatever goes beyond the limit: then false.
    pub fn insert(&mut self, block: BlockRef, content: &Page) -> bool {
        match self.fingerprints.of(content) {
            Some(fingerprint) => self.add(block, fingerprint),
            None => true,
        }
    }

    /// The same with a fingerprint.
    pub fn add(&mut self, block: BlockRef, Fingerprint(fingerprint): Fingerprint) -> bool {
        if self.len >= self.limit || block.block >= (1 << DISK_SHIFT) - 2 {
            return false;
        }
        if self.len * 2 >= self.slots.len() {
            self.grow();
        }
        let place = (u64::from(block.disk) << DISK_SHIFT) + block.block + 1;
        self.len += usize::from(put(&mut self.slots, Slot { fingerprint, place }));
        true
    }

    /// The block has another content than this by now.
    pub fn remove(&mut self, block: BlockRef, Fingerprint(fingerprint): Fingerprint) {
        let place = (u64::from(block.disk) << DISK_SHIFT) + block.block + 1;
        let mut at = start(&self.slots, fingerprint);
        while self.slots[at].place != EMPTY {
            if self.slots[at].place == place {
                self.slots[at].place = GONE;
                return;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    fn grow(&mut self) {
        let old = std::mem::take(&mut self.slots);
        self.slots = vec![Slot::default(); old.len() * 2];
        self.len = 0;
        for slot in old.into_iter().filter(|slot| slot.place != EMPTY && slot.place != GONE) {
            self.len += usize::from(put(&mut self.slots, slot));
        }
    }
}

fn start(slots: &[Slot], fingerprint: u64) -> usize {
    fingerprint as usize & (slots.len() - 1)
}

/// False if one with this fingerprint is there.
fn put(slots: &mut [Slot], slot: Slot) -> bool {
    let mut at = start(slots, slot.fingerprint);
    loop {
        match slots[at].place {
            EMPTY => {
                slots[at] = slot;
                return true;
            }
            place if place != GONE && slots[at].fingerprint == slot.fingerprint => return false,
            _ => at = (at + 1) & (slots.len() - 1),
        }
    }
}

impl PageIndex for ContentIndex {
    fn find(&mut self, page: &Page) -> Option<BlockRef> {
        if self.len == 0 {
            return None;
        }
        let Fingerprint(fingerprint) = self.fingerprints.of_any(page);
        let mut at = start(&self.slots, fingerprint);
        loop {
            let slot = &self.slots[at];
            match slot.place {
                EMPTY => return None,
                place if place != GONE && slot.fingerprint == fingerprint => {
                    let disk = ((place - 1) >> DISK_SHIFT) as u16;
                    return Some(BlockRef { disk, block: (place - 1) & ((1 << DISK_SHIFT) - 1) });
                }
                _ => at = (at + 1) & (self.slots.len() - 1),
            }
        }
    }

    fn forget(&mut self, block: BlockRef, page: &Page) {
        self.remove(block, self.fingerprints.of_any(page));
    }
}

/// For tests: every page's block by its whole content.
impl PageIndex for HashMap<Vec<u8>, BlockRef> {
    fn find(&mut self, page: &Page) -> Option<BlockRef> {
        self.get(&page[..]).copied()
    }

    fn forget(&mut self, block: BlockRef, _: &Page) {
        self.retain(|_, known| *known != block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u32) -> Page {
        let mut page = [0; crate::PAGE_SIZE];
        page[100..104].copy_from_slice(&number.to_le_bytes());
        page
    }

    #[test]
    fn finds_what_was_added_until_it_is_forgotten() {
        let mut index = ContentIndex::new(7, 1 << 20);
        for number in 1..5000 {
            assert!(index.insert(BlockRef { disk: 3, block: number.into() }, &page(number)));
        }
        assert_eq!(index.len(), 4999);
        let expected = Some(BlockRef { disk: 3, block: 77 });
        assert_eq!(index.find(&page(77)), expected);
        assert!(index.insert(BlockRef { disk: 4, block: 1 }, &page(77)));
        assert_eq!(index.find(&page(77)), expected);
        index.forget(BlockRef { disk: 3, block: 77 }, &page(77));
        assert_eq!(index.find(&page(77)), None);
        assert_eq!(index.find(&page(78)), Some(BlockRef { disk: 3, block: 78 }));
        assert_eq!(index.find(&page(5001)), None);
        assert!(index.insert(BlockRef { disk: 0, block: 0 }, &page(0)));
        assert_eq!(index.find(&page(0)), None);
    }

    #[test]
    fn a_block_with_a_new_content_is_found_by_that_alone() {
        let mut index = ContentIndex::new(7, 1 << 20);
        let block = BlockRef { disk: 0, block: 12 };
        let of = |number| index.fingerprints().of(&page(number));
        let (old, new) = (of(1).unwrap(), of(2).unwrap());
        assert_eq!(of(0), None);
        index.reserve(1000);
        assert!(index.add(block, old));
        index.remove(block, old);
        assert!(index.add(block, new));
        assert_eq!((index.find(&page(1)), index.find(&page(2))), (None, Some(block)));
    }

    #[test]
    fn grows_no_further_than_it_may() {
        let mut index = ContentIndex::new(7, 64 << 10);
        let added = |n: &u32| index.insert(BlockRef { disk: 0, block: (*n).into() }, &page(*n));
        assert_eq!((1..5000).filter(added).count(), 1024);
    }
}
