//! The export format: what is written is read again, and hostile bytes are refused, never followed.

use proptest::collection::vec;
use proptest::prelude::*;
use semper_blockmap::RegionKey;
use semper_blockmap::format::{BlockRecord, Export, FormatError, PageRecord, PageState};

fn export() -> impl Strategy<Value = Export> {
    let pages = vec((0..2u32, 0..50u64, 0..700u64, any::<u64>(), any::<[u8; 16]>()), 0..40);
    let blocks = vec((0..80u64, any::<u64>(), any::<[u8; 16]>()), 0..40);
    (any::<[u8; 32]>(), any::<bool>(), pages, blocks).prop_map(|(key, verified, pages, blocks)| {
        let region = |n: u64| RegionKey {
            guest_addr: n << 20,
            size: 50 * 4096,
            file_offset: n,
            file: (n, 9),
        };
        let state = |hash: &[u8; 16]| match (verified, hash[0] % 2) {
            (false, _) => PageState::Hint,
            (true, 0) => PageState::Associated,
            (true, _) => PageState::Content,
        };
        let mut pages: Vec<_> = pages
            .into_iter()
            .map(|(region, page, sector, stamp, hash)| PageRecord {
                region,
                state: state(&hash),
                page,
                sector,
                stamp,
                hash,
            })
            .collect();
        pages.sort_by_key(|p| (p.region, p.page));
        pages.dedup_by_key(|p| (p.region, p.page));
        let mut blocks: Vec<_> = blocks
            .into_iter()
            .map(|(block, stamp, hash)| BlockRecord { hash, block, stamp })
            .collect();
        blocks.sort_by_key(|b| b.block);
        blocks.dedup_by_key(|b| b.block);
        let regions = vec![region(0), region(1)];
        Export { capacity: 100 * 4096, key, verified, regions, pages, blocks }
    })
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn what_is_written_is_read(export in export()) {
        let bytes = export.to_bytes();
        prop_assert_eq!(bytes.len(), export.encoded_len());
        for page in &export.pages {
            prop_assert_eq!(export.block_in(page.region, page.page), Some(page));
        }
        prop_assert_eq!(Export::parse(&bytes), Ok(export));
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_refused(export in export(), at in any::<usize>(), bit in 0..8u8) {
        let mut bytes = export.to_bytes();
        let at = at % bytes.len();
        prop_assert!(Export::parse(&bytes[..at]).is_err());
        bytes[at] ^= 1 << bit;
        prop_assert!(Export::parse(&bytes).is_err());
    }

    #[test]
    fn hostile_bytes_are_never_followed(
        export in export(),
        edits in vec((any::<usize>(), any::<u8>()), 1..8),
        tail in vec(any::<u8>(), 0..64),
    ) {
        let mut bytes = export.to_bytes();
        for (at, value) in edits {
            // The header is where the damage can be done.
            let at = if at % 2 == 0 { at % 128 } else { at % bytes.len() };
            bytes[at] = value;
        }
        bytes.extend(tail);
        if let Ok(export) = Export::parse_unsummed(&bytes) {
            for page in &export.pages {
                prop_assert!(page.page < export.regions[page.region as usize].size / 4096);
                prop_assert!((page.sector + 8) * 512 <= export.capacity);
            }
            prop_assert!(export.blocks.iter().all(|b| (b.block + 1) * 4096 <= export.capacity));
        }
    }
}

#[test]
fn another_version_and_another_file_are_named_as_such() {
    let empty = Export {
        capacity: 0,
        key: [0; 32],
        verified: false,
        regions: vec![],
        pages: vec![],
        blocks: vec![],
    };
    let mut bytes = empty.to_bytes();
    bytes[8] = 2;
    assert_eq!(Export::parse(&bytes), Err(FormatError::Version(2)));
    assert_eq!(Export::parse(b"#!/bin/sh"), Err(FormatError::Magic));
    assert!(matches!(Export::parse(b""), Err(FormatError::Length { .. })));
    // Counts that would need more memory than there is.
    let mut bytes = empty.to_bytes();
    bytes[88..96].copy_from_slice(&(u64::MAX / 64).to_le_bytes());
    assert!(matches!(Export::parse(&bytes), Err(FormatError::Length { .. })));
}
