//! Numbers of the specification (NVM Express Base Specification 1.4) that `semper_nvme::spec` has not.

pub use semper_nvme::spec::{CQE, SQE, admin, cc, csts, register};

/// Numbers of queues whose doorbells lie in the one page that is mapped.
pub const QUEUES: u16 = 512;

/// CAP: the doorbells' stride [3.1.1].
pub const STRIDE: u64 = 0xf << 32;
/// The same: how long it may take to become ready, in 500 ms.
pub const TIMEOUT_SHIFT: u32 = 24;
/// Memory of the controller's own is not handed on: persistent memory, memory buffer.
pub const MEMORY_BUFFERS: u64 = 3 << 56;
/// Timeouts that depend on how it becomes ready; read only.
pub const CRTO: u64 = 0x68;

/// Read [NVM command set].
pub const READ: u8 = 2;
/// Doorbells in memory.
pub const DOORBELL_BUFFER: u8 = 0x7c;
/// Of a command: the controller writes to memory.
pub const TO_HOST: u8 = 2;

/// Features [5.21].
pub mod feature {
    /// LBA ranges; with data.
    pub const RANGES: u8 = 0x03;
    /// How many queues.
    pub const QUEUES: u8 = 0x07;
    /// By vector.
    pub const VECTOR: u8 = 0x09;
    /// By what is measured.
    pub const TEMPERATURE: u8 = 0x04;
    /// Power states that it takes by itself; with data.
    pub const POWER: u8 = 0x0c;
    /// Memory that the host lends.
    pub const HOST_MEMORY: u8 = 0x0d;
    /// The time; with data.
    pub const TIME: u8 = 0x0e;
    /// What the host can do; with data.
    pub const HOST: u8 = 0x16;
}
