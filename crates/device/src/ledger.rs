//! What the next process has to know of a device, in memory that outlives this one.
//!
//! ```text
//!      0  magic u32 "SVLG" │ version u32 │ number of words u64 │ 4 marks u64
//!     64  cells: of each  sequence u64 │ bytes of text 0 u64 │ of text 1 u64 │ 0      (sequence 0: empty)
//!   4096  texts: of each cell two of 128 KiB; the one with the number `sequence % 2` counts
//!      …  words u64
//! ```
//!
//! A process can die between any two stores. So a text is written where the one that counts is not, and
//! then one store makes it the one that counts. What changes with each request has no time for that: it is
//! in words, of which a device says in what order it writes them. All numbers are the processor's own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: u32 = u32::from_ne_bytes(*b"SVLG");
/// Changes whenever another release could misunderstand what it finds.
const VERSION: u32 = 1;
const MARK: usize = 16;
const MARKS: usize = 4;
const CELLS: usize = 2;
const HEADS: usize = 64;
const HEAD: usize = 32;
const TEXTS: usize = 4096;
/// Bytes of a text at most.
pub const TEXT_MOST: usize = 128 << 10;
const WORDS: usize = TEXTS + 2 * CELLS * TEXT_MOST;
/// Words that a device may ask for.
const WORDS_MOST: usize = 1 << 20;

/// Whose text it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// The mediator's own.
    Mediator,
    /// The device's.
    Device,
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    base: *mut u8,
    len: usize,
    words: usize,
}

// SAFETY: the pointer leads into a mapping that lives as long as the ledger. Words are accessed by
// atomics, and texts by the one thread that writes them, or by a process that comes after that thread.
unsafe impl Send for Ledger {}
// SAFETY: as above.
unsafe impl Sync for Ledger {}

impl Ledger {
    /// An empty one with so many words.
    ///
    /// # Errors
    /// The system's.
    pub fn new(words: usize) -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a string; the result is checked and then owned.
        let fd = unsafe { libc::memfd_create(c"ledger".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len((WORDS + 8 * words) as u64)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: no memory is passed.
        if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let ledger = Self::map(file, words)?;
        ledger.at(8).store(words as u64, Ordering::Relaxed);
        ledger.at(0).store(u64::from(VERSION) << 32 | u64::from(MAGIC), Ordering::Release);
        Ok(ledger)
    }

    /// That of another process.
    ///
    /// # Errors
    /// The system's; `InvalidData` for what is no ledger of this version.
    pub fn open(file: File) -> io::Result<Self> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        // SAFETY: no memory is passed.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals & libc::F_SEAL_SHRINK == 0 {
            return Err(invalid("a ledger that could be cut off"));
        }
        let words = usize::try_from(file.metadata()?.len()).ok().and_then(|len| {
            len.checked_sub(WORDS).map(|len| len / 8).filter(|words| *words <= WORDS_MOST)
        });
        let words = words.ok_or_else(|| invalid("a ledger of another size"))?;
        let ledger = Self::map(file, words)?;
        let begin = ledger.at(0).load(Ordering::Acquire);
        let known = begin == u64::from(VERSION) << 32 | u64::from(MAGIC)
            && ledger.at(8).load(Ordering::Relaxed) == words as u64;
        if known { Ok(ledger) } else { Err(invalid("a ledger of another version")) }
    }

    fn map(file: File, words: usize) -> io::Result<Self> {
        let len = WORDS + 8 * words;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let mapped = unsafe {
            let fd = file.as_raw_fd();
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { file, base: mapped.cast(), len, words })
    }

    fn at(&self, offset: usize) -> &AtomicU64 {
        assert!(offset % 8 == 0 && offset + 8 <= self.len, "{offset} is no word of a ledger");
        // SAFETY: inside the mapping, which is aligned for words and lives as long as `self`.
        unsafe { &*self.base.add(offset).cast() }
    }

    /// How many words there are.
    pub fn words(&self) -> usize {
        self.words
    }

    /// A word.
    ///
    /// # Panics
    /// When there is no such word.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words, "word {index} of {}", self.words);
        self.at(WORDS + 8 * index)
    }

    /// A word of the mediator's own.
    ///
    /// # Panics
    /// When there is no such word.
    pub fn mark(&self, index: usize) -> &AtomicU64 {
        assert!(index < MARKS, "mark {index} of {MARKS}");
        self.at(MARK + 8 * index)
    }

    fn text(cell: Cell, number: u64) -> usize {
        TEXTS + (2 * cell as usize + (number % 2) as usize) * TEXT_MOST
    }

    /// Puts a text into a cell, in place of the one that is there: all of it, or nothing. False for a
    /// text that is too long.
    pub fn put(&self, cell: Cell, text: &str) -> bool {
        if text.len() > TEXT_MOST {
            return false;
        }
        let head = HEADS + cell as usize * HEAD;
        let next = self.at(head).load(Ordering::Relaxed) + 1;
        // SAFETY: room for the longest text is there, and nobody reads this one before it counts.
        unsafe {
            let to = self.base.add(Self::text(cell, next));
            std::ptr::copy_nonoverlapping(text.as_ptr(), to, text.len());
        }
        let len = self.at(head + 8 + 8 * (next % 2) as usize);
        len.store(text.len() as u64, Ordering::Release);
        self.at(head).store(next, Ordering::Release);
        true
    }

    /// The text of a cell, if there is one.
    pub fn get(&self, cell: Cell) -> Option<String> {
        let head = HEADS + cell as usize * HEAD;
        let number = self.at(head).load(Ordering::Acquire);
        let len = self.at(head + 8 + 8 * (number % 2) as usize).load(Ordering::Acquire);
        let len = usize::try_from(len).ok().filter(|len| *len <= TEXT_MOST && number > 0)?;
        let mut bytes = vec![0; len];
        // SAFETY: inside the mapping; what is copied is judged only after this one copy.
        unsafe {
            let from = self.base.add(Self::text(cell, number));
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len);
        }
        String::from_utf8(bytes).ok()
    }
}

impl AsFd for Ledger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`; nobody keeps a reference beyond the ledger's life.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_finds_the_last_text_and_every_word() {
        let ledger = Ledger::new(3).unwrap();
        let other = || Ledger::open(ledger.file.try_clone().unwrap()).unwrap();
        assert_eq!((other().get(Cell::Device), other().words()), (None, 3));
        for text in ["one", "two and more", "3"] {
            assert!(ledger.put(Cell::Device, text));
            assert_eq!(other().get(Cell::Device).as_deref(), Some(text));
        }
        assert!(ledger.put(Cell::Mediator, &"m".repeat(TEXT_MOST)));
        assert!(!ledger.put(Cell::Mediator, &"n".repeat(TEXT_MOST + 1)));
        assert_eq!(other().get(Cell::Mediator).unwrap().len(), TEXT_MOST);
        assert_eq!(other().get(Cell::Device).as_deref(), Some("3"));
        ledger.word(2).store(7, Ordering::Relaxed);
        assert_eq!(other().word(2).load(Ordering::Relaxed), 7);
    }

    #[test]
    fn a_text_of_which_only_a_part_was_written_does_not_count() {
        let ledger = Ledger::new(0).unwrap();
        ledger.put(Cell::Device, "whole");
        // As far as a process comes that dies before the last store.
        let next = ledger.at(HEADS + HEAD).load(Ordering::Relaxed) + 1;
        // SAFETY: as in `put`.
        unsafe { *ledger.base.add(Ledger::text(Cell::Device, next)) = b'x' };
        ledger.at(HEADS + HEAD + 8 + 8 * (next % 2) as usize).store(1, Ordering::Relaxed);
        assert_eq!(ledger.get(Cell::Device).as_deref(), Some("whole"));
    }

    #[test]
    fn what_is_no_ledger_is_refused() {
        let ledger = Ledger::new(1).unwrap();
        ledger.at(0).store(1, Ordering::Relaxed);
        assert!(Ledger::open(ledger.file.try_clone().unwrap()).is_err());
        let file = File::open("/dev/null").unwrap();
        assert!(Ledger::open(file).is_err());
    }
}
