//! The stamp: what a writer puts into a block, and the judgement of what is read back.
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
//! The judgement is a pure function of the bytes and of what the ledger expects: see [`judge`].

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

/// What a block may legally hold.
#[derive(Clone, Copy, Debug)]
pub struct Expectation {
    /// Who wrote it.
    pub identity: Identity,
    /// Its first sector on the device.
    pub first_sector: u64,
    /// The ledger's number.
    pub run: u32,
    /// The lane that owns the block.
    pub writer: u32,
    /// The newest write that was acknowledged; 0 = none, so that the old contents are unknown.
    pub acked: u32,
    /// The newest write that was tried. Those above `acked` failed or are in flight: each sector
    /// may hold any of them, or still the acknowledged one.
    pub attempted: u32,
}

impl Expectation {
    /// Fills `block` with write number `seq` of it.
    pub fn stamp(&self, seq: u32, block: &mut [u8]) {
        for (index, bytes) in block.chunks_exact_mut(SECTOR).enumerate() {
            let stamp = Stamp {
                identity: self.identity,
                sector: self.first_sector + index as u64,
                seq: u64::from(seq),
                run: self.run,
                writer: self.writer,
            };
            stamp.write_to(bytes);
        }
    }
}

/// In which way a block is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The whole block is one older write than the one acknowledged.
    Lost,
    /// Its sectors come from different writes, or a checksum does not match.
    Torn,
    /// It holds what belongs to another place, lane or device.
    Misplaced,
    /// It holds another boot's stamp, none at all, or one that was never given out.
    Foreign,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sector {
    Legal,
    Old(u32, u64),
    Elsewhere,
    Foreign,
    Damaged,
}

fn judge_sector(found: Found, sector: u64, expect: &Expectation) -> Sector {
    // Before the first acknowledged write of this ledger a block may hold anything that was there.
    let unknown = expect.acked == 0;
    let stamp = match found {
        Found::Blank if unknown => return Sector::Legal,
        Found::Damaged if unknown => return Sector::Legal,
        Found::Blank => return Sector::Foreign,
        Found::Damaged => return Sector::Damaged,
        Found::Sound(stamp) => stamp,
    };
    if stamp.identity.nonce != expect.identity.nonce {
        return if unknown { Sector::Legal } else { Sector::Foreign };
    }
    if stamp.identity.device != expect.identity.device || stamp.sector != sector {
        return Sector::Elsewhere;
    }
    if stamp.run < expect.run {
        return if unknown { Sector::Legal } else { Sector::Old(stamp.run, stamp.seq) };
    }
    if stamp.run > expect.run || stamp.seq == 0 || stamp.seq > u64::from(expect.attempted) {
        return Sector::Foreign;
    }
    if stamp.writer != expect.writer {
        return Sector::Elsewhere;
    }
    if stamp.seq < u64::from(expect.acked) {
        return Sector::Old(stamp.run, stamp.seq);
    }
    Sector::Legal
}

/// Judges a block that was read back; `None` means that it is right.
///
/// Every wrong block gets exactly one kind. A block whose sectors agree is named by what they are;
/// one whose sectors disagree is torn. A sector that belongs elsewhere is wrong even where nothing
/// is expected, so that a write that went astray is seen on blocks never written.
pub fn judge(block: &[u8], expect: &Expectation) -> Option<Wrong> {
    let mut first = None;
    let mut same = true;
    let mut elsewhere = false;
    for (index, bytes) in block.chunks_exact(SECTOR).enumerate() {
        let sector = expect.first_sector + index as u64;
        let state = judge_sector(Stamp::read_from(bytes), sector, expect);
        same &= *first.get_or_insert(state) == state;
        elsewhere |= state == Sector::Elsewhere;
    }
    match first? {
        _ if !same && expect.acked == 0 && elsewhere => Some(Wrong::Misplaced),
        _ if !same => Some(Wrong::Torn),
        Sector::Legal => None,
        Sector::Old(..) => Some(Wrong::Lost),
        Sector::Elsewhere => Some(Wrong::Misplaced),
        Sector::Foreign => Some(Wrong::Foreign),
        Sector::Damaged => Some(Wrong::Torn),
    }
}

/// Describes what a block holds, for the first few wrong blocks: runs of equal sectors.
pub fn describe(block: &[u8]) -> String {
    let mut parts: Vec<(usize, usize, String)> = Vec::new();
    for (index, bytes) in block.chunks_exact(SECTOR).enumerate() {
        let text = match Stamp::read_from(bytes) {
            Found::Blank if bytes.iter().all(|byte| *byte == 0) => "zeroes".to_owned(),
            Found::Blank => "no stamp".to_owned(),
            Found::Damaged => "bad checksum".to_owned(),
            Found::Sound(stamp) => format!(
                "seq {} run {} writer {} of sector {} nonce {:08x} device {:08x}",
                stamp.seq,
                stamp.run,
                stamp.writer,
                // Relative, so that neighbours of one block read the same.
                stamp.sector.wrapping_sub(index as u64),
                stamp.identity.nonce as u32,
                stamp.identity.device as u32,
            ),
        };
        match parts.last_mut() {
            Some((_, last, same)) if *same == text => *last = index,
            _ => parts.push((index, index, text)),
        }
    }
    let parts: Vec<String> =
        parts.into_iter().map(|(from, to, text)| format!("sectors {from}-{to}: {text}")).collect();
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ME: Identity = Identity { nonce: 0x1234_5678_9abc_def0_1122_3344_5566_7788, device: 7 };

    fn expect(block: u64, sectors: u64, acked: u32, attempted: u32) -> Expectation {
        let first_sector = block * sectors;
        Expectation { identity: ME, first_sector, run: 2, writer: 3, acked, attempted }
    }

    fn stamped(expect: &Expectation, sectors: usize, seq: u32) -> Vec<u8> {
        let mut block = vec![0; sectors * SECTOR];
        expect.stamp(seq, &mut block);
        block
    }

    proptest! {
        #[test]
        fn a_block_as_written_is_right(block in 0u64..1 << 40, sectors in 1usize..32, seq in 1u32..) {
            let expect = expect(block, sectors as u64, seq, seq);
            prop_assert_eq!(judge(&stamped(&expect, sectors, seq), &expect), None);
        }

        #[test]
        fn an_older_write_is_lost(sectors in 1usize..16, seq in 2u32.., back in 1u32..) {
            let expect = expect(9, sectors as u64, seq, seq);
            let old = seq - (back % (seq - 1)).max(1);
            prop_assert_eq!(judge(&stamped(&expect, sectors, old), &expect), Some(Wrong::Lost));
        }

        #[test]
        fn a_write_of_an_older_ledger_is_lost(seq in 1u32..) {
            let expect = expect(9, 8, 1, 1);
            let block = stamped(&Expectation { run: 1, ..expect }, 8, seq);
            prop_assert_eq!(judge(&block, &expect), Some(Wrong::Lost));
        }

        #[test]
        fn sectors_of_two_writes_are_torn(cut in 1usize..8, seq in 2u32.., newest_first: bool) {
            let expect = expect(9, 8, seq, seq);
            let (mut head, mut tail) = (stamped(&expect, 8, seq), stamped(&expect, 8, seq - 1));
            if !newest_first {
                std::mem::swap(&mut head, &mut tail);
            }
            head[cut * SECTOR..].copy_from_slice(&tail[cut * SECTOR..]);
            prop_assert_eq!(judge(&head, &expect), Some(Wrong::Torn));
        }

        #[test]
        fn any_flipped_bit_is_seen(sectors in 2usize..8, at in 0usize..8 * SECTOR, bit in 0u8..8) {
            let expect = expect(5, sectors as u64, 4, 4);
            let mut block = stamped(&expect, sectors, 4);
            let at = at % block.len();
            block[at] ^= 1 << bit;
            prop_assert_eq!(judge(&block, &expect), Some(Wrong::Torn));
        }

        #[test]
        fn any_overwritten_stretch_is_torn(from in 0usize..8 * SECTOR, length in 1usize..7 * SECTOR, byte: u8) {
            let expect = expect(5, 8, 4, 4);
            let mut block = stamped(&expect, 8, 4);
            let to = (from + length).min(block.len());
            let before = block.clone();
            block[from..to].fill(byte);
            let expected = if block == before { None } else { Some(Wrong::Torn) };
            prop_assert_eq!(judge(&block, &expect), expected);
        }

        #[test]
        fn another_block_is_misplaced(block in 0u64..1000, other in 0u64..1000, acked in 0u32..3) {
            prop_assume!(block != other);
            let here = expect(block, 8, acked, acked);
            let bytes = stamped(&expect(other, 8, 1, 1), 8, 1);
            prop_assert_eq!(judge(&bytes, &here), Some(Wrong::Misplaced));
        }

        #[test]
        fn half_of_another_block_is_torn_or_astray(cut in 1usize..8) {
            let bytes = stamped(&expect(4, 8, 1, 1), 8, 1);
            for (acked, wrong) in [(0, Wrong::Misplaced), (1, Wrong::Torn)] {
                let here = expect(3, 8, acked, 1);
                let mut block = stamped(&here, 8, 1);
                block[cut * SECTOR..].copy_from_slice(&bytes[cut * SECTOR..]);
                prop_assert_eq!(judge(&block, &here), Some(wrong));
            }
        }

        #[test]
        fn after_failed_writes_each_sector_may_be_old_or_new(acked in 1u32..100, tried in 1u32..5,
                                                             picks in prop::collection::vec(0u32..5, 8)) {
            let expect = expect(5, 8, acked, acked + tried);
            let mut block = vec![0; 8 * SECTOR];
            for (index, pick) in picks.iter().enumerate() {
                let whole = stamped(&expect, 8, acked + pick % (tried + 1));
                let range = index * SECTOR..(index + 1) * SECTOR;
                block[range.clone()].copy_from_slice(&whole[range]);
            }
            prop_assert_eq!(judge(&block, &expect), None);
            // The same contents are wrong once a newer write was acknowledged.
            let later = Expectation { acked: acked + tried + 1, attempted: acked + tried + 1, ..expect };
            prop_assert!(judge(&block, &later).is_some());
        }

        #[test]
        fn garbage_is_foreign(bytes in prop::collection::vec(any::<u8>(), 8 * SECTOR)) {
            prop_assert_eq!(judge(&bytes, &expect(5, 8, 1, 1)), Some(Wrong::Foreign));
            prop_assert_eq!(judge(&bytes, &expect(5, 8, 0, 0)), None);
        }
    }

    #[test]
    fn zeroes_are_foreign_where_a_write_was_acknowledged() {
        assert_eq!(judge(&[0; 4096], &expect(5, 8, 1, 1)), Some(Wrong::Foreign));
        assert_eq!(judge(&[0; 4096], &expect(5, 8, 0, 3)), None);
    }

    #[test]
    fn another_boot_is_foreign() {
        let here = expect(5, 8, 1, 1);
        let other = Expectation { identity: Identity { nonce: 1, ..ME }, ..here };
        assert_eq!(judge(&stamped(&other, 8, 1), &here), Some(Wrong::Foreign));
    }

    #[test]
    fn another_device_or_writer_is_misplaced() {
        let here = expect(5, 8, 1, 1);
        let device = Expectation { identity: Identity { device: 8, ..ME }, ..here };
        let writer = Expectation { writer: 4, ..here };
        assert_eq!(judge(&stamped(&device, 8, 1), &here), Some(Wrong::Misplaced));
        assert_eq!(judge(&stamped(&writer, 8, 1), &here), Some(Wrong::Misplaced));
    }

    #[test]
    fn a_sequence_never_given_out_is_foreign() {
        let here = expect(5, 8, 1, 1);
        assert_eq!(judge(&stamped(&here, 8, 2), &here), Some(Wrong::Foreign));
    }

    #[test]
    fn a_description_names_each_stretch() {
        let here = expect(5, 8, 2, 2);
        let mut block = stamped(&here, 8, 2);
        block[2048..].fill(0);
        let text = describe(&block);
        assert!(text.starts_with("sectors 0-3: seq 2 run 2 writer 3 of sector 40"), "{text}");
        assert!(text.ends_with("sectors 4-7: zeroes"), "{text}");
    }
}
