//! The silent danger of references: a block that is overwritten before the destination has read it.
//!
//! Blocks change at the worst instants here: between encoding and reading, in the middle of a read
//! of several blocks, between the read and the verdict, and again while the repair is under way.
//! Every page must come out as it went in. The same runs without verification must find damage, or
//! this test would prove nothing.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use semper_wire::synthetic::{MemoryDisk, Pair, Stream, noise, prose};
use semper_wire::{BlockRef, ContentIndex, Page};

const BLOCKS: u64 = 128;
const RUNS: u64 = 250;

/// Numbers of a run.
struct Dice(Cell<u64>);

impl Dice {
    fn roll(&self, sides: u64) -> u64 {
        let state = self.0.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.0.set(state);
        (state >> 33) % sides
    }
}

/// Writes anything to blocks, preferably just where somebody reads.
fn overwrite(blocks: &RefCell<Vec<Page>>, dice: &Dice, near: u64) {
    for _ in 0..1 + dice.roll(3) {
        let block = (near + dice.roll(6)) % BLOCKS;
        let mut blocks = blocks.borrow_mut();
        let content = &mut blocks[block as usize];
        match dice.roll(4) {
            // One bit, a torn write, all of it, and the content of another known block.
            0 => content[dice.roll(4096) as usize] ^= 1 << dice.roll(8),
            1 => content[..2048].copy_from_slice(&noise(dice.roll(1 << 30))[..2048]),
            2 => *content = noise(dice.roll(1 << 30)),
            _ => *content = noise(dice.roll(BLOCKS)),
        }
    }
}

struct Outcome {
    differs: bool,
    mismatches: u64,
    references: u64,
}

fn run(seed: u64, verify: bool) -> Outcome {
    let dice = Rc::new(Dice(Cell::new(seed)));
    let content: Vec<Page> = (0..BLOCKS).map(noise).collect();
    let mut index = ContentIndex::new(3, 1 << 20);
    for (block, page) in (0..).zip(&content) {
        assert!(index.insert(BlockRef { disk: 0, block }, page));
    }
    let mut disk = MemoryDisk::new(content);
    let blocks = Rc::clone(&disk.blocks);
    let (at_disk, at_dice) = (Rc::clone(&blocks), Rc::clone(&dice));
    disk.on_read = Some(Rc::new(move |first, _after| {
        if at_dice.roll(4) == 0 {
            overwrite(&at_disk, &at_dice, first.block);
        }
    }));

    let mut stream = Stream::begin(1 << 16);
    stream.part();
    for _ in 0..400 {
        // The same page again and again, in ever new versions: the last must win.
        let number = dice.roll(64);
        match dice.roll(8) {
            0 => stream.zero(number),
            1 => stream.page(number, &prose(dice.roll(1 << 20))),
            _ => {
                let from = dice.roll(BLOCKS);
                (0..1 + dice.roll(4))
                    .for_each(|n| stream.page(number + n, &noise((from + n) % BLOCKS)));
            }
        }
    }
    let stream = stream.finish();

    let mut pair = Pair::new(index, disk, BLOCKS);
    if !verify {
        pair.decoder = pair.decoder.without_verification();
    }
    for piece in stream.chunks(1 + dice.roll(60_000) as usize) {
        pair.feed(piece).unwrap();
        if dice.roll(2) == 0 {
            pair.flush().unwrap();
        }
        // What is under way is overtaken by writes.
        if dice.roll(3) == 0 {
            overwrite(&blocks, &dice, dice.roll(BLOCKS));
        }
        for _ in 0..dice.roll(4) {
            pair.deliver().unwrap();
        }
    }
    let carried = pair.finish().unwrap();
    assert_eq!(carried.bytes.len(), stream.len());
    Outcome {
        differs: carried.bytes != stream,
        mismatches: carried.judged.mismatches,
        references: carried.judged.references,
    }
}

#[test]
fn every_page_is_the_sources_whatever_happens_to_the_disk() {
    let (mut mismatches, mut references) = (0, 0);
    for seed in 0..RUNS {
        let outcome = run(seed, true);
        assert!(!outcome.differs, "run {seed}");
        mismatches += outcome.mismatches;
        references += outcome.references;
    }
    println!("{RUNS} runs, {references} references, {mismatches} of them to blocks that changed");
    assert!(mismatches > 10 * RUNS, "the disk hardly changed: {mismatches}");
    assert!(references > 2 * mismatches, "too few references that hold: {references}");
}

#[test]
fn without_verification_the_same_runs_are_damaged() {
    let damaged = (0..RUNS).filter(|&seed| run(seed, false).differs).count() as u64;
    println!("{damaged} of {RUNS} runs damaged");
    assert!(damaged > RUNS * 9 / 10, "{damaged} of {RUNS}");
}
