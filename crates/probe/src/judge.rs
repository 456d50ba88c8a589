//! The judge: is a block that was read back right, and if not, in which way is it wrong?
//!
//! A pure function of the bytes and of what the ledger expects.

use crate::history::Allowed;
use crate::stamp::{Found, Identity, SECTOR, Stamp};

/// What a block may legally hold.
#[derive(Clone, Debug)]
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
    /// Where lanes share blocks: exactly which writes are legal. `acked` then only says whether any
    /// was acknowledged, and `writer` nothing.
    pub allowed: Option<Allowed>,
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
    if let Some(allowed) = &expect.allowed {
        let legal = allowed.contains(stamp.seq as u32);
        return if legal { Sector::Legal } else { Sector::Old(stamp.run, stamp.seq) };
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
        Expectation {
            identity: ME,
            first_sector,
            run: 2,
            writer: 3,
            acked,
            attempted,
            allowed: None,
        }
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
            let block = stamped(&Expectation { run: 1, ..expect.clone() }, 8, seq);
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
            let later = Expectation { acked: acked + tried + 1, attempted: acked + tried + 1, ..expect.clone() };
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
        let other = Expectation { identity: Identity { nonce: 1, ..ME }, ..here.clone() };
        assert_eq!(judge(&stamped(&other, 8, 1), &here), Some(Wrong::Foreign));
    }

    #[test]
    fn another_device_or_writer_is_misplaced() {
        let here = expect(5, 8, 1, 1);
        let device = Expectation { identity: Identity { device: 8, ..ME }, ..here.clone() };
        let writer = Expectation { writer: 4, ..here.clone() };
        assert_eq!(judge(&stamped(&device, 8, 1), &here), Some(Wrong::Misplaced));
        assert_eq!(judge(&stamped(&writer, 8, 1), &here), Some(Wrong::Misplaced));
    }

    #[test]
    fn a_sequence_never_given_out_is_foreign() {
        let here = expect(5, 8, 1, 1);
        assert_eq!(judge(&stamped(&here, 8, 2), &here), Some(Wrong::Foreign));
    }

    #[test]
    fn where_lanes_share_blocks_exactly_the_allowed_writes_are_legal() {
        let allowed = Some(Allowed { seqs: vec![3, 5], newest: 6, in_flight: false });
        let here = Expectation { allowed, ..expect(5, 8, 1, 8) };
        let other_writer = Expectation { writer: 9, ..here.clone() };
        for (seq, wrong) in [
            (3, None),
            (4, Some(Wrong::Lost)),
            (5, None),
            (6, Some(Wrong::Lost)),
            (7, None),
            (8, None),
            (9, Some(Wrong::Foreign)),
        ] {
            assert_eq!(judge(&stamped(&other_writer, 8, seq), &here), wrong, "{seq}");
        }
        let mut mixed = stamped(&here, 8, 3);
        mixed[512..1024].copy_from_slice(&stamped(&other_writer, 8, 5)[512..1024]);
        assert_eq!(judge(&mixed, &here), None);
        mixed[512..1024].copy_from_slice(&stamped(&other_writer, 8, 4)[512..1024]);
        assert_eq!(judge(&mixed, &here), Some(Wrong::Torn));
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
