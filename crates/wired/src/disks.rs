//! The shared disks, as an end reads them: never written, never locked, and never believed.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::OFlags;
use semper_blockmap::Page;
use semper_layers::chain::Chain;
use semper_layers::reader::of_image;
use semper_wire::PAGE_SIZE;

use crate::args::{DiskArg, MapSource};
use crate::failure::Failure;

/// Most blocks of one read.
pub(crate) const RUN: usize = 64;

/// One open disk.
#[derive(Debug)]
pub(crate) struct Disk {
    pub name: String,
    pub path: PathBuf,
    pub map: Option<MapSource>,
    pub file: File,
    /// What stands above it, as far as it is on the medium.
    pub chain: Option<Arc<Chain>>,
    /// Bytes.
    pub size: u64,
}

impl Disk {
    /// Block devices are read around the page cache, whose content another host's writes do not
    /// change; files only where that was asked for.
    pub(crate) fn open(arg: &DiskArg) -> Result<Self, Failure> {
        let open = |direct: bool| {
            let flags = if direct { OFlags::DIRECT.bits() as i32 } else { 0 };
            OpenOptions::new().read(true).custom_flags(flags).open(&arg.path)
        };
        let cannot = || Failure::file("open the disk", &arg.path);
        let mut file = open(arg.direct).map_err(cannot())?;
        let kind = file.metadata().map_err(cannot())?.file_type();
        if kind.is_block_device() && !arg.direct {
            file = open(true).map_err(cannot())?;
        }
        if !kind.is_block_device() && !kind.is_file() {
            let path = arg.path.display();
            return Err(Failure::Usage(format!("{path} is neither a file nor a block device")));
        }
        let size = file.seek(SeekFrom::End(0)).map_err(cannot())?;
        let (name, path, map) = (arg.name.clone(), arg.path.clone(), arg.map.clone());
        let chain = of_image(&path, &file, (arg.direct, size))?;
        Ok(Self { name, path, map, file, chain, size })
    }

    /// Whole blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.size / PAGE_SIZE as u64
    }

    /// Reads blocks; they are on the disk.
    pub(crate) fn read<'a>(&self, first: u64, into: &'a mut [Page]) -> Option<&'a [u8]> {
        let bytes = Page::bytes_mut(into);
        let offset = first * PAGE_SIZE as u64;
        match &self.chain {
            None => self.file.read_exact_at(bytes, offset).ok()?,
            Some(chain) => {
                let read = chain.read_at(bytes, offset).ok()?;
                (read == bytes.len()).then_some(())?;
            }
        }
        Some(bytes)
    }
}
