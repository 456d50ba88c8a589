//! The shim: a second function of the same process, with which direct doorbells are captured.
//!
//! Its one BAR is a page. While the agent has QEMU put that BAR onto the page of doorbells, QEMU gives
//! it the guest's accesses: a BAR that was added later is before others of the same priority. Whatever
//! is written there is a doorbell of the device; nothing else is behind it.

use semper_device::Identity;

use crate::config::Config;

/// It has no class, so no driver wants it.
const IDENTITY: Identity = Identity {
    ids: (0x1b36, 0x5e02),
    subsystem: (0x1af4, 0x5e02),
    class: [0x00, 0x00, 0xff],
    revision: 1,
};

/// Bytes of its BAR.
pub(crate) const BAR_LEN: u64 = 4096;

/// The shim.
pub(crate) struct Shim {
    pub config: Config,
}

impl Shim {
    pub(crate) fn new() -> Self {
        Self { config: Config::shim(IDENTITY) }
    }
}
