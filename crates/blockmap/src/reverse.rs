//! The other way round: which pages hold this block.

use crate::map::{Association, BlockMap, Layout};

/// All associations that were good when it was built, by sector. 32 bytes each.
#[derive(Clone, Debug, Default)]
pub struct Reverse {
    by_sector: Vec<Association>,
}

impl Reverse {
    /// Scans the tables.
    pub fn build(map: &BlockMap, layout: &Layout) -> Self {
        let mut by_sector: Vec<_> = layout.associations(map).collect();
        by_sector.sort_unstable_by_key(|a| (a.sector, a.region, a.page));
        Self { by_sector }
    }

    /// The pages that hold the eight sectors from `sector`.
    pub fn pages_of(&self, sector: u64) -> &[Association] {
        let start = self.by_sector.partition_point(|a| a.sector < sector);
        let len = self.by_sector[start..].partition_point(|a| a.sector == sector);
        &self.by_sector[start..start + len]
    }
}
