//! Which blocks of the disk were ever read or written: one bit each.
//!
//! The bits may stand in a file that the next process maps as well ([`Touched::of_file`]): they are
//! only ever set, so that there is no instant at which the death of a process could harm them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::PAGE_SIZE;
use crate::lazy::Lazy;

/// First bytes of a file of touched blocks: magic, version 1, then what it belongs to.
const FILE_MAGIC: &[u8; 12] = b"SEMPTOUC\x01\0\0\0";
const FILE_HEADER: usize = PAGE_SIZE;

#[derive(Debug)]
pub(crate) struct Touched {
    words: Lazy<AtomicU64>,
    blocks: u64,
}

fn words(blocks: u64) -> usize {
    blocks.div_ceil(64) as usize
}

/// Bytes of a file.
fn size(blocks: u64) -> u64 {
    FILE_HEADER as u64 + (words(blocks) * 8).next_multiple_of(PAGE_SIZE) as u64
}

impl Touched {
    pub(crate) fn new(blocks: u64) -> io::Result<Self> {
        Ok(Self { words: Lazy::new(words(blocks))?, blocks })
    }

    /// The bits in the file at `path`, which is made anew unless it belongs to `identity`.
    ///
    /// All its space is allocated at once: a full tmpfs is told here, not by a signal later. A new
    /// file gets its name only when it is complete.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn of_file(path: &Path, identity: [u8; 32], blocks: u64) -> io::Result<Self> {
        let file = match open_existing(path, identity, size(blocks)) {
            Some(file) => file,
            None => create(path, identity, size(blocks))?,
        };
        Self::of_words(&file, blocks)
    }

    /// The same, of a file that another process may still use: it is never made anew.
    ///
    /// # Errors
    /// The system's, and that there is no such file.
    pub(crate) fn of_existing(path: &Path, identity: [u8; 32], blocks: u64) -> io::Result<Self> {
        let file = open_existing(path, identity, size(blocks));
        Self::of_words(&file.ok_or(io::ErrorKind::NotFound)?, blocks)
    }

    fn of_words(file: &File, blocks: u64) -> io::Result<Self> {
        Ok(Self { words: Lazy::of_file(file, FILE_HEADER as u64, words(blocks))?, blocks })
    }

    /// Sets the bits of `blocks`.
    #[inline]
    pub(crate) fn set(&self, block: u64) {
        let Some(word) = self.words.get((block / 64) as usize) else { return };
        let bit = 1 << (block % 64);
        // Nearly always set already; the locked instruction is for the first time only.
        if word.load(Ordering::SeqCst) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Blocks of `[first, last]` that are set, in order.
    pub(crate) fn iter(&self, first: u64, last: u64) -> impl Iterator<Item = u64> + '_ {
        let last = last.min(self.blocks.saturating_sub(1));
        (first / 64..=last / 64)
            .flat_map(move |index| {
                let word = self.words.get(index as usize);
                Bits(word.map_or(0, |word| word.load(Ordering::SeqCst)))
                    .map(move |b| index * 64 + b)
            })
            .filter(move |block| (first..=last).contains(block))
    }

    /// How many are set.
    pub(crate) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(crate) fn resident(&self) -> u64 {
        self.words.resident()
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

/// The file, if it is complete, of this size, and belongs to `identity`.
fn open_existing(path: &Path, identity: [u8; 32], size: u64) -> Option<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW);
    let mut file = options.open(path).ok()?;
    let metadata = file.metadata().ok()?;
    let mut found = [0; 44];
    file.read_exact(&mut found).ok()?;
    let allocated = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512 >= size;
    (metadata.is_file() && metadata.len() == size && allocated && found == header(identity))
        .then_some(file)
}

fn create(path: &Path, identity: [u8; 32], size: u64) -> io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = Path::new(&name);
    let _ = std::fs::remove_file(temporary);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let mut file = options.open(temporary)?;
    let filled = allocate(&file, size)
        .and_then(|()| file.write_all(&header(identity)))
        .and_then(|()| std::fs::rename(temporary, path));
    if let Err(error) = filled {
        let _ = std::fs::remove_file(temporary);
        return Err(error);
    }
    Ok(file)
}

fn allocate(file: &File, size: u64) -> io::Result<()> {
    let size = libc::off_t::try_from(size).map_err(io::Error::other)?;
    // SAFETY: no memory is passed.
    let status = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, size) };
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

    #[test]
    fn a_file_system_without_room_is_told_and_nothing_stays() {
        let path = std::env::temp_dir().join(format!("semper-full-{}", std::process::id()));
        assert!(Touched::of_file(&path, [1; 32], 1 << 53).is_err());
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let left = std::fs::read_dir(std::env::temp_dir()).unwrap().filter_map(Result::ok);
        let left: Vec<_> =
            left.filter(|e| e.file_name().to_string_lossy().contains(&name)).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
