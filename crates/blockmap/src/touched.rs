//! Which blocks of the disk were ever read or written: one bit each.
//!
//! The bits may stand in a file that the next process maps as well ([`Touched::of_file`]): they are
//! only ever set, so that there is no instant at which the death of a process could harm them.
//!
//! ```text
//!   file     header (4096), then the bits in chunks of 4096 bytes, each for 128 MiB of the disk
//!   places   u32 for each chunk     not known, in the file, in memory
//! ```
//!
//! The file is one hole at first. A chunk gets its space when its first bit is set; without room on
//! the file system its bits are kept in memory, and die with the process. A chunk that is not known
//! to have space is never touched through the mapping: that could allocate it, or end the process.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::PAGE_SIZE;
use crate::lazy::Lazy;

/// First bytes of a file of touched blocks: magic, version 1, then what it belongs to.
const FILE_MAGIC: &[u8; 12] = b"SEMPTOUC\x01\0\0\0";
const FILE_HEADER: usize = PAGE_SIZE;
/// Words of a chunk.
const CHUNK: usize = PAGE_SIZE / 8;

// Places of a chunk.
const UNKNOWN: u32 = 0;
const IN_FILE: u32 = 1;
const IN_MEMORY: u32 = 2;

#[derive(Debug)]
pub(crate) struct Touched {
    places: Lazy<AtomicU32>,
    memory: Lazy<AtomicU64>,
    kept: Option<Kept>,
    blocks: u64,
}

/// The bits that the next process finds.
#[derive(Debug)]
struct Kept {
    file: File,
    words: Lazy<AtomicU64>,
}

fn words(blocks: u64) -> usize {
    blocks.div_ceil(64) as usize
}

/// Bytes of a file.
fn size(blocks: u64) -> u64 {
    FILE_HEADER as u64 + (words(blocks) * 8).next_multiple_of(PAGE_SIZE) as u64
}

/// Where a chunk begins in the file.
fn offset(chunk: usize) -> u64 {
    (FILE_HEADER + chunk * PAGE_SIZE) as u64
}

impl Kept {
    fn new(file: File, blocks: u64) -> io::Result<Self> {
        let words = Lazy::of_file(&file, FILE_HEADER as u64, words(blocks))?;
        Ok(Self { file, words })
    }

    /// The first chunk from this one on that has a bit, as far as the file system can tell.
    fn next(&self, chunk: usize) -> Option<usize> {
        let from = libc::off_t::try_from(offset(chunk)).ok()?;
        // SAFETY: no memory is passed.
        let data = unsafe { libc::lseek(self.file.as_raw_fd(), from, libc::SEEK_DATA) };
        Some((usize::try_from(data).ok()?.max(FILE_HEADER) - FILE_HEADER) / PAGE_SIZE)
    }
}

impl Touched {
    /// # Errors
    /// The system's, when it has no address space left.
    pub(crate) fn new(blocks: u64) -> io::Result<Self> {
        Self::with(blocks, None)
    }

    /// The bits in the file at `path`, which is made anew unless it belongs to `identity`. A new file
    /// gets its name only when it is complete.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn of_file(path: &Path, identity: [u8; 32], blocks: u64) -> io::Result<Self> {
        let kept = match open_existing(path, identity, size(blocks)) {
            Some(file) => Kept::new(file, blocks)?,
            None => create(path, identity, blocks)?,
        };
        Self::with(blocks, Some(kept))
    }

    /// The same, of a file that another process may still use: it is never made anew.
    ///
    /// # Errors
    /// The system's, and that there is no such file.
    pub(crate) fn of_existing(path: &Path, identity: [u8; 32], blocks: u64) -> io::Result<Self> {
        let file = open_existing(path, identity, size(blocks)).ok_or(io::ErrorKind::NotFound)?;
        Self::with(blocks, Some(Kept::new(file, blocks)?))
    }

    fn with(blocks: u64, kept: Option<Kept>) -> io::Result<Self> {
        let words = words(blocks);
        let (places, memory) = (Lazy::new(words.div_ceil(CHUNK))?, Lazy::new(words)?);
        Ok(Self { places, memory, kept, blocks })
    }

    /// Sets the bits of `blocks`.
    #[inline]
    pub(crate) fn set(&self, block: u64) {
        let index = (block / 64) as usize;
        let Some(place) = self.places.get(index / CHUNK) else { return };
        let words = match (place.load(Ordering::SeqCst), &self.kept) {
            (IN_FILE, Some(kept)) => &kept.words,
            (IN_MEMORY, _) => &self.memory,
            _ => self.make_room(index / CHUNK, place),
        };
        let Some(word) = words.get(index) else { return };
        let bit = 1 << (block % 64);
        // Nearly always set already; the locked instruction is for the first time only.
        if word.load(Ordering::SeqCst) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Finds a place for a chunk: once in 128 MiB of the disk, a system call.
    #[cold]
    fn make_room(&self, chunk: usize, place: &AtomicU32) -> &Lazy<AtomicU64> {
        let room = self
            .kept
            .as_ref()
            .is_some_and(|kept| allocate(&kept.file, offset(chunk), PAGE_SIZE as u64).is_ok());
        let found = if room { IN_FILE } else { IN_MEMORY };
        let before = place.compare_exchange(UNKNOWN, found, Ordering::SeqCst, Ordering::SeqCst);
        match (before.map_or_else(|first| first, |_| found), &self.kept) {
            (IN_FILE, Some(kept)) => &kept.words,
            _ => &self.memory,
        }
    }

    /// The words of a chunk that may have bits, and where they begin. `next` is where the file's next
    /// bits are, if it was asked.
    fn chunk(&self, chunk: usize, next: &mut usize) -> Option<(usize, &[AtomicU64])> {
        let place = &self.places[chunk];
        let words = match (place.load(Ordering::SeqCst), &self.kept) {
            (IN_FILE, Some(kept)) => &kept.words,
            (IN_MEMORY, _) => &self.memory,
            (_, None) => return None,
            (_, Some(kept)) => {
                if *next <= chunk {
                    *next = kept.next(chunk).unwrap_or(usize::MAX);
                }
                if *next != chunk {
                    return None;
                }
                // What has bits has its space, unless another has set them in memory meanwhile.
                self.make_room(chunk, place)
            }
        };
        let first = chunk * CHUNK;
        Some((first, &words[first..words.len().min(first + CHUNK)]))
    }

    /// Every word that may have bits, from one to another, with its number.
    fn words(&self, first: usize, last: usize) -> impl Iterator<Item = (usize, u64)> + '_ {
        let chunks = first / CHUNK..self.places.len().min(last / CHUNK + 1);
        let mut next = 0;
        chunks
            .filter_map(move |chunk| self.chunk(chunk, &mut next))
            .flat_map(|(start, words)| {
                let loaded = words.iter().map(|word| word.load(Ordering::SeqCst));
                loaded.enumerate().map(move |(n, word)| (start + n, word))
            })
            .filter(move |(index, word)| *word != 0 && (first..=last).contains(index))
    }

    /// Blocks of `[first, last]` that are set, in order.
    pub(crate) fn iter(&self, first: u64, last: u64) -> impl Iterator<Item = u64> + '_ {
        let last = last.min(self.blocks.saturating_sub(1));
        self.words((first / 64) as usize, (last / 64) as usize)
            .flat_map(|(index, word)| Bits(word).map(move |bit| index as u64 * 64 + bit))
            .filter(move |block| (first..=last).contains(block))
    }

    /// How many are set.
    pub(crate) fn count(&self) -> u64 {
        self.words(0, usize::MAX).map(|(_, word)| u64::from(word.count_ones())).sum()
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(crate) fn resident(&self) -> u64 {
        let kept = self.kept.as_ref().map_or(0, |kept| kept.words.resident());
        kept + self.memory.resident() + self.places.resident()
    }
}

/// The set bits of a word, lowest first.
struct Bits(u64);

impl Iterator for Bits {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.0 == 0 {
            return None;
        }
        let bit = u64::from(self.0.trailing_zeros());
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

fn header(identity: [u8; 32]) -> [u8; 44] {
    let mut header = [0; 44];
    header[..12].copy_from_slice(FILE_MAGIC);
    header[12..].copy_from_slice(&identity);
    header
}

/// The file, if it has this size and belongs to `identity`.
fn open_existing(path: &Path, identity: [u8; 32], size: u64) -> Option<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW);
    let mut file = options.open(path).ok()?;
    let metadata = file.metadata().ok()?;
    let mut found = [0; 44];
    file.read_exact(&mut found).ok()?;
    (metadata.is_file() && metadata.len() == size && found == header(identity)).then_some(file)
}

fn create(path: &Path, identity: [u8; 32], blocks: u64) -> io::Result<Kept> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = Path::new(&name);
    let _ = std::fs::remove_file(temporary);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let mut file = options.open(temporary)?;
    let made = file
        .set_len(size(blocks))
        .and_then(|()| file.write_all(&header(identity)))
        .and_then(|()| Kept::new(file, blocks))
        .and_then(|kept| std::fs::rename(temporary, path).map(|()| kept));
    if made.is_err() {
        let _ = std::fs::remove_file(temporary);
    }
    made
}

fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let signed = |number| libc::off_t::try_from(number).map_err(io::Error::other);
    let (offset, len) = (signed(offset)?, signed(len)?);
    // SAFETY: no memory is passed.
    let status = unsafe { libc::fallocate(file.as_raw_fd(), 0, offset, len) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(touched: &Touched) -> Vec<u64> {
        touched.iter(0, u64::MAX).collect()
    }

    #[test]
    fn ranges_are_cut_at_their_ends() {
        let touched = Touched::new(1000).unwrap();
        [0, 63, 64, 500, 999].iter().for_each(|block| touched.set(*block));
        assert_eq!(touched.iter(63, 500).collect::<Vec<_>>(), [63, 64, 500]);
        assert_eq!(touched.iter(999, 2000).collect::<Vec<_>>(), [999]);
        assert_eq!(touched.iter(1000, 2000).count() + touched.iter(65, 499).count(), 0);
        assert_eq!((touched.count(), touched.blocks()), (5, 1000));
    }

    #[test]
    fn the_next_process_finds_what_was_touched_unless_it_is_another_disk() {
        let path = std::env::temp_dir().join(format!("semper-touched-{}", std::process::id()));
        let first = Touched::of_file(&path, [1; 32], 5000).unwrap();
        first.set(7);
        let spare = Touched::of_existing(&path, [1; 32], 5000).unwrap();
        assert!(
            Touched::of_existing(&path, [2; 32], 5000).is_err(),
            "another disk's is left alone"
        );
        first.set(4999);
        assert_eq!(set(&spare), [7, 4999], "also what is touched while it waits");
        drop((first, spare));
        assert_eq!(set(&Touched::of_file(&path, [1; 32], 5000).unwrap()), [7, 4999]);
        assert_eq!(set(&Touched::of_file(&path, [2; 32], 5000).unwrap()), [], "another disk");
        Touched::of_file(&path, [2; 32], 5000).unwrap().set(1);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(100).unwrap();
        assert_eq!(set(&Touched::of_file(&path, [2; 32], 5000).unwrap()), [], "cut off");
        file.set_len(0).unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    fn space(path: &Path) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512
    }

    /// 16 TiB: 512 MiB of bits.
    const LARGE: u64 = 1 << 32;

    #[test]
    fn the_file_of_a_large_disk_grows_with_what_is_touched() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("large");
        let first = Touched::of_file(&path, [1; 32], LARGE).unwrap();
        assert_eq!((space(&path), first.count(), first.resident()), (4096, 0, 0));
        let some = [0, 40_000, LARGE / 2 + 7, LARGE - 1];
        some.iter().for_each(|block| first.set(*block));
        first.set(0);
        assert_eq!(space(&path), 5 * 4096, "the header and a chunk for each");
        let spare = Touched::of_existing(&path, [1; 32], LARGE).unwrap();
        assert_eq!(set(&spare), some);
        assert_eq!(spare.iter(1, LARGE / 2 + 7).collect::<Vec<_>>(), some[1..3]);
        // What is touched while the spare waits, in a chunk of which it knew nothing.
        first.set(3 << 20);
        assert_eq!(spare.count(), 5);
        drop(first);
        spare.set(4 << 20);
        let next = Touched::of_file(&path, [1; 32], LARGE).unwrap();
        assert_eq!((next.count(), space(&path)), (6, 7 * 4096));
    }

    #[test]
    fn without_room_the_bits_of_a_chunk_stay_in_memory() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("full");
        let touched = Touched::of_file(&path, [1; 32], LARGE).unwrap();
        touched.set(5);
        let full = Touched {
            kept: Some(Kept {
                // A file in which nothing can be allocated: it is open for reading only.
                file: File::open(&path).unwrap(),
                words: Lazy::of_file(
                    &File::options().read(true).write(true).open(&path).unwrap(),
                    FILE_HEADER as u64,
                    words(LARGE),
                )
                .unwrap(),
            }),
            ..Touched::new(LARGE).unwrap()
        };
        full.set(LARGE / 2);
        full.set(LARGE / 2);
        assert_eq!(full.iter(100, LARGE).collect::<Vec<_>>(), [LARGE / 2]);
        assert_eq!(space(&path), 2 * 4096, "no page was allocated by a look at it");
        assert_eq!(set(&touched), [5], "and the next process does not know of it");
    }

    #[test]
    fn threads_that_meet_at_a_new_chunk_lose_no_bit() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let touched = Touched::of_file(&dir.path().join("shared"), [1; 32], LARGE).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let touched = &touched;
                scope.spawn(move || {
                    (0..200).for_each(|chunk| touched.set(chunk * 32_768 + thread));
                });
            }
        });
        assert_eq!(touched.count(), 800);
    }

    #[test]
    fn a_disk_that_is_too_large_is_told_and_nothing_stays() {
        let path = std::env::temp_dir().join(format!("semper-full-{}", std::process::id()));
        assert!(Touched::of_file(&path, [1; 32], 1 << 53).is_err());
        assert!(Touched::new(1 << 53).is_err());
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let left = std::fs::read_dir(std::env::temp_dir()).unwrap().filter_map(Result::ok);
        let left: Vec<_> =
            left.filter(|e| e.file_name().to_string_lossy().contains(&name)).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
