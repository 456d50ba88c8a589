//! Which blocks of a disk are referred to: none where too many references did not match.
//!
//! A guest that overwrites one file as fast as it can makes references to that part of its disk
//! wrong and no others, so each region is judged by itself; a disk of which most regions are wrong
//! (it is another one, or all of it is being written) is given up as a whole, before each of its
//! regions has cost its share of mismatches.

use std::collections::HashMap;

/// Blocks of a region, which has 64 MiB.
const REGION: u64 = 1 << 14;
/// Mismatches of a region, and wrong regions of a disk, that are taken for bad luck.
const LUCK: u64 = 64;
const LUCK_OF_REGIONS: u64 = 8;
/// Given up when more than one in so many is wrong.
const TRUST: u64 = 2;

#[derive(Clone, Copy, Debug, Default)]
struct Region {
    referred: u64,
    mismatched: u64,
    lost: bool,
}

/// What is known of the references to one disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trust {
    regions: HashMap<u64, Region>,
    lost_regions: u64,
    lost: bool,
}

impl Trust {
    /// Whether this block may be referred to; if so, it is.
    pub(crate) fn refer(&mut self, block: u64) -> bool {
        if self.lost {
            return false;
        }
        let region = self.regions.entry(block / REGION).or_default();
        region.referred += u64::from(!region.lost);
        !region.lost
    }

    /// A reference to this block was wrong.
    pub(crate) fn mismatched(&mut self, block: u64) {
        let region = self.regions.entry(block / REGION).or_default();
        region.mismatched += 1;
        if region.lost || region.mismatched <= LUCK + region.referred / TRUST {
            return;
        }
        region.lost = true;
        self.lost_regions += 1;
        let regions = self.regions.len() as u64;
        self.lost |= self.lost_regions > LUCK_OF_REGIONS + regions / TRUST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is told of each reference: whether it was wrong.
    fn judge(trust: &mut Trust, blocks: impl Iterator<Item = u64>, wrong: bool) -> (u64, u64) {
        let (mut referred, mut refused) = (0, 0);
        for block in blocks {
            if !trust.refer(block) {
                refused += 1;
                continue;
            }
            referred += 1;
            if wrong {
                trust.mismatched(block);
            }
        }
        (referred, refused)
    }

    #[test]
    fn a_part_that_is_overwritten_costs_that_part_alone() {
        let mut trust = Trust::default();
        let (wrong, refused) = judge(&mut trust, 0..REGION, true);
        assert!(wrong <= 2 * LUCK + 2, "{wrong}");
        assert_eq!(wrong + refused, REGION);
        assert_eq!(judge(&mut trust, REGION..20 * REGION, false), (19 * REGION, 0));
        assert_eq!(judge(&mut trust, 0..10, false), (0, 10));
    }

    #[test]
    fn a_disk_that_is_wrong_nearly_everywhere_is_given_up_at_a_bounded_price() {
        let mut trust = Trust::default();
        let mut wrong = 0;
        for region in 0..10_000 {
            wrong += judge(&mut trust, region * REGION..region * REGION + 1000, true).0;
        }
        assert!(trust.lost && wrong <= 17 * (2 * LUCK + 2), "{wrong}");
        assert_eq!(judge(&mut trust, 1 << 40..(1 << 40) + 9, false), (0, 9));
    }

    #[test]
    fn a_reference_now_and_then_that_is_wrong_costs_nothing() {
        let mut trust = Trust::default();
        for block in 0..4 * REGION {
            assert!(trust.refer(block));
            if block % 3 == 0 {
                trust.mismatched(block);
            }
        }
    }
}
