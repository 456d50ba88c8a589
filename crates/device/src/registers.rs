//! The register-state interface: which registers a device has, and what a move makes of each.
//!
//! ```text
//!   normal running     accesses go to the device alone
//!   capture            each write is carried out, and noted ([`crate::capture`])
//!   a round            what was noted goes to the destination, which writes it to its registers
//!   the last state     what no register shows goes with it ([`crate::Device::save`])
//! ```

/// How a register is kept and replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every write counts, in its order: a write to it starts something.
    Event,
    /// The last value written is all that there is to know: a doorbell, the base of a queue.
    Level,
    /// Every write counts, and what is read is not what was written: a mask that ones set or clear, a
    /// computation.
    Mask,
    /// It can only be read, and follows from the others.
    Status,
}

/// One register, or a row of equal ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// The name in its specification.
    pub name: &'static str,
    /// In the BAR.
    pub offset: u64,
    /// Bytes of one: 4 or 8.
    pub size: u64,
    /// How many stand one behind the other.
    pub count: u64,
    /// How it is replayed.
    pub kind: Kind,
}

impl Register {
    /// A single one.
    pub const fn one(name: &'static str, offset: u64, size: u64, kind: Kind) -> Self {
        Self { name, offset, size, count: 1, kind }
    }

    /// Whether an access of `len` bytes at `offset` touches it.
    pub fn covers(&self, offset: u64, len: u64) -> bool {
        offset < self.offset + self.size * self.count && self.offset < offset.saturating_add(len)
    }
}

/// The register that an access begins in.
pub fn find(registers: &[Register], offset: u64) -> Option<&Register> {
    registers.iter().find(|register| register.covers(offset, 1))
}
