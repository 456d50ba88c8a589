//! What QEMU asks, and what a hostile client might.

use std::io::Write;
use std::os::unix::net::UnixStream;

use semper_vfiod::message::Command;
use serde_json::json;

use crate::machine::{
    BAR, DATA, Driver, Machine, Mediator, Place, Ram, on_image, pattern, run, words,
};

#[test]
fn a_driver_reads_and_writes_with_doorbells_in_memory_and_by_message() {
    for doorbells in ["direct", "trapped"] {
        let place = Place::new();
        let option = format!("--doorbells={doorbells}");
        let mediator = Mediator::on(&place, "a", &[&option]);
        let mut machine = Machine::connect(&mediator, &Ram::new());
        assert_eq!(machine.page.is_some(), doorbells == "direct");
        machine.configure();
        machine.enable();
        machine.ram.put(DATA, &pattern(4096, 1));
        assert_eq!(machine.transfer(1, 8, 8, DATA), 0);
        assert_eq!(on_image(&place.path("image"), 4096, 4096), pattern(4096, 1));
        assert_eq!(machine.transfer(2, 8, 8, DATA + 0x2000), 0);
        assert_eq!(machine.ram.get(DATA + 0x2000, 4096), pattern(4096, 1));
        assert!(machine.interrupts(1) >= 2 && machine.interrupts(0) >= 2);
        let counters = machine.counters();
        assert_eq!((&counters["reads"], &counters["writes"]), (&json!(1), &json!(1)));
        let other = if doorbells == "direct" { "doorbells_trapped" } else { "doorbells_direct" };
        assert_eq!(counters[other], 0, "{counters}");
        assert_eq!(machine.mediated, 0);
    }
}

#[test]
fn every_engine_serves_several_requests_at_a_time_also_parts_of_blocks() {
    for options in [
        &["--engine=sync"][..],
        &["--engine=nowait"],
        &["--engine=mmap"],
        &["--engine=uring"],
        &["--engine=uring", "--direct"],
        &["--engine=sync", "--direct"],
    ] {
        let place = Place::new();
        let mediator = Mediator::on(&place, "a", options);
        let mut machine = Machine::connect(&mediator, &Ram::new());
        machine.configure();
        machine.enable();
        for round in 0..3u8 {
            for (opcode, seed) in [(1u32, round), (2, 0)] {
                let mut waiting: Vec<_> = (0..8)
                    .map(|at: u32| {
                        // Sectors of the same and of neighbouring blocks of the storage.
                        let data = DATA + u64::from(at) * 0x1000 + u64::from(opcode) * 0x8000;
                        machine.ram.put(data, &pattern(512, at as u8 + seed));
                        machine.submit(1, opcode as u8, data, &[(1, 1), (10, 3 * at), (12, 0)])
                    })
                    .collect();
                while !waiting.is_empty() {
                    let (id, status) = machine.next(1);
                    assert_eq!(status, 0, "{options:?}");
                    let at = waiting.iter().position(|waiting| *waiting == id);
                    waiting.remove(at.expect("a command that waits"));
                }
            }
            for at in 0..8u32 {
                let data = DATA + u64::from(at) * 0x1000 + 0x1_0000;
                assert_eq!(machine.ram.get(data, 512), pattern(512, at as u8 + round));
            }
        }
        assert_eq!(machine.counters()["errors"], 0, "{options:?}");
    }
}

#[test]
fn it_ends_when_qemu_has_gone_or_when_it_is_told_to_and_lets_the_image_go() {
    let place = Place::new();
    let mut first = Mediator::on(&place, "a", &[]);
    let machine = Machine::connect(&first, &Ram::new());
    let image = format!("--blk-file={}", place.path("image").display());
    let other = format!("--socket-path={}", place.path("other").display());
    let (status, told) = run(&[&image, &other]);
    assert_eq!(status, 3, "{told}");
    drop(machine);
    assert_eq!(first.wait(), 0, "{}", first.log());
    let mut second = Mediator::on(&place, "b", &[]);
    drop(second.socket("ctl"));
    // SAFETY: a process of this test.
    unsafe { libc::kill(second.child.id() as i32, libc::SIGTERM) };
    assert_eq!(second.wait(), 0, "{}", second.log());
    assert!(!place.path("b.sock").exists() && !place.path("b.ctl").exists());
}

#[test]
fn what_makes_no_sense_is_refused_with_an_errno_and_the_rest_goes_on() {
    let place = Place::new();
    let mediator = Mediator::on(&place, "a", &[]);
    let mut machine = Machine::connect(&mediator, &Ram::new());
    let access = |offset: u64, region: u32, count: u32| {
        [&offset.to_le_bytes()[..], &words(&[region, count])].concat()
    };
    for (command, body) in [
        (Command::RegionRead, access(0x4000, 0, 4)),
        (Command::RegionRead, access(u64::MAX, 0, 4)),
        (Command::RegionRead, access(0, 0, u32::MAX)),
        (Command::RegionRead, access(0, 3, 4)),
        (Command::RegionRead, access(4096, 7, 1)),
        (Command::RegionRead, vec![0; 15]),
        (Command::RegionWrite, access(0, 0, 4)),
        (Command::RegionWrite, access(0x4000, 0, 0)[..15].to_vec()),
        (Command::GetRegionInfo, words(&[32, 0, 9, 0])),
        (Command::GetIrqInfo, words(&[16, 0, 5, 0])),
        (Command::SetIrqs, words(&[20, 36, 2, 3, 1])),
        (Command::SetIrqs, words(&[20, 36, 9, 0, 1])),
        (Command::DmaMap, vec![0; 8]),
        (Command::DmaUnmap, vec![0; 8]),
        (Command::DmaRead, vec![0; 16]),
        (Command::DmaWrite, vec![0; 16]),
        (Command::Version, vec![1, 0, 0, 0]),
    ] {
        assert!(machine.ask(command, &body, None).is_err(), "{command:?} {body:x?}");
    }
    assert_eq!(machine.counters()["protocol_errors"], 17);
    machine.configure();
    machine.enable();
    assert_eq!(machine.transfer(2, 0, 1, DATA), 0);
    // A command whose data is no memory fails, and nothing else does.
    assert_ne!(machine.transfer(2, 0, 1, 1 << 40), 0);
    assert_ne!(machine.transfer(2, 0, 1, BAR), 0);
    assert_eq!(machine.transfer(2, 0, 1, DATA), 0);
}

#[test]
fn a_client_that_sends_no_messages_is_gone() {
    let place = Place::new();
    let mut mediator = Mediator::on(&place, "a", &[]);
    let mut stream: UnixStream = mediator.socket("sock");
    stream.write_all(&[0xff; 64]).unwrap();
    assert_eq!(mediator.wait(), 0, "{}", mediator.log());
}

#[test]
fn a_reset_ends_everything_and_the_driver_begins_anew() {
    let place = Place::new();
    let mediator = Mediator::on(&place, "a", &[]);
    let mut machine = Machine::connect(&mediator, &Ram::new());
    machine.configure();
    machine.enable();
    machine.ask(Command::Reset, &[], None).unwrap();
    assert_eq!(machine.read(0, 0x1c, 4), [0; 4]);
    machine.driver = Driver::new();
    machine.ram.put(0x1000, &[0; 0x4000]);
    machine.enable();
    assert_eq!(machine.transfer(2, 0, 1, DATA), 0);
}

#[test]
fn a_command_line_that_makes_no_sense_is_a_usage_error() {
    let place = Place::new();
    let socket = format!("--socket-path={}", place.path("a").display());
    let image = format!("--blk-file={}", place.path("image").display());
    for options in [
        vec![&*socket],
        vec![&*image],
        vec![&*socket, &*image, "--queues=65"],
        vec![&*socket, &*image, "--incoming"],
        vec![&*socket, &*image, "--serial=0123456789012345678901"],
        vec!["--fd=77", &*image],
    ] {
        let (status, told) = run(&options);
        assert_eq!(status, 2, "{options:?} {told}");
    }
    let missing = format!("--blk-file={}", place.path("missing").display());
    assert_eq!(run(&[&*socket, &*missing]).0, 4);
    assert!(run(&["--print-capabilities"]).1.contains("mediated-dma"));
}
