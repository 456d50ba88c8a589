//! A PCI function that the host's kernel hands over by VFIO, as a [`semper_device::Device`].
//!
//! ```text
//!   guest ──doorbell──► the function's own page          a store, nobody is told
//!     │ other registers: messages ──► profile ──► function
//!     ◄── eventfds, from the kernel to QEMU ── function ──DMA by the IOMMU──► the guest's memory
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`kernel`] | the ioctls, each with its structure from `vfio-bindings` |
//! | [`iommu`] | which memory the function reaches, at which address |
//! | [`function`] | the opened function: registers, interrupts, reset, what its configuration space says |
//! | [`profile`] | how a profile for a further device is written |
//! | [`nvme`] | the profile of NVMe controllers, whose state can be moved |
//!
//! Everything is opened from descriptors: the process needs no path of `/dev/vfio`. The crate
//! `vfio-ioctls` is not used, for it opens these paths itself, and knows groups of devices that a VMM has.

pub mod function;
pub mod iommu;
pub mod kernel;
pub mod nvme;
pub mod profile;

pub use function::{Function, OpenError};
pub use nvme::Nvme;
