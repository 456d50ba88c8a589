//! What goes wrong around the layers of a disk that is served: the guest goes on where it can, and whoever
//! asked hears the cause and the remedy.

use std::fs;
use std::path::{Path, PathBuf};

use semper_testbed::LoopDevice;
use serde_json::{Value, json};

use crate::backend::{Backend, ENGINES, Site, wait_until};
use crate::errors::SmallTmpfs;
use crate::layer_cuts::Stage;
use crate::layer_kills::{read_snapshot, start};
use crate::machine::{Ask, Machine};
use crate::snapshots::snapshot;
use crate::writers::{QUEUES, SECTOR, SECTORS};

const OK: u8 = 0;
const IOERR: u8 = 1;
const DISK: u64 = SECTORS * SECTOR as u64;
const PIECE: usize = 8192;

fn command(backend: &Backend, cmd: &str) -> Value {
    backend.control(&json!({"id": 1, "cmd": cmd, "wait": true}))
}

fn refusal(told: &Value) -> (&str, &str) {
    let error = &told["error"];
    (error["kind"].as_str().unwrap_or_default(), error["message"].as_str().unwrap_or_default())
}

fn write(machine: &mut Machine, backend: &Backend, piece: u64, value: u8) -> u8 {
    let ask = Ask::write(piece * (PIECE / 512) as u64, vec![value; PIECE]);
    machine.ask(backend, &ask).status
}

fn read(machine: &mut Machine, backend: &Backend, piece: u64) -> Vec<u8> {
    machine.ask(backend, &Ask::read(piece * (PIECE / 512) as u64, PIECE)).data
}

fn connected(site: &Site, engine: &str) -> (Backend, Machine) {
    let backend = start(site, engine, &[], &[], &[]);
    backend.wait_status("/state", &json!("listening"));
    let mut machine = Machine::new(QUEUES, 64);
    machine.connect(&site.socket()).unwrap();
    (backend, machine)
}

#[test]
fn a_full_medium_fails_what_needs_room_and_nothing_else() {
    for engine in ENGINES {
        let dir = tempfile::Builder::new().prefix("full").tempdir_in("/tmp").unwrap();
        let small = SmallTmpfs::mount(&dir.path().join("small"), 2);
        let image = small.0.join("disk.raw");
        fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let filler = small.0.join("filler");
        fs::write(&filler, vec![0; 1 << 20]).unwrap();
        let site = Site::on(dir, image);
        let (mut backend, mut machine) = connected(&site, engine);
        for piece in 0..32 {
            assert_eq!(write(&mut machine, &backend, piece, 1), OK);
        }
        let kept = snapshot(&backend);
        let full = (32..512).find(|piece| write(&mut machine, &backend, *piece, 2) == IOERR);
        let full = full.unwrap_or_else(|| panic!("{engine}: 4 MiB went into 2"));
        assert_eq!(backend.status()["last_error"]["errno"], json!(libc::ENOSPC), "{engine}");

        // What is there is read and rewritten, and a snapshot that needs room is refused.
        assert_eq!(read(&mut machine, &backend, 31), [1; PIECE], "{engine}");
        assert_eq!(read(&mut machine, &backend, full - 1), [2; PIECE], "{engine}");
        assert_eq!(write(&mut machine, &backend, full - 1, 3), OK, "{engine}");
        let told = command(&backend, "snapshot");
        if told["error"].is_object() {
            let (kind, message) = refusal(&told);
            let named = message.contains("No space left") && message.contains("check the storage");
            assert!(kind == "failed" && named, "{engine}: {message}");
        }
        assert_eq!(read(&mut machine, &backend, full - 1), [3; PIECE], "{engine}");

        // Room that is made heals it.
        fs::remove_file(&filler).unwrap();
        assert_eq!(write(&mut machine, &backend, full, 4), OK, "{engine}");
        let last = snapshot(&backend);
        let merge = json!({"id": 1, "cmd": "merge", "through": last});
        assert!(last > kept && backend.control(&merge)["ok"].is_object(), "{engine}");
        wait_until("one layer", || {
            let told = backend.control(&json!({"id": 1, "cmd": "layers"}))["ok"].clone();
            (told["layers"].as_array().unwrap().len() == 1 && told["task"].is_null()).then_some(())
        });
        let told = [(31, 1), (full - 1, 3), (full, 4)];
        for (piece, value) in told {
            assert_eq!(read(&mut machine, &backend, piece), [value; PIECE], "{engine}: {piece}");
        }
        assert!(backend.is_alive());
        machine.disconnect();
        drop(backend);
        drop(site);
        drop(small);
    }
}

#[test]
fn a_medium_that_fails_is_told_and_its_guest_reads_on() {
    for engine in ENGINES {
        let stage = Stage::new();
        let site = stage.site();
        let (mut backend, mut machine) = connected(&site, engine);
        assert_eq!(write(&mut machine, &backend, 1, 1), OK);
        snapshot(&backend);
        assert_eq!(write(&mut machine, &backend, 2, 2), OK);
        assert_eq!(machine.ask(&backend, &Ask::flush()).status, OK);

        stage.lossy.fail_writes(true);
        // Into the page cache, or not; its flush says what became of it.
        write(&mut machine, &backend, 3, 3);
        assert_eq!(machine.ask(&backend, &Ask::flush()).status, IOERR, "{engine}");
        let told = command(&backend, "snapshot");
        let (kind, message) = refusal(&told);
        let causes = ["Input/output error", "Read-only file system"];
        let named = causes.iter().any(|cause| message.contains(cause));
        assert!(kind == "failed" && named, "{engine}: {told}");
        assert!(message.contains("check the storage"), "{engine}: {message}");
        for piece in 1..3 {
            let got = read(&mut machine, &backend, piece);
            assert_eq!(got, [piece as u8; PIECE], "{engine}: {piece}");
        }
        assert!(backend.is_alive());
        // For the end of the file system.
        stage.lossy.fail_writes(false);
    }
}

/// Each start of a VM, and each move, is under an epoch of its own, and so has a layer of its own.
#[test]
fn a_chain_does_not_grow_with_epochs_while_a_snapshot_is_kept() {
    let site = Site::new(DISK);
    let record = site.image.with_extension("raw.epoch");
    let options = |epoch: u64| {
        vec![
            format!("--epoch-file={}", record.display()),
            format!("--epoch={epoch}"),
            format!("--claim={epoch:032x}"),
            "--holder=bonn".to_owned(),
        ]
    };
    let mut values = [0; 24];
    let mut kept = (0, Vec::new());
    for epoch in 1..=24u8 {
        let engine = ENGINES[usize::from(epoch) % ENGINES.len()];
        let mut backend = start(&site, engine, &options(epoch.into()), &[], &[]);
        backend.wait_status("/state", &json!("listening"));
        let mut machine = Machine::new(QUEUES, 64);
        machine.connect(&site.socket()).unwrap();
        for piece in [usize::from(epoch) % 24, usize::from(epoch) * 7 % 24] {
            assert_eq!(write(&mut machine, &backend, piece as u64, epoch), OK);
            values[piece] = epoch;
        }
        if epoch == 2 {
            kept = (snapshot(&backend), values.to_vec());
            assert_eq!(write(&mut machine, &backend, 0, epoch), OK);
            values[0] = epoch;
        }
        wait_until("a chain of two", || {
            let told = backend.control(&json!({"id": 1, "cmd": "layers"}))["ok"].clone();
            assert!(told["last_error"].is_null(), "{told}");
            let layers = told["layers"].as_array().unwrap().len();
            (layers <= 2 && told["task"].is_null()).then_some(())
        });
        for (piece, value) in values.iter().enumerate() {
            let got = read(&mut machine, &backend, piece as u64);
            assert_eq!(got, [*value; PIECE], "{engine}: {piece} under epoch {epoch}");
        }
        machine.disconnect();
        assert!(backend.terminate().success(), "{}", backend.log());
    }
    let (id, values) = kept;
    let got = read_snapshot(&site.image, "--engine=sync", id);
    for (piece, value) in values.iter().enumerate() {
        assert!(got[piece * PIECE..][..PIECE] == [*value; PIECE], "{piece} of the snapshot");
    }
}

#[test]
fn the_layer_of_another_image_is_not_taken_for_ours() {
    let layer = |image: &Path| {
        let mut path = fs::canonicalize(image).unwrap().into_os_string();
        path.push(".layers/0-1");
        PathBuf::from(path)
    };
    let sites = [Site::new(DISK), Site::new(DISK)];
    for (site, value) in sites.iter().zip(1..) {
        let (mut backend, mut machine) = connected(site, "--engine=sync");
        snapshot(&backend);
        assert_eq!(write(&mut machine, &backend, 1, value), OK);
        machine.disconnect();
        assert!(backend.terminate().success());
    }
    let [ours, others] = &sites;
    fs::copy(layer(&others.image), layer(&ours.image)).unwrap();
    let mut backend = start(ours, "--engine=sync", &[], &[], &[]);
    assert_eq!(backend.wait_exit().code(), Some(4));
    let said = backend.log();
    assert!(said.contains("is another's") && said.contains("put the right one back"), "{said}");
}

#[test]
fn a_block_device_has_its_own_snapshots() {
    let dir = tempfile::Builder::new().prefix("block").tempdir_in("/tmp").unwrap();
    let file = dir.path().join("file");
    fs::File::create(&file).unwrap().set_len(DISK).unwrap();
    let device = LoopDevice::new(&file, 512);
    let site = Site::on(dir, device.node.clone());
    let (backend, mut machine) = connected(&site, "--engine=sync");
    let told = command(&backend, "snapshot");
    let (kind, message) = refusal(&told);
    assert!(kind == "invalid" && message.contains("LVM, ZFS, RBD"), "{told}");
    assert_eq!(write(&mut machine, &backend, 1, 1), OK);
    machine.disconnect();
    drop(backend);
}
