//! What a verified block carries, and what its reader concludes.
//!
//! Each 512-byte sector of a block starts with a stamp; the rest of the sector is not looked at.
//! A device may tear a block between sectors, never within one.
//!
//! ```text
//!  0        8        16       24       32
//!  | nonce  | block  | seq    | sector |   little endian, 8 bytes each
//! ```
//!
//! `nonce` differs in each run, so what an earlier run left is told from what this one wrote;
//! `seq` counts the writes of that block from 1.

const SECTOR: usize = 512;

/// What reading a block back showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every sector has the expected write.
    Right,
    /// Every sector has one and the same earlier write of this block: the newer one was lost.
    Lost,
    /// The sectors come from different writes.
    Torn,
    /// The stamp of another block.
    Misplaced,
    /// No stamp of this run.
    Foreign,
}

fn word(sector: &[u8], index: usize) -> u64 {
    let bytes = sector[index * 8..index * 8 + 8].try_into().expect("eight bytes");
    u64::from_le_bytes(bytes)
}

/// Stamps every sector of `data`, whose length is a multiple of 512.
pub fn write(data: &mut [u8], nonce: u64, block: u64, seq: u64) {
    for (index, sector) in data.chunks_exact_mut(SECTOR).enumerate() {
        for (slot, value) in [nonce, block, seq, index as u64].into_iter().enumerate() {
            sector[slot * 8..slot * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Compares `data` with what the last completed write of `block` left there.
pub fn check(data: &[u8], nonce: u64, block: u64, seq: u64) -> Verdict {
    let mut first = None;
    for (index, sector) in data.chunks_exact(SECTOR).enumerate() {
        if word(sector, 0) != nonce {
            return Verdict::Foreign;
        }
        if word(sector, 1) != block || word(sector, 3) != index as u64 {
            return Verdict::Misplaced;
        }
        let found = word(sector, 2);
        if *first.get_or_insert(found) != found {
            return Verdict::Torn;
        }
    }
    if first == Some(seq) { Verdict::Right } else { Verdict::Lost }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_is_told_apart() {
        let mut data = vec![0u8; 4096];
        assert_eq!(check(&data, 7, 3, 1), Verdict::Foreign);
        write(&mut data, 7, 3, 2);
        assert_eq!(check(&data, 7, 3, 2), Verdict::Right);
        assert_eq!(check(&data, 7, 3, 3), Verdict::Lost);
        assert_eq!(check(&data, 7, 4, 2), Verdict::Misplaced);
        assert_eq!(check(&data, 8, 3, 2), Verdict::Foreign);
        write(&mut data[..512], 7, 3, 3);
        assert_eq!(check(&data, 7, 3, 3), Verdict::Torn);
        assert_eq!(check(&data, 7, 3, 2), Verdict::Torn);
    }

    #[test]
    fn a_shifted_sector_is_misplaced() {
        let mut data = vec![0u8; 1024];
        write(&mut data, 7, 3, 1);
        data.copy_within(512.., 0);
        assert_eq!(check(&data, 7, 3, 1), Verdict::Misplaced);
    }
}
