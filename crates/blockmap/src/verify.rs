//! Saying for certain that a page equals a block.
//!
//! # What a [`Pair`] promises
//!
//! During the call that returned it
//!
//! 1. the eight sectors had one content D, all the time from the first look at their stamp to the
//!    last: no write or discard of them was in flight at any time between;
//! 2. every byte of the page was copied once, and each equalled its byte of D at the instant it was
//!    copied; D was read and compared byte for byte (a hash only proposes).
//!
//! So if nothing stored into the page during the call, page and sectors were equal. A guest that
//! runs may store at any time, even between two bytes of the copy, and after the call; the map
//! cannot see its processor. Who must know for a later instant keeps a dirty log from before the
//! call: if the page is clean in it, and [`crate::BlockMap::stamp`] still gives the pair's stamp,
//! they are equal still. For a guest that is stopped, a pair is simply true.
//!
//! Writes by other programs to the image are not seen; the image's lock keeps them out.

use crate::aligned::Page;
use crate::index::{ContentIndex, Hash, hash_page};
use crate::map::{Association, BlockMap, Layout};
use crate::pages::{Blocks, Pages};

/// How a block was found for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// By the association that the data path recorded.
    Associated,
    /// By its content.
    Content,
}

/// A page that equals eight sectors; see the module for what that means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Index of the region in the memory table.
    pub region: usize,
    /// Index of the page in the region.
    pub page: usize,
    /// First of the eight sectors.
    pub sector: u64,
    /// The stamp under which they have this content.
    pub stamp: u64,
    /// Keyed hash of the content.
    pub hash: Hash,
    /// How it was found.
    pub found: Found,
}

/// What became of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The block, if one was found and verified.
    pub pair: Option<Pair>,
    /// The page had an association that was good by its stamp.
    pub associated: bool,
    /// The page is full of zeros.
    pub zero: bool,
}

/// Sums over pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Pages that were in memory.
    pub pages: u64,
    /// Of these, full of zeros.
    pub zero: u64,
    /// With an association that was good by its stamp.
    pub associated: u64,
    /// Verified through their association.
    pub verified_associated: u64,
    /// Verified after their content was found in the index.
    pub verified_content: u64,
    /// Of all verified, full of zeros.
    pub verified_zero: u64,
}

impl Tally {
    /// Counts one page.
    pub fn add(&mut self, outcome: &Outcome) {
        self.pages += 1;
        self.zero += u64::from(outcome.zero);
        self.associated += u64::from(outcome.associated);
        if let Some(pair) = outcome.pair {
            self.verified_zero += u64::from(outcome.zero);
            match pair.found {
                Found::Associated => self.verified_associated += 1,
                Found::Content => self.verified_content += 1,
            }
        }
    }
}

/// Looks for the block of a page, and makes sure of it.
pub struct Verifier<'a, B, P> {
    map: &'a BlockMap,
    layout: &'a Layout,
    index: &'a ContentIndex,
    blocks: &'a B,
    pages: &'a P,
    page: Box<Page>,
    block: Box<Page>,
    recheck: bool,
}

impl<'a, B: Blocks, P: Pages> Verifier<'a, B, P> {
    /// A verifier over a memory table of the map, of which `pages` must be the pages.
    pub fn new(
        (map, layout): (&'a BlockMap, &'a Layout),
        index: &'a ContentIndex,
        blocks: &'a B,
        pages: &'a P,
    ) -> Self {
        let (page, block) = (Box::default(), Box::default());
        Self { map, layout, index, blocks, pages, page, block, recheck: true }
    }

    /// Leaves out the second look at the stamps: wrong on purpose, to show that tests would see it.
    #[doc(hidden)]
    pub fn without_recheck(mut self) -> Self {
        self.recheck = false;
        self
    }

    /// Looks for the block that equals this page; none if the page is not in memory.
    pub fn page(&mut self, region: usize, page: usize) -> Option<Outcome> {
        let association = self.layout.block_in(self.map, region, page);
        if !self.pages.copy(region, page, &mut self.page) {
            return None;
        }
        let zero = self.page.is_zero();
        let hash = hash_page(self.index.key(), &self.page);
        let pair = |sector, stamp, found| Pair { region, page, sector, stamp, hash, found };
        let by_association = association
            .filter(|a| self.equal(a.sector, a.stamp) && self.still(*a))
            .map(|a| pair(a.sector, a.stamp, Found::Associated));
        let found = by_association.or_else(|| {
            let (sector, stamp) =
                self.index.find(&hash).find(|(sector, stamp)| self.equal(*sector, *stamp))?;
            Some(pair(sector, stamp, Found::Content))
        });
        Some(Outcome { pair: found, associated: association.is_some(), zero })
    }

    /// Whether the copy of the page equals the sectors, which had this stamp all the while.
    fn equal(&mut self, sector: u64, stamp: u64) -> bool {
        if self.map.stamp(sector) != Some(stamp) {
            return false;
        }
        let read = self.blocks.read(sector, std::slice::from_mut(&mut *self.block));
        let equal = read.is_ok() && self.block == self.page;
        equal && (!self.recheck || self.map.stamp(sector) == Some(stamp))
    }

    /// Whether the page's association is what it was: the device has not filled the page since.
    fn still(&self, association: Association) -> bool {
        !self.recheck
            || self.layout.block_in(self.map, association.region, association.page)
                == Some(association)
    }
}
