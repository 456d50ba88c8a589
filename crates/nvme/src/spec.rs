//! Numbers of the specification (NVM Express Base Specification 1.4; sections in brackets).

/// Registers of the controller [3.1].
pub mod register {
    /// Capabilities, 8 bytes.
    pub const CAP: u64 = 0x00;
    /// Version.
    pub const VS: u64 = 0x08;
    /// Interrupt mask: ones set bits.
    pub const INTMS: u64 = 0x0c;
    /// Interrupt mask: ones clear bits.
    pub const INTMC: u64 = 0x10;
    /// Configuration.
    pub const CC: u64 = 0x14;
    /// Status.
    pub const CSTS: u64 = 0x1c;
    /// Sizes of the admin queues.
    pub const AQA: u64 = 0x24;
    /// Base of the admin submission queue, 8 bytes.
    pub const ASQ: u64 = 0x28;
    /// Base of the admin completion queue, 8 bytes.
    pub const ACQ: u64 = 0x30;
    /// The first doorbell.
    pub const DOORBELLS: u64 = 0x1000;
}

/// Version 1.4.
pub const VERSION: u32 = 0x0001_0400;
/// Entries of the largest queue.
pub const QUEUE_MOST: u32 = 1024;
/// Most I/O queues: their doorbells lie in the one page.
pub const IO_QUEUES_MOST: u16 = 64;
/// Bytes of a submission entry.
pub const SQE: u64 = 64;
/// Bytes of a completion entry.
pub const CQE: u64 = 16;
/// Most data of a command is 4 KiB shifted by this [MDTS]: 1 MiB.
pub const MDTS: u8 = 8;
/// The same in bytes.
pub const DATA_MOST: u64 = 4096 << MDTS;
/// The one namespace.
pub const NAMESPACE: u32 = 1;
/// Every namespace.
pub const ALL_NAMESPACES: u32 = u32::MAX;
/// Asynchronous event requests that may be outstanding.
pub const EVENTS_MOST: usize = 4;

/// CC [3.1.5].
pub mod cc {
    /// Enable.
    pub const EN: u32 = 1;
    /// What is writable; the rest reads as 0.
    pub const WRITABLE: u32 = 0x00ff_fff1;
    /// I/O command set, page size, arbitration: only 0 is there.
    pub const ONLY_ZERO: u32 = 0x0000_3ff0;
    /// Sizes of entries, as powers of two: 64 and 16 bytes.
    pub const ENTRY_SIZES: u32 = 0x0046_0000;
    /// Where these sizes are.
    pub const ENTRY_SIZES_MASK: u32 = 0x00ff_0000;
    /// Shutdown notification.
    pub const SHN: u32 = 0x0000_c000;
}

/// CSTS [3.1.6].
pub mod csts {
    /// Ready.
    pub const RDY: u32 = 1;
    /// A fatal error: only a reset helps.
    pub const CFS: u32 = 2;
    /// Shutdown is complete.
    pub const SHST_DONE: u32 = 8;
    /// Where the state of the shutdown is.
    pub const SHST: u32 = 12;
}

/// Admin commands [5].
pub mod admin {
    /// Delete I/O submission queue.
    pub const DELETE_SQ: u8 = 0x00;
    /// Create I/O submission queue.
    pub const CREATE_SQ: u8 = 0x01;
    /// Get log page.
    pub const GET_LOG: u8 = 0x02;
    /// Delete I/O completion queue.
    pub const DELETE_CQ: u8 = 0x04;
    /// Create I/O completion queue.
    pub const CREATE_CQ: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous event request.
    pub const EVENT: u8 = 0x0c;
}

/// Commands of the NVM command set [NVM 6].
pub mod io {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset management.
    pub const DSM: u8 = 0x09;
}

/// Status of a completion: code, with the type in bits 8 to 10 and "do not retry" in bit 14 [4.6.1].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// Success.
    pub const OK: Self = Self(0);
    /// There is no such command.
    pub const OPCODE: Self = Self(0x4001);
    /// A field has a value that it must not have.
    pub const FIELD: Self = Self(0x4002);
    /// Data did not get through.
    pub const TRANSFER: Self = Self(0x0004);
    /// Something inside failed; the medium did not.
    pub const INTERNAL: Self = Self(0x0006);
    /// There is no such namespace.
    pub const NAMESPACE: Self = Self(0x400b);
    /// A segment of an SGL is none.
    pub const SGL_SEGMENT: Self = Self(0x400d);
    /// An SGL has too many descriptors.
    pub const SGL_COUNT: Self = Self(0x400e);
    /// An SGL is too short or too long.
    pub const SGL_LENGTH: Self = Self(0x400f);
    /// A descriptor of an SGL is of no known type.
    pub const SGL_TYPE: Self = Self(0x4011);
    /// An offset of a PRP is wrong.
    pub const PRP_OFFSET: Self = Self(0x4013);
    /// The namespace must not be written.
    pub const WRITE_PROTECTED: Self = Self(0x4020);
    /// The range ends beyond the namespace.
    pub const RANGE: Self = Self(0x4080);
    /// There is no room on the medium.
    pub const CAPACITY: Self = Self(0x0081);
    /// The medium could not be written.
    pub const WRITE_FAULT: Self = Self(0x0280);
    /// The medium could not be read.
    pub const READ_ERROR: Self = Self(0x0281);
    /// There is no such completion queue.
    pub const CQ_INVALID: Self = Self(0x4100);
    /// There is no such queue, or there is one already.
    pub const QUEUE_ID: Self = Self(0x4101);
    /// A queue must not have that size.
    pub const QUEUE_SIZE: Self = Self(0x4102);
    /// More asynchronous event requests than there may be.
    pub const EVENTS: Self = Self(0x4105);
    /// There is no such vector.
    pub const VECTOR: Self = Self(0x4108);
    /// There is no such log page.
    pub const LOG: Self = Self(0x4109);
    /// The queue still has submission queues.
    pub const QUEUE_DELETION: Self = Self(0x410c);
}
