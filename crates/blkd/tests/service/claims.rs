//! The image's record of claims: who may write is decided by the image, not by who asks.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use semper_epoch::{Record, read, record_path};
use serde_json::{Value, json};
use vhost::VhostBackend;

use crate::backend::{Backend, ENGINES, Site, blk_file, run};
use crate::machine::{Ask, Machine, Waited};

const FIRST: &str = "11111111111111111111111111111111";
const SECOND: &str = "22222222222222222222222222222222";

fn record_of(site: &Site) -> PathBuf {
    record_path(&site.image).unwrap()
}

fn present(site: &Site) -> Record {
    read(&record_of(site)).unwrap().unwrap()
}

/// The options of a claim.
fn title(site: &Site, epoch: u64, id: &str, holder: &str) -> Vec<String> {
    vec![
        format!("--epoch-file={}", record_of(site).display()),
        format!("--epoch={epoch}"),
        format!("--claim={id}"),
        format!("--holder={holder}"),
    ]
}

fn awaiting(site: &Site, holder: &str) -> Vec<String> {
    vec![
        format!("--epoch-file={}", record_of(site).display()),
        format!("--holder={holder}"),
        "--await-claim".to_owned(),
        "--incoming".to_owned(),
    ]
}

fn start(site: &Site, title: &[String], more: &[&str]) -> Backend {
    site.start(&title.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>())
}

/// Starts a backend that has to end by itself: its exit status and last line.
fn refused(site: &Site, title: &[String]) -> (Option<i32>, String) {
    let mut backend = start(site, title, &[]);
    let code = backend.wait_exit().code();
    (code, backend.log().lines().last().unwrap_or_default().to_owned())
}

fn serves(backend: &Backend) {
    backend.wait_status("/state", &json!("listening"));
}

fn give(backend: &Backend, epoch: u64, id: &str) -> Value {
    backend.control(&json!({"id": 1, "cmd": "claim", "epoch": epoch, "claim": id}))
}

#[test]
fn the_older_claim_is_refused_with_the_name_of_the_holder() {
    let site = Site::new(1 << 20);
    let newer = start(&site, &title(&site, 8, SECOND, "berlin"), &[]);
    serves(&newer);
    let shown = newer.status()["claim"].clone();
    let expected = json!({"state": "admitted", "epoch": 8, "id": SECOND, "holder": "berlin"});
    assert_eq!(shown, expected);
    drop(newer);
    let before = present(&site);
    let file = record_of(&site);
    for (epoch, id, why) in [(7, FIRST, "epoch 7;"), (8, FIRST, "epoch 8 and another id;")] {
        let (code, said) = refused(&site, &title(&site, epoch, id, "aachen"));
        assert_eq!(code, Some(3), "{said}");
        let words = format!(
            "{} is held by berlin under epoch 8; the claim of aachen has {why}",
            file.display()
        );
        assert!(said.contains(&words), "{said}");
    }
    assert_eq!(present(&site), before);
    // Refused ones have let the image go, and what comes later is admitted.
    serves(&start(&site, &title(&site, 9, FIRST, "aachen"), &[]));
    assert_eq!(present(&site).epoch, 9);
}

#[test]
fn a_crash_keeps_the_claim_and_an_orderly_end_releases_it() {
    let site = Site::new(1 << 20);
    let mine = title(&site, 7, FIRST, "aachen");
    for _ in 0..3 {
        let mut backend = start(&site, &mine, &[]);
        serves(&backend);
        assert!(!present(&site).released);
        backend.kill();
        let (code, said) = refused(&site, &[]);
        assert_eq!(code, Some(3));
        assert!(said.contains("is held by aachen under epoch 7, and no claim was given"), "{said}");
    }
    // One that only reads has no claim and needs none.
    serves(&site.start(&["--read-only"]));
    let mut backend = start(&site, &mine, &[]);
    serves(&backend);
    assert_eq!(backend.terminate().code(), Some(0));
    assert!(present(&site).released);
    let by_hand = site.start(&[]);
    serves(&by_hand);
    assert_eq!(by_hand.status()["claim"]["state"], json!("none"));
    drop(by_hand);
    // Released is not forgotten.
    let (code, said) = refused(&site, &title(&site, 6, SECOND, "berlin"));
    assert_eq!(code, Some(3), "{said}");
}

#[test]
fn a_spare_holds_its_claim_against_the_record_when_it_gets_the_image() {
    let site = Site::new(1 << 20);
    let mine = title(&site, 7, FIRST, "aachen");
    let mut active = start(&site, &mine, &[]);
    serves(&active);
    for killed in [true, false] {
        let spare = start(&site, &mine, &["--spare"]);
        spare.wait_status("/state", &json!("spare"));
        assert_eq!(spare.status()["claim"]["state"], json!("given"));
        if killed {
            active.kill()
        } else {
            _ = active.terminate()
        }
        serves(&spare);
        assert_eq!(spare.status()["claim"]["state"], json!("admitted"));
        assert!(!present(&site).released);
        active = spare;
    }
    // The image is given away while a spare waits: it must not take over.
    let mut spare = start(&site, &mine, &["--spare"]);
    spare.wait_status("/state", &json!("spare"));
    let (claim, holder) = (semper_epoch::Id([0x22; 16]), semper_epoch::Holder::new("berlin"));
    let claim = semper_epoch::Claim { epoch: 8, id: claim };
    semper_epoch::admit(&record_of(&site), claim, &holder.unwrap()).unwrap();
    // Its end must not touch what is another's now.
    assert_eq!(active.terminate().code(), Some(0));
    assert_eq!(spare.wait_exit().code(), Some(3));
    assert!(spare.log().contains("is held by berlin under epoch 8"), "{}", spare.log());
    assert_eq!((present(&site).epoch, present(&site).released), (8, false));
}

#[test]
fn what_is_started_before_the_claim_waits_for_it_and_the_front_end_does_not() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let source = start(&site, &title(&site, 7, FIRST, "aachen"), &[engine]);
        let mut here = Machine::new(1, 64);
        here.connect(&site.socket()).unwrap();
        assert_eq!(here.ask(&source, &Ask::write(0, [7; 4096])).status, 0);

        let far = Site::sharing(&site.image);
        let target = start(&far, &awaiting(&far, "berlin"), &[engine, "--num-queues=2"]);
        let mut there = Machine::new(2, 64);
        there.connect(&far.socket()).unwrap();
        let asked = [0, 1].map(|queue| there.submit(queue, &Ask::read(0, 4096)));
        assert_eq!(target.status()["claim"]["state"], json!("awaited"));
        // Messages that wait for an answer get one; a queue may be stopped and started again.
        there.config();
        assert_eq!(there.session().get_vring_base(1).unwrap(), 0);
        there.start(1).unwrap();
        for nonsense in [
            json!({"id": 1, "cmd": "claim"}),
            json!({"id": 1, "cmd": "claim", "epoch": 0, "claim": SECOND}),
            json!({"id": 1, "cmd": "claim", "epoch": 8, "claim": "2"}),
        ] {
            assert_eq!(target.control(&nonsense)["error"]["kind"], json!("invalid"));
        }
        // The other end has the image still: said, and nothing is lost by it.
        let early = give(&target, 8, SECOND);
        assert_eq!(early["error"]["kind"], json!("in-use"), "{early}");
        assert_eq!(target.status()["owns_image"], json!(false));
        assert_eq!(present(&site).epoch, 7);

        here.session().get_vring_base(0).unwrap();
        source.control(&json!({"id": 1, "cmd": "handover", "armed": true}));
        assert_eq!(source.status()["claim"]["state"], json!("given"));
        let taken = give(&target, 8, SECOND);
        assert_eq!(taken["ok"]["claim"]["state"], json!("admitted"), "{taken}");
        assert_eq!(there.wait_all(&target), Waited::Answered);
        for ticket in asked {
            assert_eq!(there.answer(ticket).data, [7; 4096]);
        }
        assert_eq!(give(&target, 8, SECOND)["ok"]["claim"]["epoch"], json!(8));
        assert_eq!(give(&target, 9, SECOND)["error"]["kind"], json!("invalid"));
        assert_eq!((present(&site).epoch, present(&site).released), (8, false));

        // The source is late: it gets the lock, and the image refuses it.
        drop(target);
        let mut source = source;
        here.start(0).unwrap();
        let mut control = UnixStream::connect(source.control_path()).unwrap();
        writeln!(control, "{}", json!({"id": 2, "cmd": "handover", "armed": false})).unwrap();
        assert_eq!(source.wait_exit().code(), Some(3));
        assert!(source.log().contains("is held by berlin under epoch 8"), "{}", source.log());
    }
}

#[test]
fn a_claim_that_comes_first_is_held_against_the_record_when_a_queue_starts() {
    let site = Site::new(1 << 20);
    let mut target = start(&site, &awaiting(&site, "berlin"), &[]);
    assert_eq!(give(&target, 8, SECOND)["ok"]["claim"]["state"], json!("given"));
    // The file is there, since the process can make none any more; nothing stands in it.
    assert_eq!(read(&record_of(&site)).unwrap(), None);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&target, &Ask::write(0, [1; 512])).status, 0);
    assert_eq!(target.status()["claim"]["state"], json!("admitted"));
    target.kill();
    machine.disconnect();
    // Whoever ends without a claim leaves the record alone.
    let mut idle = start(&site, &awaiting(&site, "chemnitz"), &[]);
    idle.wait_status("/state", &json!("listening"));
    assert_eq!(idle.terminate().code(), Some(0));
    assert_eq!((present(&site).epoch, present(&site).released), (8, false));
    // And a stale one ends instead of serving.
    let mut late = start(&site, &awaiting(&site, "chemnitz"), &[]);
    give(&late, 5, FIRST);
    assert!(machine.connect(&site.socket()).is_err(), "it ends instead of answering");
    assert_eq!(late.wait_exit().code(), Some(3));
    let other = Site::new(1 << 20);
    let plain = other.start(&[]);
    assert_eq!(give(&plain, 8, SECOND)["error"]["kind"], json!("invalid"));
}

#[test]
fn a_record_that_cannot_be_read_refuses_the_image() {
    let site = Site::new(1 << 20);
    let (mine, file) = (title(&site, 9, FIRST, "aachen"), record_of(&site));
    for (content, words) in [(&b"SVEPOCH1 and no more"[..], "is damaged"), (&newer(), "version 3")]
    {
        std::fs::write(&file, content).unwrap();
        for options in [&mine[..], &[]] {
            let (code, said) = refused(&site, options);
            assert_eq!(code, Some(3), "{said}");
            assert!(said.contains(words) && said.contains(file.to_str().unwrap()), "{said}");
        }
        assert_eq!(std::fs::read(&file).unwrap(), content);
    }
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    let (code, said) = refused(&site, &mine);
    assert_eq!(code, Some(4), "{said}");
    std::fs::remove_dir(&file).unwrap();
    serves(&start(&site, &mine, &[]));
}

/// A slot of version 2, as Python's zlib sums it.
fn newer() -> Vec<u8> {
    let mut slot = vec![0; 512];
    slot[..9].copy_from_slice(b"SVEPOCH1\x03");
    slot[16] = 1;
    slot[12..16].copy_from_slice(&0xe692_b53fu32.to_le_bytes());
    slot
}

#[test]
fn options_that_do_not_belong_together_are_refused() {
    let site = Site::new(1 << 20);
    let (image, all) = (blk_file(&site.image), title(&site, 7, FIRST, "aachen"));
    let socket = format!("--socket-path={}", site.path("other.sock").display());
    let wrong = |options: &[&str]| {
        let arguments: Vec<&str> =
            [socket.as_str(), &image].iter().chain(options).copied().collect();
        let (code, _, said) = run(&arguments);
        assert_eq!(code, 2, "{options:?}: {said}");
    };
    for left_out in 0..all.len() {
        let mut some: Vec<&str> = all.iter().map(String::as_str).collect();
        some.remove(left_out);
        wrong(&some);
    }
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    wrong(&[&all[..], &["--read-only"]].concat());
    wrong(&[&all[..], &["--await-claim", "--incoming", "--control-socket=c"]].concat());
    wrong(&[all[0], all[3], "--await-claim", "--control-socket=c"]);
    wrong(&[all[0], all[3], "--await-claim", "--incoming"]);
    wrong(&[all[0], "--epoch=0", all[2], all[3]]);
    wrong(&[all[0], all[1], "--claim=11", all[3]]);
    wrong(&[all[0], all[1], all[2], "--holder="]);
}
