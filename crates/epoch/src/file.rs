//! The file beside the image. Who reads, decides and writes has it locked meanwhile.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::record::{Admission, Claim, FILE_BYTES, Holder, Id, Record, SLOT_BYTES, newest};

/// Why an image must not be written by this process. Each message names the file; nothing was
/// written, unless it is an [`Denied::Io`].
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    /// The image was given away.
    #[error(
        "{path} is held by {} under epoch {}; the claim of {holder} has epoch {}{}; stop what still \
         runs of it here, it must not write",
        .record.holder, .record.epoch, .claim.epoch,
        if .claim.epoch == .record.epoch { " and another id" } else { "" }
    )]
    Stale {
        /// The record's file.
        path: PathBuf,
        /// What is on record.
        record: Box<Record>,
        /// What was refused.
        claim: Claim,
        /// Whose that is.
        holder: Holder,
    },
    /// Somebody has claimed the image, and this process has no claim.
    #[error(
        "{path} is held by {} under epoch {}, and no claim was given; start the VM through the \
         agent, or claim the image (--epoch-file, --epoch, --claim, --holder)",
        .record.holder, .record.epoch
    )]
    Claimed {
        /// The record's file.
        path: PathBuf,
        /// What is on record.
        record: Box<Record>,
    },
    /// Neither empty nor a record.
    #[error(
        "{0} is damaged: it cannot tell who may write the image; make sure that no host uses the \
         image, then remove the file"
    )]
    Damaged(PathBuf),
    /// Of a later release.
    #[error(
        "{path} has version {version}, which this program does not know; use the release that \
         wrote it"
    )]
    Newer {
        /// The record's file.
        path: PathBuf,
        /// The version that it has.
        version: u32,
    },
    /// The system's.
    #[error(
        "cannot use {path}: {source}; check the directory of the image, its permissions and the \
         space in it"
    )]
    Io {
        /// The record's file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Where the record of an image stands; links are followed first, so it stands once.
///
/// # Errors
/// The system's, when the image is not there.
pub fn record_path(image: &Path) -> io::Result<PathBuf> {
    let mut path = image.canonicalize()?.into_os_string();
    path.push(".epoch");
    Ok(path.into())
}

/// Puts on the medium what stands on record, if that is `claim`, and gives it: so that [`admit`]
/// need not, when there is no time. `None` if it is not, or there is no record.
///
/// # Errors
/// [`Denied`].
pub fn confirm(path: &Path, claim: Claim) -> Result<Option<Record>, Denied> {
    let opened = options().read(true).open(path);
    if opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(None);
    }
    let file = EpochFile::locked(path, opened, libc::F_RDLCK)?;
    let Some(record) = file.read()?.filter(|record| record.is_held_by(claim)) else {
        return Ok(None);
    };
    file.sync()?;
    Ok(Some(record))
}

/// Has the file be there, empty if nobody has claimed the image yet: for a process that can make none
/// later.
///
/// # Errors
/// The system's.
pub fn make(path: &Path) -> io::Result<()> {
    match options().write(true).create_new(true).open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Lets a claim write the image, or not. What has to be on record is on the medium at its return,
/// whoever wrote it: that process may have died before it flushed.
///
/// # Errors
/// [`Denied`].
pub fn admit(path: &Path, claim: Claim, holder: &Holder) -> Result<Admission, Denied> {
    admit_confirmed(path, claim, holder, None)
}

/// As [`admit`]; `confirmed` is what is on the medium, as [`confirm`] said, and need not be flushed
/// if it still stands on record.
///
/// # Errors
/// [`Denied`].
pub fn admit_confirmed(
    path: &Path,
    claim: Claim,
    holder: &Holder,
    confirmed: Option<&Record>,
) -> Result<Admission, Denied> {
    let file = EpochFile::create(path)?;
    let record = file.read_or_begin()?;
    let said = record.admit(claim);
    match said {
        Admission::Stale => {
            let (path, record) = (path.to_owned(), Box::new(record));
            return Err(Denied::Stale { path, record, claim, holder: holder.clone() });
        }
        Admission::Renewed if record.is_held_by(claim) => {
            if confirmed != Some(&record) {
                file.sync()?;
            }
        }
        _ => {
            let (holder, Claim { epoch, id }) = (holder.clone(), claim);
            file.write(Record { epoch, claim: id, holder, released: false, ..record })?;
        }
    }
    Ok(said)
}

/// Notes that the holder of a claim ended in order; false if the image was given to another.
///
/// # Errors
/// [`Denied`], but not [`Denied::Stale`].
pub fn release(path: &Path, claim: Claim) -> Result<bool, Denied> {
    let file = EpochFile::create(path)?;
    let held = file.read()?.filter(|record| record.admit(claim) == Admission::Renewed);
    let Some(record) = held else { return Ok(false) };
    file.write(Record { released: true, ..record })?;
    Ok(true)
}

/// Notes whether layers stand above the image; while they do, programs that know none refuse it. On
/// the medium at its return.
///
/// # Errors
/// [`Denied`], but not [`Denied::Stale`].
pub fn set_layered(path: &Path, layered: bool) -> Result<(), Denied> {
    let file = EpochFile::create(path)?;
    let record = file.read_or_begin()?;
    if layered && record.layered && record.sequence > 0 {
        return file.sync();
    }
    if !layered {
        // Into both slots: programs that know no layers refuse a file of which any slot is of a later
        // version.
        file.write(Record { layered, ..record.clone() })?;
        let sequence = record.sequence + 1;
        return file.write(Record { layered, sequence, ..record });
    }
    file.write(Record { layered, ..record })
}

/// The record of an image, without making one.
///
/// # Errors
/// [`Denied`].
pub fn read(path: &Path) -> Result<Option<Record>, Denied> {
    let opened = options().read(true).open(path);
    if opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(None);
    }
    EpochFile::locked(path, opened, libc::F_RDLCK)?.read()
}

/// Refuses an image that somebody has claimed and not released, to one who has no claim.
///
/// # Errors
/// [`Denied`].
pub fn check_unclaimed(image: &Path) -> Result<(), Denied> {
    let path = match record_path(image) {
        Ok(path) => path,
        // An open file without a name, /proc/PID/fd/N: nothing stands beside it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Denied::Io { path: image.to_owned(), source }),
    };
    match read(&path)? {
        Some(record) if record.epoch > 0 && !record.released => {
            Err(Denied::Claimed { path, record: Box::new(record) })
        }
        _ => Ok(()),
    }
}

/// Open and locked until it is dropped.
struct EpochFile<'a> {
    path: &'a Path,
    file: File,
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW).mode(0o600);
    options
}

impl<'a> EpochFile<'a> {
    fn create(path: &'a Path) -> Result<Self, Denied> {
        let mut options = options();
        options.read(true).write(true);
        let opened = options.open(path);
        let new = opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        let opened = if new { options.create(true).open(path) } else { opened };
        Self::locked(path, opened, libc::F_WRLCK)
    }

    /// Flushes the directory, so that the file is found after a power cut.
    fn sync_name(&self) -> Result<(), Denied> {
        let Some(directory) = self.path.parent() else { return Ok(()) };
        // A relative path without a directory has an empty one.
        let here = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        File::open(here).and_then(|d| d.sync_all()).map_err(|e| self.failed(e))
    }

    /// What stands on record, or what is to be written first.
    fn read_or_begin(&self) -> Result<Record, Denied> {
        if let Some(record) = self.read()? {
            return Ok(record);
        }
        // Whoever made the file flushes its name before it writes a record.
        self.sync_name()?;
        Ok(Record { image: new_id().map_err(|e| self.failed(e))?, ..Record::default() })
    }

    fn sync(&self) -> Result<(), Denied> {
        self.file.sync_data().map_err(|error| self.failed(error))
    }

    fn locked(path: &'a Path, opened: io::Result<File>, kind: i32) -> Result<Self, Denied> {
        let file = opened.and_then(|file| lock(&file, kind).map(|()| file));
        match file {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(Denied::Io { path: path.to_owned(), source }),
        }
    }

    fn read(&self) -> Result<Option<Record>, Denied> {
        let mut content = [0; FILE_BYTES];
        let mut length = 0;
        while length < FILE_BYTES {
            match self.file.read_at(&mut content[length..], length as u64) {
                Ok(0) => break,
                Ok(n) => length += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        let content = &content[..length];
        match newest(content) {
            Ok(None) if content.iter().any(|&byte| byte != 0) => {
                Err(Denied::Damaged(self.path.to_owned()))
            }
            Ok(found) => Ok(found),
            Err(newer) => Err(Denied::Newer { path: self.path.to_owned(), version: newer.version }),
        }
    }

    /// Into the slot that is not in force: a write that is cut off leaves the record before it.
    fn write(&self, record: Record) -> Result<(), Denied> {
        let sequence = record.sequence.checked_add(1);
        // No writer gets there; and one more would be a zero, which is never valid.
        let sequence = sequence.ok_or_else(|| Denied::Damaged(self.path.to_owned()))?;
        let slot = Record { sequence, ..record }.encode();
        let at = sequence % 2 * SLOT_BYTES as u64;
        self.file.write_all_at(&slot, at).map_err(|error| self.failed(error))?;
        self.sync()
    }

    fn failed(&self, source: io::Error) -> Denied {
        Denied::Io { path: self.path.to_owned(), source }
    }
}

/// Waits for a lock on the whole file (`F_RDLCK`, `F_WRLCK`); it ends with the open file.
///
/// # Errors
/// The system's.
pub fn lock(file: &File, kind: i32) -> io::Result<()> {
    let everything = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    loop {
        // SAFETY: fcntl reads the structure, which lives across the call.
        let status =
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLKW, &raw const everything) };
        match status {
            0 => return Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// Sixteen random bytes: an id that nothing else has.
///
/// # Errors
/// The system's.
pub fn new_id() -> io::Result<Id> {
    let mut id = Id::default();
    // SAFETY: the kernel writes at most as many bytes as it is told.
    let got = unsafe { libc::getrandom(id.0.as_mut_ptr().cast(), id.0.len(), 0) };
    if got == id.0.len() as isize { Ok(id) } else { Err(io::Error::last_os_error()) }
}
