//! The guest runs before its memory is there: what is missing is waited for, by whichever engine
//! touches it, and is never taken for zeros.

use std::os::unix::fs::FileExt;

use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::backend::{Backend, ENGINES, Site};
use crate::machine::{Ask, Machine, Waited};

const OURS: [u8; 4096] = [0x5a; 4096];
const OLD: [u8; 4096] = [0x11; 4096];

fn content(site: &Site) -> [u8; 4096] {
    let mut content = [0; 4096];
    std::fs::File::open(&site.image).unwrap().read_exact_at(&mut content, 0).unwrap();
    content
}

/// A disk with old data, behind a machine that offers a write of new data; the page with that data
/// is missing.
fn write_from_a_missing_page(site: &Site, engine: &str, listen: bool) -> (Backend, Machine, u16) {
    let image = std::fs::OpenOptions::new().write(true).open(&site.image).unwrap();
    image.write_all_at(&OLD, 0).unwrap();
    let backend = site.start(&[engine, "--incoming"]);
    let mut machine = Machine::new(1, 64);
    machine.listen = listen;
    let head = machine.next_head(0);
    machine.submit(0, &Ask::write(0, OURS));
    machine.take_page(0, head);
    machine.connect(&site.socket()).unwrap();
    (backend, machine, head)
}

fn sites() -> [Site; 2] {
    [Site::new(1 << 20), Site::on_tmpfs(1 << 20)]
}

#[test]
fn a_missing_page_is_waited_for() {
    for (&engine, site) in ENGINES.iter().flat_map(|engine| sites().map(|site| (engine, site))) {
        let (backend, mut machine, head) = write_from_a_missing_page(&site, engine, true);
        machine.wait_fault(0, head);
        assert_eq!(backend.status()["memory"], json!("listening"));
        machine.reap();
        assert_eq!((machine.pending(), content(&site)), (1, OLD), "{engine}");
        let refused = backend.control(&json!({"id": 1, "cmd": "map-verify"}));
        assert_eq!(refused["error"]["kind"], json!("busy"), "{refused}");
        machine.end_fault(0, head, &OURS);
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        assert_eq!(content(&site), OURS, "{engine}");

        // And one that the device writes.
        let head = machine.next_head(0);
        let ticket = machine.submit(0, &Ask::read(0, 4096));
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        assert_eq!(machine.answer(ticket).data, OURS);
        let ticket = machine.prepare(0, &Ask::read(0, 4096));
        machine.take_page(0, head);
        machine.show(0);
        machine.wait_fault(0, head);
        machine.end_fault(0, head, &OLD);
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        assert_eq!(machine.answer(ticket).data, OURS, "{engine}");

        // In the end nobody serves faults any more, and there are none.
        machine.session().postcopy_end().unwrap();
        assert_eq!(backend.status()["memory"], json!("complete"));
        let head = machine.next_head(0);
        machine.prepare(0, &Ask::write(0, OURS));
        machine.take_page(0, head);
        machine.show(0);
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        assert_eq!(content(&site), [0; 4096]);
    }
}

/// The control to all of the others: they would see the damage.
#[test]
fn without_a_postcopy_a_missing_page_is_zeros() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let (backend, mut machine, _) = write_from_a_missing_page(&site, engine, false);
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        assert_eq!(content(&site), [0; 4096]);
    }
}

#[test]
fn the_next_process_serves_nothing_before_the_memory_is_there() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let (mut backend, mut machine, head) = write_from_a_missing_page(&site, engine, true);
        machine.wait_fault(0, head);
        backend.kill();
        machine.disconnect();
        machine.listen = false;
        let backend = site.start(&[engine]);
        machine.connect(&site.socket()).unwrap();
        assert_eq!(backend.status()["memory"], json!("inherited"));
        // Neither a guest that resets the device nor a further process changes that.
        let shape = machine.inflight().unwrap().0;
        drop(machine.session().get_inflight_fd(&shape).unwrap());
        machine.disconnect();
        machine.connect(&site.socket()).unwrap();
        assert_eq!(backend.status()["memory"], json!("inherited"));
        machine.place_page(0, head, &OURS);
        machine.kick(0);
        machine.config();
        machine.reap();
        assert_eq!((machine.pending(), content(&site)), (1, OLD));
        machine.session().postcopy_end().unwrap();
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        assert_eq!((backend.status()["memory"].clone(), content(&site)), (json!("complete"), OURS));
        // The note is gone.
        machine.disconnect();
        machine.connect(&site.socket()).unwrap();
        assert_eq!(backend.status()["memory"], json!("complete"));
    }
}

#[test]
fn the_next_process_sees_that_the_memory_is_there_if_nobody_says_so() {
    let site = Site::new(1 << 20);
    let (mut backend, mut machine, head) = write_from_a_missing_page(&site, "--engine=sync", true);
    machine.wait_fault(0, head);
    backend.kill();
    machine.disconnect();
    machine.listen = false;
    let backend = site.start(&[]);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(backend.status()["memory"], json!("inherited"));
    machine.place_page(0, head, &OURS);
    machine.place_all();
    assert_eq!(machine.wait_all(&backend), Waited::Answered);
    assert_eq!((backend.status()["memory"].clone(), content(&site)), (json!("complete"), OURS));
    // The front end was only slow.
    machine.session().postcopy_end().unwrap();
    machine.config();
}

#[test]
fn a_front_end_that_goes_takes_the_process_with_it_and_no_zeros_reach_the_disk() {
    for (&engine, site) in ENGINES.iter().flat_map(|engine| sites().map(|site| (engine, site))) {
        let (mut backend, mut machine, head) = write_from_a_missing_page(&site, engine, true);
        machine.wait_fault(0, head);
        machine.disconnect();
        assert_eq!(backend.wait_exit().code(), Some(1));
        assert!(backend.log().contains("while the guest's memory arrives"), "{}", backend.log());
        assert_eq!(content(&site), OLD, "{engine}");
    }
}

#[test]
fn what_could_not_be_kept_is_not_offered() {
    let site = Site::new(1 << 20);
    for (options, expected) in
        [(&["--incoming"][..], true), (&["--incoming", "--no-inflight"], false)]
    {
        let _backend = site.start(options);
        let mut machine = Machine::new(1, 64);
        machine.negotiate(&site.socket()).unwrap();
        let offered = machine.session().get_protocol_features().unwrap();
        assert_eq!(offered.contains(VhostUserProtocolFeatures::PAGEFAULT), expected);
        // Memory that was in use before cannot be told from what has arrived.
        if expected {
            machine.session().postcopy_advise().unwrap();
            assert!(machine.session().postcopy_listen().is_err());
        }
    }
}

#[test]
fn a_process_that_no_memory_arrives_at_begins_no_postcopy() {
    let site = Site::new(1 << 20);
    let _backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.negotiate(&site.socket()).unwrap();
    // It may inherit one, and is told its end.
    let offered = machine.session().get_protocol_features().unwrap();
    assert!(offered.contains(VhostUserProtocolFeatures::PAGEFAULT));
    assert!(machine.session().postcopy_advise().is_err());
}
