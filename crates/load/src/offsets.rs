//! Which block each request touches, and a cheap seeded random number generator for it.

/// SplitMix64 (Steele, Lea, Flood 2014): one multiplication chain for each number, any seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator whose whole sequence follows from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 random bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound` by multiply and shift; the bias is below bound / 2^64.
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }
}

/// The order in which a lane visits its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other, from the start again after the last.
    Sequential,
    /// Each time any of them.
    Random,
}

/// The blocks of one lane: those whose number is `first`, `first + stride`, … below `blocks`.
///
/// With `stride` 1 lanes share all blocks; verification gives each lane its own by letting
/// `stride` be the number of lanes.
#[derive(Clone, Debug)]
pub struct Blocks {
    first: u64,
    stride: u64,
    count: u64,
    cursor: u64,
    order: Order,
}

impl Blocks {
    /// The blocks `first + i * stride` below `blocks`. `None` if there is not one.
    pub fn new(blocks: u64, first: u64, stride: u64, order: Order) -> Option<Self> {
        let count = blocks.checked_sub(first)?.div_ceil(stride);
        (count > 0).then_some(Self { first, stride, count, cursor: 0, order })
    }

    /// The same blocks, sequentially from the one at `cursor` (so that lanes that share their
    /// blocks do not walk over the same ones).
    pub fn starting_at(mut self, cursor: u64) -> Self {
        self.cursor = cursor % self.count;
        self
    }

    /// How many blocks the lane has.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The position of the next block among the lane's own, below `count`.
    #[inline]
    pub fn next_index(&mut self, random: &mut Random) -> u64 {
        match self.order {
            Order::Random => random.below(self.count),
            Order::Sequential => {
                let index = self.cursor;
                self.cursor = if index + 1 == self.count { 0 } else { index + 1 };
                index
            }
        }
    }

    /// The number on the disk of the lane's block at `index`.
    #[inline]
    pub fn block(&self, index: u64) -> u64 {
        self.first + index * self.stride
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_sequence_is_the_published_one() {
        // Reference values of SplitMix64 for seed 1234567.
        let mut random = Random::new(1_234_567);
        let found: Vec<u64> = (0..3).map(|_| random.next_u64()).collect();
        assert_eq!(
            found,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn random_blocks_spread_evenly() {
        let mut random = Random::new(1);
        let mut blocks = Blocks::new(16, 0, 1, Order::Random).unwrap();
        let mut hits = [0u32; 16];
        (0..160_000).for_each(|_| hits[blocks.next_index(&mut random) as usize] += 1);
        assert!(hits.iter().all(|&hit| (9_500..10_500).contains(&hit)), "{hits:?}");
    }

    #[test]
    fn sequential_blocks_wrap() {
        let mut random = Random::new(1);
        let mut blocks = Blocks::new(4, 0, 1, Order::Sequential).unwrap().starting_at(2);
        let found: Vec<u64> = (0..6).map(|_| blocks.next_index(&mut random)).collect();
        assert_eq!(found, [2, 3, 0, 1, 2, 3]);
    }

    #[test]
    fn a_lane_without_a_block_is_refused() {
        assert!(Blocks::new(0, 0, 1, Order::Random).is_none());
        assert!(Blocks::new(2, 2, 4, Order::Random).is_none());
        assert!(Blocks::new(2, 3, 4, Order::Random).is_none());
    }

    proptest! {
        #[test]
        fn below_stays_below(seed: u64, bound in 1u64..) {
            let mut random = Random::new(seed);
            for _ in 0..100 {
                prop_assert!(random.below(bound) < bound);
            }
        }

        #[test]
        fn lanes_share_the_disk_without_overlap(total in 1u64..500, lanes in 1u64..9) {
            let mut owner = vec![None; total as usize];
            for lane in 0..lanes {
                let Some(blocks) = Blocks::new(total, lane, lanes, Order::Random) else { continue };
                for index in 0..blocks.count() {
                    let block = blocks.block(index);
                    prop_assert!(block < total);
                    prop_assert_eq!(owner[block as usize].replace(lane), None);
                }
            }
            prop_assert!(owner.iter().all(Option::is_some));
        }
    }
}
