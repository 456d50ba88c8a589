//! What a device that is there in hardware needs beside [`crate::Device`]: it reaches the guest's memory
//! and interrupts the guest by itself.
//!
//! A device has it by [`crate::Device::hardware`]; one that we are has none of it.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use semper_ring::GuestMemory;

/// A device in hardware. Who calls is the thread that calls [`crate::Device`], between two steps.
pub trait Hardware {
    /// The file that the guest's page of direct registers is a mapping of, and where its BAR begins there,
    /// in bytes. Who writes to that page writes to the device.
    fn registers_file(&self) -> (BorrowedFd<'_>, u64);

    /// An eventfd: the device wants a step.
    fn wake(&self) -> BorrowedFd<'_>;

    /// From now on this is the guest's memory, for the device as well.
    ///
    /// # Errors
    /// An errno; what the device reaches then is a part of it.
    fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), i32>;

    /// Whether the guest lets it reach memory.
    fn set_master(&mut self, on: bool);

    /// The eventfds of all vectors as the client has set them; `None` without MSI-X. The device interrupts
    /// by them without us, but for those that it keeps to itself and raises in its step.
    ///
    /// # Errors
    /// An errno.
    fn set_vectors(&mut self, vectors: Option<&[Option<File>]>) -> Result<(), i32>;

    /// Its direct registers are written by way of us from now on, and each page that it writes is told to
    /// the bus; or this ends.
    fn capture(&mut self, on: bool);

    /// Why its state cannot be had, and what helps.
    fn unmovable(&self) -> Option<String>;

    /// Before the guest goes on with a state that was restored: makes the hardware have it.
    ///
    /// # Errors
    /// A sentence. It can be tried again.
    fn take_over(&mut self) -> Result<(), String>;
}
