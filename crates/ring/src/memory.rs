//! The guest's memory, as the front end describes it: regions of files, mapped shared.

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

/// One region as it stands in a vhost-user memory table. All addresses and sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest-physical address of the first byte.
    pub guest_addr: u64,
    /// Length of the region.
    pub size: u64,
    /// The same first byte in the front end's address space (ring addresses are given in it).
    pub user_addr: u64,
    /// Where in the file the region starts.
    pub file_offset: u64,
}

/// Device and inode of the file behind a region; zeros for anonymous memory.
pub type FileId = (u64, u64);

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The region is empty, or its end does not fit 64 bits.
    #[error("memory region {0:?} is empty or wraps around the address space")]
    Invalid(RegionSpec),
    /// The file behind the region ends before the region does; touching it would be a SIGBUS.
    #[error("memory region {spec:?} needs {needed} bytes, but its file has {actual}")]
    FileTooShort {
        /// The region.
        spec: RegionSpec,
        /// Bytes that the file would have to have.
        needed: u64,
        /// Bytes that it has.
        actual: u64,
    },
    /// Two regions claim the same addresses.
    #[error("memory region {0:?} overlaps another region")]
    Overlap(RegionSpec),
    /// The region to remove is not there.
    #[error("memory region {0:?} is not in the table")]
    Unknown(RegionSpec),
    /// `mmap` or `fstat` failed.
    #[error("cannot map a memory region: {0}")]
    Map(#[from] std::io::Error),
}

struct Mapping {
    base: *mut u8,
    len: usize,
    /// None for anonymous memory.
    file: Option<File>,
}

// SAFETY: a mapping is only an address range; all access to it goes through raw pointers whose
// users state their own synchronisation (the guest writes it concurrently in any case).
unsafe impl Send for Mapping {}
// SAFETY: as above; `Mapping` has no interior state.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are what mmap returned; nobody holds a pointer into a mapping
        // beyond the life of the `GuestMemory` that keeps it alive.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

#[derive(Clone)]
struct Region {
    spec: RegionSpec,
    host: *mut u8,
    file: FileId,
    // Kept alive for as long as any table that names this region is.
    mapping: Arc<Mapping>,
}

/// An immutable table of mapped guest memory; a change makes a new table.
///
/// Regions never overlap in guest-physical space. They are sorted by guest address.
#[derive(Clone, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

// SAFETY: see `Mapping`; the table itself is immutable.
unsafe impl Send for GuestMemory {}
// SAFETY: see `Mapping`; the table itself is immutable.
unsafe impl Sync for GuestMemory {}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|r| r.spec)).finish()
    }
}

impl GuestMemory {
    /// A table with no memory at all.
    pub fn empty() -> Self {
        Self::default()
    }

    /// One region of anonymous memory at guest address `guest_addr`; for tests and fuzzing.
    ///
    /// # Errors
    /// [`MemoryError::Map`] when the kernel has no memory.
    pub fn anonymous(guest_addr: u64, size: usize) -> Result<Self, MemoryError> {
        let spec =
            RegionSpec { guest_addr, size: size as u64, user_addr: guest_addr, file_offset: 0 };
        let mapping = map(None, size, 0)?;
        let host = mapping.base;
        Ok(Self { regions: vec![Region { spec, host, file: (0, 0), mapping: Arc::new(mapping) }] })
    }

    /// This table and one more region, backed by `file`.
    ///
    /// # Errors
    /// Any [`MemoryError`]; the present table is unchanged.
    pub fn with_region(&self, spec: RegionSpec, file: &File) -> Result<Self, MemoryError> {
        let end = spec
            .file_offset
            .checked_add(spec.size)
            .filter(|_| spec.size > 0)
            .filter(|_| spec.guest_addr.checked_add(spec.size).is_some())
            .filter(|_| spec.user_addr.checked_add(spec.size).is_some())
            .ok_or(MemoryError::Invalid(spec))?;
        let metadata = file.metadata()?;
        // A character device (a passed-through BAR, say) reports no length; mmap judges it.
        if metadata.is_file() && metadata.len() < end {
            return Err(MemoryError::FileTooShort { spec, needed: end, actual: metadata.len() });
        }
        let overlaps = |r: &Region| {
            spec.guest_addr < r.spec.guest_addr + r.spec.size
                && r.spec.guest_addr < spec.guest_addr + spec.size
        };
        if self.regions.iter().any(overlaps) {
            return Err(MemoryError::Overlap(spec));
        }
        // mmap wants a page-aligned offset; the front end need not give one.
        let lead = spec.file_offset % page_size();
        let len = usize::try_from(spec.size + lead).map_err(|_| MemoryError::Invalid(spec))?;
        let mapping = map(Some(file), len, spec.file_offset - lead)?;
        // SAFETY: lead < len, so the pointer stays inside the mapping.
        let host = unsafe { mapping.base.add(lead as usize) };
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|r| r.spec.guest_addr < spec.guest_addr);
        let file = (metadata.dev(), metadata.ino());
        regions.insert(at, Region { spec, host, file, mapping: Arc::new(mapping) });
        Ok(Self { regions })
    }

    /// This table without the region that has the same addresses and size as `spec`.
    ///
    /// # Errors
    /// [`MemoryError::Unknown`] when there is none.
    pub fn without_region(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let same = |r: &Region| {
            (r.spec.guest_addr, r.spec.size, r.spec.user_addr)
                == (spec.guest_addr, spec.size, spec.user_addr)
        };
        let at = self.regions.iter().position(same).ok_or(MemoryError::Unknown(spec))?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self { regions })
    }

    /// The regions, in order of guest address.
    pub fn specs(&self) -> impl Iterator<Item = RegionSpec> + '_ {
        self.regions.iter().map(|r| r.spec)
    }

    /// The regions with the host pointer of their first byte and the file behind them.
    pub fn mapped(&self) -> impl Iterator<Item = (RegionSpec, *mut u8, FileId)> + '_ {
        self.regions.iter().map(|r| (r.spec, r.host, r.file))
    }

    /// Whether every page of every region is there; one that is not would come as zeros. Touches
    /// none.
    ///
    /// # Errors
    /// The kernel's: the files behind some regions cannot tell.
    pub fn is_present(&self) -> std::io::Result<bool> {
        for region in &self.regions {
            let Some(file) = &region.mapping.file else { continue };
            let (start, size) = (region.spec.file_offset as i64, region.spec.size as i64);
            // SAFETY: no memory is passed. Nobody reads these files by their offset.
            let hole = unsafe { libc::lseek(file.as_raw_fd(), start, libc::SEEK_HOLE) };
            if hole < 0 {
                return Err(std::io::Error::last_os_error());
            }
            if hole < start + size {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Calls `each` with host pointers that together cover `[addr, addr + len)`, in order.
    ///
    /// A buffer may cross from one region into an adjacent one. Returns false, perhaps after
    /// some calls, if any byte is not guest memory.
    #[inline]
    pub fn for_each_slice(
        &self,
        addr: u64,
        len: u64,
        mut each: impl FnMut(*mut u8, usize),
    ) -> bool {
        let (mut addr, mut left) = (addr, len);
        while left > 0 {
            let Some(region) = self.region_at(addr) else { return false };
            let skip = addr - region.spec.guest_addr;
            let here = left.min(region.spec.size - skip);
            // SAFETY: skip < size, so the pointer is inside the mapping, and `here` bytes follow.
            each(unsafe { region.host.add(skip as usize) }, here as usize);
            left -= here;
            match addr.checked_add(here) {
                Some(next) => addr = next,
                None => return left == 0,
            }
        }
        true
    }

    /// Host pointer of a guest-physical range that lies within one region.
    #[inline]
    pub fn translate(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let region = self.region_at(addr)?;
        let skip = addr - region.spec.guest_addr;
        // SAFETY: skip < size (region_at), so the pointer is inside the mapping.
        (len <= region.spec.size - skip).then(|| unsafe { region.host.add(skip as usize) })
    }

    /// Host pointer of a range given in the front end's addresses, within one region.
    pub fn translate_user(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let region = self
            .regions
            .iter()
            .find(|r| addr >= r.spec.user_addr && addr - r.spec.user_addr < r.spec.size)?;
        let skip = addr - region.spec.user_addr;
        // SAFETY: skip < size, so the pointer is inside the mapping.
        (len <= region.spec.size - skip).then(|| unsafe { region.host.add(skip as usize) })
    }

    /// Guest-physical address of a host pointer into the table.
    pub fn guest_address(&self, ptr: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let skip = (ptr.addr() as u64).checked_sub(region.host.addr() as u64)?;
            (skip < region.spec.size).then_some(region.spec.guest_addr + skip)
        })
    }

    #[inline]
    fn region_at(&self, addr: u64) -> Option<&Region> {
        // A VM has a handful of regions and nearly all buffers lie in one: a scan beats a search.
        self.regions
            .iter()
            .find(|r| addr >= r.spec.guest_addr && addr - r.spec.guest_addr < r.spec.size)
    }
}

fn page_size() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

fn map(file: Option<&File>, len: usize, offset: u64) -> Result<Mapping, std::io::Error> {
    let flags = match file {
        Some(_) => libc::MAP_SHARED | libc::MAP_NORESERVE,
        None => libc::MAP_SHARED | libc::MAP_ANONYMOUS,
    };
    let offset = libc::off_t::try_from(offset)
        .map_err(|_| std::io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            file.map_or(-1, AsRawFd::as_raw_fd),
            offset,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    // A core file of this process would otherwise hold the guest's memory: that takes seconds, in
    // which the image is locked, and leaves the guest's secrets on the disk. A kernel that does not
    // know the advice works as well.
    // SAFETY: the advice changes what a core file holds, and no memory.
    unsafe { libc::madvise(base, len, libc::MADV_DONTDUMP) };
    Ok(Mapping { base: base.cast(), len, file: file.map(File::try_clone).transpose()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    fn memfd(len: u64) -> File {
        // SAFETY: memfd_create returns a new descriptor, which the File then owns.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        file.set_len(len).unwrap();
        file
    }

    fn spec(guest_addr: u64, size: u64, file_offset: u64) -> RegionSpec {
        RegionSpec { guest_addr, size, user_addr: guest_addr.wrapping_add(1 << 40), file_offset }
    }

    #[test]
    fn a_buffer_may_cross_adjacent_regions_but_not_a_hole() {
        let file = memfd(0x6000);
        let mem = GuestMemory::empty()
            .with_region(spec(0x1000, 0x1000, 0), &file)
            .and_then(|m| m.with_region(spec(0x2000, 0x1000, 0x1000), &file))
            .and_then(|m| m.with_region(spec(0x8000, 0x1000, 0x2000), &file))
            .unwrap();
        let mut pieces = Vec::new();
        assert!(mem.for_each_slice(0x1f00, 0x200, |_, len| pieces.push(len)));
        assert_eq!(pieces, [0x100, 0x100]);
        assert!(!mem.for_each_slice(0x2f00, 0x200, |_, _| ()));
        assert!(mem.translate(0x1f00, 0x100).is_some());
        assert!(mem.translate(0x1f00, 0x101).is_none());
        assert!(mem.translate_user((1 << 40) + 0x8fff, 1).is_some());
        assert!(mem.translate(u64::MAX, 1).is_none());
    }

    #[test]
    fn a_file_shorter_than_its_region_is_refused_before_it_can_fault() {
        let error = GuestMemory::empty().with_region(spec(0, 0x2000, 0x1000), &memfd(0x2fff));
        assert!(matches!(error, Err(MemoryError::FileTooShort { needed: 0x3000, .. })));
    }

    #[test]
    fn overlapping_empty_and_wrapping_regions_are_refused() {
        let file = memfd(0x4000);
        let mem = GuestMemory::empty().with_region(spec(0x1000, 0x2000, 0), &file).unwrap();
        assert!(matches!(mem.with_region(spec(0x2fff, 1, 0), &file), Err(MemoryError::Overlap(_))));
        assert!(matches!(mem.with_region(spec(0x9000, 0, 0), &file), Err(MemoryError::Invalid(_))));
        let wrap = RegionSpec { user_addr: 0, ..spec(u64::MAX - 5, 10, 0) };
        assert!(matches!(mem.with_region(wrap, &file), Err(MemoryError::Invalid(_))));
    }

    #[test]
    fn an_unaligned_file_offset_maps_the_right_bytes() {
        let file = memfd(0x3000);
        std::os::unix::fs::FileExt::write_all_at(&file, b"hello", 0x1234).unwrap();
        let mem = GuestMemory::empty().with_region(spec(0, 0x100, 0x1234), &file).unwrap();
        let ptr = mem.translate(0, 5).unwrap();
        // SAFETY: translate checked the five bytes.
        assert_eq!(unsafe { std::ptr::read(ptr.cast::<[u8; 5]>()) }, *b"hello");
    }

    #[test]
    fn a_page_that_nobody_wrote_is_not_present() {
        let file = memfd(0x4000);
        let mem = GuestMemory::empty()
            .with_region(spec(0, 0x1000, 0), &file)
            .and_then(|m| m.with_region(spec(0x1000, 0x1000, 0x2000), &file))
            .unwrap();
        assert!(!mem.is_present().unwrap());
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0).unwrap();
        assert!(!mem.is_present().unwrap());
        // The hole between the regions is nobody's.
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0x2fff).unwrap();
        assert!(mem.is_present().unwrap());
    }

    #[test]
    fn removing_a_region_leaves_the_others() {
        let file = memfd(0x2000);
        let mem = GuestMemory::empty()
            .with_region(spec(0, 0x1000, 0), &file)
            .and_then(|m| m.with_region(spec(0x1000, 0x1000, 0x1000), &file))
            .unwrap();
        let mem = mem.without_region(spec(0, 0x1000, 0)).unwrap();
        assert!(mem.translate(0, 1).is_none() && mem.translate(0x1000, 1).is_some());
        assert!(mem.without_region(spec(0, 0x1000, 0)).is_err());
    }
}
