//! The hostile guest with real threads: one writes blocks and pages all the time, directly and
//! through the device, while another verifies.
//!
//! Each content is written once, and the writer notes which stamp it stands under; so a pair can be
//! judged however late.

use std::collections::HashMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use semper_blockmap::{
    Access, BlockMap, Blocks, ContentIndex, Counters, Memory, Note, Page, Recorder, RegionKey,
    Verifier, hash_page,
};

const BLOCKS: usize = 16;
const PAGES: usize = 16;
const WORDS: usize = 512;
const KEY: [u8; 32] = [3; 32];
const PAIRS: u64 = 2000;
const DEADLINE: Duration = Duration::from_secs(60);

/// Memory as words that anybody may read and write at any time.
#[repr(C, align(4096))]
struct Block([AtomicU64; WORDS]);

fn blocks(n: usize) -> Arc<Vec<Block>> {
    Arc::new((0..n).map(|_| Block([const { AtomicU64::new(0) }; WORDS])).collect())
}

fn copy(from: &Block, to: &Block) {
    for (from, to) in from.0.iter().zip(&to.0) {
        to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

struct Disk(Arc<Vec<Block>>);

impl Blocks for Disk {
    fn read(&self, sector: u64, into: &mut [Page]) -> io::Result<()> {
        for (block, page) in self.0[sector as usize / 8..].iter().zip(into) {
            for (word, bytes) in block.0.iter().zip(page.0.chunks_exact_mut(8)) {
                bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
            }
        }
        Ok(())
    }
}

/// Ends the guest however the test ends; a scope waits for its threads.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Guest {
    map: Arc<BlockMap>,
    recorder: Recorder,
    disk: Arc<Vec<Block>>,
    memory: Arc<Vec<Block>>,
    /// Content by (block, stamp).
    written: Arc<Mutex<HashMap<(usize, u64), u64>>>,
    random: u64,
}

impl Guest {
    fn below(&mut self, n: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.random >> 33) as usize % n
    }

    fn transfer(&self, access: Access, page: usize, block: usize) {
        let mut note = Note::default();
        let base = self.memory[page].0.as_ptr().cast_mut().cast();
        let segment = libc::iovec { iov_base: base, iov_len: 4096 };
        self.recorder.start(&mut note, access, (block as u64 * 4096, 4096), &[segment]);
        match access {
            Access::Write => copy(&self.memory[page], &self.disk[block]),
            _ => copy(&self.disk[block], &self.memory[page]),
        }
        self.recorder.finish(&mut note, true);
    }

    fn run(mut self, stop: &AtomicBool) {
        for content in 1.. {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let (page, block) = (self.below(PAGES), self.below(BLOCKS));
            match self.below(4) {
                0 => {
                    self.memory[page].0.iter().for_each(|w| w.store(content, Ordering::Relaxed));
                    self.transfer(Access::Write, page, block);
                    let stamp = self.map.stamp(block as u64 * 8).unwrap();
                    self.written.lock().unwrap().insert((block, stamp), content);
                }
                1 => {
                    let other = self.below(PAGES);
                    copy(&self.memory[page], &self.memory[other]);
                }
                _ => self.transfer(Access::Read, page, block),
            }
        }
    }
}

#[test]
fn pairs_are_true_under_a_guest_that_never_rests() {
    let (disk, memory) = (blocks(BLOCKS), blocks(PAGES));
    let map = Arc::new(BlockMap::new((BLOCKS * 4096) as u64).unwrap());
    let size = (PAGES * 4096) as u64;
    let key = RegionKey { guest_addr: 0, size, file_offset: 0, file: (1, 1) };
    let keep = Arc::clone(&memory);
    map.attach(Memory { regions: vec![(key, memory.as_ptr().expose_provenance())], keep }).unwrap();
    let written = Arc::new(Mutex::new(HashMap::<(usize, u64), u64>::new()));
    written.lock().unwrap().extend((0..BLOCKS).map(|block| ((block, 0), 0)));
    let guest = Guest {
        map: Arc::clone(&map),
        recorder: map.recorder(&Arc::new(Counters::default())),
        disk: Arc::clone(&disk),
        memory,
        written: Arc::clone(&written),
        random: 1,
    };
    let stop = AtomicBool::new(false);
    let disk = Disk(disk);
    let layout = map.layout().unwrap();
    let pages = layout.pages();
    let mut index = ContentIndex::new(KEY);
    let (mut pairs, mut unknown) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| guest.run(&stop));
        let _stop = Stop(&stop);
        let deadline = Instant::now() + DEADLINE;
        while pairs < PAIRS && Instant::now() < deadline {
            index.refresh(&map, &disk, usize::MAX, &mut |_| ControlFlow::Continue(()));
            let mut verifier = Verifier::new((&map, &layout), &index, &disk, &pages);
            for page in 0..PAGES {
                let Some(pair) = verifier.page(0, page).and_then(|outcome| outcome.pair) else {
                    unknown += 1;
                    continue;
                };
                pairs += 1;
                let place = (pair.sector as usize / 8, pair.stamp);
                // The writer notes it just after the write.
                let content = loop {
                    if let Some(content) = written.lock().unwrap().get(&place) {
                        break *content;
                    }
                    assert!(Instant::now() < deadline, "no write ended with {pair:?}");
                };
                let mut expected = Page::default();
                expected
                    .0
                    .chunks_exact_mut(8)
                    .for_each(|b| b.copy_from_slice(&content.to_ne_bytes()));
                let true_pair = pair.hash == hash_page(&KEY, &expected);
                assert!(true_pair, "{pair:?} is not what was written under that stamp");
            }
        }
    });
    assert!(pairs >= PAIRS, "{pairs} pairs, {unknown} pages without one");
}
