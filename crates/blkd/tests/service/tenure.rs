//! What a process found out about its image before it had the image may be wrong when it takes it:
//! the size, what its name leads to, the file beside it.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vhost::VhostBackend;

use crate::backend::{Backend, ENGINES, Site};
use crate::machine::{Ask, Machine};

const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;

fn resize(image: &Path, size: u64) {
    OpenOptions::new().write(true).open(image).unwrap().set_len(size).unwrap();
}

/// An active process, and a spare that waits for it.
fn two(site: &Site, options: &[&str]) -> (Backend, Backend) {
    let active = site.start(options);
    active.wait_status("/standing", &json!("held"));
    (active, spare(site, options))
}

fn spare(site: &Site, options: &[&str]) -> Backend {
    let spare = site.start(&[options, &["--spare"]].concat());
    spare.wait_status("/standing", &json!("waiting"));
    spare.wait_status("/state", &json!("spare"));
    spare
}

/// Bytes of the disk, as the guest is told.
fn capacity(machine: &mut Machine) -> u64 {
    u64::from_le_bytes(machine.config()[..8].try_into().unwrap()) * 512
}

fn last_error(backend: &Backend) -> Value {
    backend.status()["last_error"].clone()
}

/// A block in the last page of a disk of this size can be written and read.
fn serves_end(machine: &mut Machine, backend: &Backend, size: u64) {
    assert_eq!(capacity(machine), size);
    assert_eq!(backend.status()["size_bytes"], json!(size));
    let sector = size / 512 - 8;
    assert_eq!(machine.ask(backend, &Ask::write(sector, [7; 4096])).status, 0);
    assert_eq!(machine.ask(backend, &Ask::read(sector, 4096)).data, [7; 4096]);
    assert_eq!(machine.ask(backend, &Ask::read(sector + 8, 512)).status, IOERR);
}

#[test]
fn a_spare_serves_an_image_that_has_grown_while_it_waited() {
    for &engine in ENGINES {
        for site in [Site::new(64 * MIB), Site::on_tmpfs(64 * MIB)] {
            let map = format!("--map-file={}", site.path("touched").display());
            let (mut active, spare) = two(&site, &[engine, &map]);
            let mut machine = Machine::new(1, 64);
            machine.connect(&site.socket()).unwrap();
            assert_eq!(machine.ask(&active, &Ask::write(8, [1; 4096])).status, 0);
            resize(&site.image, 128 * MIB);
            active.kill();
            machine.disconnect();
            machine.connect(&site.socket()).unwrap();
            serves_end(&mut machine, &spare, 128 * MIB);
            assert_eq!(machine.ask(&spare, &Ask::read(8, 4096)).data, [1; 4096]);
            // Also the page/block map: block 1 was touched by the process before.
            let map = spare.control(&json!({"id": 1, "cmd": "map"}))["ok"].clone();
            let blocks = (&map["blocks"], &map["touched"]);
            assert_eq!(blocks, (&json!(128 * MIB / 4096), &json!(2)), "{engine}");
            assert_eq!(last_error(&spare), json!(null));
        }
    }
}

#[test]
fn what_was_given_away_or_comes_from_elsewhere_is_taken_in_its_present_size() {
    let site = Site::new(64 * MIB);
    let source = site.start(&[]);
    let mut here = Machine::new(1, 64);
    here.connect(&site.socket()).unwrap();
    let far = Site::sharing(&site.image);
    let target = far.start(&["--incoming"]);
    target.wait_status("/standing", &json!("incoming"));
    let mut there = Machine::new(1, 64);
    there.negotiate(&far.socket()).unwrap();
    let armed = source.control(&json!({"id": 1, "cmd": "handover", "armed": true}));
    assert_eq!(armed["ok"]["armed"], json!(true));
    here.session().get_vring_base(0).unwrap();
    source.wait_status("/standing", &json!("handed-over"));
    resize(&site.image, 128 * MIB);
    there.start(0).unwrap();
    serves_end(&mut there, &target, 128 * MIB);
    drop(target);
    resize(&site.image, 192 * MIB);
    let taken = source.control(&json!({"id": 2, "cmd": "handover", "armed": false}));
    assert_eq!(taken["ok"]["owns_image"], json!(true), "{taken}");
    here.start(0).unwrap();
    serves_end(&mut here, &source, 192 * MIB);
}

#[test]
fn an_image_that_has_shrunk_is_told_and_what_is_beyond_its_end_fails() {
    for &engine in ENGINES {
        let site = Site::new(64 * MIB);
        let (mut active, mut spare) = two(&site, &[engine]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.ask(&active, &Ask::write(8, [1; 4096])).status, 0);
        resize(&site.image, 32 * MIB);
        active.kill();
        machine.disconnect();
        machine.connect(&site.socket()).unwrap();
        serves_end(&mut machine, &spare, 32 * MIB);
        assert_eq!(machine.ask(&spare, &Ask::read(64 * MIB / 512 - 8, 4096)).status, IOERR);
        assert_eq!(machine.ask(&spare, &Ask::read(8, 4096)).data, [1; 4096]);
        let error = last_error(&spare);
        assert_eq!((&error["op"], &error["offset"]), (&json!("size"), &json!(32 * MIB)));
        let words = "shrunk from 67108864 to 33554432 bytes";
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
        assert!(error["message"].as_str().unwrap().contains("truncate --size=67108864"), "{error}");
        assert!(spare.is_alive());
    }
}

#[test]
fn an_image_that_is_empty_or_of_half_blocks_by_now_is_refused() {
    for (size, words) in
        [(0, "is empty"), (32 * MIB + 512, "has 33554944 bytes, which is no multiple of 4096")]
    {
        let site = Site::new(64 * MIB);
        let (mut active, mut spare) = two(&site, &["--block-size=4096"]);
        resize(&site.image, size);
        active.kill();
        assert_eq!(spare.wait_exit().code(), Some(4));
        assert!(spare.log().contains(words), "{}", spare.log());
    }
}

#[test]
fn a_spare_refuses_a_name_that_leads_to_another_image_and_leaves_that_one_alone() {
    let site = Site::new(MIB);
    let record = format!("{}.epoch", site.image.display());
    let title = [
        &format!("--epoch-file={record}"),
        "--epoch=7",
        "--claim=11111111111111111111111111111111",
        "--holder=aachen",
    ];
    let (mut active, mut spare) = two(&site, &title);
    std::fs::rename(&site.image, site.path("was")).unwrap();
    File::create(&site.image).unwrap().set_len(MIB).unwrap();
    std::fs::remove_file(&record).unwrap();
    active.kill();
    assert_eq!(spare.wait_exit().code(), Some(4));
    let (log, name) = (spare.log(), site.image.display().to_string());
    let said = log.lines().last().unwrap();
    assert!(said.starts_with("semper-blkd: error: ") && said.contains(&name), "{said}");
    assert!(said.contains("was replaced") && said.contains("put the right one there"), "{said}");
    assert!(!Path::new(&record).exists(), "the other image has not been claimed");
}

#[test]
fn the_last_of_a_removed_image_is_served_on_and_told() {
    let site = Site::new(MIB);
    let (mut active, spare) = two(&site, &[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&active, &Ask::write(8, [1; 4096])).status, 0);
    std::fs::remove_file(&site.image).unwrap();
    active.kill();
    machine.disconnect();
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&spare, &Ask::read(8, 4096)).data, [1; 4096]);
    let error = last_error(&spare);
    assert_eq!(error["op"], json!("name"));
    let message = error["message"].as_str().unwrap();
    let copy = message.split("copy it from ").nth(1).unwrap();
    assert_eq!(std::fs::read(copy).unwrap()[4096..8192], [1; 4096]);
}

/// The path by which a child opens what this descriptor is of; inherited by every child.
fn inherited(file: &File) -> PathBuf {
    // SAFETY: no memory is passed.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

#[test]
fn an_image_that_is_given_by_its_descriptor_is_served_wherever_its_name_leads() {
    let dir = tempfile::Builder::new().prefix("blkd").tempdir_in("/tmp").unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, [1; 8192]).unwrap();
    let file = OpenOptions::new().custom_flags(libc::O_PATH).read(true).open(&path).unwrap();
    let site = Site::on(dir, inherited(&file));
    let (mut active, mut spare) = two(&site, &[]);
    assert_eq!(active.status()["image"], json!(path.display().to_string()));
    std::fs::rename(&path, site.path("was")).unwrap();
    std::fs::write(&path, [9; 8192]).unwrap();
    active.kill();
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&spare, &Ask::read(0, 4096)).data, [1; 4096]);
    let error = last_error(&spare);
    assert_eq!(error["op"], json!("name"));
    assert!(error["message"].as_str().unwrap().contains("leads to another file"), "{error}");
    // One that is started by now, and one without any name left.
    let later = self::spare(&site, &[]);
    std::fs::remove_file(site.path("was")).unwrap();
    spare.kill();
    machine.disconnect();
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&later, &Ask::read(8, 4096)).data, [1; 4096]);
    let last = self::spare(&site, &[]);
    drop(later);
    machine.disconnect();
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&last, &Ask::read(8, 4096)).data, [1; 4096]);
    drop(last);
    // The control: by its path it is the other file.
    let other = Site::sharing(&path);
    let by_path = other.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&other.socket()).unwrap();
    assert_eq!(machine.ask(&by_path, &Ask::read(0, 4096)).data, [9; 4096]);
}

#[test]
fn a_spare_leaves_the_map_file_to_the_process_that_uses_it() {
    let site = Site::new(64 * MIB);
    let map = format!("--map-file={}", site.path("touched").display());
    let (mut active, first) = two(&site, &[&map]);
    drop(first);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    resize(&site.image, 128 * MIB);
    // It sees the new size at once, and the active process still serves the old one.
    let late = spare(&site, &[&map]);
    assert_eq!(machine.ask(&active, &Ask::read(800, 4096)).status, 0);
    let inode = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(site.path(name)).unwrap().ino()
    };
    let before = inode("touched");
    assert_eq!(active.status()["size_bytes"], json!(64 * MIB));
    active.kill();
    late.wait_status("/standing", &json!("held"));
    assert_ne!(inode("touched"), before, "made anew, for the new size, and only now");
    machine.disconnect();
    machine.connect(&site.socket()).unwrap();
    serves_end(&mut machine, &late, 128 * MIB);
}
