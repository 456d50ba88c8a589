//! The DMA-dirty interface: which pages of the guest a device has written.
//!
//! | source | what it goes by | for |
//! |---|---|---|
//! | [`Parsed`] | what the device's commands say, and its completion queues | a device that we are, or understand |
//! | [`Everything`] | nothing: every page may have been written | a device that nobody understands |
//!
//! A third one, an IOMMU that keeps dirty bits (iommufd), needs a kernel with `CONFIG_IOMMUFD`.

use std::collections::HashMap;

use crate::PAGE;

/// Tells which pages were written since it began. Addresses are the guest's, in bytes.
pub trait DirtySource: Send {
    /// The name in reports.
    fn name(&self) -> &'static str;

    /// Forgets all pages.
    fn clear(&mut self);

    /// The device has written there.
    fn wrote(&mut self, address: u64, len: u64);

    /// The first address of each page that was written, in order, and forgets them.
    fn take(&mut self) -> Vec<u64>;

    /// How many pages that would be.
    fn count(&self) -> u64;
}

/// Goes by what the device's commands say.
#[derive(Debug, Default)]
pub struct Parsed {
    /// By 64 pages: one bit each.
    words: HashMap<u64, u64>,
}

impl DirtySource for Parsed {
    fn name(&self) -> &'static str {
        "parsed"
    }

    fn clear(&mut self) {
        self.words.clear();
    }

    fn wrote(&mut self, address: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|more| address.saturating_add(more)) else {
            return;
        };
        for page in address / PAGE..=last / PAGE {
            *self.words.entry(page / 64).or_default() |= 1 << (page % 64);
        }
    }

    fn take(&mut self) -> Vec<u64> {
        let mut words: Vec<_> = self.words.drain().collect();
        words.sort_unstable();
        let pages = words.into_iter().flat_map(|(word, bits)| {
            (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| (word * 64 + bit) * PAGE)
        });
        pages.collect()
    }

    fn count(&self) -> u64 {
        self.words.values().map(|bits| u64::from(bits.count_ones())).sum()
    }
}

/// Every page of the guest's memory, whose ranges (address, bytes) it is given.
#[derive(Debug, Default)]
pub struct Everything {
    ranges: Vec<(u64, u64)>,
}

impl Everything {
    /// Of memory with these ranges.
    pub fn new(ranges: Vec<(u64, u64)>) -> Self {
        Self { ranges }
    }
}

impl DirtySource for Everything {
    fn name(&self) -> &'static str {
        "everything"
    }

    fn clear(&mut self) {}

    fn wrote(&mut self, _address: u64, _len: u64) {}

    fn take(&mut self) -> Vec<u64> {
        let pages = |&(address, len): &(u64, u64)| {
            (address / PAGE..(address + len).div_ceil(PAGE)).map(|page| page * PAGE)
        };
        self.ranges.iter().flat_map(pages).collect()
    }

    fn count(&self) -> u64 {
        self.ranges.iter().map(|(_, len)| len.div_ceil(PAGE)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_told_once_in_order_and_then_forgotten() {
        let mut dirty = Parsed::default();
        dirty.wrote(0x10_0fff, 2);
        dirty.wrote(0x3000, 1);
        dirty.wrote(0x3008, 16);
        dirty.wrote(0x9000, 0);
        assert_eq!(dirty.count(), 3);
        assert_eq!(dirty.take(), [0x3000, 0x10_0000, 0x10_1000]);
        assert_eq!((dirty.count(), dirty.take()), (0, Vec::new()));
    }

    #[test]
    fn a_range_that_wraps_ends_with_the_addresses() {
        let mut dirty = Parsed::default();
        dirty.wrote(u64::MAX, 10);
        assert_eq!(dirty.take(), [u64::MAX - 0xfff]);
    }

    #[test]
    fn of_a_device_that_nobody_understands_every_page_is_dirty() {
        let mut dirty = Everything::new(vec![(0x1000, 0x2000), (0x8000, 1)]);
        assert_eq!(dirty.take(), [0x1000, 0x2000, 0x8000]);
        assert_eq!(dirty.count(), 3);
    }
}
