//! How fast one core encodes and decodes, in guest pages: `cargo bench -p semper-wire`.
//!
//! Streams with the shares of pages that real guests have, no network and no disk. What counts is
//! processor time, and of several rounds the best: others use the machine as well.

use std::collections::VecDeque;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use semper_wire::synthetic::{KEY, Stream, noise, prose};
use semper_wire::{
    Batch, BlockRef, ContentIndex, Decoder, Disks, Encoder, EncoderOptions, Frame, PAGE_SIZE, Page,
    PageIndex,
    format::{self, first_frame},
};

const BLOCKS: u64 = 1 << 16;
const PAGES: u64 = 1 << 16;
const INPUT: usize = 256 << 10;

/// Processor time of this thread.
fn clock() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

struct Lent<'a>(&'a mut ContentIndex);

impl PageIndex for Lent<'_> {
    fn find(&mut self, page: &Page) -> Option<BlockRef> {
        self.0.find(page)
    }

    fn forget(&mut self, block: BlockRef, page: &Page) {
        self.0.forget(block, page);
    }
}

struct Flat<'a>(&'a [u8]);

impl Disks for Flat<'_> {
    fn read(&mut self, first: BlockRef, count: usize) -> Option<&[u8]> {
        let from = first.block as usize * PAGE_SIZE;
        self.0.get(from..from + count * PAGE_SIZE)
    }
}

/// A guest: shares of zero pages and of pages on the disk, in percent; the rest compresses.
fn stream(zero: u64, known: u64, packs: bool) -> Vec<u8> {
    let mut stream = Stream::begin(PAGES);
    stream.part();
    for number in 0..PAGES {
        // Runs of 16, as caches and free memory have them.
        let share = (number / 16).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        match share % 100 {
            share if share < zero => stream.zero(number),
            share if share < zero + known => stream.page(number, &noise(number * 7919 % BLOCKS)),
            _ if packs => stream.page(number, &prose(BLOCKS + number)),
            _ => stream.page(number, &noise(BLOCKS + number)),
        }
    }
    stream.finish()
}

/// Gives each batch to `take`; the processor time.
fn encode(bytes: &[u8], index: &mut ContentIndex, mut take: impl FnMut(Batch)) -> Duration {
    let began = clock();
    let options = EncoderOptions::new(KEY, vec![true]);
    let mut packer = options.packer().expect("memory");
    let mut encoder = Encoder::new(Lent(index), options);
    let mut held = VecDeque::new();
    let mut at = 0;
    loop {
        let taken = encoder.feed(&bytes[at..bytes.len().min(at + INPUT)]);
        at += taken;
        if taken == 0 {
            encoder.finish(&bytes[at..]);
        }
        while let Some(draft) = encoder.pop() {
            let mut batch = packer.pack(draft);
            held.push_back(batch.held.take());
            if held.len() > 16 {
                held.pop_front();
            }
            take(batch);
        }
        if taken == 0 {
            return clock() - began;
        }
    }
}

fn decode(frames: &[Batch], disk: &[u8]) -> (Duration, u64) {
    let began = clock();
    let mut decoder = Decoder::new(Flat(disk), vec![BLOCKS], KEY, 1 << 30).expect("memory");
    let (mut length, mut credit) = (0, 0);
    for batch in frames {
        let (frame, _): (Frame<'_>, _) = first_frame(batch.frame()).expect("valid").expect("whole");
        decoder.frame(&frame).expect("valid");
        while let Some(piece) = decoder.pop() {
            length += piece.bytes.len() as u64;
            credit += piece.charge;
        }
        decoder.grant(credit);
    }
    (clock() - began, length)
}

fn main() {
    let disk: Vec<u8> = (0..BLOCKS).flat_map(noise).collect();
    let mut index = ContentIndex::new(5, 1 << 30);
    let began = clock();
    for (block, page) in (0..).zip(disk.chunks_exact(PAGE_SIZE)) {
        index.insert(BlockRef { disk: 0, block }, page.try_into().expect("a page"));
    }
    let gb = |bytes: u64, took: Duration| bytes as f64 / took.as_secs_f64() / 1e9;
    println!("index    {:5.2} GB/s", gb(disk.len() as u64, clock() - began));
    let guests = [
        ("page cache full", 5, 85, true),
        ("page cache and zeros", 29, 55, true),
        ("only references", 0, 100, true),
        ("just booted", 80, 5, true),
        ("nothing known, packs", 0, 0, true),
        ("nothing known, random", 0, 0, false),
    ];
    for (name, zero, known, packs) in guests {
        let bytes = stream(zero, known, packs);
        let guest = PAGES * PAGE_SIZE as u64;
        let mut best = (Duration::MAX, Duration::MAX);
        let mut wire = 0u64;
        for _ in 0..5 {
            // Frames are sent and forgotten.
            let took = encode(&bytes, &mut index, drop);
            let mut frames = Vec::new();
            encode(&bytes, &mut index, |batch| frames.push(batch));
            wire = frames.iter().map(|batch| batch.frame().len() as u64).sum();
            let (unpacked, length) = decode(&frames, &disk);
            assert_eq!(length, bytes.len() as u64);
            best = (best.0.min(took), best.1.min(unpacked));
        }
        println!(
            "{name:22} encode {:5.2} GB/s  decode {:5.2} GB/s  wire {:5.1} % of {} MB",
            gb(guest, best.0),
            gb(guest, best.1),
            100.0 * wire as f64 / bytes.len() as f64,
            bytes.len() / 1_000_000,
        );
    }
    println!("version {} of the format, of guest pages on one core", format::NEWEST);
}
