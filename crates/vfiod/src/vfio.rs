//! Numbers of VFIO that vfio-user has taken over (linux/vfio.h). The crate `vfio-bindings` has the
//! structures of ioctls as well, of which nothing is used here.

/// Regions: BARs 0 to 5, the ROM, the configuration space, VGA.
pub(crate) const REGIONS: u32 = 9;
/// The first BAR.
pub(crate) const BAR0: u32 = 0;
/// The configuration space.
pub(crate) const CONFIG: u32 = 7;

/// Interrupts: the line, MSI, MSI-X, errors, requests.
pub(crate) const IRQS: u32 = 5;
/// The line.
pub(crate) const INTX: u32 = 0;
/// MSI-X.
pub(crate) const MSIX: u32 = 2;

/// Of a device.
pub(crate) mod device {
    /// It can be reset.
    pub(crate) const RESET: u32 = 1;
    /// It is a PCI function.
    pub(crate) const PCI: u32 = 2;
}

/// Of a region.
pub(crate) mod region {
    pub(crate) const READ: u32 = 1;
    pub(crate) const WRITE: u32 = 2;
    pub(crate) const MMAP: u32 = 4;
    pub(crate) const CAPS: u32 = 8;
    /// Bytes of what is told of a region, without capabilities.
    pub(crate) const INFO: u32 = 32;
    /// The capability that says which parts can be mapped.
    pub(crate) const SPARSE: u16 = 1;
}

/// Of an interrupt.
pub(crate) mod irq {
    pub(crate) const EVENTFD: u32 = 1;
    pub(crate) const MASKABLE: u32 = 2;
    pub(crate) const AUTOMASKED: u32 = 4;
}

/// Of SET_IRQS.
pub(crate) mod set {
    pub(crate) const NONE: u32 = 1;
    pub(crate) const EVENTFD: u32 = 4;
    pub(crate) const MASK: u32 = 8;
    pub(crate) const UNMASK: u32 = 16;
    pub(crate) const TRIGGER: u32 = 32;
}

/// Of DMA_MAP and DMA_UNMAP.
pub(crate) mod dma {
    /// The device may write there.
    pub(crate) const WRITE: u32 = 2;
    /// Of an unmap: everything.
    pub(crate) const ALL: u32 = 2;
}
