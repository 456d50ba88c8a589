//! The stamp: what a writer puts into each sector of a block.
//!
//! Each 512-byte sector of a block is stamped by itself, so that a block of any size shows which of
//! its sectors came from which write. Layout of a sector, little-endian:
//!
//! ```text
//!   0  magic    u64   "SVSTAMP1"
//!   8  nonce    u128  of the boot that wrote it; exists only in RAM
//!  24  device   u64   hash of the device's name and serial number
//!  32  sector   u64   where this sector belongs, in units of 512 bytes
//!  40  seq      u64   number of this write among the writes of its block, from 1
//!  48  run      u32   which ledger the sequence belongs to, from 1
//!  52  writer   u32   the lane that wrote it
//!  56  checksum u64   over the sector with this field left out
//!  64  payload        56 words of a generator seeded by all of the above
//! ```
//!
//! What is read back is judged in [`crate::judge`].

/// Bytes in one sector, the smallest unit that is stamped.
pub const SECTOR: usize = 512;

const MAGIC: u64 = u64::from_le_bytes(*b"SVSTAMP1");
const WORDS: usize = SECTOR / 8;
const CHECKSUM_WORD: usize = 7;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Who stamps: one boot of one guest, writing to one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Drawn at boot, never stored.
    pub nonce: u128,
    /// Tells the disks of one guest apart.
    pub device: u64,
}

/// The stamp of one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The boot and the device that it was written for.
    pub identity: Identity,
    /// Its place on the device, in sectors.
    pub sector: u64,
    /// Which write of its block.
    pub seq: u64,
    /// Which ledger.
    pub run: u32,
    /// Which lane.
    pub writer: u32,
}

/// What one sector turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No stamp at all.
    Blank,
    /// A stamp whose checksum does not match.
    Damaged,
    /// A sound stamp.
    Sound(Stamp),
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Each step is a bijection of the state, so a change in any single word always changes the result.
fn checksum(words: &[u64; WORDS]) -> u64 {
    let mut sum = GOLDEN;
    for (index, word) in words.iter().enumerate() {
        if index != CHECKSUM_WORD {
            sum = (sum ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
            sum ^= sum >> 32;
        }
    }
    sum
}

fn load(sector: &[u8]) -> [u64; WORDS] {
    let mut words = [0u64; WORDS];
    for (word, bytes) in words.iter_mut().zip(sector.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    words
}

impl Stamp {
    /// Fills one sector.
    ///
    /// # Panics
    /// If `bytes` is not exactly one sector long.
    pub fn write_to(&self, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), SECTOR, "a stamp fills exactly one sector");
        let mut words = [0u64; WORDS];
        words[0] = MAGIC;
        words[1] = self.identity.nonce as u64;
        words[2] = (self.identity.nonce >> 64) as u64;
        words[3] = self.identity.device;
        words[4] = self.sector;
        words[5] = self.seq;
        words[6] = u64::from(self.run) | u64::from(self.writer) << 32;
        let mut state = words[1..7].iter().fold(GOLDEN, |sum, word| mix(sum ^ word));
        for word in &mut words[CHECKSUM_WORD + 1..] {
            // xorshift64*: cheap under emulation, and no two stamps share a payload.
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            *word = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        }
        words[CHECKSUM_WORD] = checksum(&words);
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Reads one sector.
    pub fn read_from(bytes: &[u8]) -> Found {
        let words = load(bytes);
        if words[0] != MAGIC {
            return Found::Blank;
        }
        if words[CHECKSUM_WORD] != checksum(&words) {
            return Found::Damaged;
        }
        Found::Sound(Stamp {
            identity: Identity {
                nonce: u128::from(words[1]) | u128::from(words[2]) << 64,
                device: words[3],
            },
            sector: words[4],
            seq: words[5],
            run: words[6] as u32,
            writer: (words[6] >> 32) as u32,
        })
    }
}
