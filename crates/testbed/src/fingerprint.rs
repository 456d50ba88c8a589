//! A fast 128-bit hash, wide enough that two states of millions do not meet by accident.

use std::hash::Hasher;

/// Two lanes of 64 bits, each with a multiplication for every word.
#[derive(Debug)]
pub struct Fingerprint {
    lanes: (u64, u64),
}

impl Default for Fingerprint {
    fn default() -> Self {
        Self::new()
    }
}

impl Fingerprint {
    /// Of nothing.
    pub fn new() -> Self {
        Self { lanes: (0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344) }
    }

    /// Of everything that was written.
    pub fn value(&self) -> u128 {
        u128::from(self.lanes.0) << 64 | u128::from(self.lanes.1)
    }

    fn word(&mut self, word: u64) {
        let (a, b) = &mut self.lanes;
        *a = (*a ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *a ^= *a >> 32;
        *b = (b.rotate_left(23) ^ word).wrapping_add(1).wrapping_mul(0xd6e8_feb8_6659_fd93);
        *b ^= *b >> 29;
    }
}

impl Hasher for Fingerprint {
    fn finish(&self) -> u64 {
        self.lanes.0
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            self.word(u64::from_le_bytes(chunk.try_into().expect("eight bytes")));
        }
        let rest = chunks.remainder();
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            last[7] = rest.len() as u8;
            self.word(u64::from_le_bytes(last));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.word(u64::from(value) | 1 << 40);
    }

    fn write_u16(&mut self, value: u16) {
        self.word(u64::from(value) | 1 << 41);
    }

    fn write_u64(&mut self, value: u64) {
        self.word(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.word(value as u64);
    }
}
