//! A guest against the ring.

use std::cell::OnceCell;

use semper_ring::{ChainError, MAX_CHAIN_DESCRIPTORS, RingError, SplitQueue};

use crate::bytes::Bytes;
use crate::ground::{Ground, MAX_SIZE, guest_step};

thread_local!(static GROUND: OnceCell<Ground> = const { OnceCell::new() });

/// Guest and device take turns as `data` says; whatever the guest writes, the device stays within
/// guest memory, within its queue, and in agreement with itself.
pub fn ring(data: &[u8]) {
    GROUND.with(|ground| attack(ground.get_or_init(Ground::new), &mut Bytes(data)));
}

fn attack(ground: &Ground, bytes: &mut Bytes<'_>) {
    ground.clear();
    let shape = bytes.u8();
    let size = 1 << (shape % 7);
    assert!(size <= MAX_SIZE);
    let ring = ground.ring(size);
    let start = if shape & 0x40 != 0 { 65530 } else { 0 };
    ring.set_avail_idx(start);
    ring.set_used_idx(start);
    let mut queue = ground.queue(size, shape & 0x80 != 0);
    let (mut taken, mut published) = (Vec::new(), queue.used_idx());
    let mut last_avail = queue.last_avail();
    for _ in 0..512 {
        if bytes.is_empty() {
            break;
        }
        match bytes.u8() % 16 {
            0..=8 => guest_step(ground, &ring, bytes),
            9..=11 => match queue.pop_head() {
                Ok(Some(head)) => {
                    assert!(head < size);
                    last_avail = last_avail.wrapping_add(1);
                    walk(ground, &queue, head);
                    taken.push(head);
                }
                Ok(None) => {}
                Err(RingError::AvailIndex { .. } | RingError::Head { .. }) => {}
                Err(other) => panic!("taking a head gave {other:?}"),
            },
            12 => {
                // Any number, in the table or not.
                let head = bytes.u16();
                walk(ground, &queue, if bytes.u8() % 2 == 0 { head % size } else { head });
            }
            13 => {
                if let Some(head) = taken.pop() {
                    queue.stage_used(head, bytes.u32());
                }
            }
            14 => {
                published = published.wrapping_add(queue.staged());
                queue.publish_used();
                assert_eq!(ring.used_idx(), published);
            }
            _ => {
                queue.needs_call();
                queue.disable_kicks();
                queue.enable_kicks();
            }
        }
        assert_eq!((queue.used_idx(), queue.last_avail()), (published, last_avail));
    }
}

fn walk(ground: &Ground, queue: &SplitQueue, head: u16) {
    let (mut count, mut writable) = (0u32, false);
    let walked = queue.walk(head, |segment| {
        ground.check(&segment);
        assert!(segment.writable || !writable, "readable after writable");
        writable |= segment.writable;
        count += 1;
    });
    // Each descriptor crosses at most one border between regions.
    assert!(count <= 2 * MAX_CHAIN_DESCRIPTORS);
    if head >= queue.size() {
        assert_eq!(walked, Err(ChainError::Index(head)));
    }
}
