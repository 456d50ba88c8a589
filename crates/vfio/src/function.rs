//! The opened function: its registers, its interrupts, its reset, and what its configuration space says.
//!
//! The guest never reaches the function's own configuration space: what it sees is made by its mediator,
//! and of what it writes there bus mastering alone comes here ([`Function::set_master`]). Memory decoding
//! stays on, for who accesses a mapped register without it is ended by the kernel.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;

use semper_device::{Identity, PAGE, Window};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};

use crate::iommu::Iommu;
use crate::kernel;

const COMMAND: u64 = 0x04;
/// Of the command: memory, bus master, no interrupt by the line.
const MEMORY: u16 = 0x02;
const MASTER: u16 = 0x04;
const NO_LINE: u16 = 0x400;
const CAPABILITIES: usize = 0x34;
const MSIX: u8 = 0x11;

/// Why a function cannot be opened; each says what helps.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another device of the group has a driver of the host.
    #[error(
        "the IOMMU group of {0} has other devices with drivers of the host; bind them to vfio-pci as well \
         (or to no driver), or put the device into another slot"
    )]
    Shared(String),
    /// Somebody else has it.
    #[error("{0} is in use by another process; end the one that has its group open")]
    Busy(String),
    /// There is none, or it does not remap interrupts.
    #[error(
        "no IOMMU that remaps interrupts is there for {address} ({error}); switch it on in the firmware \
         and on the kernel's command line (intel_iommu=on, or amd_iommu=on)"
    )]
    NoIommu {
        /// Of the function.
        address: String,
        /// The kernel's.
        error: io::Error,
    },
    /// It is not in the group.
    #[error("{0} is not in this group; look at /sys/bus/pci/devices/{0}/iommu_group")]
    NotThere(String),
    /// It is none that can be handed on like this.
    #[error("{address} cannot be passed through: {why}")]
    Unfit {
        /// Of the function.
        address: String,
        /// What is missing.
        why: String,
    },
    /// Anything else.
    #[error("cannot {what} of {address}: {error}")]
    System {
        /// Of the function.
        address: String,
        /// What was tried.
        what: &'static str,
        /// The kernel's.
        error: io::Error,
    },
}

/// Registers of the function, mapped.
#[derive(Debug)]
struct Bar {
    base: *mut u8,
    len: u64,
}

// SAFETY: the pointer leads into a mapping that lives as long as the value; accesses are volatile.
unsafe impl Send for Bar {}

impl Drop for Bar {
    fn drop(&mut self) {
        // SAFETY: mapped in `Function::open`; nobody keeps a reference beyond its life.
        unsafe { libc::munmap(self.base.cast(), self.len as usize) };
    }
}

/// The function.
#[derive(Debug)]
pub struct Function {
    address: String,
    // Before the group, which the kernel otherwise calls busy.
    device: File,
    bar: Bar,
    bar_at: u64,
    config_at: u64,
    identity: Identity,
    window: Window,
    master: bool,
    vectors_on: bool,
    wake: File,
    /// Which memory it reaches.
    pub iommu: Iommu,
    _group: File,
}

/// MSI-X: vectors, where the table is, where the pending bits are; each with its BAR in the low bits.
fn msix(config: &[u8]) -> Option<(u16, u32, u32)> {
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| config[at + i]));
    let mut at = usize::from(config[CAPABILITIES] & !3);
    // A list that loops ends nowhere.
    for _ in 0..48 {
        if !(0x40..=0xf4).contains(&at) {
            return None;
        }
        if config[at] == MSIX {
            let vectors = (word(at) >> 16 & 0x7ff) as u16 + 1;
            return Some((vectors, word(at + 4), word(at + 8)));
        }
        at = usize::from(config[at + 1] & !3);
    }
    None
}

/// The BAR as its mediator knows it.
fn window(config: &[u8], size: u64, direct: Option<u64>) -> Result<Window, String> {
    let (vectors, table, pending) = msix(config).ok_or("it has no MSI-X")?;
    if table & 7 != 0 || pending & 7 != 0 {
        return Err("its MSI-X table is not in BAR 0".to_owned());
    }
    let (table, pending) = (u64::from(table), u64::from(pending));
    let pages = [direct.unwrap_or(0) / PAGE, table / PAGE, pending / PAGE];
    let apart = pages[0] != pages[1] && pages[0] != pages[2] && pages[1] != pages[2];
    let fits = size.is_power_of_two()
        && [direct.unwrap_or(0), table, pending]
            .iter()
            .all(|at| at % PAGE == 0 && at + PAGE <= size);
    if !apart || !fits {
        return Err("registers, MSI-X table and pending bits share a page of BAR 0".to_owned());
    }
    Ok(Window { size, direct, table, pending, vectors })
}

fn identity(config: &[u8]) -> Identity {
    let half = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
    Identity {
        ids: (half(0), half(2)),
        subsystem: (half(0x2c), half(0x2e)),
        class: [config[9], config[10], config[11]],
        revision: config[8],
    }
}

impl Function {
    /// Opens the function with this address, of a group, in a new container. `direct` is the page of BAR 0
    /// that the guest is to have mapped, if there is one. The function is reset.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        container: File,
        group: File,
        address: &str,
        direct: Option<u64>,
    ) -> Result<Self, OpenError> {
        let system = |what: &'static str| {
            move |error| OpenError::System { address: address.to_owned(), what, error }
        };
        let unfit = |why: String| OpenError::Unfit { address: address.to_owned(), why };
        let flags = kernel::group_flags(&group).map_err(system("look at the group"))?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(OpenError::Shared(address.to_owned()));
        }
        kernel::set_container(&group, &container).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY | libc::EINVAL) => OpenError::Busy(address.to_owned()),
            _ => system("use the group")(error),
        })?;
        kernel::set_iommu(&container)
            .map_err(|error| OpenError::NoIommu { address: address.to_owned(), error })?;
        let device =
            kernel::device(&group, address).map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => OpenError::Busy(address.to_owned()),
                Some(libc::ENODEV) => OpenError::NotThere(address.to_owned()),
                _ => system("open the device")(error),
            })?;
        let flags = kernel::device_flags(&device).map_err(system("look at the device"))?;
        if flags & VFIO_DEVICE_FLAGS_PCI == 0 || flags & VFIO_DEVICE_FLAGS_RESET == 0 {
            return Err(unfit("it cannot be reset by itself".to_owned()));
        }
        let (_, _, config_at) = kernel::region(&device, VFIO_PCI_CONFIG_REGION_INDEX)
            .map_err(system("find the configuration space"))?;
        let mut config = [0; 256];
        device.read_exact_at(&mut config, config_at).map_err(system("read the configuration"))?;
        let (flags, size, bar_at) =
            kernel::region(&device, VFIO_PCI_BAR0_REGION_INDEX).map_err(system("find BAR 0"))?;
        if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Err(unfit("its BAR 0 cannot be mapped".to_owned()));
        }
        let window = window(&config, size, direct).map_err(unfit)?;
        let len = direct.map_or(PAGE, |direct| direct + PAGE);
        let bar = Self::map(&device, bar_at, len).map_err(system("map the registers"))?;
        // SAFETY: no preconditions; the result is checked and then owned.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(system("make an eventfd for")(io::Error::last_os_error()));
        }
        // SAFETY: a new descriptor that nobody else owns.
        let wake = unsafe { File::from_raw_fd(fd) };
        let mut function = Self {
            address: address.to_owned(),
            device,
            bar,
            bar_at,
            config_at,
            identity: identity(&config),
            window,
            master: false,
            vectors_on: false,
            wake,
            iommu: Iommu::new(container),
            _group: group,
        };
        function.reset().map_err(system("reset"))?;
        Ok(function)
    }

    fn map(device: &File, at: u64, len: u64) -> io::Result<Bar> {
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, device.as_raw_fd());
        let (size, at) = (len as usize, at as libc::off_t);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, fd, at) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Bar { base: base.cast(), len })
    }

    /// Where it is on the host, "0000:01:00.0".
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What its configuration space says.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Its BAR.
    pub fn window(&self) -> Window {
        self.window
    }

    /// The file that its BAR is a mapping of, and where the BAR begins there.
    pub fn registers_file(&self) -> (BorrowedFd<'_>, u64) {
        (self.device.as_fd(), self.bar_at)
    }

    /// What [`Function::set_vectors`] has its first vector write to.
    pub fn wake(&self) -> &File {
        &self.wake
    }

    fn register(&self, at: u64) -> *mut u32 {
        assert!(at % 4 == 0 && at + 4 <= self.bar.len, "no register at {at:#x}");
        // SAFETY: within the mapping.
        unsafe { self.bar.base.add(at as usize).cast() }
    }

    /// A register of 4 bytes.
    ///
    /// # Panics
    /// Where none is mapped.
    pub fn read(&self, at: u64) -> u32 {
        // SAFETY: `register` has checked it.
        u32::from_le(unsafe { self.register(at).read_volatile() })
    }

    /// One of 8.
    ///
    /// # Panics
    /// Where none is mapped.
    pub fn read_long(&self, at: u64) -> u64 {
        u64::from(self.read(at)) | u64::from(self.read(at + 4)) << 32
    }

    /// Writes a register of 4 bytes. What was written to memory before is visible to the function.
    ///
    /// # Panics
    /// Where none is mapped.
    pub fn write(&self, at: u64, value: u32) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        // SAFETY: `register` has checked it.
        unsafe { self.register(at).write_volatile(value.to_le()) };
    }

    /// One of 8, the low half first.
    ///
    /// # Panics
    /// Where none is mapped.
    pub fn write_long(&self, at: u64, value: u64) {
        self.write(at, value as u32);
        self.write(at + 4, (value >> 32) as u32);
    }

    fn command(&self) -> io::Result<()> {
        let master = if self.master { MASTER } else { 0 };
        let command = MEMORY | NO_LINE | master;
        self.device.write_all_at(&command.to_le_bytes(), self.config_at + COMMAND)
    }

    /// Whether it may reach memory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_master(&mut self, on: bool) -> io::Result<()> {
        self.master = on;
        self.command()
    }

    /// Whether it may.
    pub fn is_master(&self) -> bool {
        self.master
    }

    /// Has each vector write to its eventfd, but the first one to [`Function::wake`]. None: MSI-X is off.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_vectors(&mut self, vectors: Option<&[Option<File>]>) -> io::Result<()> {
        let Some(vectors) = vectors else {
            if std::mem::take(&mut self.vectors_on) {
                kernel::set_vectors(&self.device, &[])?;
            }
            return Ok(());
        };
        // All at once: few kernels can add one later.
        let fd = |vector: &Option<File>| vector.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let mut fds: Vec<RawFd> = vectors.iter().map(fd).collect();
        if let Some(first) = fds.first_mut() {
            *first = self.wake.as_raw_fd();
        }
        kernel::set_vectors(&self.device, &fds)?;
        self.vectors_on = true;
        Ok(())
    }

    /// As after power-on, but for the configuration space.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reset(&mut self) -> io::Result<()> {
        kernel::reset(&self.device)?;
        self.command()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(capabilities: &[(usize, &[u8])]) -> [u8; 256] {
        let mut config = [0; 256];
        config[CAPABILITIES] = capabilities.first().map_or(0, |(at, _)| *at as u8);
        for (at, bytes) in capabilities {
            config[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        config
    }

    #[test]
    fn vectors_and_their_table_are_found_behind_other_capabilities() {
        let table = [0x11, 0, 0x40, 0x80, 0, 0x20, 0, 0, 0, 0x30, 0, 0];
        let config = config(&[(0x80, &[0x10, 0x40]), (0x40, &table)]);
        assert_eq!(msix(&config), Some((65, 0x2000, 0x3000)));
        let found = window(&config, 0x4000, Some(0x1000)).unwrap();
        assert_eq!((found.vectors, found.table, found.pending), (65, 0x2000, 0x3000));
        assert!(window(&config, 0x4000, Some(0x2000)).unwrap_err().contains("share"));
        assert!(window(&config, 0x3000, Some(0x1000)).is_err());
    }

    #[test]
    fn a_list_that_loops_or_leads_nowhere_has_none() {
        assert_eq!(msix(&config(&[(0x40, &[1, 0x40])])), None);
        assert_eq!(msix(&config(&[(0x40, &[1, 0xfc])])), None);
        assert_eq!(msix(&config(&[])), None);
        let elsewhere = [0x11, 0, 0, 0, 1, 0x20, 0, 0, 1, 0x30, 0, 0];
        let why = window(&config(&[(0x40, &elsewhere)]), 0x4000, None).unwrap_err();
        assert!(why.contains("BAR 0"));
    }
}
