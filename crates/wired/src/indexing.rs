//! Building the source's index: which blocks it is made of, and reading them.
//!
//! Best is the page/block map of semper-blkd, which names the blocks that the guest has touched.
//! Without one all of the disk is read, but for its holes.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use semper_blockmap::format::Export;
use semper_blockmap::{Page, SECTORS_PER_BLOCK};
use semper_wire::{BlockRef, ContentIndex, PAGE_SIZE};
use serde_json::Value;

use crate::args::MapSource;
use crate::disks::{Disk, RUN};
use crate::failure::Failure;
use crate::progress::Progress;

/// Longest answer of semper-blkd, in bytes.
const MAX_MAP: u64 = 4 << 30;
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads the blocks of all disks; stops at the index's limit.
pub(crate) fn build(
    index: &mut ContentIndex,
    disks: &[Disk],
    progress: &Progress,
) -> Result<(), Failure> {
    for (number, disk) in (0..).zip(disks) {
        let runs = match &disk.map {
            Some(map) => touched(disk, map)?,
            None => data(disk)?,
        };
        let mut buffer = vec![Page::default(); RUN];
        'disk: for (first, count) in pieces(runs) {
            // A block that cannot be read is not in the index; the guest's own reads will tell.
            let Some(bytes) = disk.read(first, &mut buffer[..count]) else { continue };
            for (block, content) in (first..).zip(bytes.chunks_exact(PAGE_SIZE)) {
                let content = content.try_into().expect("a page");
                if !index.insert(BlockRef { disk: number, block }, content) {
                    log::warn!("the index is full disk={} block={block}", disk.name);
                    break 'disk;
                }
            }
            progress.indexed(index.len() as u64);
        }
        log::info!("indexed disk={} blocks={}", disk.name, index.len());
    }
    Ok(())
}

/// Runs of any length as runs of at most [`RUN`] blocks.
fn pieces(runs: Vec<(u64, u64)>) -> impl Iterator<Item = (u64, usize)> {
    runs.into_iter().flat_map(|(first, end)| {
        (first..end).step_by(RUN).map(move |at| (at, (end - at).min(RUN as u64) as usize))
    })
}

/// First block and end of each piece of the disk that is no hole.
fn data(disk: &Disk) -> Result<Vec<(u64, u64)>, Failure> {
    let page = PAGE_SIZE as u64;
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < disk.size {
        let start = match rustix::fs::seek(&disk.file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A device has no holes to tell of.
            Err(_) => return Ok(vec![(0, disk.blocks())]),
        };
        let end = rustix::fs::seek(&disk.file, SeekFrom::Hole(start)).unwrap_or(disk.size);
        runs.push((start / page, (end.div_ceil(page)).min(disk.blocks())));
        at = end.max(start + 1);
    }
    Ok(runs)
}

/// Runs of blocks that the map names.
fn touched(disk: &Disk, map: &MapSource) -> Result<Vec<(u64, u64)>, Failure> {
    let (bytes, path) = match map {
        MapSource::File(path) => {
            (fs::read(path).map_err(Failure::file("read the map", path))?, path)
        }
        MapSource::Backend(path) => (ask(path)?, path),
    };
    let export = Export::parse(&bytes)
        .map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?;
    if export.capacity != disk.size {
        let (path, image) = (path.display(), disk.path.display());
        return Err(Failure::Usage(format!(
            "the map {path} is of a disk of {} bytes, and {image} has {}; name the map of this disk",
            export.capacity, disk.size
        )));
    }
    // A page may begin at any sector; only a whole block can be referred to.
    let aligned = |sector: &u64| sector % SECTORS_PER_BLOCK == 0;
    let pages = export.pages.iter().map(|page| page.sector).filter(aligned);
    let pages = pages.map(|sector| sector / SECTORS_PER_BLOCK);
    let mut blocks: Vec<u64> = pages.chain(export.blocks.iter().map(|block| block.block)).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for block in blocks.into_iter().filter(|&block| block < disk.blocks()) {
        match runs.last_mut() {
            Some((_, end)) if *end == block => *end += 1,
            _ => runs.push((block, block + 1)),
        }
    }
    Ok(runs)
}

/// Asks semper-blkd for its map.
fn ask(path: &Path) -> Result<Vec<u8>, Failure> {
    let cannot = || Failure::file("ask the backend for its map at", path);
    let refused = |line: &str| {
        Failure::Usage(format!("the backend at {} gives no map: {}", path.display(), line.trim()))
    };
    let socket = UnixStream::connect(path).map_err(cannot())?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(cannot())?;
    let request = b"{\"id\":1,\"cmd\":\"map-export\",\"verify\":false}\n";
    (&socket).write_all(request).map_err(cannot())?;
    let mut reader = BufReader::new(&socket);
    let mut line = String::new();
    reader.by_ref().take(64 << 10).read_line(&mut line).map_err(cannot())?;
    let answer: Value = serde_json::from_str(&line).map_err(|_| refused(&line))?;
    let length = answer["ok"]["bytes"].as_u64().filter(|&length| length <= MAX_MAP);
    let length = length.ok_or_else(|| refused(&line))?;
    let mut bytes = Vec::new();
    reader.take(length).read_to_end(&mut bytes).map_err(cannot())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn runs_are_read_in_pieces() {
        let pieces: Vec<_> = pieces(vec![(0, 2), (10, 139)]).collect();
        assert_eq!(pieces, [(0, 2), (10, 64), (74, 64), (138, 1)]);
    }
}
