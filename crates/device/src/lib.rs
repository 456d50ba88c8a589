//! What a passed-through device is to its mediator (`semper-vfiod`): US10963286B2.
//!
//! | module | what it is |
//! |---|---|
//! | here | [`Device`], the contract of everything behind a function, and [`Bus`], what it reaches |
//! | [`registers`] | the register-state interface: which registers there are, how each is kept and replayed |
//! | [`capture`] | what a driver wrote while its accesses were captured, for the other end of a move |
//! | [`dirty`] | the DMA-dirty interface: which pages of the guest a device has written |
//! | [`ledger`] | what the next process has to know, in memory that outlives this one |
//! | [`page`] | the page of registers that a guest writes without anybody being told |
//! | [`hardware`] | what a device needs beside, that is there in hardware |
//!
//! A device of another kind is one type that has [`Device`]: `crates/nvme`, and as the smallest
//! example `crates/vfiod/src/edu.rs`. One that is there in hardware: `crates/vfio`.

pub mod capture;
pub mod dirty;
pub mod hardware;
pub mod ledger;
pub mod page;
pub mod registers;

use std::sync::Arc;

use semper_ring::GuestMemory;

use crate::hardware::Hardware;
use crate::ledger::Ledger;
use crate::page::Page;
use crate::registers::Register;

/// Bytes of a page of the guest.
pub const PAGE: u64 = 4096;

/// What a function says of itself in its configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor and device.
    pub ids: (u16, u16),
    /// Vendor and device of the subsystem.
    pub subsystem: (u16, u16),
    /// Interface, subclass, class.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
}

/// The one BAR of a device: 64 bits, memory.
///
/// ```text
///   0        direct             direct + 4096      table          pending          size
///   │registers │ the page that a guest may write by itself │ MSI-X table │ MSI-X pending bits │
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Bytes, a power of two.
    pub size: u64,
    /// Where the page is, if there is one.
    pub direct: Option<u64>,
    /// Where the table of MSI-X vectors is: QEMU keeps it, and its server never sees an access.
    pub table: u64,
    /// Where the pending bits are.
    pub pending: u64,
    /// How many vectors there are.
    pub vectors: u16,
}

/// Memory that is not the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {address:#x} are no memory of the guest that its device may reach")]
pub struct Unreachable {
    /// Of the guest.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// How what a device writes gets into the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Through a mapping of our own: QEMU hears nothing of it.
    Direct,
    /// By QEMU, which sends these pages again if it is moving the VM.
    Mediated,
}

/// What a device reaches.
pub trait Bus {
    /// The guest's memory as it is now. Who does I/O there keeps it until that has ended.
    fn memory(&self) -> &Arc<GuestMemory>;

    /// Which way [`Bus::write`] takes. With [`Route::Mediated`] a device writes in no other way.
    fn route(&self) -> Route;

    /// Reads; both ways are the same.
    ///
    /// # Errors
    /// [`Unreachable`]; what `into` holds then is undefined.
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Unreachable>;

    /// Writes. Writes arrive in order.
    ///
    /// # Errors
    /// [`Unreachable`]; nothing was written.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Unreachable>;

    /// Tells that something else has written there directly: an engine of block I/O.
    fn wrote(&mut self, address: u64, len: u64);

    /// Interrupts the guest, after everything that was written before. Interrupts of one vector
    /// may become one.
    fn interrupt(&mut self, vector: u16);

    /// So much is on its way that a device takes no new command.
    fn is_congested(&self) -> bool;
}

/// Whether a device has something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Something was done, and there may be more.
    Busy,
    /// Requests are on their way, and nothing else is there to do.
    Waiting,
    /// There is nothing to do before the driver writes a register.
    Idle,
}

/// Counters, since the device began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Requests of each kind that have ended.
    pub reads: u64,
    /// The same.
    pub writes: u64,
    /// The same.
    pub flushes: u64,
    /// The same: discards, write zeroes.
    pub others: u64,
    /// Of these, those that failed.
    pub errors: u64,
    /// By reads.
    pub bytes_read: u64,
    /// By writes.
    pub bytes_written: u64,
    /// Requests on their way now.
    pub in_flight: u64,
    /// Commands that are about the device.
    pub admin: u64,
    /// What the driver did against the device's rules.
    pub refused: u64,
    /// Changes of the registers of the direct page that a guest has made there itself, as often as they
    /// were seen.
    pub rung: u64,
}

/// A device behind a function.
///
/// Contract, for every device:
/// * it never panics, whatever a guest writes to its registers and to its memory, and whatever
///   [`Device::restore`] is given;
/// * it reaches the guest's memory by [`Bus`] alone, and in [`Device::step`] alone; hardware does so by
///   itself, and tells the bus where while it is captured ([`hardware::Hardware`]);
/// * [`Device::read`] and [`Device::write`] return at once and change registers only: what follows
///   from them is done by `step`. So a register can be accessed while anything else goes on;
/// * a step is short: it never waits for a request;
/// * while it is on hold it takes no new command, ends those that it has, and
///   [`Device::in_flight`] becomes 0 in the end.
pub trait Device: Send {
    /// The name of its kind, as on the command line.
    fn kind(&self) -> &'static str;

    /// What its configuration space says.
    fn identity(&self) -> Identity;

    /// Its BAR.
    fn window(&self) -> Window;

    /// Its registers, in the order in which they are restored.
    fn registers(&self) -> Vec<Register>;

    /// Reads registers: any range within the BAR outside of the direct page.
    fn read(&mut self, offset: u64, into: &mut [u8]);

    /// Writes registers, as [`Device::read`] reads them.
    fn write(&mut self, offset: u64, bytes: &[u8]);

    /// Does what there is to do. Registers of the direct page are found in `page`.
    fn step(&mut self, page: &Page, bus: &mut dyn Bus) -> Activity;

    /// As after power-on, once [`Device::in_flight`] is 0; `step` does the rest.
    fn reset(&mut self);

    /// Whether a reset is still to come to its end.
    fn is_resetting(&self) -> bool;

    /// Takes no new command, or takes them again.
    fn hold(&mut self, hold: bool);

    /// Requests that have not ended.
    fn in_flight(&self) -> usize;

    /// All of its state but the direct page, as text; on hold, with nothing in flight.
    fn save(&self) -> String;

    /// Takes a state that [`Device::save`] gave, of the same release or an earlier one. With
    /// `replayed`, what [`Device::registers`] names stays as it was written here. Gives how many of
    /// these registers had another value than the state has.
    ///
    /// # Errors
    /// A sentence: it is no such state, or does not fit this device. Nothing has changed.
    fn restore(&mut self, state: &str, page: &Page, replayed: bool) -> Result<usize, String>;

    /// The vectors of completions that the driver has not taken yet: at a destination they are
    /// interrupted once more, for nobody knows whether the guest was.
    fn owed(&self) -> Vec<u16>;

    /// Whether its interrupt line is asserted: for a driver without MSI-X.
    fn asserts_line(&self) -> bool;

    /// Whether a driver was told that something is lost, which only this process knows of: its device
    /// must not go elsewhere, where the driver would be told that all is well.
    fn has_lost(&self) -> bool {
        false
    }

    /// How many words of a [`Ledger`] it needs to be gone on with by another process; `None` for a
    /// device that dies with its process.
    fn ledger_words(&self) -> Option<usize> {
        None
    }

    /// From now on it keeps in `ledger` whatever the next process needs, at every instant. Called once,
    /// before anything else is done with it; [`Device::recover`] follows if another process has kept it.
    fn keep_in(&mut self, _ledger: Arc<Ledger>) {}

    /// Goes on from its ledger, where another process has ended: requests that had not ended are done
    /// again, and what the driver was or was not told of is told. On hold, with nothing in flight.
    ///
    /// # Errors
    /// A sentence: what is there cannot be.
    fn recover(&mut self, _page: &Page) -> Result<(), String> {
        Err(format!("a device of kind {} dies with its process", self.kind()))
    }

    /// What it has done.
    fn counters(&self) -> Counters;

    /// Of a device that is there in hardware, and reaches memory by itself.
    fn hardware(&self) -> Option<&dyn Hardware> {
        None
    }

    /// The same.
    fn hardware_mut(&mut self) -> Option<&mut dyn Hardware> {
        None
    }
}
