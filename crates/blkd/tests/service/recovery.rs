//! Requests survive the process: SIGKILL, replay, the device record, draining.

use serde_json::json;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::backend::{ENGINES, Site, wait_until};
use crate::machine::{Ask, F_EVENT_IDX, Machine, Waited};

#[test]
fn what_was_in_flight_at_sigkill_is_done_again_by_the_next_process() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let mut first = site.start(&[engine]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.ask(&first, &Ask::write(0, [1; 512])).status, 0);
        // The first write holds the thread long enough for the kill; nothing is published.
        first.fault(json!({"op": "write", "delay_ms": 10_000}));
        let writes: Vec<_> =
            (0..6u8).map(|n| machine.prepare(0, &Ask::write(0, vec![n + 2; 512]))).collect();
        let read = machine.prepare(0, &Ask::read(0, 512));
        machine.show(0);
        first.wait_status("/state", &json!("running"));
        first.kill();
        machine.reap();
        assert_eq!(machine.pending(), 7);

        let second = site.start(&[engine]);
        machine.disconnect();
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.wait_all(&second), Waited::Answered);
        assert!(writes.iter().all(|ticket| machine.answer(*ticket).status == 0));
        assert_eq!(machine.answer(read).data, [7; 512]);
        let status = second.status();
        assert_eq!(status["inflight"], json!(true));
        assert!(status["timeline_ns"]["replayed"].is_u64());
        assert_eq!(std::fs::read(&site.image).unwrap()[..512], [7; 512]);
    }
}

#[test]
fn without_the_region_the_same_kill_loses_requests() {
    let site = Site::new(1 << 20);
    let mut first = site.start(&["--no-inflight"]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    first.fault(json!({"op": "write", "delay_ms": 10_000}));
    (0..4).for_each(|n| _ = machine.submit(0, &Ask::write(n, [1; 512])));
    first.wait_status("/state", &json!("running"));
    first.kill();
    machine.disconnect();
    let second = site.start(&["--no-inflight"]);
    assert!(machine.inflight().is_none());
    // A front end that gives the available index as the base, as cloud-hypervisor's does: what the
    // dead process had taken is lost for good.
    machine.base = Some(4);
    machine.connect(&site.socket()).unwrap();
    let late = machine.submit(0, &Ask::write(9, [1; 512]));
    let _ = second.wait_status("/queues/0/writes", &json!(1));
    machine.reap();
    assert!(machine.is_answered(late) && machine.pending() == 4);
}

#[test]
fn the_base_of_a_front_end_is_ignored_when_there_is_a_region() {
    let site = Site::new(1 << 20);
    let mut machine = Machine::new(1, 64);
    // Used index (QEMU), available index (cloud-hypervisor), nonsense.
    for base in [None, Some(u16::MAX), Some(4), Some(12345)] {
        machine.base = base;
        let mut backend = site.start(&[]);
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        assert_eq!(machine.ask(&backend, &Ask::write(1, [1; 512])).status, 0);
        backend.fault(json!({"op": "write", "delay_ms": 10_000}));
        (0..4).for_each(|n| _ = machine.submit(0, &Ask::write(n, [1; 512])));
        backend.kill();
        machine.disconnect();
    }
}

#[test]
fn a_region_from_elsewhere_is_refused_by_name() {
    use std::os::unix::fs::FileExt;

    let site = Site::new(1 << 20);
    let mut backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::read(0, 512)).status, 0);
    let damage: [(&str, u64, &[u8]); 4] = [
        ("version 9", 8, &[9, 0]),
        ("has 63 entries", 10, &[63, 0]),
        ("entry 2 of the in-flight region holds 7", 16 + 2 * 16, &[7]),
        ("of one device", 14, &[0xff, 0x7f]),
    ];
    for (words, at, bytes) in damage {
        machine.disconnect();
        let file = machine.inflight().unwrap().1.try_clone().unwrap();
        let mut before = [0; 2048];
        file.read_exact_at(&mut before[..1088], 0).unwrap();
        file.write_all_at(bytes, at).unwrap();
        // Something in flight, or there would be nothing to decide.
        file.write_all_at(&[1], 16 + 5 * 16).unwrap();
        assert!(machine.connect(&site.socket()).is_err(), "{words}");
        wait_until(words, || backend.log().contains(words).then_some(()));
        file.write_all_at(&before[..1088], 0).unwrap();
    }
    assert!(backend.is_alive());
    machine.disconnect();
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::read(0, 512)).status, 0);
}

#[test]
fn get_vring_base_answers_after_everything_is_finished() {
    for &engine in ENGINES {
        for round in 0..3 {
            let site = Site::new(1 << 20);
            let backend = site.start(&[engine]);
            let mut machine = Machine::new(1, 64);
            machine.connect(&site.socket()).unwrap();
            backend.fault(json!({"op": "any", "delay_ms": 5}));
            let tickets: Vec<_> = (0..10 * round)
                .map(|n| machine.submit(0, &Ask::write(n, [n as u8 + 1; 512])))
                .collect();
            let base = machine.session().get_vring_base(0).unwrap() as usize;
            // Without waiting: everything that was taken must be there now.
            machine.reap();
            let answered = tickets.iter().filter(|ticket| machine.is_answered(**ticket)).count();
            assert_eq!(answered, base, "{engine}");
            let status = backend.status();
            assert_eq!(
                (&status["state"], &status["queues"][0]["enabled"]),
                (&json!("connected"), &json!(false))
            );
            // And the guest goes on where it was stopped.
            machine.start(0).unwrap();
            assert_eq!(machine.wait_all(&backend), Waited::Answered);
        }
    }
}

#[test]
fn a_disabled_queue_is_drained_and_goes_on() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    for _ in 0..10 {
        machine.submit(0, &Ask::write(1, [1; 512]));
        machine.session().set_vring_enable(0, false).unwrap();
        machine.submit(0, &Ask::write(2, [2; 512]));
        machine.session().set_vring_enable(0, true).unwrap();
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
    }
}

#[test]
fn a_reset_device_starts_anew() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    for round in 0..5 {
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.ask(&backend, &Ask::write(round, [1; 512])).status, 0);
        machine.set_write_cache(round % 2 == 0);
        machine.session().get_vring_base(0).unwrap();
        machine.session().reset_device().unwrap();
        assert_eq!(machine.config()[32], 1, "the write cache of an earlier guest");
        machine.disconnect();
        machine.reset();
    }
}

#[test]
fn the_write_cache_switch_survives_the_process() {
    let site = Site::new(1 << 20);
    let mut machine = Machine::new(1, 64);
    for on in [false, true, false] {
        let mut backend = site.start(&[]);
        machine.connect(&site.socket()).unwrap();
        machine.set_write_cache(on);
        assert_eq!(machine.config()[32], u8::from(on));
        backend.kill();
        machine.disconnect();

        let next = site.start(&[]);
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.config()[32], u8::from(on));
        let mode = if on { "write-back" } else { "write-through" };
        assert_eq!(next.status()["write_cache"], json!(mode));
        machine.disconnect();
    }
}

#[test]
fn a_driver_that_can_neither_flush_nor_switch_gets_a_write_through_disk() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.features = !(1 << 9 | 1 << 11);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(backend.status()["write_cache"], json!("write-through"));
    assert_eq!(machine.ask(&backend, &Ask::write(0, [1; 512])).status, 0);
}

#[test]
fn front_ends_may_come_and_go() {
    let site = Site::new(1 << 20);
    let mut backend = site.start(&["--num-queues=2", "--threads=2"]);
    let mut machine = Machine::new(2, 64);
    for round in 0..20u8 {
        machine.features = if round % 2 == 0 { u64::MAX } else { !F_EVENT_IDX };
        machine.connect(&site.socket()).unwrap();
        machine.reap();
        while machine.pending() < 60 {
            let n = machine.pending();
            machine.submit(n % 2, &Ask::write(n as u64, vec![round; 512]));
        }
        // Gone in the middle of it; the rings and the region stay.
        machine.disconnect();
    }
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.wait_all(&backend), Waited::Answered);
    assert!(backend.is_alive());
    assert_eq!(backend.status()["counters"]["guest_errors"], json!(0));
}

#[test]
fn a_kick_descriptor_may_be_replaced_under_way() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let backend = site.start(&[engine]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        for round in 0..5u8 {
            assert_eq!(machine.ask(&backend, &Ask::write(0, [round; 512])).status, 0);
            machine.replace_kick(0);
        }
        assert_eq!(machine.ask(&backend, &Ask::read(0, 512)).data, [4; 512]);
    }
}

/// The region is made for the largest queue that a guest usually has; firmware and drivers may
/// choose a smaller one, and some front ends ask with a number below what the driver then takes.
#[test]
fn queues_of_all_sizes_are_recovered_also_from_a_region_for_larger_ones() {
    for (size, entries) in [(1, 1), (2, 2), (1, 256), (256, 128), (64, 1024), (8, 65535)] {
        let site = Site::new(1 << 20);
        let mut machine = Machine::new(2, size);
        machine.region_entries = Some(entries);
        for round in 0..3u8 {
            let mut backend = site.start(&["--num-queues=2"]);
            machine.connect(&site.socket()).unwrap();
            assert_eq!(machine.wait_all(&backend), Waited::Answered);
            backend.fault(json!({"op": "write", "delay_ms": 10_000, "every": 3}));
            let count = usize::from(size).min(6);
            for queue in 0..2 {
                (0..count).for_each(|n| {
                    let sector = (n + 8 * queue) as u64;
                    machine.submit(queue, &Ask::write(sector, [round + 1; 512]));
                });
            }
            backend.kill();
            machine.disconnect();
        }
        let backend = site.start(&["--num-queues=2"]);
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        assert_eq!(machine.ask(&backend, &Ask::read(8, 512)).data, [3; 512]);
    }
}
