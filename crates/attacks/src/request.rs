//! A guest against the parser of its requests.

use std::cell::OnceCell;

use semper_blkd::hostile::{Room, Target, Verdict};
use semper_inflight::{NoHook, TrackedQueue};
use tempfile::NamedTempFile;

use crate::bytes::Bytes;
use crate::ground::{Ground, guest_step, sensible_request};

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
            0 | 1 => sensible_request(ground, &ring, bytes, IMAGE_LEN),
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
