//! What the program tells, against its golden files.

use semper_control::golden::check;
use serde_json::{Value, json};

use crate::machine::{DATA, Machine, Mediator, Place, Ram, run};

#[test]
fn every_answer_looks_like_its_golden_file() {
    let place = Place::new();
    let ram = Ram::new();
    let mediator = Mediator::on(&place, "a", &[]);
    let mut machine = Machine::connect(&mediator, &ram);
    let held = |machine: &mut Machine, name: &str, request: Value| {
        let mut request = request;
        request["id"] = json!(1);
        let answer = machine.control(request);
        check(name, &answer);
        answer["ok"].clone()
    };
    held(&mut machine, "vfiod-configuration-early", json!({"cmd": "configuration"}));
    held(&mut machine, "vfiod-status", json!({"cmd": "status"}));
    machine.configure();
    machine.enable();
    // An access that is refused is what is told last.
    let refused = machine.ask(semper_vfiod::message::Command::RegionRead, &[0xff; 16], None);
    assert!(refused.is_err());
    held(&mut machine, "vfiod-status-refused", json!({"cmd": "status"}));
    held(&mut machine, "vfiod-capture", json!({"cmd": "capture", "on": true}));
    let found = held(&mut machine, "vfiod-configuration", json!({"cmd": "configuration"}));
    let table = &found["msix_table"];
    let msix = json!({"cmd": "msix", "address": table["address"], "table": table["table"]});
    held(&mut machine, "vfiod-msix", msix);
    let round = held(&mut machine, "vfiod-round", json!({"cmd": "round"}));
    assert_eq!(machine.transfer(2, 0, 1, DATA), 0);
    held(&mut machine, "vfiod-quiesce", json!({"cmd": "quiesce"}));
    held(&mut machine, "vfiod-touch", json!({"cmd": "touch"}));
    let state = held(&mut machine, "vfiod-export", json!({"cmd": "export"}))["state"].clone();
    held(&mut machine, "vfiod-release", json!({"cmd": "release"}));
    held(&mut machine, "vfiod-refused", json!({"cmd": "dance"}));

    let record = place.path("image.epoch");
    let options = [
        "--incoming",
        "--await-claim",
        &format!("--epoch-file={}", record.display()),
        "--holder=berlin",
    ];
    let target = Mediator::on(&place, "b", &options);
    let mut there = Machine::connect(&target, &ram);
    held(&mut there, "vfiod-replay", json!({"cmd": "replay", "writes": round["writes"]}));
    held(&mut there, "vfiod-import", json!({"cmd": "import", "state": state}));
    assert_eq!(there.refused(json!({"cmd": "resume"})), "busy");
    let claim = json!({"cmd": "claim", "epoch": 8, "claim": "5f0c9a417e2b4d3c8f6a1b0e92d7c4f8"});
    held(&mut there, "vfiod-claim", claim);
    held(&mut there, "vfiod-resume", json!({"cmd": "resume"}));
    held(&mut there, "vfiod-status-claimed", json!({"cmd": "status"}));

    let small = Mediator::start(&place, "c", &["--kind=edu"]);
    let mut edu = Machine::connect(&small, &ram);
    held(&mut edu, "vfiod-status-without-image", json!({"cmd": "status"}));
    let told: Value = serde_json::from_str(&run(&["--print-capabilities"]).1).unwrap();
    check("vfiod-capabilities", &told);
}
