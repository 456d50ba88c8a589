//! What a driver wrote while its accesses were captured.
//!
//! A round takes what was noted; the destination writes it to its own registers, without anything
//! following from it. Of a register that is a level the last value stands for all; others are kept
//! each, in their order. What is kept is bounded: who writes more than that is noted as having
//! overflowed, and the whole state at the end makes up for it.

use serde::{Deserialize, Serialize};

use crate::registers::{Kind, Register, find};

/// Writes that one round keeps.
const MOST: usize = 512;

/// One write of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    /// In the BAR.
    pub offset: u64,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// Little-endian.
    pub value: u64,
}

/// What was noted since the last round.
#[derive(Debug)]
pub struct Capture {
    registers: Vec<Register>,
    on: bool,
    writes: Vec<Write>,
    overflowed: bool,
}

impl Capture {
    /// For a device with these registers; notes nothing yet.
    pub fn new(registers: Vec<Register>) -> Self {
        Self { registers, on: false, writes: Vec::new(), overflowed: false }
    }

    /// Begins, with nothing noted, or ends.
    pub fn set(&mut self, on: bool) {
        (self.on, self.overflowed) = (on, false);
        self.writes.clear();
    }

    /// Whether writes are noted.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Notes a write, if it is of a register and writes are noted.
    pub fn note(&mut self, offset: u64, bytes: &[u8]) {
        let Some(write) = Write::of(offset, bytes).filter(|_| self.on) else { return };
        let kind = find(&self.registers, offset).map(|register| register.kind);
        match kind {
            None | Some(Kind::Status) => {}
            Some(Kind::Level) => {
                let same = |old: &&mut Write| (old.offset, old.size) == (offset, write.size);
                match self.writes.iter_mut().find(same) {
                    Some(old) => old.value = write.value,
                    None => self.push(write),
                }
            }
            Some(Kind::Event | Kind::Mask) => self.push(write),
        }
    }

    fn push(&mut self, write: Write) {
        match self.writes.len() < MOST {
            true => self.writes.push(write),
            false => self.overflowed = true,
        }
    }

    /// What was noted since the last round, and whether that is not all.
    pub fn take(&mut self) -> (Vec<Write>, bool) {
        (std::mem::take(&mut self.writes), std::mem::take(&mut self.overflowed))
    }
}

impl Write {
    /// A write of at most eight bytes.
    pub fn of(offset: u64, bytes: &[u8]) -> Option<Self> {
        if !matches!(bytes.len(), 1 | 2 | 4 | 8) {
            return None;
        }
        let mut value = [0; 8];
        value[..bytes.len()].copy_from_slice(bytes);
        Some(Self { offset, size: bytes.len() as u8, value: u64::from_le_bytes(value) })
    }

    /// What was written; `None` for a size that no write has.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let size = usize::from(self.size);
        matches!(size, 1 | 2 | 4 | 8).then(|| self.value.to_le_bytes()[..size].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture() -> Capture {
        let mut capture = Capture::new(vec![
            Register::one("CC", 0x14, 4, Kind::Event),
            Register::one("CSTS", 0x1c, 4, Kind::Status),
            Register { name: "DB", offset: 0x1000, size: 4, count: 8, kind: Kind::Level },
        ]);
        capture.set(true);
        capture
    }

    #[test]
    fn of_a_doorbell_the_last_value_counts_and_of_others_every_write() {
        let mut capture = capture();
        for value in [1u32, 2, 3] {
            capture.note(0x1008, &value.to_le_bytes());
            capture.note(0x14, &value.to_le_bytes());
        }
        capture.note(0x1c, &[0; 4]);
        capture.note(0x2000, &[0; 4]);
        let (writes, overflowed) = capture.take();
        assert!(!overflowed);
        let told: Vec<_> = writes.iter().map(|write| (write.offset, write.value)).collect();
        assert_eq!(told, [(0x1008, 3), (0x14, 1), (0x14, 2), (0x14, 3)]);
        assert_eq!(capture.take(), (Vec::new(), false));
    }

    #[test]
    fn nothing_is_noted_while_it_is_off() {
        let mut capture = capture();
        capture.set(false);
        capture.note(0x14, &[1, 0, 0, 0]);
        assert_eq!(capture.take().0, []);
    }

    #[test]
    fn who_writes_too_much_has_overflowed_and_takes_no_more_memory() {
        let mut capture = capture();
        (0..10_000).for_each(|_| capture.note(0x14, &[1, 0, 0, 0]));
        let (writes, overflowed) = capture.take();
        assert!(overflowed && writes.len() == MOST);
    }

    #[test]
    fn a_write_has_one_of_four_sizes() {
        assert_eq!(Write::of(4, &[1, 2]).unwrap().bytes().unwrap(), [1, 2]);
        assert_eq!(Write::of(4, &[1, 2, 3]), None);
        assert_eq!(Write { offset: 0, size: 9, value: 0 }.bytes(), None);
    }
}
