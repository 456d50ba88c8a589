//! What the decoder reads of the shared disks, and the note that the guest has used it.

use std::sync::Arc;

use semper_blockmap::Page;
use semper_wire::{BlockRef, Disks};

use crate::disks::{Disk, RUN};
use crate::touched::Touched;

/// The disks that a source refers to, by its numbers; none where there is no such disk here.
pub(crate) struct DiskReader {
    disks: Vec<Option<Disk>>,
    buffer: Vec<Page>,
    touched: Arc<Touched>,
}

impl DiskReader {
    pub(crate) fn new(disks: Vec<Option<Disk>>, touched: Arc<Touched>) -> Self {
        Self { disks, buffer: vec![Page::default(); RUN], touched }
    }
}

impl Disks for DiskReader {
    fn read(&mut self, first: BlockRef, count: usize) -> Option<&[u8]> {
        #[cfg(feature = "unsafe-no-verify")]
        crate::trial::before_read(first, count);
        let disk = self.disks.get(usize::from(first.disk))?.as_ref()?;
        self.touched.add(first, count as u64);
        disk.read(first.block, self.buffer.get_mut(..count)?)
    }
}
