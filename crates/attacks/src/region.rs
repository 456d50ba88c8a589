//! A front end against recovery.

use std::cell::OnceCell;

use semper_inflight::format::{
    ENTRY_SIZE, HEADER_SIZE, OFFSET_DESC_NUM, OFFSET_LAST_BATCH_HEAD, OFFSET_USED_IDX,
    OFFSET_VERSION, VERSION, queue_stride,
};
use semper_inflight::{DeviceRecord, NoHook, QueueRegion, TrackedQueue};

use crate::bytes::Bytes;
use crate::ground::{Ground, MAX_SIZE};

thread_local!(static GROUND: OnceCell<Ground> = const { OnceCell::new() });

/// Recovers from a region that holds whatever `data` says. It is refused unchanged, or gives heads
/// that exist, each once, oldest first; and recovering again gives the same.
pub fn region(data: &[u8]) {
    GROUND.with(|ground| attack(ground.get_or_init(Ground::new), &mut Bytes(data)));
}

struct Region(Box<[u64]>);

impl Region {
    fn new(capacity: u16, bytes: &mut Bytes<'_>) -> Self {
        let mut region = Self(vec![0; queue_stride(capacity) / 8].into());
        // Most inputs should get past the first check.
        let tame = bytes.u8();
        let len = region.0.len() * 8;
        let raw = bytes.take(len);
        region.bytes()[..raw.len()].copy_from_slice(raw);
        if tame & 1 == 0 {
            region.put(OFFSET_VERSION, if tame & 2 == 0 { VERSION } else { 0 });
            region.put(OFFSET_DESC_NUM, capacity);
        }
        if tame & 4 == 0 {
            for entry in region.bytes()[HEADER_SIZE..].chunks_mut(ENTRY_SIZE) {
                entry[0] &= 1;
                entry[6] %= capacity.max(1) as u8;
                entry[7] = 0;
            }
            let used_idx = u16::from(tame / 8 % 8);
            region.put(OFFSET_USED_IDX, used_idx);
            region.put(OFFSET_LAST_BATCH_HEAD, u16::from(tame) % capacity.max(1));
        }
        region
    }

    fn bytes(&mut self) -> &mut [u8] {
        let len = self.0.len() * 8;
        // SAFETY: the same memory, of which every bit pattern is a byte.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }

    fn put(&mut self, at: usize, value: u16) {
        self.bytes()[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn word(&mut self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes()[at], self.bytes()[at + 1]])
    }

    fn counter(&mut self, head: u16) -> u64 {
        self.0[2 + 2 * usize::from(head) + 1]
    }

    fn part(&mut self, capacity: u16) -> QueueRegion {
        // SAFETY: 8-aligned, of the right size, and outlived by nothing that uses it (`attack`).
        unsafe { QueueRegion::new(self.0.as_mut_ptr().cast(), capacity) }
    }
}

fn attack(ground: &Ground, bytes: &mut Bytes<'_>) {
    ground.clear();
    let (shape, capacity) = (bytes.u8(), u16::from(bytes.u8() % 65));
    let size = 1 << (shape % 7);
    assert!(size <= MAX_SIZE);
    let ring = ground.ring(size);
    let used_idx = match shape & 0xc0 {
        0 => bytes.u16(),
        _ => u16::from(bytes.u8() % 16),
    };
    ring.set_used_idx(used_idx);
    ring.set_avail_idx(used_idx.wrapping_add(u16::from(bytes.u8()) % (size + 1)));
    let base = bytes.u16();
    let mut region = Region::new(capacity, bytes);
    // SAFETY: at least 64 bytes for a region of any capacity; 8-aligned.
    let record = unsafe { DeviceRecord::new(region.0.as_mut_ptr().cast()) };
    record.write_through();
    let before = region.0.clone();
    let part = region.part(capacity);
    let recovered = TrackedQueue::recover(ground.queue(size, false), Some(part), base, NoHook);
    let Ok((mut queue, replay)) = recovered else {
        assert!(region.0 == before, "a refused region was changed: {:?}", recovered.err());
        return;
    };
    assert!(capacity >= size);
    assert_eq!(region.word(OFFSET_USED_IDX), used_idx);
    assert!(replay.iter().all(|&head| head < size));
    let order: Vec<_> = replay.iter().map(|&head| (region.counter(head), head)).collect();
    assert!(order.is_sorted_by(|a, b| a < b), "twice, or not in order: {order:?}");
    let next = used_idx.wrapping_add(replay.len() as u16);
    assert_eq!(queue.ring().last_avail(), next);

    // A process that dies at once leaves the same to the next one.
    let part = region.part(capacity);
    let again = TrackedQueue::recover(ground.queue(size, false), Some(part), base, NoHook);
    let Ok((_, replay_again)) = again else { panic!("recovered once, refused then") };
    assert_eq!(replay_again, replay);

    // And what is recovered can be served to its end.
    for head in &replay {
        assert!(queue.walk(*head, |segment| ground.check(&segment)).is_ok());
        queue.complete(*head, 1);
        if bytes.u8() % 2 == 0 {
            queue.publish();
        }
    }
    queue.publish();
    assert_eq!(ring.used_idx(), used_idx.wrapping_add(replay.len() as u16));
    for _ in 0..=size {
        match queue.pop() {
            Ok(Some(head)) => queue.complete(head, 0),
            Ok(None) | Err(_) => break,
        }
    }
    queue.publish();
    let part = region.part(capacity);
    let last = TrackedQueue::recover(ground.queue(size, false), Some(part), base, NoHook);
    assert!(last.is_ok_and(|(_, replay)| replay.is_empty()), "a finished queue has work left");
}
