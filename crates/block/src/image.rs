//! Opening a raw image or a block device, and what it can do.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::SECTOR_SIZE;
use crate::op::Op;
use crate::partial::PartialWrites;

/// Bytes of which a layer has all or nothing (`crates/layers`).
const LAYER_BLOCK: u32 = 4096;

/// How to open an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Never write to it.
    pub read_only: bool,
    /// Go around the page cache (O_DIRECT).
    pub direct: bool,
    /// Logical block size that the guest shall see, in bytes; by default the one that the image was
    /// partitioned with.
    pub block_size: Option<u32>,
}

/// Why an image cannot be used. Each message names the cause and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is not there.
    #[error("image {0} does not exist; create it (qemu-img create -f raw) or correct the path")]
    Missing(PathBuf),
    /// The file system says no.
    #[error("no permission to open image {path} {how}; change its owner or mode{hint}")]
    Permission {
        /// The image.
        path: PathBuf,
        /// "for reading" or "for writing".
        how: &'static str,
        /// A further remedy, or nothing.
        hint: &'static str,
    },
    /// The medium is read-only.
    #[error("image {0} is on a read-only medium; mount it read-write, or make the disk read-only")]
    ReadOnlyMedium(PathBuf),
    /// Its name leads to something else than what was opened.
    #[error(
        "image {0} was replaced: its name leads to another file or device than the one that was \
         opened, and a guest must not go on with another disk; put the right one there, and start \
         the backend again"
    )]
    Replaced(PathBuf),
    /// Not a file and not a block device.
    #[error("image {0} is neither a regular file nor a block device; give one of these")]
    Kind(PathBuf),
    /// Nothing in it.
    #[error("image {0} is empty; it was truncated or never allocated: restore it, or resize it")]
    Empty(PathBuf),
    /// The file system cannot do O_DIRECT.
    #[error("the file system of image {0} does not support direct I/O; serve it without --direct")]
    Direct(PathBuf),
    /// No disk has such blocks.
    #[error(
        "block size {asked} is none that a disk can have; give a power of two from 512 to 65536, \
         or leave it out"
    )]
    BlockSize {
        /// What was asked for.
        asked: u32,
    },
    /// The image does not end with a whole block.
    #[error(
        "image {path} has {size} bytes, which is no multiple of {block}, {}; make it larger \
         (truncate --size={}), or {}",
        .unit.why(), .size.next_multiple_of(u64::from(*.block)), .unit.way_out()
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The size of a block in bytes.
        block: u32,
        /// Whose blocks these are.
        unit: Unit,
    },
    /// Anything else the system said.
    #[error("cannot open image {path}: {source}")]
    Io {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why an image did not become larger. Each message names the cause and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// Something would be cut off.
    #[error(
        "image {path} has {present} bytes, and would be cut off at {size}: a disk is never made \
         smaller under its guest; name at least its present size"
    )]
    Smaller {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        size: u64,
        /// What it has.
        present: u64,
    },
    /// Disks are made of sectors.
    #[error("{size} bytes are no whole sectors of 512; name {}", .size.next_multiple_of(SECTOR_SIZE))]
    Sectors {
        /// What was asked for.
        size: u64,
    },
    /// Its blocks would not fit.
    #[error(transparent)]
    Unsuitable(ImageError),
    /// Block devices cannot be made larger here.
    #[error(
        "{path} is a block device of {present} bytes; make that one larger first (lvextend, for \
         example), then ask for {size} again"
    )]
    Device {
        /// The device.
        path: PathBuf,
        /// What was asked for.
        size: u64,
        /// What it has.
        present: u64,
    },
    /// What the system said.
    #[error(
        "image {path} cannot be made {size} bytes large: {source}; see what its file system allows"
    )]
    Io {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        size: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// Whose blocks an image has to be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// The guest's.
    Guest,
    /// Those of the storage, for direct I/O.
    Storage,
}

impl Unit {
    fn why(self) -> &'static str {
        match self {
            Self::Guest => "the block size of its guest",
            Self::Storage => "the blocks in which its storage does direct I/O",
        }
    }

    fn way_out(self) -> &'static str {
        match self {
            Self::Guest => "give it blocks of 512 bytes",
            Self::Storage => "serve it without --direct",
        }
    }
}

/// What has become of the name under which an image was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// It leads to the image, or cannot be looked at.
    Kept,
    /// It leads nowhere: who has the image open has all that is left of it.
    Removed,
    /// It leads to something else.
    Replaced,
}

/// An open raw image or block device. All sizes in bytes.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    pinned: bool,
    /// Relaxed: it changes only in [`Image::refresh_size`], and what happens before and after is
    /// ordered by the lock and by the start of the queues.
    file_size: AtomicU64,
    read_only: bool,
    direct: bool,
    block_size: u32,
    memory_alignment: usize,
    transfer_alignment: u32,
    trim_alignment: u32,
    /// Where blocks of the storage are written in part.
    partial_writes: Option<PartialWrites>,
    /// Layers stand above it, which have blocks of 4 KiB as a whole or not at all.
    layered: AtomicBool,
    layered_writes: OnceLock<PartialWrites>,
}

impl Image {
    /// Opens `path`. Takes no lock; see [`Image::try_lock`].
    ///
    /// A path of the form /proc/self/fd/N, a descriptor that was inherited, is opened anew, and is
    /// that file wherever its name leads later: the image is *pinned*, and called by the name that
    /// the file has now.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self, ImageError> {
        let pinned = path.parent() == Some(Path::new("/proc/self/fd"));
        let opened = path;
        let name = if pinned { name_of(path) } else { path.to_owned() };
        let path = &*name;
        let file = open_file(opened, path, options)?;
        let other = |source| ImageError::Io { path: path.to_owned(), source };
        let metadata = file.metadata().map_err(other)?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(ImageError::Kind(path.to_owned()));
        }
        let file_size = size_of(&file).map_err(other)?;
        if file_size == 0 {
            return Err(ImageError::Empty(path.to_owned()));
        }
        let (memory_alignment, transfer_alignment) = if options.direct {
            direct_alignment(&file).ok_or_else(|| ImageError::Direct(path.to_owned()))?
        } else {
            (1, 1)
        };
        // The kernel cuts files anywhere, and devices between their sectors only.
        let trim_alignment = if metadata.is_file() { 1 } else { 1 << device_block_shift(&file) };
        let block_size = match options.block_size {
            Some(asked) if !asked.is_power_of_two() || !(512..=65536).contains(&asked) => {
                return Err(ImageError::BlockSize { asked });
            }
            Some(asked) => asked,
            None => partitioned_for(&file, file_size, transfer_alignment),
        };
        let image = Self {
            file,
            path: path.to_owned(),
            pinned,
            file_size: AtomicU64::new(file_size),
            read_only: options.read_only,
            direct: options.direct,
            block_size,
            memory_alignment,
            transfer_alignment,
            trim_alignment,
            partial_writes: (transfer_alignment > SECTOR_SIZE as u32)
                .then(|| PartialWrites::new(transfer_alignment)),
            layered: AtomicBool::new(false),
            layered_writes: OnceLock::new(),
        };
        image.check_size(file_size)?;
        Ok(image)
    }

    /// Whether an image of this size is of whole blocks. Sectors it need not fill: see
    /// [`Image::capacity`].
    fn check_size(&self, size: u64) -> Result<(), ImageError> {
        let units = [(self.block_size, Unit::Guest), (self.transfer_alignment, Unit::Storage)];
        let wrong = units
            .into_iter()
            .find(|(block, _)| *block > SECTOR_SIZE as u32 && size % u64::from(*block) != 0);
        match wrong {
            None => Ok(()),
            Some((block, unit)) => {
                Err(ImageError::Size { path: self.path.clone(), size, block, unit })
            }
        }
    }

    /// The image's file descriptor.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The open file; its locks are the image's.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether it is this very file that is to be served, whatever its name leads to.
    pub fn pinned(&self) -> bool {
        self.pinned
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file or device.
    pub fn file_size(&self) -> u64 {
        self.file_size.load(Ordering::Relaxed)
    }

    /// Size that the guest sees: whole sectors, the last one perhaps ending beyond the file.
    pub fn capacity(&self) -> u64 {
        self.file_size().next_multiple_of(SECTOR_SIZE)
    }

    /// Looks at the size again, once the lock was taken: until then another process wrote, and may
    /// have made the image larger or smaller. No request may be in flight.
    ///
    /// # Errors
    /// [`ImageError::Empty`], [`ImageError::Size`] or [`ImageError::Io`]; the size that was known
    /// stays.
    pub fn refresh_size(&self) -> Result<(), ImageError> {
        let path = || self.path.clone();
        let size = size_of(&self.file).map_err(|source| ImageError::Io { path: path(), source })?;
        if size == 0 {
            return Err(ImageError::Empty(path()));
        }
        self.check_size(size)?;
        self.file_size.store(size, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the image larger, unless it has that size already; the size that is served stays until
    /// [`Image::refresh_size`]. A block device has to be made larger by whoever it belongs to.
    /// Nothing is ever made smaller.
    ///
    /// # Errors
    /// [`GrowError`]; nothing has changed then.
    pub fn grow(&self, size: u64) -> Result<(), GrowError> {
        let failed = |source| GrowError::Io { path: self.path.clone(), size, source };
        let present = size_of(&self.file).map_err(failed)?;
        let served = self.capacity();
        if size < present.max(served) {
            let (path, present) = (self.path.clone(), present.max(served));
            return Err(GrowError::Smaller { path, size, present });
        }
        if size % SECTOR_SIZE != 0 {
            return Err(GrowError::Sectors { size });
        }
        self.check_size(size).map_err(GrowError::Unsuitable)?;
        if size == present {
            return Ok(());
        }
        if !self.file.metadata().map_err(failed)?.is_file() {
            return Err(GrowError::Device { path: self.path.clone(), size, present });
        }
        self.file.set_len(size).map_err(failed)
    }

    /// Looks whether the image's name still leads to it. A block device is known by its number,
    /// since its node may be made anew; a file by its file system and inode.
    pub fn name(&self) -> Name {
        let identity = |m: &std::fs::Metadata| match m.file_type().is_block_device() {
            true => (true, m.rdev(), 0),
            false => (false, m.dev(), m.ino()),
        };
        match (self.file.metadata(), std::fs::metadata(&self.path)) {
            (Ok(open), Ok(named)) if identity(&open) != identity(&named) => Name::Replaced,
            (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => Name::Removed,
            // What cannot be looked at is not known to have changed.
            _ => Name::Kept,
        }
    }

    /// Lets go of what the page cache holds of the image: before it is served around the cache,
    /// where the kernel would have to look at each request, and after another host may have
    /// written to it. Call it with the lock held.
    pub fn drop_cache(&self) {
        // SAFETY: no memory is passed. Advice; pages that are in use or dirty stay.
        unsafe { libc::posix_fadvise(self.fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }

    /// Enters a request, before its first submission, or says that it has to wait for another, of
    /// any thread, that writes to the same blocks of the storage; then try again soon.
    pub fn try_enter(&self, op: Op, offset: u64, len: u64) -> bool {
        match self.guard() {
            Some(writes) if op.writes() => writes.try_enter(offset, len),
            _ => true,
        }
    }

    /// Takes out a request that was entered, at its end.
    pub fn leave(&self, op: Op, offset: u64, len: u64) {
        if let Some(writes) = self.guard()
            && op.writes()
        {
            writes.leave(offset, len);
        }
    }

    /// What keeps apart writes of parts of blocks: of the storage, or of layers.
    fn guard(&self) -> Option<&PartialWrites> {
        if !self.layered.load(Ordering::Relaxed) {
            return self.partial_writes.as_ref();
        }
        let block = self.transfer_alignment.max(LAYER_BLOCK);
        Some(self.layered_writes.get_or_init(|| PartialWrites::new(block)))
    }

    /// Layers stand above it from now on, or do not any more. No request may be in flight.
    pub fn set_layered(&self, layered: bool) {
        self.layered.store(layered, Ordering::Relaxed);
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the page cache is bypassed.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Logical block size that the guest sees. Smaller requests are served as well.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Bytes that are written at once, however few of them a request names: 4 KiB in the page cache
    /// and on most media.
    pub fn physical_block_size(&self) -> u32 {
        self.transfer_alignment.max(self.trim_alignment).max(self.block_size).max(4096)
    }

    /// Alignment that buffers must have; 1 where any will do.
    pub fn memory_alignment(&self) -> usize {
        self.memory_alignment
    }

    /// Alignment that offset and length of a read or write must have; 1 where any will do.
    pub fn transfer_alignment(&self) -> u32 {
        self.transfer_alignment
    }

    /// Alignment that ranges must have which are discarded or zeroed; 1 where any will do.
    pub fn trim_alignment(&self) -> u32 {
        match self.layered.load(Ordering::Relaxed) {
            true => self.trim_alignment.max(LAYER_BLOCK),
            false => self.trim_alignment,
        }
    }

    /// The blocks of the storage that a request touches, as (offset, bytes).
    pub fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        let mask = u64::from(self.transfer_alignment) - 1;
        let start = offset & !mask;
        (start, ((offset + len + mask) & !mask) - start)
    }

    /// Whether the image is a file on tmpfs, where io_uring sends every request to a worker thread.
    pub fn on_tmpfs(&self) -> bool {
        // The nodes of devices are on a tmpfs as well (devtmpfs), and what they stand for is not.
        let is_file = self.file.metadata().is_ok_and(|metadata| metadata.is_file());
        // SAFETY: statfs is plain data, and fstatfs fills it.
        is_file
            && unsafe {
                let mut fs: libc::statfs = std::mem::zeroed();
                libc::fstatfs(self.fd(), &mut fs) == 0 && fs.f_type == libc::TMPFS_MAGIC
            }
    }
}

/// What a descriptor under /proc is called; the path itself where nobody can say.
fn name_of(descriptor: &Path) -> PathBuf {
    let Ok(name) = std::fs::read_link(descriptor) else { return descriptor.to_owned() };
    let deleted = std::fs::metadata(descriptor).is_ok_and(|metadata| metadata.nlink() == 0);
    let bytes = name.as_os_str().as_encoded_bytes();
    match bytes.strip_suffix(b" (deleted)") {
        Some(bytes) if deleted => std::ffi::OsStr::from_bytes(bytes).into(),
        _ => name,
    }
}

/// Opens what is at `at`; errors call it `path`.
fn open_file(at: &Path, path: &Path, options: OpenOptions) -> Result<File, ImageError> {
    let mut flags = libc::O_CLOEXEC;
    if options.direct {
        flags |= libc::O_DIRECT;
    }
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(at);
    let path = path.to_owned();
    opened.map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => ImageError::Missing(path),
        Some(libc::EACCES | libc::EPERM) if options.read_only => {
            ImageError::Permission { path, how: "for reading", hint: "" }
        }
        Some(libc::EACCES | libc::EPERM) => ImageError::Permission {
            path,
            how: "for writing",
            hint: ", or make the disk read-only",
        },
        Some(libc::EROFS) => ImageError::ReadOnlyMedium(path),
        Some(libc::EISDIR) => ImageError::Kind(path),
        Some(libc::EINVAL) if options.direct => ImageError::Direct(path),
        _ => ImageError::Io { path, source },
    })
}

fn size_of(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    let mut size = 0u64;
    // SAFETY: the ioctl writes one u64 to the address given.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &mut size) } {
        0 => Ok(size),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Alignment of (memory, offset) that O_DIRECT wants, as statx tells it; a safe guess where the
/// kernel is too old to say; `None` where it is not supported.
fn direct_alignment(file: &File) -> Option<(usize, u32)> {
    const STATX_DIOALIGN: u32 = 0x2000;
    // SAFETY: statx is plain data, and the call fills it; the path is an empty C string.
    let (status, stat) = unsafe {
        let mut stat: libc::statx = std::mem::zeroed();
        let status = libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            STATX_DIOALIGN,
            &mut stat,
        );
        (status, stat)
    };
    if status != 0 || stat.stx_mask & STATX_DIOALIGN == 0 {
        return Some((4096, 4096.min(1 << device_block_shift(file))));
    }
    (stat.stx_dio_mem_align > 0)
        .then_some((stat.stx_dio_mem_align as usize, stat.stx_dio_offset_align))
}

/// log2 of the device's logical block size where there is one; 9 for files.
fn device_block_shift(file: &File) -> u32 {
    const BLKSSZGET: libc::c_ulong = 0x1268;
    let mut size: libc::c_int = 512;
    // SAFETY: the ioctl writes one int; on a file it fails and leaves the value.
    unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut size) };
    size.max(512).unsigned_abs().trailing_zeros()
}

/// The block size that an image was partitioned for: with blocks of 4096 bytes the table (GPT)
/// stands in the second of these, and otherwise at byte 512. An image without one is for blocks of
/// 512 bytes, as nearly all are, wherever it is served.
fn partitioned_for(file: &File, size: u64, transfer_alignment: u32) -> u32 {
    const LARGE: usize = 4096;
    const SMALL: usize = SECTOR_SIZE as usize;
    #[repr(align(4096))]
    struct Head([u8; 65536]);
    let mut head = Head([0; 65536]);
    let wanted = (2 * LARGE).max(transfer_alignment as usize).min(head.0.len());
    // What cannot be read is told to the guest when it reads that.
    let read = file.read_at(&mut head.0[..wanted], 0).unwrap_or(0);
    let table_at = |at: usize| head.0[..read].get(at..).is_some_and(|b| b.starts_with(b"EFI PART"));
    let large = table_at(LARGE) && !table_at(SMALL) && size % LARGE as u64 == 0;
    if large { LARGE as u32 } else { SECTOR_SIZE as u32 }
}
