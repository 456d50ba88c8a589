//! Whoever gives a program an exported page/block map.

use semper_blockmap::format::{Export, MAGIC, VERSION};

const HEADER: usize = 128;
const CHECKSUM: usize = 32;

/// Whatever is accepted points nowhere outside, and is written and read again as the same.
pub fn map(data: &[u8]) {
    judge(data);
    // The same bytes behind a beginning that is right, so that more than the first test is met.
    let mut counts = [0u64; 3];
    for (count, byte) in counts.iter_mut().zip(data) {
        *count = u64::from(byte % 5);
    }
    let total = (HEADER + CHECKSUM) as u64 + counts[0] * 40 + counts[1] * 48 + counts[2] * 32;
    let mut bytes = data.to_vec();
    bytes.resize(total as usize, 0);
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&total.to_le_bytes());
    bytes[32..36].copy_from_slice(&4096u32.to_le_bytes());
    bytes[36..40].copy_from_slice(&1u32.to_le_bytes());
    bytes[72] &= 1;
    bytes[73..80].fill(0);
    for (at, count) in (80..).step_by(8).zip(counts) {
        bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
    }
    bytes[104..HEADER].fill(0);
    judge(&bytes);
}

fn judge(bytes: &[u8]) {
    let Ok(export) = Export::parse_unsummed(bytes) else {
        assert!(Export::parse(bytes).is_err(), "accepted with its checksum, refused without");
        return;
    };
    for page in &export.pages {
        let region = &export.regions[page.region as usize];
        assert!((page.page + 1) * 4096 <= region.size, "a page outside its region");
        assert!((page.sector + 8) * 512 <= export.capacity, "sectors beyond the disk");
    }
    for block in &export.blocks {
        assert!((block.block + 1) * 4096 <= export.capacity, "a block beyond the disk");
    }
    assert_eq!(Export::parse(&export.to_bytes()).as_ref(), Ok(&export), "not read as written");
}
