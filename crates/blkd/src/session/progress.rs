//! How far a process is with a message, in memory that outlives it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const SIZE: usize = 4096;
/// Of a phase, below the sequence number.
const BITS: u32 = 3;

/// What a process does with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Nothing: it is done.
    Idle,
    /// It was seen; it is carried out, and told to the spares. It is still in the connection.
    Handling,
    /// The answer goes out, or has just gone: the outbox says which.
    Answering,
    /// The spares were told, as far as they listen; it is being taken from the connection.
    Taking,
    /// An answer with files goes out, or has just gone, and nothing says which.
    Sending,
}

/// Sequence number of a message, and what is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub sequence: u64,
    pub phase: Phase,
}

impl Progress {
    fn pack(self) -> u64 {
        self.sequence << BITS | self.phase as u64
    }

    fn unpack(word: u64) -> Self {
        let phase = match word & ((1 << BITS) - 1) {
            0 => Phase::Idle,
            1 => Phase::Handling,
            2 => Phase::Answering,
            3 => Phase::Taking,
            // What nobody writes is taken for the phase that promises least.
            _ => Phase::Sending,
        };
        Self { sequence: word >> BITS, phase }
    }
}

/// A page that one process writes and its spares read.
pub(crate) struct Page {
    file: Arc<OwnedFd>,
    word: *const AtomicU64,
}

// SAFETY: the word is only accessed atomically.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: what `map` mapped; nobody else knows the address.
        unsafe { libc::munmap(self.word.cast_mut().cast(), SIZE) };
    }
}

impl Page {
    /// A page of one's own.
    ///
    /// # Errors
    /// The system's, when it has no memory or descriptor left.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string; the result is checked and then owned.
        let fd = unsafe { libc::memfd_create(c"semper-progress".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fd is a new descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(SIZE as u64)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: no memory is passed.
        if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Self::map(Arc::new(file.into()))
    }

    /// The page of another process.
    ///
    /// # Errors
    /// `InvalidInput` for a file that is too small or that can shrink; otherwise the system's.
    pub(crate) fn map(file: Arc<OwnedFd>) -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        let size = File::from(file.try_clone()?).metadata()?.len();
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 || size < SIZE as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), SIZE, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { file, word: base.cast() })
    }

    pub(crate) fn file(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.file)
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: the first word of a page that stays mapped as long as self, and cannot shrink.
        unsafe { &*self.word }
    }

    pub(crate) fn set(&self, sequence: u64, phase: Phase) {
        self.word().store(Progress { sequence, phase }.pack(), Ordering::SeqCst);
    }

    /// From now on whoever goes by this page gives up: the connection has been gone on with.
    pub(crate) fn end(&self) {
        self.set(u64::MAX >> BITS, Phase::Idle);
    }

    pub(crate) fn get(&self) -> Progress {
        Progress::unpack(self.word().load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_the_file_sees_the_progress() {
        let page = Page::new().unwrap();
        let theirs = Page::map(page.file()).unwrap();
        assert_eq!(theirs.get(), Progress { sequence: 0, phase: Phase::Idle });
        for phase in [Phase::Handling, Phase::Taking, Phase::Answering, Phase::Sending] {
            page.set(7, phase);
            assert_eq!(theirs.get(), Progress { sequence: 7, phase });
        }
        page.end();
        assert_eq!(theirs.get().sequence, u64::MAX >> BITS);
    }

    #[test]
    fn a_file_that_can_shrink_is_refused() {
        let file = File::options().read(true).write(true).open("/dev/zero").unwrap();
        assert!(Page::map(Arc::new(file.into())).is_err());
    }
}
