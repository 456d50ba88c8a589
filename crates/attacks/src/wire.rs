//! Three enemies on the wire between two hosts: a QEMU whose stream is anything, a source and a
//! destination that say anything.

use std::time::Duration;

use semper_wire::format::{FRAME_HEADER, Kind, MAX_STREAM, WINDOWS, first_frame};
use semper_wire::synthetic::{KEY, MemoryDisk, Pair, noise};
use semper_wire::{
    BlockRef, ContentIndex, Decoder, Encoder, EncoderOptions, Frame, Hello, Ledger, Page, Ready,
    Start, Window, agree,
};

use crate::bytes::Bytes;

const BLOCKS: u64 = 8;
const WINDOW: u64 = *WINDOWS.start();

fn disk() -> (MemoryDisk, ContentIndex) {
    let blocks: Vec<Page> = (0..BLOCKS).map(noise).collect();
    let mut index = ContentIndex::new(1, 1 << 16);
    for (block, content) in (0..).zip(&blocks) {
        index.insert(BlockRef { disk: 0, block }, content);
    }
    (MemoryDisk::new(blocks), index)
}

/// A stream in QEMU's words, put together by the enemy. It comes out at the other end as it went
/// in, however it is cut, and with blocks that change under way.
pub fn stream(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut stream = Vec::new();
    let mut cuts = Vec::new();
    while !bytes.is_empty() && stream.len() < MAX_STREAM {
        match bytes.u8() % 12 {
            0 => stream.extend_from_slice(b"QEVM\0\0\0\x03"),
            1 => stream.extend_from_slice(b"\x07\0\0\0\x02pc\x05\x1aconfiguration/capabilities"),
            2 => stream.extend_from_slice(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"),
            3 => stream.extend_from_slice(b"\x02\0\0\0\x02"),
            4 => stream.extend_from_slice(b"\x7e\0\0\0\x02"),
            5 => {
                let header = u64::from(bytes.u32()) << 12 | u64::from(bytes.u16() & 0xfff);
                stream.extend_from_slice(&header.to_be_bytes());
            }
            6 | 7 => {
                let header = u64::from(bytes.u8()) << 12 | 0x28;
                stream.extend_from_slice(&header.to_be_bytes());
                stream.extend_from_slice(&noise(u64::from(bytes.u8()) % (BLOCKS + 2)));
            }
            8 => {
                let first = u64::from(bytes.u8()) << 12;
                for number in 0..u64::from(bytes.u8()) {
                    stream.extend_from_slice(&((first + (number << 12)) | 0x22).to_be_bytes());
                    stream.push(0);
                }
            }
            9 => stream.extend_from_slice(&noise(u64::from(bytes.u8()))),
            10 => cuts.push(stream.len()),
            _ => {
                let len = usize::from(bytes.u8() % 32);
                stream.extend_from_slice(bytes.take(len));
            }
        }
    }
    let (disk, index) = disk();
    let blocks = disk.blocks.clone();
    let mut pair = Pair::new(index, disk, BLOCKS);
    let mut at = 0;
    for (number, cut) in (0u64..).zip(cuts.into_iter().chain([stream.len()])) {
        pair.feed(&stream[at..cut]).expect("both ends are honest");
        if number % 2 == 0 {
            pair.flush().expect("both ends are honest");
        }
        if number % 3 == 0 {
            blocks.borrow_mut()[(number % BLOCKS) as usize][7] ^= 1;
        }
        at = cut;
    }
    let carried = pair.finish().expect("both ends are honest");
    assert!(carried.bytes == stream, "another stream came out");
}

/// Frames to the destination. Each input begins as real batches, which the enemy then changes: the
/// decoder refuses them, or gives pieces that fit into its window.
pub fn source(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (disk, index) = disk();
    let mut wire = honest(index, &mut bytes);
    let greeting = Hello::new(semper_wire::Role::Destination, WINDOW, "m");
    if let Ok(theirs) = Hello::parse(data)
        && let Ok(agreed) = agree(&greeting, &theirs)
    {
        assert!(agreed.version == 1 && WINDOWS.contains(&agreed.window));
        let _ = Start::parse(data, &agreed);
    }
    for _ in 0..bytes.u8() % 8 {
        let at = usize::from(bytes.u16()) % wire.len().max(1);
        match bytes.u8() % 4 {
            0 => {
                let many = usize::from(bytes.u8());
                wire.splice(at..at, bytes.take(many).iter().copied());
            }
            1 => drop(wire.drain(at..(at + usize::from(bytes.u8())).min(wire.len()))),
            _ => {
                let value = bytes.u8();
                wire.get_mut(at).into_iter().for_each(|byte| *byte = value);
            }
        }
    }
    wire.extend_from_slice(bytes.take(1 << 12));
    let mut decoder = Decoder::new(disk, vec![BLOCKS], KEY, WINDOW).expect("memory");
    let (mut rest, mut waiting, mut granted) = (&wire[..], 0, 0);
    while let Ok(Some((frame, length))) = first_frame(rest) {
        rest = &rest[length..];
        let Ok(answer) = decoder.frame(&frame) else { return };
        assert!(answer.is_none_or(|answer| first_frame(&answer).is_ok_and(|f| f.is_some())));
        while let Some(piece) = decoder.pop() {
            assert!(!piece.bytes.is_empty() && piece.bytes.len() <= MAX_STREAM);
            waiting += piece.charge;
        }
        assert!(waiting - granted <= WINDOW, "more waits than the window allows");
        if length % 3 == 0 {
            granted = waiting;
            decoder.grant(granted);
        }
    }
}

/// Batches of a few pages, as frames.
fn honest(index: ContentIndex, bytes: &mut Bytes<'_>) -> Vec<u8> {
    let options = EncoderOptions::new(KEY, vec![true]);
    let mut packer = options.packer().expect("memory");
    let mut encoder = Encoder::new(index, options);
    let mut stream = semper_wire::synthetic::Stream::begin(64);
    stream.part();
    for number in 0..u64::from(bytes.u8() % 8) {
        stream.zero(number);
        stream.page(10 + number, &noise(u64::from(bytes.u8()) % (2 * BLOCKS)));
    }
    let stream = stream.bytes;
    let taken = encoder.feed(&stream);
    encoder.finish(&stream[taken..]);
    let drafts = std::iter::from_fn(|| encoder.pop());
    drafts.flat_map(|draft| packer.pack(draft).frame().to_vec()).collect()
}

/// Frames to the source: verdicts on what it holds, credit for what it sent.
pub fn destination(data: &[u8]) {
    let mut bytes = Bytes(data);
    let options = EncoderOptions::new(KEY, vec![true]);
    let mut packer = options.packer().expect("memory");
    let mut encoder = Encoder::new(disk().1, options);
    let (mut ledger, mut window) = (Ledger::default(), Window::new(WINDOW));
    let mut stream = semper_wire::synthetic::Stream::begin(64);
    stream.part();
    (0..BLOCKS).for_each(|number| stream.page(number, &noise(number)));
    encoder.feed(&stream.bytes);
    for _ in 0..bytes.u8() % 4 {
        let mut part = semper_wire::synthetic::Stream::default();
        part.page(1, &noise(1));
        encoder.flush();
        encoder.feed(&part.bytes[part.bytes.len() - 4104..]);
    }
    encoder.flush();
    while let Some(draft) = encoder.pop() {
        assert!(window.has_room(draft.charge()));
        window.send(draft.charge(), Duration::ZERO);
        packer.pack(draft).held.into_iter().for_each(|held| ledger.hold(held));
    }
    let held = ledger.held_bytes();
    let ours = Hello::new(semper_wire::Role::Source, WINDOW, "m");
    if let Ok(theirs) = Hello::of_frame(&Frame { kind: Some(Kind::Hello), payload: data }) {
        let _ = agree(&ours, &theirs);
    }
    let _ = Ready::parse(data, usize::from(bytes.u8() % 4));
    let mut repaired = 0;
    while !bytes.is_empty() {
        let payload: Vec<u8> = match bytes.u8() % 3 {
            // A verdict whose shape is right.
            0 => {
                let (batch, bad) = (u32::from(bytes.u8() % 4), u32::from(bytes.u8() % 4));
                let places = (0..bad).map(|_| u32::from(bytes.u8() % 10));
                let words: Vec<u32> = [batch, bad].into_iter().chain(places).collect();
                words.iter().flat_map(|word| word.to_le_bytes()).collect()
            }
            1 => bytes.u64().to_le_bytes().to_vec(),
            _ => {
                let len = usize::from(bytes.u8());
                bytes.take(len).to_vec()
            }
        };
        if let Ok(total) = semper_wire::format::parse_number(&payload) {
            let _ = window.credit(total, Duration::from_millis(total % 1000));
        }
        let Ok(repairs) = ledger.verdict(&payload) else { return };
        for frame in &repairs.frames {
            repaired += frame.len() - FRAME_HEADER;
        }
        encoder.mismatched(&repairs.mismatched);
        assert!(repaired as u64 <= held + 1024, "more bytes than were referred to");
    }
}
