//! Growing the source's index: which blocks it is made of, and reading them, in a thread of its own.
//!
//! Best is the page/block map of semper-blkd, which names the blocks that the guest has touched. It
//! is asked again while the stream goes on: what the guest reads or writes meanwhile is found too.
//! Without a map all of the disk is read once, but for its holes.
//!
//! What this thread says is a guess, as all of the index: the destination verifies.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, SeekFrom};
use rustix::io::Errno;
use semper_blockmap::Page;
use semper_wire::{BlockRef, ContentIndex, Fingerprint, Fingerprinter, PAGE_SIZE};

use crate::args::MapSource;
use crate::connects::Connects;
use crate::disks::{Disk, RUN};
use crate::failure::Failure;
use crate::maps::{Known, Named, named};

/// The map is asked for again no sooner, and so rarely that it takes a twentieth of the time.
const PAUSE: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;

/// Touched blocks that are in no page are read before the stream begins if there are no more; they
/// may hold what the guest has copied, but a disk may have been in use for years.
const AT_ONCE: usize = 1 << 18;

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
    connects: Connects,
    index: &ContentIndex,
) -> Result<Receiver<News>, Failure> {
    let (news, listener) = channel();
    let known = disks.iter().map(|_| Vec::new()).collect();
    let (fingerprints, room) = (index.fingerprints(), index.limit());
    let indexer = Indexer { disks, connects, known, fingerprints, room, news };
    let spawned = thread::Builder::new().name("index".into()).spawn(move || indexer.run());
    spawned.map_err(Failure::system("start a thread"))?;
    Ok(listener)
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
    connects: Connects,
    /// By disk and block: what its map has named.
    known: Vec<Vec<Known>>,
    fingerprints: Fingerprinter,
    /// Blocks that still fit.
    room: usize,
    news: Sender<News>,
}

impl Indexer {
    fn run(mut self) {
        let mut later = Vec::new();
        let began = (0..self.disks.len()).try_for_each(|number| self.begin(number, &mut later));
        match began.and_then(|()| Ok(self.news.send(News::Complete)?)) {
            Ok(()) => {}
            Err(Stop::Failed(failure)) => return drop(self.news.send(News::Failed(failure))),
            Err(Stop::Deserted) => return,
        }
        let backend = |disk: &Disk| matches!(disk.map, Some(MapSource::Backend(_)));
        let mut live: Vec<usize> = (0..self.disks.len()).collect();
        live.retain(|&number| self.disks[number].as_ref().is_some_and(backend));
        // From now on others have more to do. On Linux this is this thread's priority alone.
        let _ = rustix::process::setpriority_process(None, 19);
        if later.into_iter().any(|(number, others)| self.look(number, others).is_err()) {
            return;
        }
        let mut pause = PAUSE;
        while !live.is_empty() {
            thread::sleep(pause);
            let began = Instant::now();
            for &number in &live {
                match self.look_again(number) {
                    Ok(()) => {}
                    // The backend may be gone already; what is known stays.
                    Err(Stop::Failed(why)) => log::debug!("no map error=\"{why}\""),
                    Err(Stop::Deserted) => return,
                }
            }
            pause = PAUSE.max(began.elapsed() * SHARE);
        }
    }

    /// Reads what the stream should not begin without; the rest is put off.
    fn begin(&mut self, number: usize, later: &mut Vec<(usize, Vec<Known>)>) -> Result<(), Stop> {
        let Some(disk) = &self.disks[number] else { return Ok(()) };
        let Some(map) = &disk.map else { return self.read_all(number) };
        let Named { held, others } = named(disk, map, &self.connects)?;
        self.look(number, held)?;
        match others.len() <= AT_ONCE {
            true => self.look(number, others)?,
            false => later.push((number, others)),
        }
        Ok(())
    }

    fn look_again(&mut self, number: usize) -> Result<(), Stop> {
        let Some(disk) = &self.disks[number] else { return Ok(()) };
        let Some(map) = &disk.map else { return Ok(()) };
        let Named { mut held, mut others } = named(disk, map, &self.connects)?;
        held.append(&mut others);
        self.look(number, held)
    }

    /// Reads those of these blocks that are new or have changed.
    fn look(&mut self, number: usize, mut changed: Vec<Known>) -> Result<(), Stop> {
        changed.sort_by_key(|found| found.block);
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
    if disk.chain.is_some() {
        // Each file has holes where another has data.
        return vec![(0, disk.blocks())];
    }
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

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn runs_are_read_in_pieces() {
        let pieces: Vec<_> = pieces(vec![(0, 2), (10, 139)]).collect();
        assert_eq!(pieces, [(0, 2), (10, 64), (74, 64), (138, 1)]);
    }
}
