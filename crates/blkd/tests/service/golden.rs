//! What the control socket tells looks as its readers expect: see `crates/control/golden`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use semper_control::golden::check;
use serde_json::{Value, json};

use crate::backend::{Backend, Site, run};
use crate::machine::{Ask, Machine, Waited};

const CLAIM: &str = "11111111111111111111111111111111";

/// Asks, and holds the whole line against the golden file.
fn ask(backend: &Backend, name: &str, request: Value) -> Value {
    let mut stream = UnixStream::connect(backend.control_path()).unwrap();
    writeln!(stream, "{request}").unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let answer: Value = serde_json::from_str(&line).unwrap();
    check(name, &answer);
    let mut bytes = vec![0; answer["ok"]["bytes"].as_u64().unwrap_or(0) as usize];
    reader.read_exact(&mut bytes).unwrap();
    answer
}

#[test]
fn a_status_is_complete_at_each_stage_of_a_backend() {
    let site = Site::new(1 << 20);
    let record = format!("--epoch-file={}.epoch", site.image.display());
    let claim = format!("--claim={CLAIM}");
    let title = [record.as_str(), "--epoch=7", &claim, "--holder=aachen"];
    let mut active = site.start(&[&title[..], &["--no-map"]].concat());
    active.wait_status("/standing", &json!("held"));
    let spare = site.start(&[&title[..], &["--spare", "--serial=web-root"]].concat());
    spare.wait_status("/standing", &json!("waiting"));
    let waiting = spare.wait_status("/state", &json!("spare"));
    assert!(waiting["timeline_ns"]["lock_acquired"].is_null());
    crate::backend::wait_until("a spare that is ready", || {
        spare.status()["timeline_ns"]["spare_ready"].as_u64()
    });
    let status = json!({"id": 1, "cmd": "status"});
    ask(&spare, "blkd-status-spare", status.clone());
    ask(&active, "blkd-status-without-map", status.clone());

    let mut machine = Machine::new(1, 64);
    active.kill();
    machine.connect(&site.socket()).unwrap();
    spare.wait_status("/standing", &json!("held"));
    spare.fault(json!({"op": "write", "errno": "ENOSPC", "limit": 1}));
    machine.submit(0, &Ask::write(8, vec![1; 4096]));
    machine.submit(0, &Ask::read(8, 4096));
    assert_eq!(machine.wait_all(&spare), Waited::Answered);
    ask(&spare, "blkd-status-active", status.clone());
    drop(spare);

    let elsewhere = site.start(&[&record, "--holder=aachen", "--await-claim", "--incoming"]);
    elsewhere.wait_status("/standing", &json!("awaiting-claim"));
    ask(&elsewhere, "blkd-status-incoming", status.clone());
    let claim = json!({"id": 1, "cmd": "claim", "epoch": 8, "claim": CLAIM});
    ask(&elsewhere, "blkd-claim", claim);
    drop(elsewhere);

    let plain = site.start(&["--read-only"]);
    plain.wait_status("/standing", &json!("held"));
    ask(&plain, "blkd-status-unclaimed", status);
}

#[test]
fn each_other_answer_is_complete() {
    let site = Site::new(1 << 20);
    let backend = site.start(&["--num-queues=2"]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::read(8, 4096)).status, 0);
    let request = |cmd: &str, key: &str, value: Value| json!({"id": 1, "cmd": cmd, key: value});

    let rule = json!({"op": "write", "errno": "EIO", "every": 2});
    ask(&backend, "blkd-fault", request("fault", "rule", rule));
    ask(&backend, "blkd-threads", request("threads", "map", json!([0, 1])));
    ask(&backend, "blkd-handover", request("handover", "armed", json!(false)));
    ask(&backend, "blkd-refused", request("dance", "with", json!("me")));

    ask(&backend, "blkd-map", request("map", "id", json!(1)));
    let found = ask(&backend, "blkd-map-find-sector", request("map-find", "sector", json!(8)));
    let address = &found["ok"]["addresses"][0];
    ask(&backend, "blkd-map-find-address", request("map-find", "address", address.clone()));
    let unknown = address.as_u64().unwrap() + 4096;
    let unknown = request("map-find", "address", json!(unknown));
    ask(&backend, "blkd-map-find-nothing", unknown);
    ask(&backend, "blkd-map-touch", request("map-touch", "runs", json!([[8, 2]])));
    ask(&backend, "blkd-map-blocks", request("map-blocks", "limit", json!(100)));
    ask(&backend, "blkd-map-export", request("map-export", "verify", json!(true)));
    ask(&backend, "blkd-map-verify", request("map-verify", "id", json!(1)));
    crate::backend::wait_until("the end of the verification", || {
        let map = backend.control(&json!({"id": 1, "cmd": "map"}))["ok"].clone();
        map["running"].is_null().then_some(())
    });
    ask(&backend, "blkd-map-verified", request("map", "id", json!(1)));
    assert_eq!(machine.config()[..8], 2048u64.to_le_bytes());
    ask(&backend, "blkd-resize", request("resize", "size_bytes", json!(2 << 20)));
}

#[test]
fn the_capabilities_are_complete() {
    let (_, said, _) = run(&["--print-capabilities"]);
    check("blkd-capabilities", &serde_json::from_str(&said).unwrap());
}
