//! A guest against the parser of its requests.

use std::cell::OnceCell;

use semper_blkd::hostile::{Room, Target, Verdict};
use semper_inflight::{NoHook, TrackedQueue};
use tempfile::NamedTempFile;

use crate::bytes::Bytes;
use crate::ground::{Ground, QUEUE_SPACE, R0, guest_step};

/// Bytes of the image: a whole number of sectors and a bit.
const IMAGE_LEN: u64 = (1 << 20) + 100;

struct Stage {
    ground: Ground,
    targets: [Target; 2],
    _image: NamedTempFile,
}

thread_local!(static STAGE: OnceCell<Stage> = const { OnceCell::new() });

impl Stage {
    fn new() -> Self {
        let image = NamedTempFile::new().expect("a file for the image");
        image.as_file().set_len(IMAGE_LEN).expect("room for the image");
        let targets = [false, true].map(|read_only| Target::new(image.path(), read_only, 1));
        Self { ground: Ground::new(), targets, _image: image }
    }
}

/// Parses chains that `data` describes, sensible ones and others. What comes out is I/O within the
/// disk and within guest memory, or a status.
pub fn request(data: &[u8]) {
    STAGE.with(|stage| attack(stage.get_or_init(Stage::new), &mut Bytes(data)));
}

fn attack(stage: &Stage, bytes: &mut Bytes<'_>) {
    let ground = &stage.ground;
    ground.clear();
    let shape = bytes.u8();
    let size = 1 << (shape % 7);
    let target = &stage.targets[usize::from(shape >> 7)];
    let ring = ground.ring(size);
    let queue = TrackedQueue::recover(ground.queue(size, false), None, 0, NoHook);
    let Ok((mut queue, _)) = queue else { panic!("a queue without a region was refused") };
    let mut room = Room::default();
    for _ in 0..64 {
        if bytes.is_empty() {
            return;
        }
        match bytes.u8() % 4 {
            0 | 1 => sensible_request(ground, &ring, bytes),
            2 => guest_step(ground, &ring, bytes),
            _ => {
                let Ok(Some(head)) = queue.pop() else { continue };
                match target.parse(&queue, head, &mut room, shape & 0x20 != 0) {
                    Ok(Verdict::Io { offset, len, segments, moves_data }) => {
                        let end = offset.checked_add(len).expect("no wrap");
                        assert!(end <= target.capacity() && (offset | len) % 512 == 0);
                        assert_eq!(segments, if moves_data { len } else { 0 });
                    }
                    Ok(Verdict::Answered(status)) => assert!(status <= 2),
                    Ok(Verdict::Unanswerable) | Err(_) => {}
                }
                queue.complete(head, 0);
                queue.publish();
            }
        }
    }
}

/// Header, data and status, with numbers out of the input.
fn sensible_request(ground: &Ground, ring: &semper_testbed::DriverRing, bytes: &mut Bytes<'_>) {
    const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 2, 77];
    let size = ring.layout().size;
    let kind = KINDS[usize::from(bytes.u8() % 8)];
    let sector = match bytes.u8() % 4 {
        0 => bytes.u64(),
        1 => u64::MAX / 512 - u64::from(bytes.u8()),
        _ => u64::from(bytes.u16()) % (IMAGE_LEN / 512 + 4),
    };
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let (header_at, data_at, status_at) = (QUEUE_SPACE, QUEUE_SPACE + 512, QUEUE_SPACE + 256);
    ground.poke(header_at, &header);
    ground.poke(data_at, bytes.take(16));
    let len = match kind {
        11 | 13 => 16,
        _ => 512 * (u32::from(bytes.u8()) % 40) + u32::from(bytes.u8() % 32 == 1),
    };
    let head = u16::from(bytes.u8()) % size;
    let second = (head + 1) % size;
    let third = (head + 2) % size;
    let writable = if kind == 0 || kind == 8 { 2 } else { 0 };
    ring.write_descriptor(head, R0 + header_at, 16, 1, second);
    ring.write_descriptor(second, R0 + data_at, len, 1 | writable, third);
    ring.write_descriptor(third, R0 + status_at, 1, 2, 0);
    let idx = ring.avail_idx();
    ring.write_avail(idx, head);
    ring.set_avail_idx(idx.wrapping_add(1));
}
