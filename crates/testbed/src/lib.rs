//! What the tests of several crates stand on. Nothing here is part of a program.
//!
//! * [`DriverRing`] is the driver's end of a split virtqueue, in raw memory: what a guest's kernel
//!   does, and what a hostile one could do.
//! * [`Guest`] submits a list of [`Request`]s through such a ring and holds the device to its word.
//! * [`History`] judges what the guest saw: is there a legal order that explains it?
//! * [`Choices`] walks through all paths of a test that has to make decisions.
//! * [`LoopDevice`] is a block device with sectors of a chosen size, of the kernel's own.
//! * [`Lossy`] is a file system that loses what was not flushed.
//! * [`World`] is what outlives a process: guest, memory, in-flight region, disk, kernel. It can
//!   be copied as a dying process would leave it at any instant ([`World::pass`]).

mod choices;
mod death;
mod driver;
mod fingerprint;
mod guest;
mod history;
mod loop_device;
mod lossy;
mod world;

pub use choices::Choices;
pub use driver::{Buffer, DriverRing, Layout};
pub use fingerprint::Fingerprint;
pub use guest::{Format, Guest, Misbehaviour, Wakeup};
pub use history::{History, MAX_BLOCKS, Request, Verb};
pub use loop_device::LoopDevice;
pub use lossy::Lossy;
pub use world::{KernelIo, Setup, Snapshot, Violation, World};
