//! Dirty logging: every page that the device writes is in the log, whatever happens meanwhile, and
//! none besides. (What reads the log is QEMU; a migration of a real guest is tested elsewhere.)

use std::collections::BTreeSet;

use crate::backend::{ENGINES, Site};
use crate::machine::{Ask, Machine, T_DISCARD, Ticket, Waited};

/// Asks for everything that a device answers.
fn asks() -> Vec<Ask> {
    vec![
        Ask::read(0, 512),
        Ask::read(8, 8192),
        Ask::write(64, vec![7; 8192]),
        Ask::flush(),
        Ask::get_id(),
        Ask::trim(T_DISCARD, 128, 8, 0),
        Ask { kind: 77, ..Ask::read(0, 512) },
        Ask::read(1 << 30, 4096),
    ]
}

/// Prepares all of them; gives the pages that the device may write for them.
fn prepare(machine: &mut Machine) -> (Vec<Ticket>, BTreeSet<u64>) {
    let mut pages = machine.used_pages(0);
    let mut tickets = Vec::new();
    for ask in asks() {
        let head = machine.next_head(0);
        // What is refused is not written to.
        let refused = ask.kind == 77 || ask.sector == 1 << 30;
        let written = if refused { Ask { room: 0, ..ask.clone() } } else { ask.clone() };
        pages.extend(machine.writes_of(0, head, &written));
        tickets.push(machine.prepare(0, &ask));
    }
    (tickets, pages)
}

#[test]
fn the_log_has_the_pages_that_were_written_and_no_others() {
    for (&engine, pieces) in ENGINES.iter().zip([1, 3, 5, 7]) {
        let site = Site::new(1 << 20);
        let backend = site.start(&[engine]);
        let mut machine = Machine::new(1, 64);
        machine.pieces = pieces;
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.ask(&backend, &Ask::read(0, 4096)).status, 0);
        machine.set_logging(true);
        let (_, expected) = prepare(&mut machine);
        machine.show(0);
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        machine.disconnect();
        assert_eq!(machine.logged(), expected, "{engine}");
    }
}

#[test]
fn with_direct_io_and_buffers_that_do_not_suit_it() {
    for engine in ["--engine=sync", "--engine=uring"] {
        let site = Site::new(1 << 20);
        let backend = site.start(&[engine, "--direct"]);
        let mut machine = Machine::new(1, 64);
        machine.pieces = 3;
        machine.connect(&site.socket()).unwrap();
        machine.set_logging(true);
        let ask = Ask::read(8, 8192);
        let mut expected = machine.writes_of(0, machine.next_head(0), &ask);
        expected.extend(machine.used_pages(0));
        assert_eq!(machine.ask(&backend, &ask).status, 0);
        machine.disconnect();
        assert_eq!(machine.logged(), expected, "{engine}");
    }
}

#[test]
fn what_is_switched_off_logs_nothing() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    machine.set_logging(true);
    // The front end's own copy of the bitmap's descriptor outlives the switch.
    let before = machine.logged();
    machine.set_logging(false);
    assert_eq!(machine.ask(&backend, &Ask::read(0, 4096)).status, 0);
    machine.set_logging(true);
    assert_eq!(machine.logged(), before, "a fresh log has the used ring only");
}

#[test]
fn a_process_that_dies_leaves_no_page_out() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let mut backend = site.start(&[engine]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        machine.set_logging(true);
        let mut expected = machine.used_pages(0);
        for _ in 0..20 {
            let (_, pages) = prepare(&mut machine);
            expected.extend(pages);
            machine.show(0);
            // Some are answered, some are under way.
            machine.wait_for_pending(6, &backend);
            backend.kill();
            backend = site.start(&[engine]);
            machine.disconnect();
            machine.connect(&site.socket()).unwrap();
            assert_eq!(machine.wait_all(&backend), Waited::Answered);
        }
        machine.disconnect();
        assert_eq!(machine.logged(), expected, "{engine}");
    }
}
