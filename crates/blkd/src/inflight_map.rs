//! The in-flight region as shared memory: made here, kept by the front end.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use semper_inflight::format::{DEVICE_RECORD_SIZE, queue_stride, region_size};
use semper_inflight::{DeviceRecord, QueueRegion};

/// Queues of a region, and the entries that each has in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub num_queues: u16,
    pub queue_size: u16,
}

impl Shape {
    pub(crate) fn size(self) -> usize {
        region_size(self.num_queues, self.queue_size)
    }
}

/// A mapped region.
pub(crate) struct InflightMap {
    base: *mut u8,
    len: usize,
    shape: Shape,
}

// SAFETY: an address range; all access to it is atomic, through `QueueRegion`.
unsafe impl Send for InflightMap {}
// SAFETY: as above.
unsafe impl Sync for InflightMap {}

impl Drop for InflightMap {
    fn drop(&mut self) {
        // SAFETY: what `map` mapped; every queue that uses it holds an Arc of it.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// A new, zeroed region as a file that nobody can shrink under us.
///
/// # Errors
/// The system's, when it has no memory or descriptor left.
pub(crate) fn create(shape: Shape) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string; the result is checked and then owned.
    let fd = unsafe { libc::memfd_create(c"semper-inflight".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fd is a new descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(shape.size() as u64)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no memory is passed.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Maps a region that the front end gave back.
///
/// # Errors
/// `InvalidInput` when the file or the range is too small for `shape`; otherwise the system's.
pub(crate) fn map(
    file: &File,
    offset: u64,
    size: u64,
    shape: Shape,
) -> io::Result<Arc<InflightMap>> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
    let len = shape.size();
    if size < len as u64 {
        return Err(invalid("the in-flight region is too small for its queues"));
    }
    let end = offset.checked_add(size).ok_or_else(|| invalid("the in-flight region wraps"))?;
    if file.metadata()?.len() < end {
        return Err(invalid("the file of the in-flight region is shorter than the region"));
    }
    if offset % 4096 != 0 {
        return Err(invalid("the in-flight region does not start on a page"));
    }
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(Arc::new(InflightMap { base: base.cast(), len, shape }))
}

impl InflightMap {
    /// One queue's part, or none where the region has no such queue. The caller keeps the map for
    /// as long as the part.
    pub(crate) fn queue(&self, index: u16) -> Option<QueueRegion> {
        let Shape { num_queues, queue_size } = self.shape;
        (index < num_queues).then(|| {
            let offset = queue_stride(queue_size) * usize::from(index);
            // SAFETY: `map` checked the length for all queues; strides are multiples of 64.
            unsafe { QueueRegion::new(self.base.add(offset), queue_size) }
        })
    }

    /// The device record behind the queues.
    pub(crate) fn device(&self) -> DeviceRecord {
        // SAFETY: the record is the last part of what `map` checked and mapped.
        unsafe { DeviceRecord::new(self.base.add(self.len - DEVICE_RECORD_SIZE)) }
    }
}
