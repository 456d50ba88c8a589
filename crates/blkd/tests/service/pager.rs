//! The front end's side of userfaultfd(2): reads the device's faults, and wakes it.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;

use crate::backend::DEADLINE;

const EVENT_PAGEFAULT: u8 = 0x12;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;

/// The device's faults.
pub struct Pager {
    faults: File,
    /// Where the device has mapped the guest's memory.
    pub base: u64,
}

impl Pager {
    pub fn new(faults: File, base: u64) -> Self {
        Self { faults, base }
    }

    /// Waits until the device touches a page that is missing; gives its address there.
    pub fn wait_fault(&self) -> u64 {
        let mut poll =
            libc::pollfd { fd: self.faults.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the structure lives across the call.
        let ready = unsafe { libc::poll(&mut poll, 1, DEADLINE.as_millis() as i32) };
        assert_eq!(ready, 1, "no page fault within {DEADLINE:?}");
        let mut message = [0; 32];
        assert_eq!((&self.faults).read(&mut message).unwrap(), 32);
        assert_eq!(message[0], EVENT_PAGEFAULT);
        u64::from_ne_bytes(message[16..24].try_into().unwrap()) & !4095
    }

    /// The page is there now.
    pub fn wake(&self, address: u64) {
        let range = [address, 4096u64];
        // SAFETY: the kernel reads the range, which lives across the call.
        let status = unsafe { libc::ioctl(self.faults.as_raw_fd(), UFFDIO_WAKE, range.as_ptr()) };
        assert_eq!(status, 0);
    }
}
