//! How a profile for a further device is written.
//!
//! A profile is one type in one file that has [`semper_device::Device`] and
//! [`semper_device::hardware::Hardware`], on a [`crate::Function`], which does everything that every PCI
//! function needs. What is left to it is what nobody else can know:
//!
//! | question | where it answers | NVMe's answer |
//! |---|---|---|
//! | Which page of BAR 0 may the guest have mapped? | `Function::open(…, direct)` | 0x1000: doorbells |
//! | Which other registers does a guest see, and which reach the function? | `read`, `write`, `step` | a list; the rest reads as 0 |
//! | What is set up by commands, which no register shows? | `step`: it looks at them before the guest hears of their end | queues, features |
//! | When is nothing in flight? | `in_flight`, on hold | completions against what was fetched |
//! | Which pages has it written? | `bus.wrote`, from `capture(true)` on | ranges of reads, completion queues |
//! | What has to be done for another function to be in that state? | `save`, `restore`, `take_over` | queues made anew and brought to where they were |
//!
//! A profile that cannot answer one of the last four says so in `unmovable`: its guest has the device, and
//! the VM stays where it is. [`Plain`] is such a one, whole: any function with MSI-X in BAR 0, of which
//! nobody knows more than that.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use semper_device::hardware::Hardware;
use semper_device::page::Page;
use semper_device::registers::Register;
use semper_device::{Activity, Bus, Counters, Device, Identity, PAGE, Window};
use semper_ring::GuestMemory;

use crate::function::Function;

/// A function that nobody knows anything of: its first page of registers is handed on, message by message.
pub struct Plain {
    function: Function,
    memory: Arc<GuestMemory>,
}

impl Plain {
    /// Of an opened function.
    pub fn new(function: Function) -> Self {
        Self { function, memory: Arc::new(GuestMemory::empty()) }
    }
}

impl Device for Plain {
    fn kind(&self) -> &'static str {
        "plain-pci"
    }

    fn identity(&self) -> Identity {
        self.function.identity()
    }

    fn window(&self) -> Window {
        self.function.window()
    }

    fn registers(&self) -> Vec<Register> {
        Vec::new()
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) {
        let end = offset.saturating_add(into.len() as u64);
        match into.len() {
            4 | 8 if offset % 4 == 0 && end <= PAGE => {
                for (index, word) in into.chunks_exact_mut(4).enumerate() {
                    let value = self.function.read(offset + 4 * index as u64);
                    word.copy_from_slice(&value.to_le_bytes());
                }
            }
            _ => into.fill(0),
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset.saturating_add(bytes.len() as u64);
        if offset % 4 == 0 && bytes.len() % 4 == 0 && end <= PAGE {
            for (index, word) in bytes.chunks_exact(4).enumerate() {
                let value = u32::from_le_bytes(std::array::from_fn(|i| word[i]));
                self.function.write(offset + 4 * index as u64, value);
            }
        }
    }

    fn step(&mut self, _page: &Page, bus: &mut dyn Bus) -> Activity {
        if take(self.function.wake()) {
            bus.interrupt(0);
            return Activity::Busy;
        }
        Activity::Idle
    }

    fn reset(&mut self) {
        if let Err(error) = self.function.reset() {
            log::warn!("the function was not reset error=\"{error}\"");
        }
    }

    fn is_resetting(&self) -> bool {
        false
    }

    fn hold(&mut self, _hold: bool) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn save(&self) -> String {
        String::new()
    }

    fn restore(&mut self, _: &str, _: &Page, _: bool) -> Result<usize, String> {
        Err("nobody knows what the state of such a device is".to_owned())
    }

    fn owed(&self) -> Vec<u16> {
        Vec::new()
    }

    fn asserts_line(&self) -> bool {
        false
    }

    fn counters(&self) -> Counters {
        Counters::default()
    }

    fn hardware(&self) -> Option<&dyn Hardware> {
        Some(self)
    }

    fn hardware_mut(&mut self) -> Option<&mut dyn Hardware> {
        Some(self)
    }
}

impl Hardware for Plain {
    fn registers_file(&self) -> (BorrowedFd<'_>, u64) {
        self.function.registers_file()
    }

    fn wake(&self) -> BorrowedFd<'_> {
        self.function.wake().as_fd()
    }

    fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), i32> {
        set_memory(&mut self.function, &mut self.memory, memory)
    }

    fn set_master(&mut self, on: bool) {
        set_master(&mut self.function, on);
    }

    fn set_vectors(&mut self, vectors: Option<&[Option<File>]>) -> Result<(), i32> {
        self.function.set_vectors(vectors).map_err(errno)
    }

    fn capture(&mut self, _on: bool) {}

    fn unmovable(&self) -> Option<String> {
        let why = "a device without a profile cannot be moved; give it back before the VM is";
        Some(why.to_owned())
    }

    fn take_over(&mut self) -> Result<(), String> {
        Err("it has no state".to_owned())
    }
}

/// The errno of an error.
pub(crate) fn errno(error: std::io::Error) -> i32 {
    log::warn!("the kernel refused error=\"{error}\"");
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Whether an eventfd was written to; it is 0 again.
pub(crate) fn take(mut wake: &File) -> bool {
    std::io::Read::read(&mut wake, &mut [0; 8]).is_ok()
}

/// The function follows; the memory of before is kept until then.
pub(crate) fn set_memory(
    function: &mut Function,
    kept: &mut Arc<GuestMemory>,
    memory: &Arc<GuestMemory>,
) -> Result<(), i32> {
    function.iommu.follow(memory).map_err(|error| {
        if error.raw_os_error() == Some(libc::ENOMEM) {
            log::error!(
                "the guest's memory cannot be locked for its device; raise the limit (LimitMEMLOCK=infinity, \
                 ulimit -l) to more than that memory"
            );
        }
        errno(error)
    })?;
    *kept = Arc::clone(memory);
    Ok(())
}

/// As the guest has it.
pub(crate) fn set_master(function: &mut Function, on: bool) {
    if function.is_master() != on
        && let Err(error) = function.set_master(on)
    {
        log::warn!("bus mastering was not set on={on} error=\"{error}\"");
    }
}
