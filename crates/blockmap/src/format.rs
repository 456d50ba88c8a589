//! The map as bytes, version 1. Little endian; drawn in `docs/reference/map-format.md`.
//!
//! ```text
//!   header    128 bytes
//!      0  magic       "SEMPRMAP"
//!      8  version     u32   1; a reader refuses others
//!     12  header_len  u32   128
//!     16  total_len   u64   all bytes, checksum included
//!     24  capacity    u64   of the disk, in bytes
//!     32  page_size   u32   4096
//!     36  hash        u32   1 = first 16 bytes of keyed BLAKE3 of a page's worth
//!     40  key         32 bytes
//!     72  flags       u64   bit 0: every page in memory was looked at and verified
//!     80  regions     u64   how many
//!     88  pages       u64   how many
//!     96  blocks      u64   how many
//!    104  reserved    24 bytes, zero
//!   regions   40 bytes each: guest_addr u64, size u64, file_offset u64, device u64, inode u64
//!   pages     48 bytes each, by region and page:
//!             region u32, state u32, page u64, sector u64, stamp u64, hash 16 bytes
//!   blocks    32 bytes each, by block: hash 16 bytes, block u64, stamp u64
//!   checksum  32 bytes: BLAKE3, without key, of all before
//! ```
//!
//! The version changes when a reader of the old one would misunderstand the new one.

use crate::index::{ContentIndex, Hash};
use crate::map::{Association, RegionKey};
use crate::verify::{Found, Pair};
use crate::{PAGE_SIZE, SECTOR_SIZE, SECTORS_PER_BLOCK};

/// First bytes of an export.
pub const MAGIC: &[u8; 8] = b"SEMPRMAP";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

const HEADER: usize = 128;
const REGION: usize = 40;
const PAGE: usize = 48;
const BLOCK: usize = 32;
const CHECKSUM: usize = 32;
const HASH_BLAKE3: u32 = 1;
const FLAG_VERIFIED: u64 = 1;

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Associated by the data path; its content was not looked at, and `hash` is zero.
    Hint = 1,
    /// Verified; found through its association.
    Associated = 2,
    /// Verified; found by its content.
    Content = 3,
}

/// One page and its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRecord {
    /// Index into the regions.
    pub region: u32,
    /// What is known.
    pub state: PageState,
    /// Index of the page in its region.
    pub page: u64,
    /// First of the eight sectors.
    pub sector: u64,
    /// Their stamp: differs once they were written.
    pub stamp: u64,
    /// Keyed hash of the page, where it was verified.
    pub hash: Hash,
}

/// One block of the disk and its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRecord {
    /// Keyed hash of its content.
    pub hash: Hash,
    /// Index of the block on the disk.
    pub block: u64,
    /// Its stamp when it was hashed.
    pub stamp: u64,
}

/// A map that was exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes of the disk.
    pub capacity: u64,
    /// Key of all hashes.
    pub key: [u8; 32],
    /// Every page in memory was looked at.
    pub verified: bool,
    /// Regions of the guest's memory.
    pub regions: Vec<RegionKey>,
    /// Pages, by region and page, each at most once.
    pub pages: Vec<PageRecord>,
    /// Blocks, in order, each at most once.
    pub blocks: Vec<BlockRecord>,
}

/// Why bytes are no map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Too short for what they announce, or too long.
    #[error("the map has {actual} bytes where {needed} belong: it was cut off, or is no map")]
    Length {
        /// Bytes that there should be.
        needed: u64,
        /// Bytes that there are.
        actual: u64,
    },
    /// They begin with something else.
    #[error("this is no page/block map: it does not begin with SEMPRMAP")]
    Magic,
    /// Written by another version of this format.
    #[error("the map is of version {0}, and this program reads version {VERSION}")]
    Version(u32),
    /// A field has a value that it cannot have.
    #[error("the map is damaged: {0}")]
    Field(&'static str),
    /// The bytes are not those that were written.
    #[error("the map is damaged: its checksum is wrong")]
    Checksum,
}

impl Export {
    /// Everything that is known and was not verified.
    pub fn of_hints(
        capacity: u64,
        regions: Vec<RegionKey>,
        hints: &[Association],
        index: &ContentIndex,
    ) -> Self {
        let record = |a: &Association| PageRecord {
            region: a.region as u32,
            state: PageState::Hint,
            page: a.page as u64,
            sector: a.sector,
            stamp: a.stamp,
            hash: [0; 16],
        };
        let pages = hints.iter().map(record).collect();
        Self { verified: false, pages, ..Self::of_pairs(capacity, regions, &[], index) }
    }

    /// The outcome of a verification of all pages.
    pub fn of_pairs(
        capacity: u64,
        regions: Vec<RegionKey>,
        pairs: &[Pair],
        index: &ContentIndex,
    ) -> Self {
        let page = |p: &Pair| PageRecord {
            region: p.region as u32,
            state: match p.found {
                Found::Associated => PageState::Associated,
                Found::Content => PageState::Content,
            },
            page: p.page as u64,
            sector: p.sector,
            stamp: p.stamp,
            hash: p.hash,
        };
        let blocks = index.records().iter();
        Self {
            capacity,
            key: *index.key(),
            verified: true,
            regions,
            pages: pairs.iter().map(page).collect(),
            blocks: blocks
                .map(|r| BlockRecord { hash: r.hash, block: r.block, stamp: r.stamp })
                .collect(),
        }
    }

    /// Bytes that [`Self::to_bytes`] gives.
    pub fn encoded_len(&self) -> usize {
        HEADER
            + self.regions.len() * REGION
            + self.pages.len() * PAGE
            + self.blocks.len() * BLOCK
            + CHECKSUM
    }

    /// The bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let total = self.encoded_len();
        let mut out = Vec::with_capacity(total);
        out.extend_from_slice(MAGIC);
        put32(&mut out, &[VERSION, HEADER as u32]);
        put64(&mut out, &[total as u64, self.capacity]);
        put32(&mut out, &[PAGE_SIZE as u32, HASH_BLAKE3]);
        out.extend_from_slice(&self.key);
        let counts = [self.regions.len(), self.pages.len(), self.blocks.len()];
        put64(&mut out, &[if self.verified { FLAG_VERIFIED } else { 0 }]);
        put64(&mut out, &counts.map(|n| n as u64));
        out.resize(HEADER, 0);
        for region in &self.regions {
            let (device, inode) = region.file;
            put64(&mut out, &[region.guest_addr, region.size, region.file_offset, device, inode]);
        }
        for page in &self.pages {
            put32(&mut out, &[page.region, page.state as u32]);
            put64(&mut out, &[page.page, page.sector, page.stamp]);
            out.extend_from_slice(&page.hash);
        }
        for block in &self.blocks {
            out.extend_from_slice(&block.hash);
            put64(&mut out, &[block.block, block.stamp]);
        }
        let checksum = blake3::hash(&out);
        out.extend_from_slice(checksum.as_bytes());
        out
    }

    /// Reads what [`Self::to_bytes`] wrote, from bytes that nobody vouches for. Every index in the
    /// result is inside what it points into.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let export = Self::parse_unsummed(bytes)?;
        let (body, checksum) = bytes.split_at(bytes.len() - CHECKSUM);
        if blake3::hash(body).as_bytes() != checksum {
            return Err(FormatError::Checksum);
        }
        Ok(export)
    }

    /// [`Self::parse`] without its last step, for fuzzers.
    ///
    /// # Errors
    /// [`FormatError`].
    #[doc(hidden)]
    pub fn parse_unsummed(bytes: &[u8]) -> Result<Self, FormatError> {
        let actual = bytes.len() as u64;
        let mut reader = Reader(bytes);
        let short = |needed: usize| FormatError::Length { needed: needed as u64, actual };
        if &reader.array::<8>().ok_or(short(HEADER + CHECKSUM))? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = reader.u32().ok_or(short(HEADER + CHECKSUM))?;
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        if bytes.len() < HEADER + CHECKSUM {
            return Err(short(HEADER + CHECKSUM));
        }
        let cut = || FormatError::Field("it ends too early");
        let header_len = reader.u32().ok_or_else(cut)?;
        let total = reader.u64().ok_or_else(cut)?;
        let capacity = reader.u64().ok_or_else(cut)?;
        let (page_size, hash) = (reader.u32().ok_or_else(cut)?, reader.u32().ok_or_else(cut)?);
        let key = reader.array().ok_or_else(cut)?;
        let flags = reader.u64().ok_or_else(cut)?;
        let mut count = || reader.u64().ok_or_else(cut);
        let (regions, pages, blocks) = (count()?, count()?, count()?);
        let reserved: [u8; 24] = reader.array().ok_or_else(cut)?;
        if header_len as usize != HEADER || page_size as usize != PAGE_SIZE {
            return Err(FormatError::Field("sizes of the header"));
        }
        if hash != HASH_BLAKE3 || flags & !FLAG_VERIFIED != 0 || reserved != [0; 24] {
            return Err(FormatError::Field("flags of the header"));
        }
        // Lengths first: nothing is allocated that the bytes do not back.
        let needed = [(regions, REGION), (pages, PAGE), (blocks, BLOCK)]
            .iter()
            .try_fold((HEADER + CHECKSUM) as u64, |sum, (count, size)| {
                count.checked_mul(*size as u64)?.checked_add(sum)
            })
            .ok_or(FormatError::Field("counts of the header"))?;
        if needed != actual || total != actual {
            return Err(FormatError::Length { needed: needed.max(total), actual });
        }
        let verified = flags & FLAG_VERIFIED != 0;
        let mut export = Self {
            capacity,
            key,
            verified,
            regions: Vec::with_capacity(regions as usize),
            pages: Vec::with_capacity(pages as usize),
            blocks: Vec::with_capacity(blocks as usize),
        };
        for _ in 0..regions {
            export.regions.push(reader.region().ok_or_else(cut)??);
        }
        for _ in 0..pages {
            let page = reader.page().ok_or_else(cut)??;
            export.check_page(&page)?;
            export.pages.push(page);
        }
        for _ in 0..blocks {
            let block = reader.block().ok_or_else(cut)?;
            export.check_block(&block)?;
            export.blocks.push(block);
        }
        Ok(export)
    }

    fn check_page(&self, page: &PageRecord) -> Result<(), FormatError> {
        let region = self.regions.get(page.region as usize);
        let region = region.ok_or(FormatError::Field("a page of a region that is not there"))?;
        if page.page >= region.size / PAGE_SIZE as u64 {
            return Err(FormatError::Field("a page outside its region"));
        }
        let end = page.sector.checked_add(SECTORS_PER_BLOCK);
        if end.is_none_or(|end| end > self.capacity / SECTOR_SIZE) {
            return Err(FormatError::Field("a page of sectors beyond the disk"));
        }
        if self.verified == (page.state == PageState::Hint) {
            return Err(FormatError::Field("a page whose state is not that of the map"));
        }
        let place = |p: &PageRecord| (p.region, p.page);
        if self.pages.last().is_some_and(|last| place(last) >= place(page)) {
            return Err(FormatError::Field("pages out of order"));
        }
        Ok(())
    }

    fn check_block(&self, block: &BlockRecord) -> Result<(), FormatError> {
        if block.block >= self.capacity / PAGE_SIZE as u64 {
            return Err(FormatError::Field("a block beyond the disk"));
        }
        if self.blocks.last().is_some_and(|last| last.block >= block.block) {
            return Err(FormatError::Field("blocks out of order"));
        }
        Ok(())
    }

    /// The sectors of a page.
    pub fn block_in(&self, region: u32, page: u64) -> Option<&PageRecord> {
        let place = |p: &PageRecord| (p.region, p.page);
        self.pages.binary_search_by_key(&(region, page), place).ok().map(|at| &self.pages[at])
    }
}

fn put32(out: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

fn put64(out: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn region(&mut self) -> Option<Result<RegionKey, FormatError>> {
        let (guest_addr, size, file_offset) = (self.u64()?, self.u64()?, self.u64()?);
        let file = (self.u64()?, self.u64()?);
        let whole = (guest_addr | size) % PAGE_SIZE as u64 == 0;
        let fits = guest_addr.checked_add(size).is_some() && size > 0;
        if !whole || !fits {
            return Some(Err(FormatError::Field("a region that is empty, torn or too long")));
        }
        Some(Ok(RegionKey { guest_addr, size, file_offset, file }))
    }

    fn page(&mut self) -> Option<Result<PageRecord, FormatError>> {
        let region = self.u32()?;
        let state = match self.u32()? {
            1 => PageState::Hint,
            2 => PageState::Associated,
            3 => PageState::Content,
            _ => return Some(Err(FormatError::Field("a page in an unknown state"))),
        };
        let (page, sector, stamp) = (self.u64()?, self.u64()?, self.u64()?);
        let hash = self.array()?;
        Some(Ok(PageRecord { region, state, page, sector, stamp, hash }))
    }

    fn block(&mut self) -> Option<BlockRecord> {
        Some(BlockRecord { hash: self.array()?, block: self.u64()?, stamp: self.u64()? })
    }
}
