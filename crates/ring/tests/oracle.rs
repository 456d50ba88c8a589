//! The same rings, walked by this crate and by `virtio-queue`, must look the same.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use semper_ring::{GuestMemory, RegionSpec, RingAddresses, SplitQueue};
use semper_testbed::{Buffer, DriverRing, Layout};
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const FIRST: u64 = 0x1000;
const BORDER: u64 = 0x9000;
const END: u64 = 0x11000;
const TABLE: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;

/// One memory, mapped once for each of the two, with a queue at its start.
struct Pair {
    ours: Arc<GuestMemory>,
    theirs: GuestMemoryMmap,
    ring: DriverRing,
    hosts: [*mut u8; 2],
}

fn memfd(len: u64) -> File {
    // SAFETY: the name is a C string; the result is checked and then owned.
    let file = unsafe {
        let fd = libc::memfd_create(c"oracle".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    file
}

impl Pair {
    fn new(size: u16) -> Self {
        let file = memfd(END - FIRST);
        let spec = |guest_addr, file_offset| RegionSpec {
            guest_addr,
            size: BORDER - FIRST,
            user_addr: guest_addr,
            file_offset,
        };
        let ours = GuestMemory::empty()
            .with_region(spec(FIRST, 0), &file)
            .and_then(|memory| memory.with_region(spec(BORDER, BORDER - FIRST), &file))
            .unwrap();
        let range = |addr, offset| {
            let part = FileOffset::new(file.try_clone().unwrap(), offset);
            (GuestAddress(addr), (BORDER - FIRST) as usize, Some(part))
        };
        let ranges = [range(FIRST, 0), range(BORDER, BORDER - FIRST)];
        let theirs = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let hosts = [FIRST, BORDER].map(|addr| ours.translate(addr, BORDER - FIRST).unwrap());
        // SAFETY: page-aligned, and the layout is inside the first region.
        let ring = unsafe { DriverRing::new(hosts[0], Layout::packed(0, size)) };
        Self { ours: Arc::new(ours), theirs, ring, hosts }
    }

    fn our_queue(&self, event_idx: bool) -> SplitQueue {
        let Layout { size, desc, avail, used, .. } = self.ring.layout();
        let at = |offset: usize| FIRST + offset as u64;
        let addresses = RingAddresses { desc: at(desc), avail: at(avail), used: at(used) };
        SplitQueue::new(Arc::clone(&self.ours), addresses, u32::from(size), event_idx).unwrap()
    }

    fn their_queue(&self, event_idx: bool) -> Queue {
        let Layout { size, desc, avail, used, .. } = self.ring.layout();
        let at = |offset: usize| GuestAddress(FIRST + offset as u64);
        let mut queue = Queue::new(size).unwrap();
        queue.try_set_desc_table_address(at(desc)).unwrap();
        queue.try_set_avail_ring_address(at(avail)).unwrap();
        queue.try_set_used_ring_address(at(used)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_next_avail(self.ring.used_idx());
        queue.set_next_used(self.ring.used_idx());
        queue.set_ready(true);
        assert!(queue.is_valid(&self.theirs));
        queue
    }

    /// (guest address, length, writable) of the segments that we find.
    fn walk(&self, queue: &SplitQueue, head: u16) -> Vec<(u64, usize, bool)> {
        let mut segments = Vec::new();
        let guest_address = |ptr: *mut u8| {
            let inside = |base: &*mut u8| (base.addr()..base.addr() + 0x8000).contains(&ptr.addr());
            let region = self.hosts.iter().position(inside).expect("guest memory");
            [FIRST, BORDER][region] + (ptr.addr() - self.hosts[region].addr()) as u64
        };
        let walked = queue.walk(head, |segment| {
            segments.push((guest_address(segment.ptr), segment.len, segment.writable));
        });
        assert_eq!(walked, Ok(()));
        segments
    }
}

/// Cuts a buffer where one region ends and the next begins, and drops it if it is empty.
fn expected(addr: u64, len: u32, writable: bool) -> Vec<(u64, usize, bool)> {
    let end = addr + u64::from(len);
    let cut = BORDER.clamp(addr, end);
    [(addr, cut), (cut, end)]
        .into_iter()
        .filter(|(from, to)| from < to)
        .map(|(from, to)| (from, (to - from) as usize, writable))
        .collect()
}

/// Where a buffer may be: anywhere behind the tables, across the border between regions too.
fn buffers() -> impl Strategy<Value = Vec<Buffer>> {
    let one = (BUFFERS..END, 0..6000u32, any::<bool>()).prop_map(|(addr, len, writable)| Buffer {
        addr,
        len: len.min((END - addr) as u32),
        writable,
    });
    vec(one, 1..16).prop_map(|mut buffers| {
        buffers.sort_by_key(|buffer| buffer.writable);
        buffers
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000, failure_persistence: None, ..ProptestConfig::default()
    })]

    /// Chains of all three shapes: in the table, in an indirect table, and half and half.
    #[test]
    fn valid_chains_have_the_same_segments(
        buffers in buffers(),
        order in Just((0..16u16).collect::<Vec<_>>()).prop_shuffle(),
        direct in 0..16usize,
    ) {
        let pair = Pair::new(16);
        let direct = direct.min(buffers.len());
        let (in_table, indirect) = buffers.split_at(direct);
        pair.ring.write_chain(&order[..direct], in_table);
        if !indirect.is_empty() {
            let head = order[direct];
            // SAFETY: the table is inside the first region.
            unsafe {
                pair.ring.write_indirect(head, (TABLE - FIRST) as usize, TABLE, indirect);
            }
            if let Some(last) = in_table.last() {
                let flags = 1 + 2 * u16::from(last.writable);
                pair.ring.write_descriptor(order[direct - 1], last.addr, last.len, flags, head);
            }
        }
        pair.ring.write_avail(0, order[0]);
        pair.ring.set_avail_idx(1);

        let mut theirs = pair.their_queue(false);
        let chain = theirs.pop_descriptor_chain(&pair.theirs).expect("a chain");
        prop_assert_eq!(chain.head_index(), order[0]);
        let reference: Vec<_> = chain
            .flat_map(|desc| expected(desc.addr().0, desc.len(), desc.is_write_only()))
            .collect();
        let mut ours = pair.our_queue(false);
        prop_assert_eq!(ours.pop_head(), Ok(Some(order[0])));
        prop_assert_eq!(pair.walk(&ours, order[0]), reference);
        let wanted: Vec<_> =
            buffers.iter().flat_map(|b| expected(b.addr, b.len, b.writable)).collect();
        prop_assert_eq!(pair.walk(&ours, order[0]), wanted);
    }

    /// Two devices on two copies of the same ring, driven alike, leave the same bytes.
    #[test]
    fn indices_and_notifications_are_the_same(
        steps in vec((0..6u8, any::<u16>()), 1..200),
        size in (0..6u32).prop_map(|shift| 1u16 << shift),
        start in prop_oneof![Just(0u16), Just(65530), any::<u16>()],
    ) {
        let pairs = [Pair::new(size), Pair::new(size)];
        for pair in &pairs {
            pair.ring.set_avail_idx(start);
            pair.ring.set_used_idx(start);
        }
        let (mut ours, mut theirs) = (pairs[0].our_queue(true), pairs[1].their_queue(true));
        // After a start we call whatever the driver wants; they do not.
        prop_assert!(ours.needs_call());
        let mut taken = Vec::new();
        for (step, value) in steps {
            let driver = pairs.each_ref().map(|pair| pair.ring);
            let avail = driver[0].avail_idx();
            let room = size - avail.wrapping_sub(ours.used_idx());
            match step {
                0 | 1 if room > 0 => driver.iter().for_each(|ring| {
                    ring.write_avail(avail, value % size);
                    ring.set_avail_idx(avail.wrapping_add(1));
                }),
                2 => {
                    let chain = theirs.pop_descriptor_chain(&pairs[1].theirs);
                    let head = ours.pop_head().unwrap();
                    prop_assert_eq!(head, chain.map(|chain| chain.head_index()));
                    taken.extend(head);
                }
                3 if !taken.is_empty() => {
                    let head = taken.remove(usize::from(value) % taken.len());
                    theirs.add_used(&pairs[1].theirs, head, u32::from(value)).unwrap();
                    ours.stage_used(head, u32::from(value));
                    ours.publish_used();
                }
                4 => {
                    let wish = ours.used_idx().wrapping_sub(2).wrapping_add(value % 4);
                    driver.iter().for_each(|ring| ring.set_used_event(wish));
                    let reference = theirs.needs_notification(&pairs[1].theirs).unwrap();
                    prop_assert_eq!(ours.needs_call(), reference);
                }
                5 => {
                    let reference = theirs.enable_notification(&pairs[1].theirs).unwrap();
                    prop_assert_eq!(ours.enable_kicks(), reference);
                    let (old, new) = (avail.wrapping_sub(value % 3), avail);
                    let wants = driver.map(|ring| ring.needs_kick(old, new, true));
                    prop_assert_eq!(wants[0], wants[1]);
                }
                _ => {}
            }
            prop_assert_eq!(ours.last_avail(), theirs.next_avail());
            prop_assert_eq!(ours.used_idx(), theirs.next_used());
            // SAFETY: both layouts are inside regions that nobody writes now.
            let bytes = pairs.each_ref().map(|pair| unsafe {
                std::slice::from_raw_parts(pair.hosts[0], pair.ring.layout().end)
            });
            prop_assert!(bytes[0] == bytes[1], "the rings differ after step {step}");
        }
    }

    /// Several staged elements appear by one store, and not before.
    #[test]
    fn a_batch_appears_at_once(heads in vec(0..16u16, 1..16), start in any::<u16>()) {
        let pair = Pair::new(16);
        pair.ring.set_used_idx(start);
        pair.ring.set_avail_idx(start);
        let mut queue = pair.our_queue(false);
        for (n, head) in heads.iter().enumerate() {
            queue.stage_used(*head, n as u32);
            prop_assert_eq!(pair.ring.used_idx(), start);
            prop_assert_eq!(usize::from(queue.staged()), n + 1);
        }
        queue.publish_used();
        let end = start.wrapping_add(heads.len() as u16);
        prop_assert_eq!((pair.ring.used_idx(), queue.used_idx(), queue.staged()), (end, end, 0));
        for (n, head) in heads.iter().enumerate() {
            let element = pair.ring.used_element(start.wrapping_add(n as u16));
            prop_assert_eq!(element, (u32::from(*head), n as u32));
        }
    }
}

#[test]
fn sizes_and_addresses_that_make_no_sense_are_refused() {
    let pair = Pair::new(16);
    let layout = pair.ring.layout();
    let at = |offset: usize| FIRST + offset as u64;
    let good =
        RingAddresses { desc: at(layout.desc), avail: at(layout.avail), used: at(layout.used) };
    let make = |addresses, size| SplitQueue::new(Arc::clone(&pair.ours), addresses, size, false);
    for size in [0, 3, 17, 65535, 65536, 1 << 20, u32::MAX] {
        assert!(make(good, size).is_err(), "size {size}");
    }
    assert!(make(good, 16).is_ok());
    let bad = [0, 1, FIRST - 1, END, END - 8, u64::MAX, u64::MAX - 15, BORDER - 16];
    for addr in bad {
        assert!(make(RingAddresses { desc: addr, ..good }, 16).is_err(), "desc {addr:#x}");
        assert!(make(RingAddresses { avail: addr, ..good }, 16).is_err(), "avail {addr:#x}");
        assert!(make(RingAddresses { used: addr, ..good }, 16).is_err(), "used {addr:#x}");
    }
    for (part, by) in [("desc", 8), ("avail", 1), ("used", 2)] {
        let moved = match part {
            "desc" => RingAddresses { desc: good.desc + by, ..good },
            "avail" => RingAddresses { avail: good.avail + by, ..good },
            _ => RingAddresses { used: good.used + by, ..good },
        };
        assert!(make(moved, 16).is_err(), "misaligned {part}");
    }
}
