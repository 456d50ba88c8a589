//! The configuration space of a function, and how a move restores it.
//!
//! ```text
//!   0x00 header │ 0x40 MSI-X │ 0x60 power management │ 0x80 PCI Express │ no extended capabilities
//! ```
//!
//! QEMU forwards every write here and keeps what it emulates itself. At a destination the same writes
//! have to reach *QEMU*, for they map BARs and hand over eventfds: so a move has the destination's QEMU
//! write them, before and after the table of MSI-X vectors, which lies in a BAR ([`Config::restoring`]).

use std::ops::Range;

use semper_device::{Identity, Window};

/// Bytes of the space.
pub(crate) const LEN: usize = 4096;
/// Bytes of it that have something in them.
pub(crate) const USED: usize = 256;

const COMMAND: usize = 0x04;
const BAR: usize = 0x10;
const LINE: usize = 0x3c;
const PIN: usize = 0x3d;
const MSIX: usize = 0x40;
const POWER: usize = 0x60;
const EXPRESS: usize = 0x80;
const DEVICE_CONTROL: usize = EXPRESS + 8;
/// The function resets itself.
const FUNCTION_RESET: u16 = 1 << 15;

/// A write that a move has QEMU make: where, bytes, value.
pub(crate) type Write = (u16, u8, u32);

/// The space.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    bytes: Vec<u8>,
    /// Bits that a driver can change.
    writable: Vec<u8>,
    long_bar: bool,
}

/// What follows from a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Nothing,
    /// The function is to be reset.
    Reset,
}

impl Config {
    fn header(identity: Identity) -> Self {
        let mut config = Self { bytes: vec![0; LEN], writable: vec![0; LEN], long_bar: false };
        config.put(0, &identity.ids.0.to_le_bytes());
        config.put(2, &identity.ids.1.to_le_bytes());
        config.put(8, &[identity.revision]);
        config.put(9, &identity.class);
        config.put(0x2c, &identity.subsystem.0.to_le_bytes());
        config.put(0x2e, &identity.subsystem.1.to_le_bytes());
        // Memory, bus master, parity, system errors, no interrupts by the line.
        config.allow(COMMAND, &0x0546u16.to_le_bytes());
        config.allow(LINE, &[0xff]);
        config
    }

    /// Of a device. With `line` it has an interrupt line.
    pub(crate) fn device(identity: Identity, window: Window, line: bool) -> Self {
        let mut config = Self::header(identity);
        config.long_bar = true;
        config.put(BAR, &4u32.to_le_bytes());
        config.allow(BAR, &(!(window.size - 1)).to_le_bytes());
        config.put(PIN, &[line.into()]);
        // Status: there are capabilities, and where.
        config.put(0x06, &0x10u16.to_le_bytes());
        config.put(0x34, &[MSIX as u8]);
        config.put(MSIX, &[0x11, POWER as u8]);
        config.put(MSIX + 2, &(window.vectors - 1).to_le_bytes());
        config.put(MSIX + 4, &(window.table as u32).to_le_bytes());
        config.put(MSIX + 8, &(window.pending as u32).to_le_bytes());
        config.allow(MSIX + 3, &[0xc0]);
        // Version 3; a function that wakes up is as it was.
        config.put(POWER, &[0x01, EXPRESS as u8, 0x03, 0x00, 0x08]);
        config.allow(POWER + 4, &[0x03]);
        // Version 2, an endpoint; it can be reset by itself.
        config.put(EXPRESS, &[0x10, 0x00, 0x02, 0x00]);
        config.put(EXPRESS + 4, &0x1000_8000u32.to_le_bytes());
        config.allow(DEVICE_CONTROL, &0x7fffu16.to_le_bytes());
        config
    }

    /// Of the shim: one BAR of a page, of 32 bits.
    pub(crate) fn shim(identity: Identity) -> Self {
        let mut config = Self::header(identity);
        config.allow(BAR, &(!0xfffu32).to_le_bytes());
        config
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    fn range(offset: u64, len: usize) -> Option<Range<usize>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(len).filter(|end| *end <= LEN)?;
        Some(start..end)
    }

    /// Reads; `None` beyond the space.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Option<&[u8]> {
        Self::range(offset, len).map(|range| &self.bytes[range])
    }

    /// Writes what can be written; `None` beyond the space.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Option<Effect> {
        let range = Self::range(offset, bytes.len())?;
        for (at, byte) in range.clone().zip(bytes) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
        // A bit that is never read as set.
        let bit = DEVICE_CONTROL + 1;
        let asked =
            range.contains(&bit) && bytes[bit - range.start] & (FUNCTION_RESET >> 8) as u8 != 0;
        Some(if asked { Effect::Reset } else { Effect::Nothing })
    }

    fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|i| self.bytes[at + i]))
    }

    /// Where the BAR is in the guest's memory, while the guest has memory decoding on.
    pub(crate) fn bar(&self) -> Option<u64> {
        let low = u64::from(self.word(BAR) & !0xf);
        let high = if self.long_bar { u64::from(self.word(BAR + 4)) << 32 } else { 0 };
        Some(high | low).filter(|base| *base != 0 && self.half(COMMAND) & 2 != 0)
    }

    /// Whether the device may reach the guest's memory.
    pub(crate) fn is_master(&self) -> bool {
        self.half(COMMAND) & 4 != 0
    }

    /// The bytes in use.
    pub(crate) fn used(&self) -> &[u8] {
        &self.bytes[..USED]
    }

    /// The bytes in use as another process had them.
    pub(crate) fn take_used(&mut self, bytes: &[u8]) {
        let len = bytes.len().min(USED);
        self.bytes[..len].copy_from_slice(&bytes[..len]);
    }

    /// What a destination's QEMU is to write before the table of vectors, and after it. The order is
    /// the one that was found to work: the BAR before it is decoded, the last write hands over eventfds.
    pub(crate) fn restoring(&self) -> (Vec<Write>, Vec<Write>) {
        let before = vec![
            (BAR as u16, 4, self.word(BAR)),
            (BAR as u16 + 4, 4, self.word(BAR + 4)),
            (LINE as u16, 1, self.bytes[LINE].into()),
            (DEVICE_CONTROL as u16, 2, self.half(DEVICE_CONTROL).into()),
            (COMMAND as u16, 2, self.half(COMMAND).into()),
        ];
        (before, vec![(MSIX as u16 + 2, 2, self.half(MSIX + 2).into())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let identity = Identity { ids: (1, 2), subsystem: (3, 4), class: [5, 6, 7], revision: 8 };
        let window =
            Window { size: 0x4000, direct: None, table: 0x2000, pending: 0x3000, vectors: 5 };
        Config::device(identity, window, false)
    }

    #[test]
    fn a_bar_tells_its_size_and_is_there_when_memory_is_decoded() {
        let mut config = config();
        config.write(0x10, &[0xff; 8]).unwrap();
        assert_eq!(config.read(0x10, 8).unwrap(), (!0x3fffu64 | 4).to_le_bytes());
        config.write(0x10, &0xfebf_0000u64.to_le_bytes()).unwrap();
        assert_eq!(config.bar(), None);
        config.write(4, &[6, 0]).unwrap();
        assert_eq!((config.bar(), config.is_master()), (Some(0xfebf_0000), true));
    }

    #[test]
    fn identity_cannot_be_written_and_nothing_is_behind_the_end() {
        let mut config = config();
        config.write(0, &[0xff; 4]).unwrap();
        assert_eq!(config.read(0, 4).unwrap(), [1, 0, 2, 0]);
        assert!(config.read(4095, 2).is_none() && config.write(u64::MAX, &[0]).is_none());
        assert!(config.write(4094, &[0; 4]).is_none());
    }

    #[test]
    fn the_bit_that_resets_the_function_is_an_effect_and_reads_as_0() {
        let mut config = config();
        assert_eq!(config.write(0x88, &[0x0f, 0x80]), Some(Effect::Reset));
        assert_eq!(config.read(0x88, 2).unwrap(), [0x0f, 0]);
        assert_eq!(config.write(0x88, &[0x0f, 0x20]), Some(Effect::Nothing));
    }

    #[test]
    fn what_was_written_is_restored_by_the_same_writes() {
        let mut config = config();
        config.write(0x10, &0xfebf_0000u64.to_le_bytes()).unwrap();
        config.write(4, &[6, 4]).unwrap();
        config.write(0x3c, &[11]).unwrap();
        config.write(0x42, &[4, 0x80]).unwrap();
        config.write(0x88, &[0x10, 0x28]).unwrap();
        let (before, after) = config.restoring();
        let mut other = self::config();
        for (offset, size, value) in before.into_iter().chain(after) {
            let bytes = value.to_le_bytes();
            other.write(offset.into(), &bytes[..usize::from(size)]).unwrap();
        }
        assert_eq!(config.used(), other.used());
    }
}
