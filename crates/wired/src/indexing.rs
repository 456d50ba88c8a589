//! Growing the source's index: which blocks it is made of, and reading them, in a thread of its own.
//!
//! Best is the page/block map of semper-blkd, which names the blocks that the guest has touched. It
//! is asked again while the stream goes on: what the guest reads or writes meanwhile is found too.
//! Without a map all of the disk is read once, but for its holes.
//!
//! What this thread says is a guess, as all of the index: the destination verifies.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, SeekFrom};
use rustix::io::Errno;
use semper_blockmap::format::Export;
use semper_blockmap::{Page, SECTORS_PER_BLOCK};
use semper_wire::{BlockRef, ContentIndex, Fingerprint, Fingerprinter, PAGE_SIZE};
use serde_json::Value;

use crate::args::MapSource;
use crate::disks::{Disk, RUN};
use crate::failure::Failure;

/// Longest answer of semper-blkd, in bytes.
const MAX_MAP: u64 = 4 << 30;
const PATIENCE: Duration = Duration::from_secs(60);

/// The map is asked for again no sooner, and so rarely that it takes a twentieth of the time.
const PAUSE: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;

/// A block whose content is another one than was known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    block: BlockRef,
    old: Option<Fingerprint>,
    new: Option<Fingerprint>,
}

/// What the thread has found out.
pub(crate) enum News {
    /// So many blocks will be looked at.
    Expected(usize),
    Changed(Vec<Change>),
    /// All that was known at the beginning was read.
    Complete,
    Failed(Failure),
}

impl News {
    /// Puts it into the index; true when the index is complete.
    pub(crate) fn apply(self, index: &mut ContentIndex) -> Result<bool, Failure> {
        match self {
            News::Expected(blocks) => index.reserve(blocks),
            News::Changed(changes) => {
                for Change { block, old, new } in changes {
                    old.into_iter().for_each(|old| index.remove(block, old));
                    if let Some(new) = new {
                        // One that is full has said so.
                        let _ = index.add(block, new);
                    }
                }
            }
            News::Complete => return Ok(true),
            News::Failed(failure) => return Err(failure),
        }
        Ok(false)
    }
}

/// Starts the thread; it ends by itself when nobody listens any longer. None stands for a disk that
/// the destination cannot read.
pub(crate) fn spawn(
    disks: Vec<Option<Disk>>,
    index: &ContentIndex,
) -> Result<Receiver<News>, Failure> {
    let (news, listener) = channel();
    let known = disks.iter().map(|_| Vec::new()).collect();
    let (fingerprints, room) = (index.fingerprints(), index.limit());
    let indexer = Indexer { disks, known, fingerprints, room, news };
    let spawned = thread::Builder::new().name("index".into()).spawn(move || indexer.run());
    spawned.map_err(Failure::system("start a thread"))?;
    Ok(listener)
}

/// What is known of a block that a map has named.
#[derive(Clone, Copy, Debug)]
struct Known {
    block: u64,
    stamp: u64,
    fingerprint: Option<Fingerprint>,
}

/// Why nothing more can be done.
enum Stop {
    Failed(Failure),
    /// Nobody listens.
    Deserted,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Stop::Failed(failure)
    }
}

impl From<SendError<News>> for Stop {
    fn from(_: SendError<News>) -> Self {
        Stop::Deserted
    }
}

struct Indexer {
    disks: Vec<Option<Disk>>,
    /// By disk and block: what its map has named.
    known: Vec<Vec<Known>>,
    fingerprints: Fingerprinter,
    /// Blocks that still fit.
    room: usize,
    news: Sender<News>,
}

impl Indexer {
    fn run(mut self) {
        let all: Vec<usize> = (0..self.disks.len()).collect();
        let began = all.iter().try_for_each(|&number| self.look(number));
        match began.and_then(|()| Ok(self.news.send(News::Complete)?)) {
            Ok(()) => {}
            Err(Stop::Failed(failure)) => return drop(self.news.send(News::Failed(failure))),
            Err(Stop::Deserted) => return,
        }
        let mut live = all;
        live.retain(|&n| {
            let map = self.disks[n].as_ref().and_then(|disk| disk.map.as_ref());
            matches!(map, Some(MapSource::Backend(_)))
        });
        // From now on others have more to do. On Linux this is this thread's priority alone.
        let _ = rustix::process::setpriority_process(None, 19);
        let mut pause = PAUSE;
        while !live.is_empty() {
            thread::sleep(pause);
            let began = Instant::now();
            for &number in &live {
                match self.look(number) {
                    Ok(()) => {}
                    // The backend may be gone already; what is known stays.
                    Err(Stop::Failed(why)) => log::debug!("no map error=\"{why}\""),
                    Err(Stop::Deserted) => return,
                }
            }
            pause = PAUSE.max(began.elapsed() * SHARE);
        }
    }

    /// Reads what is new on a disk.
    fn look(&mut self, number: usize) -> Result<(), Stop> {
        let Some(disk) = &self.disks[number] else { return Ok(()) };
        let Some(map) = &disk.map else { return self.read_all(number) };
        let mut changed = touched(disk, map)?;
        let known = &self.known[number];
        changed.retain_mut(|found| {
            let at = known.binary_search_by_key(&found.block, |known| known.block);
            let before = at.ok().map(|at| known[at]);
            found.fingerprint = before.and_then(|before| before.fingerprint);
            before.is_none_or(|before| before.stamp != found.stamp)
        });
        self.fit(number, &mut changed);
        self.news.send(News::Expected(changed.len()))?;
        let mut at = 0;
        while at < changed.len() {
            let first = changed[at].block;
            let follows = |(ahead, found): &(usize, &Known)| found.block == first + *ahead as u64;
            let count = changed[at..].iter().take(RUN).enumerate().take_while(follows).count();
            let mut read = self.fingerprints_of(number, first, count);
            let mut changes = Vec::with_capacity(count);
            for found in &mut changed[at..at + count] {
                let new = read.pop_front().flatten();
                let block = BlockRef { disk: number as u16, block: found.block };
                changes.push(Change { block, old: found.fingerprint, new });
                found.fingerprint = new;
            }
            self.news.send(News::Changed(changes))?;
            at += count;
        }
        if !changed.is_empty() {
            log::info!("indexed disk={} blocks={}", self.name(number), changed.len());
        }
        // The newer first: of two for one block it stays.
        changed.append(&mut self.known[number]);
        changed.sort_by_key(|known| known.block);
        changed.dedup_by_key(|known| known.block);
        self.known[number] = changed;
        Ok(())
    }

    fn read_all(&mut self, number: usize) -> Result<(), Stop> {
        let Some(disk) = &self.disks[number] else { return Ok(()) };
        // Read once, and by nobody else.
        let _ = rustix::fs::fadvise(&disk.file, 0, None, Advice::NoReuse);
        let runs = data(disk);
        let total = runs.iter().map(|(first, end)| end - first).sum::<u64>();
        self.news.send(News::Expected(usize::try_from(total).unwrap_or(usize::MAX)))?;
        for (first, count) in pieces(runs) {
            let read = self.fingerprints_of(number, first, count);
            let changes: Vec<_> = (first..)
                .zip(read)
                .filter(|(_, new)| new.is_some())
                .take(self.room)
                .map(|(block, new)| {
                    let block = BlockRef { disk: number as u16, block };
                    Change { block, old: None, new }
                })
                .collect();
            self.room -= changes.len();
            self.news.send(News::Changed(changes))?;
            if self.room == 0 {
                log::warn!("the index is full disk={}", self.name(number));
                break;
            }
        }
        log::info!("indexed disk={} blocks={total}", self.name(number));
        Ok(())
    }

    /// Leaves out what the index has no room for.
    fn fit(&mut self, number: usize, changed: &mut Vec<Known>) {
        let known = &self.known[number];
        let before = changed.len();
        changed.retain(|found| {
            let is_new = known.binary_search_by_key(&found.block, |known| known.block).is_err();
            let fits = !is_new || self.room > 0;
            self.room -= usize::from(is_new && fits);
            fits
        });
        if changed.len() < before {
            log::warn!("the index is full disk={}", self.name(number));
        }
    }

    /// None for a block of zeros, and for one that cannot be read: the guest's own reads will tell.
    fn fingerprints_of(
        &self,
        number: usize,
        first: u64,
        count: usize,
    ) -> VecDeque<Option<Fingerprint>> {
        let Some(disk) = &self.disks[number] else { return VecDeque::new() };
        let mut buffer = vec![Page::default(); count];
        let Some(bytes) = disk.read(first, &mut buffer) else { return VecDeque::new() };
        let blocks = bytes.chunks_exact(PAGE_SIZE).filter_map(|block| block.first_chunk());
        blocks.map(|block| self.fingerprints.of(block)).collect()
    }

    fn name(&self, number: usize) -> &str {
        self.disks[number].as_ref().map_or("", |disk| &disk.name)
    }
}

/// Runs of any length as runs of at most [`RUN`] blocks.
fn pieces(runs: Vec<(u64, u64)>) -> impl Iterator<Item = (u64, usize)> {
    runs.into_iter().flat_map(|(first, end)| {
        (first..end).step_by(RUN).map(move |at| (at, (end - at).min(RUN as u64) as usize))
    })
}

/// First block and end of each piece of the disk that is no hole.
fn data(disk: &Disk) -> Vec<(u64, u64)> {
    let page = PAGE_SIZE as u64;
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < disk.size {
        let start = match rustix::fs::seek(&disk.file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A device has no holes to tell of.
            Err(_) => return vec![(0, disk.blocks())],
        };
        let end = rustix::fs::seek(&disk.file, SeekFrom::Hole(start)).unwrap_or(disk.size);
        runs.push((start / page, (end.div_ceil(page)).min(disk.blocks())));
        at = end.max(start + 1);
    }
    runs
}

/// The blocks that the map names, in order, with the stamps of their contents.
fn touched(disk: &Disk, map: &MapSource) -> Result<Vec<Known>, Failure> {
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
    let pages = export.pages.iter().filter(|page| page.sector % SECTORS_PER_BLOCK == 0);
    let pages = pages.map(|page| (page.sector / SECTORS_PER_BLOCK, page.stamp));
    // A page's stamp is that of now, a block's that of when it was hashed: the page's stays.
    let blocks = export.blocks.iter().map(|block| (block.block, block.stamp));
    let known = |(block, stamp)| Known { block, stamp, fingerprint: None };
    let mut found: Vec<Known> = pages.chain(blocks).map(known).collect();
    found.retain(|found| found.block < disk.blocks());
    found.sort_by_key(|found| found.block);
    found.dedup_by_key(|found| found.block);
    Ok(found)
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
