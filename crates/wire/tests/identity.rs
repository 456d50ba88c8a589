//! What comes out is byte for byte what went in, however the stream is cut, whatever stands in it;
//! and it costs no more than it must.

use proptest::prelude::*;
use semper_wire::synthetic::{Carried, MemoryDisk, Pair, Stream, noise, prose};
use semper_wire::{BlockRef, ContentIndex, Decoder, Disks, NoIndex, PAGE_SIZE, Page, PageIndex};

const BLOCKS: u64 = 256;

fn disk() -> (MemoryDisk, ContentIndex) {
    let blocks: Vec<Page> = (0..BLOCKS).map(noise).collect();
    let mut index = ContentIndex::new(11, 1 << 20);
    for (block, content) in (0..).zip(&blocks) {
        assert!(index.insert(BlockRef { disk: 0, block }, content));
    }
    (MemoryDisk::new(blocks), index)
}

fn carry(stream: &[u8], pieces: &[usize]) -> Carried {
    let (disk, index) = disk();
    carry_with(index, disk, stream, pieces)
}

/// In pieces of these lengths, with a flush after each odd one, and the rest at the end.
fn carry_with(index: impl PageIndex, disk: impl Disks, stream: &[u8], pieces: &[usize]) -> Carried {
    let mut pair = Pair::new(index, disk, BLOCKS);
    let mut rest = stream;
    for &piece in pieces {
        let (now, later) = rest.split_at(piece.min(rest.len()));
        pair.feed(now).unwrap();
        if piece % 2 == 1 {
            pair.flush().unwrap();
        }
        rest = later;
    }
    for piece in rest.chunks(100_000) {
        pair.feed(piece).unwrap();
    }
    pair.finish().unwrap()
}

#[derive(Clone, Debug)]
enum Item {
    Zeros(u64),
    Known(u64, u64),
    Unknown(u64),
    Part,
    Other(Vec<u8>),
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        4 => (1..300u64).prop_map(Item::Zeros),
        4 => (0..BLOCKS, 1..90u64).prop_map(|(from, count)| Item::Known(from, count)),
        2 => (1..20u64).prop_map(Item::Unknown),
        2 => Just(Item::Part),
        1 => proptest::collection::vec(any::<u8>(), 1..30).prop_map(Item::Other),
    ]
}

fn stream(items: &[Item]) -> Vec<u8> {
    let mut stream = Stream::begin(1 << 18);
    let mut number = 0;
    stream.part();
    for item in items {
        match item {
            Item::Zeros(count) => (0..*count).for_each(|n| stream.zero(number + n)),
            Item::Known(from, count) => {
                (0..*count).for_each(|n| stream.page(number + n, &noise((from + n) % BLOCKS)));
            }
            Item::Unknown(count) => {
                (0..*count).for_each(|n| stream.page(number + n, &prose(1000 + number + n)));
            }
            Item::Part => {
                stream.end_part();
                stream.part();
            }
            // Whatever a newer QEMU might have thought of.
            Item::Other(bytes) => stream.put(bytes),
        }
        number += 400;
    }
    stream.finish()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_stream_comes_out_as_it_went_in(
        items in proptest::collection::vec(item(), 1..30),
        pieces in proptest::collection::vec(prop_oneof![1..20usize, 1..9000usize], 0..60),
    ) {
        let stream = stream(&items);
        let carried = carry(&stream, &pieces);
        prop_assert!(carried.bytes == stream);
        prop_assert_eq!(carried.counters.stream_bytes, stream.len() as u64);
    }

    #[test]
    fn so_do_bytes_that_are_no_stream(
        bytes in proptest::collection::vec(any::<u8>(), 0..9000),
        pieces in proptest::collection::vec(1..3000usize, 0..20),
    ) {
        prop_assert!(carry(&bytes, &pieces).bytes == bytes);
    }

    #[test]
    fn so_does_a_stream_with_a_broken_byte(
        at in 0.0..1.0f64, value in any::<u8>(),
        items in proptest::collection::vec(item(), 1..6),
    ) {
        let mut stream = stream(&items);
        let at = (at * stream.len() as f64) as usize;
        stream[at] = value;
        prop_assert!(carry(&stream, &[]).bytes == stream);
    }
}

#[test]
fn pages_of_the_disk_become_references_and_zeros_cost_nothing() {
    let mut stream = Stream::begin(1 << 18);
    stream.part();
    (0..100_000).for_each(|number| stream.zero(number));
    (0..BLOCKS).for_each(|block| stream.page(200_000 + block, &noise(block)));
    let carried = carry(&stream.clone().finish(), &[]);
    let counters = carried.counters;
    // The first page of a part carries the name of its block.
    assert_eq!((counters.zero_pages, counters.references, counters.pages), (99_999, BLOCKS, 0));
    assert_eq!((carried.judged.references, carried.judged.mismatches), (BLOCKS, 0));
    assert!(carried.wire.0 < BLOCKS * 24 + 2000, "{} bytes", carried.wire.0);
    assert!(carried.wire.1 < 2000, "{} bytes", carried.wire.1);
}

#[test]
fn a_stream_that_cannot_be_improved_costs_hardly_more() {
    let mut stream = Stream::begin(1 << 18);
    stream.part();
    (0..4000).for_each(|number| stream.page(2 * number, &noise(10_000 + number)));
    let stream = stream.finish();
    let carried = carry_with(NoIndex, disk().0, &stream, &[]);
    let wire = carried.wire.0 + carried.wire.1;
    assert!(wire as f64 <= stream.len() as f64 * 1.005, "{wire} bytes for {}", stream.len());
    // Nor does one that is not understood at all.
    let stream: Vec<u8> = (0..1000).flat_map(noise).collect();
    let carried = carry(&stream, &[]);
    assert!(carried.wire.0 as f64 <= stream.len() as f64 * 1.005, "{}", carried.wire.0);
}

#[test]
fn pages_after_a_packaged_blob_are_still_found() {
    let mut stream = Stream::begin(1 << 18);
    stream.put(b"\x08\0\x07\0\x04\0\0\x01\0");
    stream.put(&[4; 256]);
    stream.part();
    (0..50).for_each(|number| stream.page(number, &noise(number)));
    let stream = stream.finish();
    let carried = carry(&stream, &[]);
    assert!(carried.bytes == stream);
    assert_eq!(carried.counters.references, 50);
}

#[test]
fn tables_with_addresses_or_page_sizes_are_understood() {
    for (capability, extra) in [("x-ignore-shared", 1), ("x-ignore-shared", 2), ("whatever", 1)] {
        let mut stream = Stream::default();
        stream.put(b"QEVM\0\0\0\x03\x07\0\0\0\x02pc");
        stream.put(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01");
        stream.put(&[capability.len() as u8]);
        stream.put(capability.as_bytes());
        stream.put(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        stream.put(&((3 * PAGE_SIZE as u64) | 4).to_be_bytes());
        for (name, pages) in [(b"\x01a", 2), (b"\x01b", 1)] {
            stream.put(name);
            stream.put(&(pages * PAGE_SIZE as u64).to_be_bytes());
            (0..extra).for_each(|_| stream.put(&(1u64 << 21).to_be_bytes()));
        }
        stream.end_part();
        stream.part();
        (0..3).for_each(|number| stream.page(number, &noise(number)));
        let stream = stream.finish();
        let carried = carry(&stream, &[]);
        assert!(carried.bytes == stream);
        assert_eq!(carried.counters.references, 3, "{capability}, {extra}");
    }
}

#[test]
fn a_disk_that_never_matches_is_given_up() {
    let (_, index) = disk();
    let wrong = MemoryDisk::new((0..BLOCKS).map(|n| noise(n + 5000)).collect());
    let mut stream = Stream::begin(1 << 18);
    stream.part();
    for number in 0..4000 {
        stream.page(number, &noise(number % BLOCKS));
    }
    let stream = stream.finish();
    let mut pair = Pair::new(index, wrong, BLOCKS);
    for piece in stream.chunks(10_000) {
        pair.feed(piece).unwrap();
        pair.flush().unwrap();
        while pair.deliver().unwrap() {}
    }
    let carried = pair.finish().unwrap();
    assert!(carried.bytes == stream);
    assert!(carried.counters.references < 200, "{}", carried.counters.references);
    assert_eq!(carried.judged.repaired, carried.counters.references);
}

#[test]
fn a_source_may_not_exceed_the_window() {
    use semper_wire::format::{MAX_STREAM, WINDOWS, first_frame};
    let options = semper_wire::EncoderOptions::new(semper_wire::synthetic::KEY, vec![]);
    let mut packer = options.packer().unwrap();
    let mut encoder = semper_wire::Encoder::new(NoIndex, options);
    let key = semper_wire::synthetic::KEY;
    let mut decoder = Decoder::new(MemoryDisk::default(), vec![], key, *WINDOWS.start()).unwrap();
    let (mut sent, mut refused) = (0, false);
    for _ in 0..10 {
        encoder.feed(&[7; MAX_STREAM]);
        encoder.flush();
        while let Some(draft) = encoder.pop() {
            sent += draft.charge();
            let batch = packer.pack(draft);
            let (frame, _) = first_frame(batch.frame()).unwrap().unwrap();
            refused |= decoder.frame(&frame).is_err();
            assert_eq!(refused, sent > *WINDOWS.start());
        }
    }
    assert!(refused);
}
