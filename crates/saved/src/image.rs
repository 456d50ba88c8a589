//! The images that a saved state refers to: blocks by content, and the state that a disk is in.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{OFlags, SeekFrom, seek};
use semper_layers::chain::Chain;
use semper_layers::reader::of_image;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::chunk::{Block, is_zero};
use crate::{Error, PAGE};

/// What is read and hashed at once.
const STEP: usize = 1 << 20;
/// The file system whose files do not tell when somebody wrote to a mapping of them.
const TMPFS: u64 = 0x0102_1994;

/// What a disk's state is known by. The hash decides; the rest spares computing it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Bytes.
    pub size: u64,
    /// BLAKE3 over each MiB that is not all zeros, with its place.
    pub hash: String,
    /// Of a file whose file system notes every change: when that was.
    pub stamp: Option<Stamp>,
}

/// A file that was not changed since.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    device: u64,
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Opens what can be read at any place of it. What a request or a saved state names may be a pipe,
/// whose writer never comes.
pub(crate) fn open_file(path: &Path) -> io::Result<File> {
    let nonblock = OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a block device"))
}

/// An image that is open for reading.
#[derive(Debug)]
pub struct Image {
    /// The disk's name in the VM.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    file: File,
    size: u64,
    /// What stands above it.
    chain: Option<Arc<Chain>>,
}

impl Image {
    /// Opens it.
    pub fn open(name: &str, path: &Path) -> Result<Self, Error> {
        let file = open_file(path).map_err(Error::io(format!("open {}", path.display())))?;
        let size = seek(file.as_fd(), SeekFrom::End(0))
            .map_err(|e| Error::io(format!("size of {}", path.display()))(e.into()))?;
        let chain = of_image(path, &file, (false, size));
        let chain = chain.map_err(|e| Error::Disk { disk: name.to_owned(), why: e.to_string() })?;
        Ok(Self { name: name.to_owned(), path: path.to_owned(), file, size, chain })
    }

    /// Makes what was written to it durable.
    pub fn sync(&self) -> Result<(), Error> {
        let doing = || format!("flush {}", self.path.display());
        self.file.sync_all().map_err(Error::io(doing()))?;
        for level in self.chain.iter().flat_map(|chain| &chain.levels) {
            level.data.sync().and_then(|()| level.map.sync()).map_err(Error::io(doing()))?;
        }
        Ok(())
    }

    /// Reads blocks; beyond the end there are zeros.
    pub fn read(&self, block: u64, pages: &mut [u8]) -> Result<(), Error> {
        let doing = || format!("read {}", self.path.display());
        let offset =
            block.checked_mul(PAGE as u64).filter(|offset| *offset < self.size).ok_or_else(
                || Error::corrupt(format!("a block beyond the end of disk {}", self.name)),
            )?;
        if let Some(chain) = &self.chain {
            let read = chain.read_at(pages, offset).map_err(Error::io(doing()))?;
            pages[read..].fill(0);
            return Ok(());
        }
        let mut done = 0;
        while done < pages.len() {
            match self.file.read_at(&mut pages[done..], offset + done as u64) {
                Ok(0) => {
                    pages[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(doing())(error)),
            }
        }
        Ok(())
    }

    fn stamp(&self) -> Option<Stamp> {
        let data = self.file.metadata().ok()?;
        let system = rustix::fs::fstatfs(self.file.as_fd()).ok()?;
        // A write into a layer does not change the image.
        let layered = self.chain.is_some();
        if layered || data.file_type().is_block_device() || system.f_type as u64 == TMPFS {
            return None;
        }
        Some(Stamp {
            device: data.dev(),
            inode: data.ino(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
        })
    }

    /// Goes over everything that is not zero; gives the state, and every such MiB to `visit`.
    fn survey(&self, mut visit: impl FnMut(u64, &[u8])) -> Result<Identity, Error> {
        let stamp = self.stamp();
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; STEP];
        let mut offset = 0;
        while offset < self.size {
            match seek(self.file.as_fd(), SeekFrom::Data(offset)) {
                // Each file has holes where another has data.
                _ if self.chain.is_some() => {}
                Ok(data) => offset = offset.max(data / STEP as u64 * STEP as u64),
                Err(rustix::io::Errno::NXIO) => break,
                Err(_) => {} // no holes are told here
            }
            let part = (self.size - offset).min(STEP as u64) as usize;
            self.read(offset / PAGE as u64, &mut buffer[..part])?;
            if !is_zero(&buffer[..part]) {
                hasher.update(&offset.to_le_bytes());
                hasher.update(blake3::hash(&buffer[..part]).as_bytes());
                visit(offset, &buffer[..part]);
            }
            offset += STEP as u64;
        }
        hasher.update(&self.size.to_le_bytes());
        let hash = hasher.finalize().to_hex().to_string();
        // One that changed meanwhile has a stamp that will not fit.
        Ok(Identity { size: self.size, hash, stamp })
    }

    /// Whether it is in the state that `wanted` describes. Raises [`Error::Disk`].
    pub fn check(&self, wanted: &Identity) -> Result<(), Error> {
        let differs = |why: String| Error::Disk { disk: self.name.clone(), why };
        if self.size != wanted.size {
            return Err(differs(format!("{} bytes, and not {}", self.size, wanted.size)));
        }
        if wanted.stamp.is_some() && self.stamp() == wanted.stamp {
            return Ok(());
        }
        if self.survey(|_, _| {})?.hash == wanted.hash {
            return Ok(());
        }
        Err(differs("its content has changed".to_owned()))
    }
}

/// A hash as its own place in a table.
#[derive(Default)]
pub struct Place(u64);

impl Hasher for Place {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64")
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

/// Blocks by content, of all images.
#[derive(Debug, Default)]
pub struct Blocks {
    by_hash: HashMap<u64, Block, BuildHasherDefault<Place>>,
}

impl Blocks {
    /// Enters all blocks of an image that are not zero, and gives the image's state.
    pub fn enter(&mut self, number: u8, image: &Image) -> Result<Identity, Error> {
        image.survey(|offset, data| {
            for (at, block) in data.chunks_exact(PAGE).enumerate() {
                if !is_zero(block) {
                    let block_number = offset / PAGE as u64 + at as u64;
                    let place = Block { image: number, block: block_number };
                    self.by_hash.entry(XxHash3_64::oneshot(block)).or_insert(place);
                }
            }
        })
    }

    /// The block that is equal to `page`: it is read and compared.
    pub fn find(&self, page: &[u8], images: &[Image], scratch: &mut [u8]) -> Option<Block> {
        let found = *self.by_hash.get(&XxHash3_64::oneshot(page))?;
        images[usize::from(found.image)].read(found.block, scratch).ok()?;
        (scratch == page).then_some(found)
    }
}
