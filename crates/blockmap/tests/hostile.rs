//! A hostile guest against the map: requests that overlap in every way, stores of its processor at
//! any instant, and a verification in the middle of it.
//!
//! Everything happens in one thread, so that "any instant" is a choice of the generator: a script
//! says what the guest does before, in the middle of and after each step of the verifier. Disk and
//! pages are halves of two KiB with few possible contents, so that pages often equal blocks by
//! accident, and requests may begin in the middle of a block.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};
use semper_blockmap::{
    Access, BlockMap, Blocks, ContentIndex, Counters, Layout, Memory, Note, Page, Pages, Recorder,
    RegionKey, Verifier, hash_page,
};

const HALF: usize = 2048;
const DISK_HALVES: usize = 8;
const PAGES: usize = 3;
const KEY: [u8; 32] = [7; 32];
/// Turns of the guest before the first verification.
const SETTLING: usize = 16;

/// What the guest does in one instant.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Its processor fills half a page.
    Store { page: usize, half: usize, value: u8 },
    /// A request of one or two halves begins.
    Begin { access: Access, page: usize, half: usize, disk: usize, halves: usize },
    /// The request moves its next half, or ends when none is left.
    Step { which: usize },
    /// The request fails where it stands.
    Fail { which: usize },
}

fn act() -> impl Strategy<Value = Act> {
    let store = (0..PAGES, 0..2usize, 0..3u8).prop_map(|(page, half, value)| Act::Store {
        page,
        half,
        value,
    });
    let access = prop_oneof![Just(Access::Read), Just(Access::Write), Just(Access::Trim)];
    let whole = (access.clone(), 0..PAGES, 0..DISK_HALVES - 1)
        .prop_map(|(access, page, disk)| Act::Begin { access, page, half: 0, disk, halves: 2 });
    let part = (access, 0..PAGES, 0..2usize, 0..DISK_HALVES)
        .prop_map(|(access, page, half, disk)| Act::Begin { access, page, half, disk, halves: 1 });
    let step = any::<usize>().prop_map(|which| Act::Step { which });
    let fail = any::<usize>().prop_map(|which| Act::Fail { which });
    prop_oneof![2 => store, 4 => whole, 1 => part, 12 => step, 1 => fail]
}

struct Request {
    access: Access,
    page: usize,
    half: usize,
    disk: usize,
    halves: usize,
    moved: usize,
    note: Note,
    began: u64,
    /// It moved data into or out of a page beside another that filled it: what stands in the page
    /// is then the guest's own doing.
    shared: bool,
}

/// The request that stored the page's association.
#[derive(Clone, Copy, Default)]
struct Last {
    began: u64,
    shared: bool,
}

struct Inner {
    disk: [u8; DISK_HALVES],
    /// Times each half was changed or had a request begun or ended on it.
    events: [u64; DISK_HALVES],
    in_flight: Vec<Request>,
    stored: [u64; PAGES],
    last: [Last; PAGES],
    now: u64,
    script: Vec<Vec<Act>>,
    /// The last block that the verifier read: sector, whether something happened to it meanwhile.
    read: Option<(u64, bool)>,
    /// What the verifier copied.
    copied: Page,
}

struct World {
    map: Arc<BlockMap>,
    layout: Arc<Layout>,
    recorder: Recorder,
    memory: *mut Page,
    inner: RefCell<Inner>,
}

struct Owned(*mut Page);
// SAFETY: only the test's one thread uses the pages.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made by Box::into_raw in `World::new`.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.0, PAGES)) });
    }
}

impl World {
    fn new(mut script: Vec<Vec<Act>>) -> Self {
        script.reverse();
        let memory = Box::into_raw(vec![Page::default(); PAGES].into_boxed_slice()).cast::<Page>();
        let map = Arc::new(BlockMap::new((DISK_HALVES * HALF) as u64).unwrap());
        let key =
            RegionKey { guest_addr: 0, size: PAGES as u64 * 4096, file_offset: 0, file: (0, 0) };
        let keep = Arc::new(Owned(memory));
        map.attach(Memory { regions: vec![(key, memory.expose_provenance())], keep }).unwrap();
        let recorder = map.recorder(&Arc::new(Counters::default()));
        let inner = RefCell::new(Inner {
            disk: [0; DISK_HALVES],
            events: [0; DISK_HALVES],
            in_flight: Vec::new(),
            stored: [0; PAGES],
            last: [Last::default(); PAGES],
            now: 0,
            script,
            read: None,
            copied: Page::default(),
        });
        map.set_shared(false);
        let layout = map.layout().unwrap();
        Self { map, layout, recorder, memory, inner }
    }

    fn half(&self, page: usize, half: usize) -> *mut u8 {
        assert!(page < PAGES && half < 2);
        // SAFETY: inside the pages, which the map keeps.
        unsafe { self.memory.add(page).cast::<u8>().add(half * HALF) }
    }

    fn get(&self, page: usize, half: usize) -> u8 {
        // SAFETY: halves are filled with one value each, by this thread.
        unsafe { self.half(page, half).read() }
    }

    fn set(&self, page: usize, half: usize, value: u8) {
        // SAFETY: as above; HALF bytes.
        unsafe { self.half(page, half).write_bytes(value, HALF) };
    }

    /// The guest has its turn.
    fn turn(&self) {
        // In the end it finishes what it has begun.
        let rest = || vec![Act::Step { which: 0 }];
        let acts = self.inner.borrow_mut().script.pop().unwrap_or_else(rest);
        for act in acts {
            self.inner.borrow_mut().now += 1;
            self.carry_out(act);
            self.associations_are_true();
        }
    }

    fn carry_out(&self, act: Act) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        match act {
            Act::Store { page, half, value } => {
                self.set(page, half, value);
                inner.stored[page] = inner.now;
            }
            Act::Begin { access, page, half, disk, halves } => {
                let mut note = Note::default();
                let segment =
                    libc::iovec { iov_base: self.half(page, half).cast(), iov_len: halves * HALF };
                let range = ((disk * HALF) as u64, (halves * HALF) as u64);
                let segments = if access == Access::Trim { &[][..] } else { &[segment][..] };
                self.recorder.start(&mut note, access, range, segments);
                let mut new = Request {
                    access,
                    page,
                    half,
                    disk,
                    halves,
                    moved: 0,
                    note,
                    began: inner.now,
                    shared: false,
                };
                for other in &mut inner.in_flight {
                    let fills = other.access == Access::Read || access == Access::Read;
                    let uses = other.access != Access::Trim && access != Access::Trim;
                    if other.page == page && fills && uses {
                        other.shared = true;
                        new.shared = true;
                    }
                }
                if access != Access::Read {
                    (disk..disk + halves).for_each(|h| inner.events[h] += 1);
                }
                inner.in_flight.push(new);
            }
            Act::Step { which } | Act::Fail { which } => {
                let fails = matches!(act, Act::Fail { .. });
                if inner.in_flight.is_empty() {
                    return;
                }
                let which = which % inner.in_flight.len();
                let request = &mut inner.in_flight[which];
                if fails || request.moved == request.halves {
                    let mut request = inner.in_flight.swap_remove(which);
                    self.recorder.finish(&mut request.note, !fails);
                    if request.access != Access::Read {
                        (request.disk..request.disk + request.halves)
                            .for_each(|h| inner.events[h] += 1);
                    }
                    // What the page is associated with now, if this request stored it. During a
                    // discard the map does not say.
                    let trimming = inner.in_flight.iter().any(|r| r.access == Access::Trim);
                    let now = self.layout.block_in(&self.map, 0, request.page);
                    let stored = now.is_some_and(|a| a.sector as usize / 4 == request.disk);
                    if request.access != Access::Trim && (stored || trimming) {
                        let shared = request.shared || trimming;
                        inner.last[request.page] = Last { began: request.began, shared };
                    }
                    return;
                }
                let (half, disk) = (request.half + request.moved, request.disk + request.moved);
                request.moved += 1;
                // A request of two halves begins at the page's first; one half stays in its half.
                match request.access {
                    Access::Read => self.set(request.page, half, inner.disk[disk]),
                    Access::Write => inner.disk[disk] = self.get(request.page, half),
                    _ => inner.disk[disk] = 0,
                }
                if request.access != Access::Read {
                    inner.events[disk] += 1;
                }
            }
        }
    }

    /// Every association that the map still believes in holds, unless the guest's processor stored
    /// into the page since, or a request is filling it now.
    fn associations_are_true(&self) {
        let inner = self.inner.borrow();
        for a in self.layout.associations(&self.map) {
            let last = inner.last[a.page];
            let filling =
                inner.in_flight.iter().any(|r| r.page == a.page && r.access == Access::Read);
            if filling || last.shared || inner.stored[a.page] >= last.began {
                continue;
            }
            let disk = a.sector as usize / 4;
            for half in 0..2 {
                assert_eq!(self.get(a.page, half), inner.disk[disk + half], "stale: {a:?}");
            }
        }
    }

    fn events(&self, sector: u64) -> (u64, bool) {
        let inner = self.inner.borrow();
        let disk = sector as usize / 4;
        let written =
            |r: &Request| r.access != Access::Read && r.disk < disk + 2 && disk < r.disk + r.halves;
        (inner.events[disk] + inner.events[disk + 1], inner.in_flight.iter().any(written))
    }
}

impl Blocks for World {
    fn read(&self, sector: u64, into: &mut [Page]) -> io::Result<()> {
        self.turn();
        let before = self.events(sector);
        for (index, page) in into.iter_mut().enumerate() {
            let disk = sector as usize / 4 + index * 2;
            for half in 0..2 {
                let value = self.inner.borrow().disk[disk + half];
                page.0[half * HALF..(half + 1) * HALF].fill(value);
                self.turn();
            }
        }
        let after = self.events(sector);
        self.inner.borrow_mut().read = Some((sector, before.1 || before != after));
        self.turn();
        Ok(())
    }
}

impl Pages for World {
    fn copy(&self, region: usize, page: usize, into: &mut Page) -> bool {
        assert_eq!(region, 0);
        self.turn();
        for half in 0..2 {
            into.0[half * HALF..(half + 1) * HALF].fill(self.get(page, half));
            self.turn();
        }
        self.inner.borrow_mut().copied = into.clone();
        true
    }
}

/// Runs the script; what was wrong with a pair that was reported as verified.
fn run(script: Vec<Vec<Act>>, recheck: bool, found: &mut u64) -> Result<(), String> {
    let world = World::new(script);
    for _ in 0..SETTLING {
        world.turn();
    }
    while !world.inner.borrow().in_flight.is_empty() {
        world.carry_out(Act::Step { which: 0 });
    }
    let mut index = ContentIndex::new(KEY);
    for _ in 0..2 {
        index.refresh(&world.map, &world, usize::MAX, &mut |_| std::ops::ControlFlow::Continue(()));
        for page in 0..PAGES {
            let mut verifier = Verifier::new((&world.map, &world.layout), &index, &world, &world);
            if !recheck {
                verifier = verifier.without_recheck();
            }
            world.inner.borrow_mut().read = None;
            let Some(outcome) = verifier.page(0, page) else { return Err("absent".into()) };
            let Some(pair) = outcome.pair else { continue };
            *found += 1;
            let copied = world.inner.borrow().copied.clone();
            if pair.hash != hash_page(&KEY, &copied) {
                return Err(format!("the hash of another page: {pair:?}"));
            }
            match world.inner.borrow().read {
                Some((sector, false)) if sector == pair.sector => {}
                other => return Err(format!("changed while it was read: {pair:?} {other:?}")),
            }
            // From now on, for as long as the stamp is the same, so is the content.
            for _ in 0..3 {
                if world.map.stamp(pair.sector) == Some(pair.stamp) {
                    let disk = pair.sector as usize / 4;
                    let inner = world.inner.borrow();
                    if [copied.0[0], copied.0[HALF]] != [inner.disk[disk], inner.disk[disk + 1]] {
                        return Err(format!("another content under the same stamp: {pair:?}"));
                    }
                }
                world.turn();
            }
        }
    }
    Ok(())
}

fn scripts() -> impl Strategy<Value = Vec<Vec<Act>>> {
    vec(vec(act(), 0..4), 0..150)
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

#[test]
fn no_wrong_pair_is_ever_reported_as_verified() {
    let found = RefCell::new(0);
    let outcome = TestRunner::new(config(3000)).run(&scripts(), |script| {
        run(script, true, &mut found.borrow_mut()).map_err(TestCaseError::fail)
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    let found = found.into_inner();
    assert!(found > 2000, "{found} pairs were found: too few to show anything");
}

/// The control: without the second look at the stamps, the same guest finds a wrong pair.
#[test]
fn without_the_recheck_a_wrong_pair_is_found() {
    let outcome = TestRunner::new(config(20_000))
        .run(&scripts(), |script| run(script, false, &mut 0).map_err(TestCaseError::fail));
    assert!(matches!(outcome, Err(TestError::Fail(..))), "nothing was found: {outcome:?}");
}
