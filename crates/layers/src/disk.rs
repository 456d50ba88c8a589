//! The files of a real image: beside it, and the maps in memory in a directory on tmpfs.
//!
//! ```text
//!   disk.raw              disk.raw.layers/record  disk.raw.layers/EPOCH-ID  disk.raw.layers/EPOCH-ID.map
//!   MEMORY-EPOCH-ID       MEMORY is the path that was given for it
//! ```
//!
//! They have a directory of their own ([`make_folder`]), so that a process that may make files there
//! can touch nothing else beside the image.
//!
//! A file that takes writes is locked by an open file that nothing but requests use: requests that the
//! kernel still carries out for a dead process hold it. Flushes go through one that has no lock.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use semper_block::{Image, Op, SECTOR_SIZE, Target};
#[cfg(target_arch = "x86_64")]
use semper_block::{Known, Mapping};
use semper_epoch::{Denied, lock, record_path, set_layered};

use crate::BLOCK;
use crate::bits::{Bits, Identity};
use crate::files::{Access, Bytes, Files, Key, Part};

/// Where the files of an image are.
pub struct Disk {
    image: PathBuf,
    base: Arc<dyn Bytes>,
    /// None for who only reads.
    guard: Option<Arc<Image>>,
    direct: bool,
    /// Layers are mapped, for the engine that copies.
    mapped: bool,
    memory: Option<PathBuf>,
    epoch: PathBuf,
}

impl Disk {
    /// The files beside an image that is open. `memory`: where maps are kept that outlive the process,
    /// on tmpfs, as a path to which the layer's number is added; without it no layer can be written.
    /// `epoch`: the epoch record, where it is not beside the image.
    ///
    /// # Errors
    /// The system's.
    pub fn new(
        image: &Arc<Image>,
        mapped: bool,
        memory: Option<PathBuf>,
        epoch: Option<PathBuf>,
    ) -> io::Result<Self> {
        let path = image.path().canonicalize()?;
        let epoch = epoch.map_or_else(|| record_path(&path), Ok)?;
        let base = Arc::new(Base::new(Arc::clone(image))?);
        let guard = Some(Arc::clone(image));
        Ok(Self { image: path, base, guard, direct: image.direct(), mapped, memory, epoch })
    }

    /// For who only reads, and has the image open as `file`.
    ///
    /// # Errors
    /// The system's.
    pub fn for_reading(path: &Path, file: File, direct: bool) -> io::Result<Self> {
        let image = path.canonicalize()?;
        let epoch = record_path(&image)?;
        let base = Arc::new(Plain { flushed: None, mapping: None, file });
        Ok(Self { image, base, guard: None, direct, mapped: false, memory: None, epoch })
    }

    fn path(&self, part: Part) -> PathBuf {
        let name = match part {
            Part::Record => "record".to_owned(),
            Part::Data(key) => format!("{}-{}", key.epoch, key.id),
            Part::Map(key) => format!("{}-{}.map", key.epoch, key.id),
        };
        folder(&self.image).join(name)
    }

    fn memory_path(&self, key: Key) -> io::Result<PathBuf> {
        let path = self
            .memory
            .as_ref()
            .ok_or_else(|| io::Error::other("no place on tmpfs was given for it (--layer-map)"))?;
        Ok(beside(path, &format!("-{}-{}", key.epoch, key.id)))
    }

    /// `new`: nothing was written to it yet.
    fn wrap(
        &self,
        part: Part,
        file: File,
        (access, new): (Access, bool),
    ) -> io::Result<Arc<dyn Bytes>> {
        let again = || File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let flushed = if access == Access::Write { Some(again()?) } else { None };
        #[cfg(target_arch = "x86_64")]
        let mapping = match part {
            Part::Data(_) if self.mapped => {
                let (size, reads) = (file.metadata()?.len(), access == Access::Read);
                let known = if new { Known::NoPage } else { Known::Nothing };
                Some(Mapping::of(file.as_raw_fd(), size, reads, (is_tmpfs(&file), known))?)
            }
            _ => None,
        };
        #[cfg(not(target_arch = "x86_64"))]
        let mapping = None;
        Ok(Arc::new(Plain { flushed, mapping, file }))
    }

    fn options(&self, part: Part, access: Access) -> OpenOptions {
        let direct = if self.direct && matches!(part, Part::Data(_)) { libc::O_DIRECT } else { 0 };
        let mut options = OpenOptions::new();
        let flags = libc::O_CLOEXEC | libc::O_NOFOLLOW | direct;
        options.read(true).write(access == Access::Write).custom_flags(flags).mode(0o600);
        options
    }
}

/// The directory of an image's layers. `image` is its real path.
fn folder(image: &Path) -> PathBuf {
    beside(image, ".layers")
}

/// Makes the directory of an image's layers, on the medium, unless it is there: for a process that can
/// make none later. Gives it.
///
/// # Errors
/// The system's.
pub fn make_folder(image: &Path) -> io::Result<PathBuf> {
    let image = image.canonicalize()?;
    let folder = folder(&image);
    match std::fs::create_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => {
            made?;
            File::open(image.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        }
    }
    Ok(folder)
}

/// What is looked at to read an image's layers: its directory of layers and its epoch record, of
/// these what there is.
pub fn places(image: &Path) -> Vec<PathBuf> {
    let Ok(image) = image.canonicalize() else { return Vec::new() };
    let places = [Some(folder(&image)), record_path(&image).ok()];
    places.into_iter().flatten().filter(|path| path.exists()).collect()
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(ending);
    path.into()
}

fn is_tmpfs(file: &File) -> bool {
    // SAFETY: statfs is plain data, and fstatfs fills it.
    unsafe {
        let mut fs: libc::statfs = std::mem::zeroed();
        libc::fstatfs(file.as_raw_fd(), &mut fs) == 0 && fs.f_type == libc::TMPFS_MAGIC
    }
}

fn refused(denied: Denied) -> io::Error {
    match denied {
        Denied::Io { source, .. } => source,
        other => io::Error::other(other.to_string()),
    }
}

impl Files for Disk {
    fn name(&self, part: Part) -> String {
        self.path(part).display().to_string()
    }

    fn base(&self) -> Arc<dyn Bytes> {
        Arc::clone(&self.base)
    }

    fn open(&self, part: Part, access: Access) -> io::Result<Option<Arc<dyn Bytes>>> {
        let file = match self.options(part, access).open(self.path(part)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match (access, part) {
            (Access::Write, _) => lock(&file, libc::F_WRLCK)?,
            (Access::Read, Part::Record) => lock(&file, libc::F_RDLCK)?,
            (Access::Read, Part::Data(_) | Part::Map(_)) => {}
        }
        self.wrap(part, file, (access, false)).map(Some)
    }

    fn create(&self, part: Part, size: u64) -> io::Result<Arc<dyn Bytes>> {
        self.remove(part)?;
        let file = self.options(part, Access::Write).create_new(true).open(self.path(part))?;
        lock(&file, libc::F_WRLCK)?;
        file.set_len(size)?;
        self.wrap(part, file, (Access::Write, true))
    }

    fn remove(&self, part: Part) -> io::Result<()> {
        match std::fs::remove_file(self.path(part)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(folder(&self.image))?.sync_all()
    }

    fn layers(&self) -> io::Result<Vec<Key>> {
        let mut keys = Vec::new();
        for entry in std::fs::read_dir(folder(&self.image))? {
            let key = entry?.file_name().to_str().and_then(key_of);
            keys.extend(key.filter(|key| !keys.contains(key)));
        }
        Ok(keys)
    }

    fn memory(&self, identity: &Identity) -> io::Result<Arc<Bits>> {
        let key = Key { epoch: identity.writer.epoch, id: identity.layer };
        Bits::of_file(&self.memory_path(key)?, identity).map(Arc::new)
    }

    fn forget(&self, layer: Key) {
        if let Ok(path) = self.memory_path(layer) {
            // What is left is of no use, and gone after a reboot.
            let _ = std::fs::remove_file(path);
        }
    }

    fn mark(&self, layered: bool) -> io::Result<()> {
        set_layered(&self.epoch, layered).map_err(refused)
    }

    fn try_alone(&self, block: u64) -> bool {
        let (op, offset, len) = part_of(block);
        self.guard.as_ref().is_none_or(|image| image.try_enter(op, offset, len))
    }

    fn leave(&self, block: u64) {
        let (op, offset, len) = part_of(block);
        if let Some(image) = &self.guard {
            image.leave(op, offset, len);
        }
    }

    fn is_marked(&self) -> io::Result<bool> {
        let record = semper_epoch::read(&self.epoch).map_err(refused)?;
        Ok(record.is_some_and(|record| record.layered))
    }
}

/// A write of a part of a block, which has the block for itself.
fn part_of(block: u64) -> (Op, u64, u64) {
    (Op::Write { stable: false }, block * BLOCK + SECTOR_SIZE, SECTOR_SIZE)
}

/// EPOCH-ID, or that with ".map".
fn key_of(ending: &str) -> Option<Key> {
    let number = ending.strip_suffix(".map").unwrap_or(ending);
    let (epoch, id) = number.split_once('-')?;
    let key = Key { epoch: epoch.parse().ok()?, id: id.parse().ok()? };
    // Not what somebody has called a file like one of ours.
    (number == format!("{}-{}", key.epoch, key.id)).then_some(key)
}

/// A file of ours.
struct Plain {
    /// Before `file`, whose lock it has not.
    flushed: Option<File>,
    #[cfg(target_arch = "x86_64")]
    mapping: Option<Arc<Mapping>>,
    #[cfg(not(target_arch = "x86_64"))]
    mapping: Option<()>,
    file: File,
}

impl Bytes for Plain {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        read_all(&self.file, into, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        punch(&self.file, offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        sync_apart(self.flushed.as_ref().unwrap_or(&self.file))
    }

    fn size(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.len())
    }

    fn target(&self) -> Target {
        let flushed = self.flushed.as_ref().unwrap_or(&self.file).as_raw_fd();
        target(self.file.as_raw_fd(), flushed, &self.mapping)
    }
}

#[cfg(target_arch = "x86_64")]
fn target(fd: RawFd, flushed: RawFd, mapping: &Option<Arc<Mapping>>) -> Target {
    Target { fd, flushed, mapping: mapping.clone() }
}

#[cfg(not(target_arch = "x86_64"))]
fn target(fd: RawFd, flushed: RawFd, _mapping: &Option<()>) -> Target {
    Target { fd, flushed }
}

/// The image that a backend serves.
struct Base {
    image: Arc<Image>,
    flushed: File,
}

impl Base {
    fn new(image: Arc<Image>) -> io::Result<Self> {
        let flushed = File::open(format!("/proc/self/fd/{}", image.fd()))?;
        Ok(Self { image, flushed })
    }
}

impl Bytes for Base {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        read_all(self.image.file(), into, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.image.file().write_all_at(bytes, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        punch(self.image.file(), offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        sync_apart(&self.flushed)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.image.capacity())
    }

    fn target(&self) -> Target {
        let none = None;
        target(self.image.fd(), self.flushed.as_raw_fd(), &none)
    }
}

/// Flushes a file that has no lock, in a thread that has no other file: a flush is not ended by SIGKILL,
/// and may take seconds, in which the dead process would keep the image from its successor.
fn sync_apart(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    let flush = move || {
        let (fd, below, end) = (fd.unsigned_abs(), fd.unsigned_abs().wrapping_sub(1), u32::MAX);
        // SAFETY: the first call gives this thread a table of files of its own, in which nobody else's
        // are closed. Without it, before Linux 5.9, nothing is closed.
        unsafe {
            let unshare = libc::CLOSE_RANGE_UNSHARE;
            if libc::syscall(libc::SYS_close_range, fd + 1, end, unshare) == 0 && fd > 0 {
                libc::syscall(libc::SYS_close_range, 0u32, below, 0);
            }
            if libc::fdatasync(fd as RawFd) == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        }
    };
    // The descriptor stays open meanwhile: `file` is borrowed until the thread has ended.
    let thread = std::thread::Builder::new().name("flush".into()).spawn(flush)?;
    thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
}

fn read_all(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Makes a hole, or where there are none writes zeros.
fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    const ZEROS: usize = 64 * BLOCK as usize;
    #[repr(align(4096))]
    struct Zeros([u8; ZEROS]);
    static NOTHING: Zeros = Zeros([0; ZEROS]);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (at, n) = (offset as libc::off_t, len as libc::off_t);
    // SAFETY: no memory is passed.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, at, n) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            let mut done = 0;
            while done < len {
                let n = (len - done).min(ZEROS as u64);
                file.write_all_at(&NOTHING.0[..n as usize], offset + done)?;
                done += n;
            }
            Ok(())
        }
        error => Err(error),
    }
}
