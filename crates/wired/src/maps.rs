//! Which blocks a page/block map names: one in a file, or that of semper-blkd.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::time::Duration;

use semper_blockmap::SECTORS_PER_BLOCK;
use semper_blockmap::format::Export;
use semper_wire::Fingerprint;
use serde_json::Value;

use crate::args::MapSource;
use crate::connects::Connects;
use crate::disks::Disk;
use crate::failure::Failure;

/// Longest answer of semper-blkd, in bytes.
const MAX_MAP: u64 = 4 << 30;
const PATIENCE: Duration = Duration::from_secs(60);

/// What is known of a block that a map has named.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub block: u64,
    /// Another one when the content is.
    pub stamp: u64,
    pub fingerprint: Option<Fingerprint>,
}

impl Known {
    fn of((block, stamp): (u64, u64)) -> Self {
        Self { block, stamp, fingerprint: None }
    }
}

/// The blocks that a map names.
#[derive(Debug)]
pub(crate) struct Named {
    /// That stand in a page, as far as the map knows.
    pub held: Vec<Known>,
    /// That the guest has used, now or long ago.
    pub others: Vec<Known>,
}

/// Asks a map; every block is on the disk, and none is named twice.
pub(crate) fn named(disk: &Disk, map: &MapSource, connects: &Connects) -> Result<Named, Failure> {
    let (path, (capacity, mut named)) = match map {
        MapSource::File(path) => {
            let bytes = fs::read(path).map_err(Failure::file("read the map", path))?;
            (path, exported(&bytes, path)?)
        }
        MapSource::Backend(path) => (path, ask(path, connects)?),
    };
    if capacity != disk.size {
        let (path, image) = (path.display(), disk.path.display());
        return Err(Failure::Usage(format!(
            "the map {path} is of a disk of {capacity} bytes, and {image} has {}; name the map of \
             this disk",
            disk.size
        )));
    }
    for blocks in [&mut named.held, &mut named.others] {
        blocks.retain(|found| found.block < disk.blocks());
    }
    Ok(named)
}

/// What an exported map names, and the size of its disk.
fn exported(bytes: &[u8], path: &Path) -> Result<(u64, Named), Failure> {
    let export = Export::parse(bytes)
        .map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?;
    // A page may begin at any sector; only a whole block can be referred to.
    let pages = export.pages.iter().filter(|page| page.sector % SECTORS_PER_BLOCK == 0);
    let pages = pages.map(|page| (page.sector / SECTORS_PER_BLOCK, page.stamp));
    // A page's stamp is that of now, a block's that of when it was hashed: the page's stays.
    let blocks = export.blocks.iter().map(|block| (block.block, block.stamp));
    let mut held: Vec<Known> = pages.chain(blocks).map(Known::of).collect();
    held.sort_by_key(|found| found.block);
    held.dedup_by_key(|found| found.block);
    Ok((export.capacity, Named { held, others: Vec::new() }))
}

/// Asks semper-blkd for the blocks; one of an earlier release only knows how to export its map.
fn ask(path: &Path, connects: &Connects) -> Result<(u64, Named), Failure> {
    let refused = |answer: &Value| {
        let path = path.display();
        Failure::Usage(format!("the backend at {path} gives no map: {answer}"))
    };
    let (answer, bytes) = request(path, connects, b"{\"id\":1,\"cmd\":\"map-blocks\"}\n")?;
    let Some(capacity) = answer["ok"]["capacity"].as_u64() else {
        let export = b"{\"id\":1,\"cmd\":\"map-export\",\"verify\":false}\n";
        let (answer, bytes) = request(path, connects, export)?;
        answer["ok"].as_object().ok_or_else(|| refused(&answer))?;
        return exported(&bytes, path);
    };
    let held = answer["ok"]["held"].as_u64().and_then(|held| usize::try_from(held).ok());
    let number = |bytes: &[u8], at| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let pairs = bytes.chunks_exact(16).filter_map(|b| Some((number(b, 0)?, number(b, 8)?)));
    let mut all: Vec<Known> = pairs.map(Known::of).collect();
    let others = all.split_off(held.ok_or_else(|| refused(&answer))?.min(all.len()));
    Ok((capacity, Named { held: all, others }))
}

/// One request to semper-blkd: the answer, and the bytes that it announces.
fn request(path: &Path, connects: &Connects, request: &[u8]) -> Result<(Value, Vec<u8>), Failure> {
    let cannot = || Failure::file("ask the backend for its map at", path);
    let socket = connects.to(path).map_err(cannot())?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(cannot())?;
    (&socket).write_all(request).map_err(cannot())?;
    let mut reader = BufReader::new(&socket);
    let mut line = String::new();
    reader.by_ref().take(64 << 10).read_line(&mut line).map_err(cannot())?;
    let answer: Value = serde_json::from_str(&line).unwrap_or(Value::String(line));
    let length = answer["ok"]["bytes"].as_u64().unwrap_or(0);
    let mut bytes = Vec::new();
    reader.take(length.min(MAX_MAP)).read_to_end(&mut bytes).map_err(cannot())?;
    Ok((answer, bytes))
}
