//! What is asked of the kernel (linux/vfio.h), one function for each ioctl.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_TYPE1v2_IOMMU,
    vfio_device_info, vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
    vfio_region_info,
};

/// `_IO(';', 100 + number)`: linux/vfio.h; the bindings have no macros.
const fn request(number: u64) -> u64 {
    (b';' as u64) << 8 | (100 + number)
}

const SET_IOMMU: u64 = request(2);
const GROUP_GET_STATUS: u64 = request(3);
const GROUP_SET_CONTAINER: u64 = request(4);
const GROUP_GET_DEVICE_FD: u64 = request(6);
const DEVICE_GET_INFO: u64 = request(7);
const DEVICE_GET_REGION_INFO: u64 = request(8);
/// Interrupts to eventfds.
pub const DEVICE_SET_IRQS: u64 = request(10);
/// The function is reset.
pub const DEVICE_RESET: u64 = request(11);
/// The function reaches memory.
pub const IOMMU_MAP_DMA: u64 = request(13);
/// It does not any more.
pub const IOMMU_UNMAP_DMA: u64 = request(14);

/// `argsz` of a structure.
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// # Safety
/// What the request does with `argument` must be sound.
unsafe fn ioctl(file: &File, request: u64, argument: usize) -> io::Result<libc::c_int> {
    // SAFETY: the caller's.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(status) }
}

fn ioctl_on<T>(file: &File, request: u64, structure: &mut T) -> io::Result<libc::c_int> {
    let address = std::ptr::from_mut(structure).addr();
    // SAFETY: the structure is the request's, says its own size, and lives across the call.
    unsafe { ioctl(file, request, address) }
}

/// Flags of a group: VFIO_GROUP_FLAGS_VIABLE, VFIO_GROUP_FLAGS_CONTAINER_SET.
///
/// # Errors
/// The kernel's.
pub fn group_flags(group: &File) -> io::Result<u32> {
    let mut status = vfio_group_status { argsz: size::<vfio_group_status>(), flags: 0 };
    ioctl_on(group, GROUP_GET_STATUS, &mut status).map(|_| status.flags)
}

/// Puts a group into a container.
///
/// # Errors
/// The kernel's; EBUSY: it is in another one.
pub fn set_container(group: &File, container: &File) -> io::Result<()> {
    let mut fd: libc::c_int = container.as_raw_fd();
    ioctl_on(group, GROUP_SET_CONTAINER, &mut fd).map(drop)
}

/// Has a container with a group in it use the IOMMU by type 1, version 2.
///
/// # Errors
/// The kernel's; ENODEV: there is no IOMMU; EPERM: none that remaps interrupts.
pub fn set_iommu(container: &File) -> io::Result<()> {
    // SAFETY: a number is passed.
    unsafe { ioctl(container, SET_IOMMU, VFIO_TYPE1v2_IOMMU as usize) }.map(drop)
}

/// The function with this address, "0000:01:00.0".
///
/// # Errors
/// The kernel's; ENODEV: it is not in the group; EBUSY: another process has it.
pub fn device(group: &File, address: &str) -> io::Result<File> {
    let name = std::ffi::CString::new(address).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads a C string, which lives across the call.
    let fd = unsafe { ioctl(group, GROUP_GET_DEVICE_FD, name.as_ptr().addr()) }?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Flags of a device: VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET.
///
/// # Errors
/// The kernel's.
pub fn device_flags(device: &File) -> io::Result<u32> {
    // SAFETY: plain numbers.
    let mut info: vfio_device_info = unsafe { std::mem::zeroed() };
    info.argsz = size::<vfio_device_info>();
    ioctl_on(device, DEVICE_GET_INFO, &mut info).map(|_| info.flags)
}

/// Of a region: flags, bytes, and where it begins in the device's file.
///
/// # Errors
/// The kernel's.
pub fn region(device: &File, index: u32) -> io::Result<(u32, u64, u64)> {
    // SAFETY: plain numbers.
    let mut info: vfio_region_info = unsafe { std::mem::zeroed() };
    (info.argsz, info.index) = (size::<vfio_region_info>(), index);
    ioctl_on(device, DEVICE_GET_REGION_INFO, &mut info)
        .map(|_| (info.flags, info.size, info.offset))
}

/// The first words of `vfio_irq_set`, which ends with what is set.
fn irq_set(flags: u32, fds: &[RawFd]) -> Vec<u32> {
    let len = 20 + 4 * fds.len() as u32;
    let mut words = vec![len, flags, VFIO_PCI_MSIX_IRQ_INDEX, 0, fds.len() as u32];
    words.extend(fds.iter().map(|fd| *fd as u32));
    words
}

/// Has each vector, from 0 on, write to its eventfd; -1 is none. Without any MSI-X is off.
///
/// # Errors
/// The kernel's.
pub fn set_vectors(device: &File, fds: &[RawFd]) -> io::Result<()> {
    let data = if fds.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
    let words = irq_set(data | VFIO_IRQ_SET_ACTION_TRIGGER, fds);
    // SAFETY: the words are a vfio_irq_set with its data, which says its own length.
    unsafe { ioctl(device, DEVICE_SET_IRQS, words.as_ptr().addr()) }.map(drop)
}

/// Resets the function; its configuration space stays.
///
/// # Errors
/// The kernel's.
pub fn reset(device: &File) -> io::Result<()> {
    // SAFETY: nothing is passed.
    unsafe { ioctl(device, DEVICE_RESET, 0) }.map(drop)
}

/// Lets the devices of a container read and write memory of ours.
///
/// # Safety
/// `host` is mapped, for so many bytes, and whoever uses that memory expects a device to write it.
///
/// # Errors
/// The kernel's; ENOMEM: RLIMIT_MEMLOCK is too low.
pub unsafe fn map(container: &File, address: u64, len: u64, host: usize) -> io::Result<()> {
    let mut map = vfio_iommu_type1_dma_map {
        argsz: size::<vfio_iommu_type1_dma_map>(),
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: host as u64,
        iova: address,
        size: len,
    };
    ioctl_on(container, IOMMU_MAP_DMA, &mut map).map(drop)
}

/// Takes what lies in this range away from them; maps that are there as a whole.
///
/// # Errors
/// The kernel's.
pub fn unmap(container: &File, address: u64, len: u64) -> io::Result<()> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: size::<vfio_iommu_type1_dma_unmap>(),
        flags: 0,
        iova: address,
        size: len,
        data: Default::default(),
    };
    ioctl_on(container, IOMMU_UNMAP_DMA, &mut unmap).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernel() {
        // From linux/vfio.h: VFIO_GET_API_VERSION is _IO(';', 100), MAP_DMA is 113.
        assert_eq!((request(0), IOMMU_MAP_DMA), (0x3b64, 0x3b71));
        assert_eq!((DEVICE_SET_IRQS, DEVICE_RESET, IOMMU_UNMAP_DMA), (0x3b6e, 0x3b6f, 0x3b72));
    }

    #[test]
    fn what_is_set_of_interrupts_says_its_length() {
        assert_eq!(irq_set(0x24, &[7, -1]), [28, 0x24, 2, 0, 2, 7, u32::MAX]);
        assert_eq!(irq_set(0x21, &[]), [20, 0x21, 2, 0, 0]);
    }
}
