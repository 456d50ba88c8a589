//! Whoever gives a program a saved state.

use semper_saved::chunk::{self, Block, Run};
use semper_saved::format::{ENTRY, Entry, HEADER, Header, Kind, MAGIC, VERSION};
use semper_saved::{CHUNK, CHUNK_PAGES, PAGE};

/// Whatever is accepted lies within the file and has its pages; what is packed is unpacked.
pub fn saved(data: &[u8]) {
    judge_header(data);
    // The same bytes behind a beginning that is right, so that more than the first test is met.
    let mut bytes = data.to_vec();
    bytes.resize(data.len().max(HEADER + ENTRY), 0);
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes[10..16].copy_from_slice(&[0, 0, CHUNK_PAGES as u8, 0, 0, 0]);
    bytes[16..24].copy_from_slice(&(CHUNK as u64).to_le_bytes());
    bytes[26..32].fill(0);
    judge_header(&bytes);
    bytes[32..40].fill(0);
    let index = (bytes.len() - ENTRY) as u64;
    bytes[40..48].copy_from_slice(&index.to_le_bytes());
    judge_header(&bytes);
    judge_body(data);
    judge_memory(data);
}

fn judge_header(bytes: &[u8]) {
    let Ok(header) = Header::read(&bytes[..bytes.len().min(HEADER)], bytes.len() as u64) else {
        return;
    };
    assert_eq!(header.write()[..], bytes[..HEADER], "not read as written");
    for entry in bytes[header.index as usize..].chunks_exact(ENTRY) {
        let Ok(entry) = Entry::read(entry.try_into().unwrap(), &header) else { continue };
        assert!(entry.offset + u64::from(entry.length) <= header.index, "beyond the file");
    }
}

fn judge_body(body: &[u8]) {
    if let Ok((runs, _)) = chunk::read_runs(body) {
        let pages = runs.iter().map(|run| match run {
            Run::Zeros(pages) | Run::Data(pages) | Run::Blocks(pages, _) => usize::from(*pages),
        });
        assert_eq!(pages.sum::<usize>(), CHUNK_PAGES, "not a chunk");
    }
    let mut pages = vec![0; CHUNK];
    for kind in [Kind::Plain, Kind::Zstd] {
        let entry = Entry { offset: 0, length: body.len() as u32, kind, hash: [0; 32] };
        let read = |_: Block, target: &mut [u8]| {
            assert!(target.len() <= CHUNK);
            target.fill(7);
            Ok(())
        };
        assert!(chunk::unpack(&entry, body, &mut pages, read).is_err(), "a hash of zeros");
    }
}

/// Each byte is a page: zeros, a block, or its own.
fn judge_memory(data: &[u8]) {
    let mut pages = vec![0; CHUNK];
    for (page, byte) in pages.chunks_exact_mut(PAGE).zip(data) {
        page.fill(byte % 16);
        page[0] = byte % 3;
    }
    let block = |page: &[u8]| (page[1] > 7).then(|| Block { image: 3, block: page[1].into() });
    let packed = chunk::pack(&pages, |page| block(page).filter(|_| page[0] == 0));
    let mut back = vec![0; CHUNK];
    let read = |first: Block, target: &mut [u8]| {
        for (page, number) in target.chunks_exact_mut(PAGE).zip(first.block..) {
            page.fill(number as u8);
            page[0] = 0;
        }
        Ok(())
    };
    chunk::unpack(&packed.entry, &packed.body, &mut back, read).unwrap();
    assert!(back == pages, "not unpacked as packed");
}
