//! A submission entry [4.2], and what is answered to it.
//!
//! ```text
//!   0 opcode │ 1 flags (bits 7:6 PRP or SGL, 1:0 fused) │ 2 command id
//!   4 namespace │ 8 reserved │ 16 metadata │ 24 data: PRP1, PRP2, or one SGL descriptor │ 40 dwords 10 to 15
//! ```

use crate::spec::SQE;

/// A command as the driver has put it into its queue; copied out of it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    bytes: [u8; SQE as usize],
}

impl From<[u8; SQE as usize]> for Command {
    fn from(bytes: [u8; SQE as usize]) -> Self {
        Self { bytes }
    }
}

impl Command {
    /// All of it, as numbers of this processor.
    pub(crate) fn words(&self) -> [u64; 8] {
        std::array::from_fn(|word| {
            u64::from_ne_bytes(std::array::from_fn(|i| self.bytes[8 * word + i]))
        })
    }

    /// As [`Command::words`] gave it.
    pub(crate) fn of_words(words: [u64; 8]) -> Self {
        let bytes = words.map(u64::to_ne_bytes);
        Self { bytes: std::array::from_fn(|at| bytes[at / 8][at % 8]) }
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|i| self.bytes[at + i]))
    }

    fn long(&self, at: usize) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|i| self.bytes[at + i]))
    }

    /// What to do.
    pub fn opcode(&self) -> u8 {
        self.bytes[0]
    }

    /// Whether it is one half of a fused pair, of which there are none.
    pub fn is_fused(&self) -> bool {
        self.bytes[1] & 3 != 0
    }

    /// How its data is described: 0 PRP, 1 and 2 SGL.
    pub fn transfer(&self) -> u8 {
        self.bytes[1] >> 6
    }

    /// Its number, which the driver chose.
    pub fn id(&self) -> u16 {
        u16::from_le_bytes([self.bytes[2], self.bytes[3]])
    }

    /// Which namespace.
    pub fn namespace(&self) -> u32 {
        self.word(4)
    }

    /// The first PRP entry.
    pub fn prp1(&self) -> u64 {
        self.long(24)
    }

    /// The second one.
    pub fn prp2(&self) -> u64 {
        self.long(32)
    }

    /// The same bytes as an SGL descriptor.
    pub fn sgl(&self) -> [u8; 16] {
        std::array::from_fn(|i| self.bytes[24 + i])
    }

    /// Dword `number`, from 10 to 15.
    pub fn dword(&self, number: usize) -> u32 {
        self.word(number.clamp(10, 15) * 4)
    }

    /// Of reads and writes: the first block.
    pub fn first_block(&self) -> u64 {
        self.long(40)
    }

    /// The same: how many, from 1 to 65536.
    pub fn blocks(&self) -> u64 {
        u64::from(self.dword(12) & 0xffff) + 1
    }

    /// Force unit access: done only when it would survive a power cut.
    pub fn is_forced(&self) -> bool {
        self.dword(12) >> 30 & 1 != 0
    }
}

#[cfg(test)]
pub(crate) fn command(opcode: u8, id: u16, dwords: &[(usize, u32)]) -> [u8; SQE as usize] {
    let mut bytes = [0; SQE as usize];
    bytes[0] = opcode;
    bytes[2..4].copy_from_slice(&id.to_le_bytes());
    for (number, value) in dwords {
        bytes[number * 4..number * 4 + 4].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}
