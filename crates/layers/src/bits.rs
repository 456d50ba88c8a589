//! The map of a layer: which blocks it has. In memory of the host, and on the medium.
//!
//! Both have one layout:
//!
//! ```text
//!   offset size  numbers are little-endian, what is not named is zero
//!   0      8     magic "SVLMAP01"
//!   8      4     version: 1. Zero is never valid; a greater one is refused
//!   12     4     CRC-32 (IEEE) of the 4096 bytes, with these four as zero
//!   16     16    the id of the chain
//!   32     8     the layer's number
//!   40     8     epoch under which the layer is written, 0 without a claim
//!   48     16    the claim that has this epoch
//!   64     8     bytes of the disk
//!   4096   n     chunks of 4096 bytes, each for 16384 blocks of 4 KiB (64 MiB of the disk): block b
//!                has the bits 2 (b mod 4) and above of byte b / 4 of all chunks together
//!                  00 absent   the layer below has it
//!                  01 zeros    it reads as zeros, whatever the layer's file holds there
//!                  11 data     the layer's file holds it; 10 is never written and means the same
//! ```
//!
//! Behind its last block a layer's file has the same header, with the magic "SVLDATA1".
//!
//! Bits are only ever set. So there is no instant at which the death of a process could harm them,
//! and a chunk of which a power cut has kept a part is a map of a time before.
//!
//! The one in memory ([`Bits`]) is a file on tmpfs, mapped shared: it outlives the process, and no
//! reboot. A chunk of it gets its space when its first bit is set, by a system call which can say
//! that there is none; a chunk without is never touched through the mapping, which would allocate it
//! or end the process. So it takes 64 MiB for each TiB that was written.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use semper_epoch::{Claim, Id};

use crate::BLOCK;
use crate::record::{LayerId, bytes_at, crc32};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 4096;
/// Bytes of a chunk.
pub const CHUNK_BYTES: usize = 4096;
/// Blocks of a chunk.
pub const CHUNK_BLOCKS: u64 = 4 * CHUNK_BYTES as u64;

const VERSION: u32 = 1;
const WORDS: usize = CHUNK_BYTES / 8;
const WORD_BLOCKS: u64 = 32;

/// One chunk's bits.
pub type Chunk = [u8; CHUNK_BYTES];

/// What a layer has of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Have {
    /// Nothing: what is below counts.
    Absent,
    /// Zeros.
    Zeros,
    /// Data, in its file.
    Data,
}

impl Have {
    fn of(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Absent,
            1 => Self::Zeros,
            _ => Self::Data,
        }
    }

    fn bits(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Zeros => 1,
            Self::Data => 3,
        }
    }
}

/// What a file belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The chain.
    pub chain: Id,
    /// The layer.
    pub layer: LayerId,
    /// Who writes it.
    pub writer: Claim,
    /// Bytes of the disk.
    pub size: u64,
}

/// Which of a layer's files a header stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A map: at its beginning.
    Map,
    /// The blocks: at its end.
    Data,
}

impl Kind {
    fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Map => b"SVLMAP01",
            Self::Data => b"SVLDATA1",
        }
    }
}

impl Identity {
    /// Blocks of the disk; the last one may be a part.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    /// Chunks of its maps.
    pub fn chunks(&self) -> usize {
        self.blocks().div_ceil(CHUNK_BLOCKS) as usize
    }

    /// Bytes of a file of this kind.
    pub fn file_bytes(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Map => (HEADER_BYTES + self.chunks() * CHUNK_BYTES) as u64,
            Kind::Data => self.header_at(kind) + HEADER_BYTES as u64,
        }
    }

    /// Where the header stands in a file of this kind.
    pub fn header_at(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Map => 0,
            Kind::Data => self.blocks() * BLOCK,
        }
    }

    /// A header.
    pub fn encode(&self, kind: Kind) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, kind.magic());
        put(8, &VERSION.to_le_bytes());
        put(16, &self.chain.0);
        put(32, &self.layer.to_le_bytes());
        put(40, &self.writer.epoch.to_le_bytes());
        put(48, &self.writer.id.0);
        put(64, &self.size.to_le_bytes());
        let checksum = crc32(&header);
        header[12..16].copy_from_slice(&checksum.to_le_bytes());
        header
    }

    /// What a header says; `None` for anything else, also of a later version.
    pub fn decode(header: &[u8], kind: Kind) -> Option<Self> {
        let header = <&[u8; HEADER_BYTES]>::try_from(header).ok()?;
        let mut blank = *header;
        blank[12..16].fill(0);
        let word = |at: usize| u32::from_le_bytes(bytes_at(header, at));
        let long = |at: usize| u64::from_le_bytes(bytes_at(header, at));
        let whole = header.starts_with(kind.magic()) && crc32(&blank) == word(12);
        (whole && word(8) == VERSION).then(|| Self {
            chain: Id(bytes_at(header, 16)),
            layer: long(32),
            writer: Claim { epoch: long(40), id: Id(bytes_at(header, 48)) },
            size: long(64),
        })
    }
}

/// Adds the bits of one chunk to those of another.
pub fn unite(into: &mut Chunk, bits: &Chunk) {
    into.iter_mut().zip(bits).for_each(|(into, bits)| *into |= bits);
}

/// Where the bits of a chunk of the medium's map begin.
pub fn chunk_at(chunk: usize) -> u64 {
    (HEADER_BYTES + chunk * CHUNK_BYTES) as u64
}

/// The bits in memory, shared by the threads that serve a disk.
#[derive(Debug)]
pub struct Bits {
    words: Words,
    /// On tmpfs; none for a process that only reads.
    file: Option<File>,
    /// Chunks that have space.
    present: Box<[AtomicBool]>,
    /// Chunks with bits that may not be on the medium.
    dirty: Box<[AtomicBool]>,
    blocks: u64,
}

impl Bits {
    /// Bits of this process alone.
    ///
    /// # Errors
    /// The system's, when it has no address space left.
    pub fn anonymous(identity: &Identity) -> io::Result<Self> {
        Self::with(identity, None)
    }

    /// The bits in a file on tmpfs: those that an earlier process has set, where the file belongs to
    /// this very layer; otherwise it is made anew. A new file gets its name when it is complete.
    ///
    /// # Errors
    /// The system's.
    pub fn of_file(path: &Path, identity: &Identity) -> io::Result<Self> {
        let found = open_existing(path, identity);
        let new = found.is_none();
        let file = found.map_or_else(|| create(path, identity), Ok)?;
        let bits = Self::with(identity, Some(file))?;
        if !new {
            bits.find_present();
        }
        Ok(bits)
    }

    fn with(identity: &Identity, file: Option<File>) -> io::Result<Self> {
        let chunks = identity.chunks();
        let words = Words::new(file.as_ref(), chunks * WORDS)?;
        let flags = || (0..chunks).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { words, file, present: flags(), dirty: flags(), blocks: identity.blocks() })
    }

    /// Finds the chunks that an earlier process has made.
    fn find_present(&self) {
        let Some(file) = &self.file else { return };
        let mut chunk = 0;
        while chunk < self.present.len() {
            // SAFETY: no memory is passed.
            let data = unsafe {
                libc::lseek(file.as_raw_fd(), chunk_at(chunk) as libc::off_t, libc::SEEK_DATA)
            };
            let Ok(data) = usize::try_from(data) else { return };
            chunk = (data.max(HEADER_BYTES) - HEADER_BYTES) / CHUNK_BYTES;
            if let Some(present) = self.present.get(chunk) {
                present.store(true, Ordering::Release);
            }
            chunk += 1;
        }
    }

    /// Chunks that there are.
    pub fn chunks(&self) -> usize {
        self.present.len()
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    fn word(&self, block: u64) -> u64 {
        let chunk = (block / CHUNK_BLOCKS) as usize;
        match self.present.get(chunk) {
            Some(present) if block < self.blocks && present.load(Ordering::Acquire) => {
                self.words.get()[(block / WORD_BLOCKS) as usize].load(Ordering::Acquire)
            }
            _ => 0,
        }
    }

    /// What there is of a block; nothing beyond the end.
    #[inline]
    pub fn get(&self, block: u64) -> Have {
        Have::of(self.word(block) >> (block % WORD_BLOCKS * 2))
    }

    /// The first block from this one on that is there, what there is of it, and how many that follow
    /// are alike: at most `most`, all in one chunk.
    pub fn next(&self, mut block: u64, most: u64) -> Option<(u64, Have, u64)> {
        while block < self.blocks {
            let chunk = (block / CHUNK_BLOCKS) as usize;
            let end = ((chunk as u64 + 1) * CHUNK_BLOCKS).min(self.blocks);
            if !self.present[chunk].load(Ordering::Acquire) {
                block = end;
                continue;
            }
            if block % WORD_BLOCKS == 0 && self.word(block) == 0 {
                block += WORD_BLOCKS;
                continue;
            }
            let have = self.get(block);
            if have != Have::Absent {
                let alike = (block..end.min(block.saturating_add(most)))
                    .take_while(|block| self.get(*block) == have);
                return Some((block, have, alike.count() as u64));
            }
            block += 1;
        }
        None
    }

    /// Notes what there is of `count` blocks from `first` on; what there is already stays if it is
    /// more. True if something is new, and has to come to the medium.
    ///
    /// # Errors
    /// The system's: there is no space for a chunk. Some of the blocks may be noted.
    pub fn set(&self, first: u64, count: u64, have: Have) -> io::Result<bool> {
        let end = first.saturating_add(count).min(self.blocks);
        let mut any = false;
        let mut block = first;
        while block < end {
            let chunk = (block / CHUNK_BLOCKS) as usize;
            let chunk_end = ((chunk as u64 + 1) * CHUNK_BLOCKS).min(end);
            self.make_room(chunk)?;
            let mut new = false;
            while block < chunk_end {
                let (at, in_word) = ((block / WORD_BLOCKS) as usize, block % WORD_BLOCKS);
                let n = (WORD_BLOCKS - in_word).min(chunk_end - block);
                let ones = if n == WORD_BLOCKS { u64::MAX } else { (1 << (2 * n)) - 1 };
                // One in both bits of each block, or in the lower one.
                let each = 0x5555_5555_5555_5555 * have.bits();
                let mask = (each & ones) << (2 * in_word);
                let word = &self.words.get()[at];
                // Mostly set already; the locked instruction is for the first time only.
                if word.load(Ordering::Acquire) & mask != mask {
                    word.fetch_or(mask, Ordering::AcqRel);
                    new = true;
                }
                block += n;
            }
            if new {
                // After the bits: whoever clears the flag looks at them once more.
                self.dirty[chunk].store(true, Ordering::SeqCst);
            }
            any |= new;
        }
        Ok(any)
    }

    fn make_room(&self, chunk: usize) -> io::Result<()> {
        if self.present[chunk].load(Ordering::Acquire) {
            return Ok(());
        }
        if let Some(file) = &self.file {
            let (at, len) = (chunk_at(chunk) as libc::off_t, CHUNK_BYTES as libc::off_t);
            // SAFETY: no memory is passed.
            if unsafe { libc::fallocate(file.as_raw_fd(), 0, at, len) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        self.present[chunk].store(true, Ordering::Release);
        Ok(())
    }

    /// Adds what the medium has of a chunk. What memory has beyond it is dirty.
    ///
    /// # Errors
    /// The system's: there is no space for the chunk.
    pub fn load(&self, chunk: usize, medium: &Chunk) -> io::Result<()> {
        if medium.iter().any(|byte| *byte != 0) {
            self.make_room(chunk)?;
        } else if !self.present[chunk].load(Ordering::Acquire) {
            return Ok(());
        }
        let words = &self.words.get()[chunk * WORDS..(chunk + 1) * WORDS];
        let mut more = false;
        for (word, bytes) in words.iter().zip(medium.chunks_exact(8)) {
            let on_medium = u64::from_le_bytes(bytes_at(bytes, 0));
            more |= word.fetch_or(on_medium, Ordering::AcqRel) | on_medium != on_medium;
        }
        if more {
            self.dirty[chunk].store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// The bits of a chunk as they are now.
    pub fn copy(&self, chunk: usize) -> Chunk {
        let mut copy = [0; CHUNK_BYTES];
        if self.present[chunk].load(Ordering::Acquire) {
            let words = &self.words.get()[chunk * WORDS..(chunk + 1) * WORDS];
            for (bytes, word) in copy.chunks_exact_mut(8).zip(words) {
                bytes.copy_from_slice(&word.load(Ordering::Acquire).to_le_bytes());
            }
        }
        copy
    }

    /// Chunks with bits that may not be on the medium.
    pub fn dirty(&self) -> Vec<usize> {
        let dirty = self.dirty.iter().enumerate();
        dirty.filter(|(_, dirty)| dirty.load(Ordering::SeqCst)).map(|(chunk, _)| chunk).collect()
    }

    /// Whether a bit of these blocks may not be on the medium.
    pub fn is_dirty(&self, first: u64, last: u64) -> bool {
        let chunks = (first / CHUNK_BLOCKS) as usize..=(last / CHUNK_BLOCKS) as usize;
        self.dirty[chunks].iter().any(|dirty| dirty.load(Ordering::SeqCst))
    }

    /// Whether any may not.
    pub fn any_dirty(&self) -> bool {
        self.dirty.iter().any(|dirty| dirty.load(Ordering::SeqCst))
    }

    /// The medium has these bits of a chunk now.
    pub fn cleaned(&self, chunk: usize, medium: &Chunk) {
        self.dirty[chunk].store(false, Ordering::SeqCst);
        if self.copy(chunk) != *medium {
            self.dirty[chunk].store(true, Ordering::SeqCst);
        }
    }

    /// Bytes of memory that the bits take.
    pub fn resident(&self) -> u64 {
        let present = self.present.iter().filter(|present| present.load(Ordering::Relaxed));
        (present.count() * CHUNK_BYTES) as u64
    }

    /// Blocks that the layer's file holds.
    pub fn count_data(&self) -> u64 {
        let chunks =
            (0..self.chunks()).filter(|chunk| self.present[*chunk].load(Ordering::Acquire));
        let words = chunks.flat_map(|chunk| &self.words.get()[chunk * WORDS..(chunk + 1) * WORDS]);
        let upper = words.map(|word| word.load(Ordering::Relaxed) & 0xaaaa_aaaa_aaaa_aaaa);
        upper.map(|bits| u64::from(bits.count_ones())).sum()
    }
}

fn open_existing(path: &Path, identity: &Identity) -> Option<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW);
    let file = options.open(path).ok()?;
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).ok()?;
    let metadata = file.metadata().ok()?;
    let whole = metadata.is_file() && metadata.len() == identity.file_bytes(Kind::Map);
    (whole && Identity::decode(&header, Kind::Map) == Some(*identity)).then_some(file)
}

fn create(path: &Path, identity: &Identity) -> io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = Path::new(&name);
    let _ = std::fs::remove_file(temporary);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(temporary)?;
    let made = file
        .set_len(identity.file_bytes(Kind::Map))
        .and_then(|()| file.write_all_at(&identity.encode(Kind::Map), 0))
        .and_then(|()| std::fs::rename(temporary, path));
    if made.is_err() {
        let _ = std::fs::remove_file(temporary);
    }
    made.map(|()| file)
}

/// A mapping of bits.
#[derive(Debug)]
struct Words {
    base: *const AtomicU64,
    len: usize,
}

// SAFETY: owns its mapping, and the words are shared only as atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    fn new(file: Option<&File>, len: usize) -> io::Result<Self> {
        let bytes = len.max(1) * 8;
        let (flags, fd, at) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd(), HEADER_BYTES as libc::off_t),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0),
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, at) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), len })
    }

    fn get(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `len` words and lives as long as self. Words without space in a
        // file are not looked at: see `present`.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: what mmap returned; nobody borrows it any more.
        unsafe { libc::munmap(self.base.cast_mut().cast(), self.len.max(1) * 8) };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    fn identity(size: u64) -> Identity {
        let writer = Claim { epoch: 7, id: Id([0x11; 16]) };
        Identity { chain: Id([0x33; 16]), layer: 5, writer, size }
    }

    /// By hand; the checksum is what Python's zlib says of these bytes.
    #[test]
    fn the_layout_is_the_one_that_is_drawn() {
        let mut expected = [0; HEADER_BYTES];
        expected[0..8].copy_from_slice(b"SVLMAP01");
        expected[8] = 1;
        expected[16..32].fill(0x33);
        expected[32] = 5;
        expected[40] = 7;
        expected[48..64].fill(0x11);
        expected[67] = 0x40;
        expected[12..16].copy_from_slice(&CHECKSUM.to_le_bytes());
        assert_eq!(identity(1 << 30).encode(Kind::Map), expected);
        assert_eq!(Identity::decode(&expected, Kind::Map), Some(identity(1 << 30)));
        assert_eq!(Identity::decode(&expected, Kind::Data), None);
        expected[70] = 1;
        assert_eq!(Identity::decode(&expected, Kind::Map), None);

        let bits = Bits::anonymous(&identity(1 << 30)).unwrap();
        bits.set(1, 1, Have::Data).unwrap();
        bits.set(6, 2, Have::Zeros).unwrap();
        bits.set(CHUNK_BLOCKS, 1, Have::Data).unwrap();
        assert_eq!(bits.copy(0)[..3], [0b1100, 0b0101_0000, 0]);
        assert_eq!(bits.copy(1)[..2], [0b11, 0]);
        assert_eq!(identity(1 << 30).file_bytes(Kind::Map), 4096 + 16 * 4096);
        assert_eq!(identity((1 << 30) + 512).file_bytes(Kind::Data), (1 << 30) + 8192);
    }

    const CHECKSUM: u32 = 0xbd6c_c912;

    #[test]
    fn the_next_process_finds_the_bits_of_this_layer_and_no_others() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("5.map");
        let size = 1 << 40;
        let first = Bits::of_file(&path, &identity(size)).unwrap();
        first.set(7, 1, Have::Data).unwrap();
        first.set((1 << 28) - 1, 1, Have::Zeros).unwrap();
        let space = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert_eq!((space, first.resident()), (3 * 4096, 2 * 4096), "a header and two chunks");
        drop(first);
        let second = Bits::of_file(&path, &identity(size)).unwrap();
        let blocks = [7, 8, (1 << 28) - 1].map(|block| second.get(block));
        assert_eq!(blocks, [Have::Data, Have::Absent, Have::Zeros]);
        assert_eq!(
            std::fs::metadata(&path).unwrap().blocks() * 512,
            space,
            "a look allocates nothing"
        );
        let other = Identity { layer: 6, ..identity(size) };
        assert_eq!(Bits::of_file(&path, &other).unwrap().next(0, 1), None);
    }

    #[test]
    fn a_chunk_without_space_is_an_error_of_the_request() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("5.map");
        let mut bits = Bits::of_file(&path, &identity(1 << 30)).unwrap();
        bits.set(0, 1, Have::Data).unwrap();
        // A file in which nothing can be allocated: it is open for reading only.
        bits.file = Some(File::open(&path).unwrap());
        bits.set(1, 1, Have::Data).unwrap();
        assert!(bits.set(CHUNK_BLOCKS, 1, Have::Data).is_err());
        assert_eq!(bits.get(CHUNK_BLOCKS), Have::Absent);
    }

    #[test]
    fn a_tebibyte_that_was_written_takes_64_mebibytes() {
        let bits = Bits::anonymous(&identity(1 << 40)).unwrap();
        bits.set(0, 1 << 28, Have::Zeros).unwrap();
        assert_eq!(bits.resident(), 64 << 20);
    }

    #[test]
    fn what_is_set_while_a_chunk_is_flushed_stays_dirty() {
        let bits = Bits::anonymous(&identity(1 << 30)).unwrap();
        bits.set(3, 1, Have::Data).unwrap();
        let copy = bits.copy(0);
        bits.set(4, 1, Have::Data).unwrap();
        bits.cleaned(0, &copy);
        assert_eq!(bits.dirty(), [0]);
        bits.cleaned(0, &bits.copy(0));
        assert!(!bits.any_dirty() && !bits.set(4, 1, Have::Zeros).unwrap() && !bits.any_dirty());
        // After a reboot the medium is all there is; after a death it may have less than memory.
        let reborn = Bits::anonymous(&identity(1 << 30)).unwrap();
        reborn.load(0, &copy).unwrap();
        assert!(!reborn.any_dirty() && reborn.get(3) == Have::Data);
        reborn.set(4, 1, Have::Data).unwrap();
        reborn.cleaned(0, &reborn.copy(0));
        reborn.load(0, &copy).unwrap();
        assert_eq!(reborn.dirty(), [0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn ranges_are_what_was_set(
            sets in prop::collection::vec((0..40_000u64, 1..300u64, any::<bool>()), 1..30),
        ) {
            let bits = Bits::anonymous(&identity(40_000 * BLOCK - 1024)).unwrap();
            let mut model = BTreeMap::new();
            for (first, count, data) in sets {
                let have = if data { Have::Data } else { Have::Zeros };
                bits.set(first, count, have).unwrap();
                for block in first..(first + count).min(40_000) {
                    let known = model.entry(block).or_insert(have);
                    if data { *known = have; }
                }
            }
            let mut found = BTreeMap::new();
            let mut at = 0;
            while let Some((first, have, count)) = bits.next(at, 100) {
                prop_assert!((1..=100).contains(&count));
                found.extend((first..first + count).map(|block| (block, have)));
                at = first + count;
            }
            let data = model.values().filter(|have| **have == Have::Data).count() as u64;
            prop_assert_eq!(bits.count_data(), data);
            prop_assert_eq!(found, model);
        }
    }
}
