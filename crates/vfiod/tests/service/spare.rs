//! A mediator that dies, and a spare that goes on in its place on the same connections.

use std::time::{Duration, Instant};

use semper_vfiod::message::Command;
use serde_json::json;

use crate::machine::{DATA, Machine, Mediator, Place, Ram, on_image, pattern, words};

const DEADLINE: Duration = Duration::from_secs(90);

/// Of each engine; more of them with SEMPER_DEATHS.
fn deaths() -> u32 {
    std::env::var("SEMPER_DEATHS").ok().and_then(|count| count.parse().ok()).unwrap_or(8)
}

/// A spare that could go on, and its predecessor knows it.
fn ready(machine: &mut Machine, place: &Place, log: &str, options: &[&str]) -> Mediator {
    let image = format!("--blk-file={}", place.path("image").display());
    let spare = Mediator::spare(place, "a", log, &[&[&*image], options].concat());
    wait_ready(machine, &spare);
    spare
}

fn wait_ready(machine: &mut Machine, spare: &Mediator) {
    let end = Instant::now() + DEADLINE;
    while machine.ok(json!({"cmd": "status"}))["spare"] != "ready" {
        assert!(Instant::now() < end, "no spare is ready\n{}", spare.log());
    }
}

fn session(place: &Place) -> String {
    format!("--session-socket={}", place.path("a.session").display())
}

#[test]
fn every_death_under_load_is_survived_on_the_same_connection() {
    for engine in ["--engine=sync", "--engine=mmap", "--engine=uring"] {
        let place = Place::new();
        let ram = Ram::new();
        let mut serving = Mediator::on(&place, "a", &[engine, &session(&place)]);
        let mut machine = Machine::connect(&serving, &ram);
        machine.configure();
        machine.enable();
        let mut chance = 12345u32;
        for round in 0..deaths() {
            let seed = round as u8;
            let mut spare = ready(&mut machine, &place, &format!("spare-{round}"), &[engine]);
            let mut waiting = Vec::new();
            chance = chance.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let die_at = (chance >> 24) % 40;
            for number in 0..60u32 {
                let block = (number % 8) * 16;
                let at = DATA + u64::from(block) * 512;
                if waiting.len() == 8 {
                    let (id, status) = machine.next(1);
                    assert_eq!(status, 0, "{engine}, {round}\n{}", spare.log());
                    let place = waiting.iter().position(|known| *known == id);
                    waiting.remove(place.expect("told once"));
                }
                // The same content each time within a round: several writes may be on their way.
                ram.put(at, &pattern(4096, seed ^ block as u8));
                let dwords = [(1, 1), (10, block), (12, 7)];
                waiting.push(machine.submit(1, 1, at, &dwords));
                if number == die_at {
                    serving.kill();
                }
            }
            while !waiting.is_empty() {
                let (id, status) = machine.next(1);
                assert_eq!(status, 0);
                let place = waiting.iter().position(|known| *known == id).expect("told once");
                waiting.remove(place);
            }
            for block in (0..8).map(|block| block * 16) {
                let found = on_image(&place.path("image"), block as usize * 512, 4096);
                assert_eq!(found, pattern(4096, seed ^ block as u8), "{engine}, {round}");
            }
            // A message, on the connection that is still the first one.
            assert_eq!(machine.read(0, 0x1c, 4), [1, 0, 0, 0]);
            assert!(machine.interrupts(1) > 0);
            machine.ask_anew(&place, "a");
            let told = machine.ok(json!({"cmd": "status"}));
            assert_eq!((&told["resumed"], &told["owns_image"]), (&json!(true), &json!(true)));
            std::mem::swap(&mut serving, &mut spare);
        }
        drop(machine);
        assert_eq!(serving.wait(), 0, "{}", serving.log());
    }
}

#[test]
fn a_message_that_nobody_has_answered_is_answered_by_the_next() {
    let place = Place::new();
    let ram = Ram::new();
    let mut serving = Mediator::on(&place, "a", &["--engine=sync", &session(&place)]);
    let mut machine = Machine::connect(&serving, &ram);
    machine.configure();
    machine.enable();
    for round in 0..12u32 {
        let spare = ready(&mut machine, &place, &format!("spare-{round}"), &["--engine=sync"]);
        let death = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(u64::from(round) * 150));
            serving.kill();
        });
        for number in 0..200u32 {
            // Memory comes and goes, with files; registers are read and written.
            let at = 0x1000_0000 + u64::from(number % 4) * 0x10_0000;
            if number % 8 < 4 {
                machine.map(at, 0x1_0000);
            } else {
                let body =
                    [words(&[24, 0]), [at, 0x1_0000].map(u64::to_le_bytes).concat()].concat();
                machine.ask(Command::DmaUnmap, &body, None).unwrap();
            }
            machine.write(7, 0x3c, &[number as u8]);
            assert_eq!(machine.read(7, 0x3c, 1), [number as u8], "{round}\n{}", spare.log());
            machine.connect_vectors();
        }
        death.join().unwrap();
        machine.interrupts(1);
        assert_eq!(machine.transfer(1, round, 1, DATA), 0);
        machine.ask_anew(&place, "a");
        assert!(machine.interrupts(1) > 0);
        serving = spare;
    }
}

#[test]
fn what_was_captured_is_captured_by_the_next_and_a_move_can_be_given_up() {
    let place = Place::new();
    let ram = Ram::new();
    let mut serving = Mediator::on(&place, "a", &["--engine=sync", &session(&place)]);
    let mut machine = Machine::connect(&serving, &ram);
    machine.configure();
    machine.enable();
    let spare = ready(&mut machine, &place, "spare", &["--engine=sync"]);
    machine.ok(json!({"cmd": "capture", "on": true}));
    ram.put(DATA, &pattern(4096, 1));
    assert_eq!(machine.transfer(1, 0, 8, DATA), 0);
    serving.kill();
    let before = machine.mediated;
    assert_eq!(machine.transfer(2, 0, 8, DATA + 0x2000), 0, "{}", spare.log());
    assert_eq!(ram.get(DATA + 0x2000, 4096), pattern(4096, 1));
    assert!(machine.mediated >= before + 4096 + 16);
    machine.ask_anew(&place, "a");
    assert_eq!(machine.ok(json!({"cmd": "status"}))["state"], "captured");
    machine.ok(json!({"cmd": "quiesce"}));
    machine.ok(json!({"cmd": "release"}));
    machine.ok(json!({"cmd": "resume"}));
    machine.ok(json!({"cmd": "capture", "on": false}));
    assert_eq!(machine.transfer(2, 0, 8, DATA + 0x4000), 0);
}

#[test]
fn the_image_that_was_given_away_is_not_taken_by_the_next() {
    let place = Place::new();
    let ram = Ram::new();
    let mut serving = Mediator::on(&place, "a", &["--engine=sync", &session(&place)]);
    let mut machine = Machine::connect(&serving, &ram);
    machine.configure();
    machine.enable();
    let spare = ready(&mut machine, &place, "spare", &["--engine=sync"]);
    machine.ok(json!({"cmd": "quiesce"}));
    machine.ok(json!({"cmd": "release"}));
    serving.kill();
    machine.ask_anew(&place, "a");
    let told = machine.ok(json!({"cmd": "status"}));
    assert_eq!((&told["state"], &told["owns_image"]), (&json!("quiesced"), &json!(false)));
    // Another one can have it, and then this one cannot.
    let other = Mediator::on(&place, "b", &[]);
    drop(other.socket("ctl"));
    assert_eq!(machine.refused(json!({"cmd": "resume"})), "in-use", "{}", spare.log());
    drop(other);
    machine.ok(json!({"cmd": "resume"}));
    assert_eq!(machine.transfer(1, 0, 8, DATA), 0);
}

#[test]
fn without_a_spare_the_driver_waits_for_ever_and_an_orderly_end_has_none_go_on() {
    let place = Place::new();
    let ram = Ram::new();
    let mut serving = Mediator::on(&place, "a", &["--engine=sync", &session(&place)]);
    let mut machine = Machine::connect(&serving, &ram);
    machine.configure();
    machine.enable();
    assert_eq!(machine.ok(json!({"cmd": "status"}))["spare"], "alone");
    let mut spare = ready(&mut machine, &place, "spare", &["--engine=sync"]);
    drop(machine);
    assert_eq!((serving.wait(), spare.wait()), (0, 0), "{}", spare.log());

    let mut serving = Mediator::on(&place, "a", &["--engine=sync", &session(&place)]);
    let mut machine = Machine::connect(&serving, &ram);
    serving.kill();
    // The connection has ended: that is all that QEMU hears.
    assert!(std::io::Read::read(&mut machine.stream, &mut [0]).map_or(true, |len| len == 0));
}

#[test]
fn the_small_device_goes_on_as_well() {
    let place = Place::new();
    let ram = Ram::new();
    let mut serving = Mediator::start(&place, "a", &["--kind=edu", &session(&place)]);
    let mut machine = Machine::connect(&serving, &ram);
    machine.configure_small();
    machine.write(0, 8, &[5, 0, 0, 0]);
    ram.put(DATA, &pattern(64, 7));
    machine.copy(DATA, 0x40000, 64, 1);
    let spare = Mediator::spare(&place, "a", "spare", &["--kind=edu"]);
    wait_ready(&mut machine, &spare);
    serving.kill();
    assert_eq!(machine.read(0, 8, 4), [120, 0, 0, 0], "{}", spare.log());
    machine.copy(0x40000, DATA + 0x1000, 64, 3);
    assert_eq!(ram.get(DATA + 0x1000, 64), pattern(64, 7));
}
