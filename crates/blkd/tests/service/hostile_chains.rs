//! Chains and rings that no sane driver builds: the process lives on, and so do other requests.

use semper_testbed::Buffer;
use serde_json::json;
use vhost::VhostBackend;

use crate::backend::Site;
use crate::machine::{Ask, Machine, Waited};

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

#[test]
fn malformed_chains_are_given_back_and_the_queue_goes_on() {
    let site = Site::new(1 << 20);
    let mut backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    let ring = machine.ring(0);
    // Each writes the descriptors of a chain that starts at the head it is given.
    type Chain = fn(&semper_testbed::DriverRing, u16, u64);
    let chains: [(&str, Chain); 12] = [
        ("leads to itself", |r, h, at| r.write_descriptor(h, at, 16, F_NEXT, h)),
        ("leads out of the table", |r, h, at| r.write_descriptor(h, at, 16, F_NEXT, 64)),
        ("leads far out of the table", |r, h, at| r.write_descriptor(h, at, 16, F_NEXT, 65535)),
        ("is not in memory", |r, h, _| r.write_descriptor(h, 0x10, 16, F_WRITE, 0)),
        ("wraps around", |r, h, _| r.write_descriptor(h, u64::MAX - 3, 16, F_WRITE, 0)),
        ("is longer than memory", |r, h, at| r.write_descriptor(h, at, u32::MAX, F_WRITE, 0)),
        ("has no room for a status", |r, h, at| r.write_descriptor(h, at, 16, 0, 0)),
        ("is empty", |r, h, at| r.write_descriptor(h, at, 0, 0, 0)),
        ("has an empty table", |r, h, at| r.write_descriptor(h, at, 0, F_INDIRECT, 0)),
        ("has a ragged table", |r, h, at| r.write_descriptor(h, at, 17, F_INDIRECT, 0)),
        ("has a table and more", |r, h, at| {
            r.write_descriptor(h, at, 16, F_INDIRECT | F_NEXT, 1);
        }),
        ("has a table outside memory", |r, h, _| r.write_descriptor(h, 16, 64, F_INDIRECT, 0)),
    ];
    let count = chains.len();
    for (what, write) in chains {
        let head = machine.take_head(0);
        write(&ring, head, machine.chunk_addr(0, head, 4096));
        let ticket = machine.offer(0, head, 0);
        machine.show(0);
        assert_eq!(machine.wait_all(&backend), Waited::Answered, "a chain that {what}");
        assert_eq!(machine.answer(ticket).written, 0, "a chain that {what}");
        assert_eq!(machine.ask(&backend, &Ask::write(1, [2; 512])).status, 0, "after it {what}");
    }
    assert_eq!(backend.status()["counters"]["guest_errors"], json!(count));
    assert!(backend.log().contains("the guest broke the rules"));
    assert!(backend.is_alive());
}

#[test]
fn readable_after_writable_and_nested_tables_are_given_back() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    let ring = machine.ring(0);
    let head = machine.take_head(0);
    let second = machine.take_head(0);
    let at = machine.chunk_addr(0, head, 4096);
    let buffers = [
        Buffer { addr: at, len: 16, writable: true },
        Buffer { addr: at + 64, len: 16, writable: false },
    ];
    ring.write_chain(&[head, second], &buffers);
    let ticket = machine.offer(0, head, 0);
    machine.show(0);
    assert_eq!(machine.wait_all(&backend), Waited::Answered);
    assert_eq!(machine.answer(ticket).written, 0);

    // An indirect table whose only entry is an indirect table: the chunk is full of them.
    let head = machine.take_head(0);
    let table = machine.chunk_addr(0, head, 0);
    let ask = Ask::read(0, 512);
    let inner = machine.prepare(0, &ask);
    machine.show(0);
    machine.wait_all(&backend);
    assert_eq!(machine.answer(inner).status, 0);
    ring.write_descriptor(head, table, 16, F_INDIRECT, 0);
    machine.poke(0, head, 0, &indirect_descriptor(table));
    let ticket = machine.offer(0, head, 0);
    machine.show(0);
    assert_eq!(machine.wait_all(&backend), Waited::Answered);
    assert_eq!(machine.answer(ticket).written, 0);
}

fn indirect_descriptor(addr: u64) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&addr.to_le_bytes());
    raw[8..12].copy_from_slice(&16u32.to_le_bytes());
    raw[12..14].copy_from_slice(&F_INDIRECT.to_le_bytes());
    raw
}

/// A ring that makes no sense stops its queue, and only until the driver resets it.
#[test]
fn a_broken_ring_stops_until_it_is_reset() {
    let site = Site::new(1 << 20);
    let mut backend = site.start(&["--num-queues=2"]);
    for fault in ["head out of range", "index too far", "the same head twice"] {
        let mut machine = Machine::new(2, 64);
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.ask(&backend, &Ask::write(1, [1; 512])).status, 0);
        let errors = backend.status()["counters"]["guest_errors"].as_u64().unwrap();
        let ring = machine.ring(0);
        let idx = ring.avail_idx();
        match fault {
            "head out of range" => {
                ring.write_avail(idx, 64);
                ring.set_avail_idx(idx.wrapping_add(1));
            }
            "index too far" => ring.set_avail_idx(idx.wrapping_add(65)),
            _ => {
                // The device holds the first when it meets the second.
                backend.fault(json!({"op": "any", "delay_ms": 1, "limit": 1}));
                machine.pieces = 1;
                let head = machine.next_head(0);
                machine.prepare(0, &Ask::write(1, [3; 512]));
                ring.write_avail(idx.wrapping_add(1), head);
                ring.set_avail_idx(idx.wrapping_add(2));
            }
        }
        machine.kick(0);
        if fault != "the same head twice" {
            let now = json!(errors + 1);
            backend.wait_status("/counters/guest_errors", &now);
        }
        // The other queue goes on.
        let other = machine.submit(1, &Ask::write(2, [1; 512]));
        crate::backend::wait_until("the other queue", || {
            machine.reap_queue(1);
            machine.is_answered(other).then_some(())
        });
        // Stopping still works.
        machine.session().get_vring_base(0).unwrap();
        machine.disconnect();
        assert!(backend.is_alive(), "{fault}");
    }
    let mut machine = Machine::new(2, 64);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::write(1, [1; 512])).status, 0);
}

#[test]
fn rings_outside_memory_are_refused() {
    let site = Site::new(1 << 20);
    let mut backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    for addr in [0, 1, 0x7000_0000_0008, u64::MAX, u64::MAX - 15] {
        machine.negotiate(&site.socket()).unwrap();
        machine.ring_addr = Some(addr);
        assert!(machine.start(0).is_err(), "{addr:#x}");
        machine.ring_addr = None;
        machine.disconnect();
    }
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::write(1, [1; 512])).status, 0);
    assert!(backend.is_alive());
}
