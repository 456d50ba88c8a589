//! Capture, the shim, and a move from one mediator to another.

use std::os::unix::net::UnixStream;

use semper_vfiod::message::{Command, Message, receive, send};
use serde_json::json;

use crate::machine::{BAR, DATA, Machine, Mediator, Place, Ram, pattern, words};

/// A write through the shim's BAR.
fn write_by_shim(shim: &UnixStream, offset: u64, value: u32) {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend(words(&[0, 4, value]));
    send(shim, &Message::request(1, Command::RegionWrite, body, true), None).unwrap();
    assert!(!receive(shim).unwrap().unwrap().is_error());
}

#[test]
fn while_it_is_captured_data_comes_by_qemu_and_an_interrupt_behind_it() {
    let place = Place::new();
    let mediator = Mediator::on(&place, "a", &[]);
    let mut machine = Machine::connect(&mediator, &Ram::new());
    machine.configure();
    machine.enable();
    machine.ram.put(DATA, &pattern(4096, 2));
    assert_eq!(machine.transfer(1, 0, 8, DATA), 0);
    let told = machine.ok(json!({"cmd": "capture", "on": true}));
    assert_eq!(told, json!({"on": true, "page": BAR + 0x1000}));
    assert_eq!(machine.ok(json!({"cmd": "status"}))["state"], "captured");
    machine.interrupts(1);
    assert_eq!(machine.transfer(2, 0, 8, DATA + 0x4000), 0);
    assert_eq!(machine.ram.get(DATA + 0x4000, 4096), pattern(4096, 2));
    // The data, and the completion.
    assert_eq!(machine.mediated, 4096 + 16);
    machine.serve_all();
    assert!(machine.barriers > 0);
    machine.counters();
    assert_eq!(machine.interrupts(1), 1);
    assert_eq!(machine.ok(json!({"cmd": "capture", "on": false}))["on"], false);
    assert_eq!(machine.transfer(2, 0, 8, DATA + 0x6000), 0);
    assert_eq!(machine.ram.get(DATA + 0x6000, 4096), pattern(4096, 2));
    assert_eq!(machine.mediated, 4096 + 16);
}

#[test]
fn pages_that_were_written_directly_are_touched_when_the_guest_stands_still() {
    for (dirty, pages) in [("touch", 3), ("none", 0), ("mediated", 0)] {
        let place = Place::new();
        let mediator = Mediator::on(&place, "a", &[]);
        let mut machine = Machine::connect(&mediator, &Ram::new());
        machine.configure();
        machine.enable();
        machine.ok(json!({"cmd": "capture", "on": true, "dirty": dirty}));
        assert_eq!(machine.refused(json!({"cmd": "touch"})), "busy");
        // Two pages of data, and that of the completion queue.
        let id = machine.submit(1, 2, DATA, &[(1, 1), (8, DATA as u32 + 0x1000), (12, 15)]);
        assert_eq!(machine.wait(1, id), 0);
        machine.ok(json!({"cmd": "quiesce"}));
        let before = machine.mediated;
        assert_eq!(machine.ok(json!({"cmd": "touch"}))["pages"], pages, "{dirty}");
        assert_eq!(machine.mediated - before, pages);
        assert_eq!(machine.ok(json!({"cmd": "touch"}))["pages"], 0);
    }
}

/// More often with SEMPER_TURNS.
#[test]
fn it_is_captured_and_given_back_with_commands_on_their_way() {
    let turns = std::env::var("SEMPER_TURNS").ok().and_then(|count| count.parse().ok());
    let place = Place::new();
    let mediator = Mediator::on(&place, "a", &[]);
    let mut machine = Machine::connect(&mediator, &Ram::new());
    let shim = mediator.socket("shim");
    machine.configure();
    machine.enable();
    let mut captured = 0;
    for turn in 0..turns.unwrap_or(20u32) {
        for on in [true, false] {
            let seed = turn as u8 ^ u8::from(on);
            let blocks: Vec<u32> = (0..6).map(|number| number * 16).collect();
            let mut waiting: Vec<_> = blocks
                .iter()
                .map(|block| {
                    let at = DATA + u64::from(*block) * 512;
                    machine.ram.put(at, &pattern(4096, seed ^ *block as u8));
                    machine.submit(1, 1, at, &[(1, 1), (10, *block), (12, 7)])
                })
                .collect();
            machine.ok(json!({"cmd": "capture", "on": on}));
            while !waiting.is_empty() {
                let (id, status) = machine.next(1);
                assert_eq!(status, 0);
                waiting.remove(waiting.iter().position(|known| *known == id).expect("told once"));
            }
            // Each doorbell that is told while it is on is noted.
            let page = machine.page.take();
            let id = machine.submit_silently(1, 2, DATA + 0x8_0000, &[(1, 1), (10, 16), (12, 7)]);
            if on {
                write_by_shim(&shim, 8, machine.tail(1));
                captured += 1;
            }
            machine.page = page;
            if !on {
                machine.ring(8, machine.tail(1));
            }
            assert_eq!(machine.wait(1, id), 0);
            assert_eq!(machine.ram.get(DATA + 0x8_0000, 4096), pattern(4096, seed ^ 16));
        }
    }
    assert_eq!(machine.counters()["doorbells_captured"], captured);
}

#[test]
fn how_pages_are_told_can_be_changed_while_it_is_captured() {
    let place = Place::new();
    let mediator = Mediator::on(&place, "a", &[]);
    let mut machine = Machine::connect(&mediator, &Ram::new());
    machine.configure();
    machine.enable();
    for (dirty, by_qemu, noted) in
        [("mediated", 512 + 16, 0), ("none", 0, 0), ("touch", 0, 2), ("mediated", 512 + 16, 0)]
    {
        machine.ok(json!({"cmd": "capture", "on": true, "dirty": dirty}));
        let before = machine.mediated;
        assert_eq!(machine.transfer(2, 0, 1, DATA), 0);
        assert_eq!(machine.mediated - before, by_qemu, "{dirty}");
        assert_eq!(machine.counters()["dirty_pages"], noted, "{dirty}");
    }
}

#[test]
fn a_doorbell_that_comes_by_the_shim_is_carried_out_and_counted() {
    let place = Place::new();
    let mediator = Mediator::on(&place, "a", &[]);
    let mut machine = Machine::connect(&mediator, &Ram::new());
    let shim = mediator.socket("shim");
    machine.configure();
    machine.enable();
    machine.ok(json!({"cmd": "capture", "on": true}));
    machine.ok(json!({"cmd": "round"}));
    let page = machine.page.take();
    // As if the guest's writes were trapped: by the shim, and not in the page.
    let id = machine.submit_silently(1, 2, DATA, &[(1, 1), (12, 0)]);
    write_by_shim(&shim, 8, machine.tail(1));
    assert_eq!(machine.wait_silently(1, id), 0);
    write_by_shim(&shim, 12, machine.head(1));
    let counters = machine.counters();
    assert_eq!(counters["doorbells_captured"], 2);
    let round = machine.ok(json!({"cmd": "round"}));
    assert_eq!(round["count"], 2, "{round}");
    // Nothing is behind a doorbell that does not exist.
    write_by_shim(&shim, 0xffc, 7);
    machine.page = page;
    assert_eq!(machine.transfer(2, 0, 1, DATA), 0);
}

#[test]
fn a_device_moves_with_a_command_that_nobody_has_taken() {
    let place = Place::new();
    let ram = Ram::new();
    let mut source = Mediator::on(&place, "a", &[]);
    let mut here = Machine::connect(&source, &ram);
    here.configure();
    here.enable();
    here.table = (0..48).collect();
    here.ram.put(DATA, &pattern(512, 3));
    assert_eq!(here.transfer(1, 5, 1, DATA), 0);
    here.ok(json!({"cmd": "capture", "on": true}));
    assert_eq!(here.transfer(2, 5, 1, DATA + 0x2000), 0);

    let target = Mediator::on(&place, "b", &["--incoming"]);
    let mut there = Machine::connect(&target, &ram);
    let told = there.ok(json!({"cmd": "status"}));
    assert_eq!((&told["state"], &told["owns_image"]), (&json!("incoming"), &json!(false)));
    assert_eq!(there.refused(json!({"cmd": "resume"})), "busy");
    // Early: configuration, in the order that the source says.
    let configuration = here.ok(json!({"cmd": "configuration"}));
    for write in configuration["before"].as_array().unwrap() {
        write_config(&mut there, write);
    }
    let table = &configuration["msix_table"];
    assert_eq!(table["address"], BAR + 0x2000);
    let request = json!({"cmd": "msix", "address": table["address"], "table": table["table"]});
    assert_eq!(there.ok(request)["written"], 48);
    assert_eq!(there.table, here.table);
    write_config(&mut there, &configuration["after"][0]);
    there.connect_vectors();
    assert_eq!(there.read(7, 0, 256), here.read(7, 0, 256));

    let round = here.ok(json!({"cmd": "round"}));
    let request = json!({"cmd": "replay", "writes": round["writes"]});
    assert_eq!(there.ok(request)["replayed"], round["count"]);
    // The guest stands still from here on; its last command was never looked at.
    here.ok(json!({"cmd": "quiesce"}));
    assert_eq!(here.ok(json!({"cmd": "quiesce"}))["drained"], 0);
    let id = here.submit(1, 2, DATA + 0x3000, &[(1, 1), (10, 5), (12, 0)]);
    here.ok(json!({"cmd": "touch"}));
    let held = here.counters()["interrupts_held"].as_u64().unwrap();
    assert_eq!(held, 0);
    let state = here.ok(json!({"cmd": "export"}))["state"].clone();
    let told = there.ok(json!({"cmd": "import", "state": state}));
    assert!(told["differing"].as_u64().unwrap() > 0, "{told}");
    // A round that the state has overtaken changes nothing: here one of a doorbell that is behind.
    let late = json!([{"offset": 0x1008, "size": 4, "value": 1}]).to_string();
    assert_eq!(there.ok(json!({"cmd": "replay", "writes": late}))["replayed"], 0);
    // Never two owners.
    assert_eq!(there.refused(json!({"cmd": "resume"})), "in-use");
    assert_eq!(here.ok(json!({"cmd": "release"}))["owns_image"], false);
    there.driver = here.driver;
    there.ok(json!({"cmd": "resume"}));
    assert_eq!(there.ok(json!({"cmd": "resume"}))["kicked"], 0);
    assert_eq!(here.refused(json!({"cmd": "resume"})), "in-use");
    assert_eq!(there.wait(1, id), 0);
    assert_eq!(there.ram.get(DATA + 0x3000, 512), pattern(512, 3));
    assert!(there.interrupts(1) > 0);
    assert_eq!(there.transfer(2, 5, 1, DATA + 0x5000), 0);
    drop(here);
    assert_eq!(source.wait(), 0);
}

fn write_config(machine: &mut Machine, write: &serde_json::Value) {
    let number = |at: usize| write[at].as_u64().unwrap();
    let value = number(2).to_le_bytes();
    machine.write(7, number(0), &value[..number(1) as usize]);
}

#[test]
fn a_move_that_is_given_up_leaves_the_device_where_it_was() {
    let place = Place::new();
    let mediator = Mediator::on(&place, "a", &[]);
    let mut machine = Machine::connect(&mediator, &Ram::new());
    assert_eq!(machine.ok(json!({"cmd": "capture", "on": false}))["on"], false);
    machine.configure();
    machine.enable();
    machine.ok(json!({"cmd": "capture", "on": true}));
    machine.ok(json!({"cmd": "capture", "on": true}));
    machine.ok(json!({"cmd": "quiesce"}));
    machine.ok(json!({"cmd": "export"}));
    machine.ok(json!({"cmd": "release"}));
    let id = machine.submit(1, 2, DATA, &[(1, 1), (12, 0)]);
    machine.ok(json!({"cmd": "resume"}));
    machine.ok(json!({"cmd": "capture", "on": false}));
    assert_eq!(machine.wait(1, id), 0);
    let told = machine.ok(json!({"cmd": "status"}));
    assert_eq!((&told["state"], &told["owns_image"]), (&json!("running"), &json!(true)));
}

#[test]
fn commands_that_do_not_fit_are_refused() {
    let place = Place::new();
    let mediator = Mediator::on(&place, "a", &[]);
    let mut machine = Machine::connect(&mediator, &Ram::new());
    for (request, kind) in [
        (json!({"cmd": "dance"}), "invalid"),
        (json!({"cmd": "capture"}), "invalid"),
        (json!({"cmd": "capture", "on": true, "dirty": "some"}), "invalid"),
        (json!({"cmd": "round"}), "busy"),
        (json!({"cmd": "replay", "writes": "[]"}), "busy"),
        (json!({"cmd": "export"}), "busy"),
        (json!({"cmd": "import", "state": "{}"}), "busy"),
        (json!({"cmd": "release"}), "busy"),
        (json!({"cmd": "claim", "epoch": 0, "claim": "x"}), "invalid"),
        (json!({"cmd": "msix", "address": 0, "table": "00"}), "invalid"),
        (json!({"cmd": "msix", "address": 0, "table": "00".repeat(48)}), "busy"),
        (json!([]), "invalid"),
    ] {
        assert_eq!(machine.refused(request.clone()), kind, "{request}");
    }
    let target = Mediator::on(&place, "b", &["--incoming"]);
    let mut there = Machine::connect(&target, &Ram::new());
    for (request, kind) in [
        (json!({"cmd": "import", "state": "{}"}), "invalid"),
        (json!({"cmd": "import"}), "invalid"),
        (
            json!({"cmd": "replay", "writes": "[{\"offset\":16384,\"size\":4,\"value\":0}]"}),
            "invalid",
        ),
        (json!({"cmd": "replay", "writes": "[{\"offset\":0,\"size\":3,\"value\":0}]"}), "invalid"),
        (json!({"cmd": "quiesce"}), "busy"),
    ] {
        assert_eq!(there.refused(request.clone()), kind, "{request}");
    }
}

#[test]
fn the_second_kind_of_device_moves_in_the_same_way() {
    let place = Place::new();
    let ram = Ram::new();
    let source = Mediator::start(&place, "a", &["--kind=edu"]);
    let mut here = Machine::connect(&source, &ram);
    here.configure_small();
    assert_eq!(here.read(0, 0, 4), [0xed, 0, 0, 1]);
    here.write(0, 8, &[5, 0, 0, 0]);
    assert_eq!(here.read(0, 8, 4), [120, 0, 0, 0]);
    here.ok(json!({"cmd": "capture", "on": true}));
    here.ram.put(DATA, &pattern(64, 7));
    here.copy(DATA, 0x40000, 64, 1);
    let target = Mediator::start(&place, "b", &["--kind=edu", "--incoming"]);
    let mut there = Machine::connect(&target, &ram);
    there.configure_small();
    let round = here.ok(json!({"cmd": "round"}));
    there.ok(json!({"cmd": "replay", "writes": round["writes"]}));
    here.ok(json!({"cmd": "quiesce"}));
    let state = here.ok(json!({"cmd": "export"}))["state"].clone();
    there.ok(json!({"cmd": "import", "state": state}));
    there.ok(json!({"cmd": "resume"}));
    assert_eq!(there.read(0, 8, 4), [120, 0, 0, 0]);
    there.copy(0x40000, DATA + 0x1000, 64, 3);
    assert_eq!(there.ram.get(DATA + 0x1000, 64), pattern(64, 7));
}
