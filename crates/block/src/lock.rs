//! The image lock: one writer, known to QEMU and to ourselves.
//!
//! QEMU marks what it does with an image by open-file-description read locks on single bytes
//! (QEMU `block/file-posix.c`, "Posix file locking bytes"): byte 100 + p for each permission p that
//! it uses, byte 200 + p for each that it does not let others use. We hold the same bytes that a
//! QEMU with this disk would, so that QEMU and qemu-img refuse our image, and we theirs.
//!
//! Read locks do not exclude each other, though: two of our processes that check each other's
//! bytes at the same time would both give up. So one further byte, the *gate*, is write-locked by
//! a backend that writes. It makes a queue: a spare sleeps in the kernel until the gate is free.
//!
//! The locks belong to the open file, not to the process. They are released when its last
//! reference is gone, and an I/O request that the kernel still carries out for a process that was
//! killed holds such a reference: **who has the gate knows that no late write of the dead can
//! land after its own**.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::image::Image;

const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;
/// Outside every byte that QEMU uses.
const GATE: i64 = 0x5356;

// QEMU's permissions (include/block/block-common.h) as bit numbers.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// How long the I/O of a process that was killed may take to end.
const LAST_IO: Duration = Duration::from_secs(5);

/// Who has an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Process identifier.
    pub pid: u32,
    /// Its program's name.
    pub program: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.program, self.pid)
    }
}

/// Why an image could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error(
        "image {path} is in use by {}; stop that first",
        .holder.as_ref().map_or("another process that cannot be seen from here".into(), Holder::to_string)
    )]
    Held {
        /// The image.
        path: PathBuf,
        /// Who, if it could be found out.
        holder: Option<Holder>,
    },
    /// The file system cannot lock.
    #[error("cannot lock image {path}: {source}; the file system must support OFD locks")]
    Io {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Image {
    /// Takes the image for this process, or says who has it.
    ///
    /// A process that was killed holds its locks until the kernel has ended its I/O, which for
    /// io_uring is some milliseconds after the process is gone. A lock that nobody alive seems to
    /// hold is therefore given time.
    ///
    /// # Errors
    /// [`LockError`]; nothing is held then.
    pub fn try_lock(&self) -> Result<(), LockError> {
        let (patience, mut pause) = (Instant::now() + LAST_IO, Duration::from_millis(1));
        loop {
            match self.try_lock_once() {
                Err(LockError::Held { holder: None, .. }) if Instant::now() < patience => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(100));
                }
                decided => return decided,
            }
        }
    }

    fn try_lock_once(&self) -> Result<(), LockError> {
        if !set_lock(self.file(), libc::F_OFD_SETLK, self.gate_kind(), GATE)
            .map_err(|source| self.lock_failed(source))?
        {
            return Err(self.held());
        }
        self.lock_for_qemu()
    }

    /// As [`Image::try_lock`], but asks again for so long, whoever has it: also where this process
    /// cannot look at others (see `semper_walls`), and so cannot tell the living from the dead.
    ///
    /// # Errors
    /// [`LockError`]; nothing is held then.
    pub fn lock_within(&self, patience: Duration) -> Result<(), LockError> {
        let end = Instant::now() + patience;
        loop {
            match self.try_lock_once() {
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
                decided => return decided,
            }
        }
    }

    /// As [`Image::try_lock`], but sleeps until the gate is free.
    ///
    /// # Errors
    /// [`LockError::Held`] when a program that does not know the gate (QEMU) has the image.
    pub fn wait_lock(&self) -> Result<(), LockError> {
        set_lock(self.file(), libc::F_OFD_SETLKW, self.gate_kind(), GATE)
            .map_err(|source| self.lock_failed(source))?;
        self.lock_for_qemu()
    }

    fn gate_kind(&self) -> i32 {
        if self.read_only() { libc::F_RDLCK } else { libc::F_WRLCK }
    }

    fn lock_for_qemu(&self) -> Result<(), LockError> {
        let uses: &[i64] =
            if self.read_only() { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE] };
        let unshared = [WRITE, RESIZE];
        let locks =
            uses.iter().map(|p| USED_BASE + p).chain(unshared.iter().map(|p| UNSHARED_BASE + p));
        for byte in locks {
            let locked = set_lock(self.file(), libc::F_OFD_SETLK, libc::F_RDLCK, byte)
                .map_err(|source| self.lock_failed(source))?;
            if !locked {
                return Err(self.give_up());
            }
        }
        // Ours stand; now, as QEMU does, look whether anybody's stand against them.
        let against =
            uses.iter().map(|p| UNSHARED_BASE + p).chain(unshared.iter().map(|p| USED_BASE + p));
        for byte in against {
            if locked_by_other(self.file(), byte).map_err(|source| self.lock_failed(source))? {
                return Err(self.give_up());
            }
        }
        Ok(())
    }

    /// Gives the image to whoever takes it next. No request may be in flight or be made again
    /// before it was locked again.
    pub fn unlock(&self) {
        for byte in (USED_BASE..USED_BASE + 8).chain(UNSHARED_BASE..UNSHARED_BASE + 8).chain([GATE])
        {
            // Unlocking what is not locked is no error.
            let _ = set_lock(self.file(), libc::F_OFD_SETLK, libc::F_UNLCK, byte);
        }
    }

    fn give_up(&self) -> LockError {
        let error = self.held();
        self.unlock();
        error
    }

    fn held(&self) -> LockError {
        LockError::Held { path: self.path().to_owned(), holder: find_holder(self.file()) }
    }

    fn lock_failed(&self, source: io::Error) -> LockError {
        LockError::Io { path: self.path().to_owned(), source }
    }
}

fn byte_lock(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Ok(false) when another holds it.
fn set_lock(file: &File, command: i32, kind: i32, byte: i64) -> io::Result<bool> {
    let mut lock = byte_lock(kind, byte);
    loop {
        // SAFETY: fcntl reads the structure, which lives across the call.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => return Ok(false),
            Some(libc::EINTR) => {}
            _ => return Err(error),
        }
    }
}

fn locked_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    // SAFETY: fcntl reads and writes the structure, which lives across the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Looks through /proc for the process whose open file has a lock on this image. The kernel does
/// not say who holds an open-file-description lock, but shows each in its holder's fdinfo:
///
/// ```text
///   lock:   1: OFDLCK  ADVISORY  WRITE -1 08:01:1234 100 100
/// ```
///
/// Files that cannot be this image by the number of their inode are not looked at: somebody's may
/// be on a medium that has stopped answering, which would hold up whoever looks.
fn find_holder(file: &File) -> Option<Holder> {
    let image = file.metadata().ok()?;
    let same = |path: PathBuf| {
        fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (image.dev(), image.ino()))
    };
    let number = format!(":{} ", image.ino());
    let own = std::process::id();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(infos) = fs::read_dir(process.path().join("fdinfo")) else { continue };
        for info in infos.flatten() {
            let locked = || {
                fs::read_to_string(info.path()).is_ok_and(|text| {
                    text.lines().any(|l| l.starts_with("lock:") && l.contains(&number))
                })
            };
            let descriptor = process.path().join("fd").join(info.file_name());
            if pid != own && locked() && same(descriptor) {
                let comm = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(Holder { pid, program: comm.trim().to_owned() });
            }
        }
    }
    None
}
