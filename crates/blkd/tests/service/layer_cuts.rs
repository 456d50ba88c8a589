//! Power cuts while snapshots are taken, undone and merged under 16 writers, on ext4: the real programs, a
//! real file system, and below it a loop device whose writes are recorded and cut, so that of what the
//! file system has not flushed any sectors are left ([`Lossy`]). What was flushed is read, and a snapshot
//! that was told is byte for byte what it was. A short form runs with the tests, `make layers-cuts` has the
//! long one. Needs root.
//!
//! The control: flushes that are answered and not carried out are noticed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use semper_testbed::{LoopDevice, Lossy};
use serde_json::json;
use tempfile::TempDir;

use crate::backend::{DEADLINE, ENGINES, Site};
use crate::layer_kills::{Trial, count, read_all, read_snapshot, start};
use crate::machine::Machine;
use crate::writers::{Dice, QUEUES, SECTOR, SECTORS, lost};

const MEDIUM: usize = 24 << 20;
const NAME: &str = "medium";

fn run(program: &str, arguments: &[&Path]) {
    let output = Command::new(program).args(arguments).output().expect(program);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}

/// A file system that is mounted until the value goes.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &LoopDevice, place: PathBuf) -> Self {
        std::fs::create_dir(&place).unwrap();
        run("mount", &[Path::new("-text4"), &device.node, &place]);
        Self(place)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily, where a test has failed and something has it open.
        let unmounted = Command::new("umount").arg(&self.0).stderr(Stdio::null()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        }
    }
}

/// A disk on ext4, on a medium that can be cut.
pub struct Stage {
    // In the order in which they are given up.
    mounted: Mounted,
    _device: LoopDevice,
    pub lossy: Lossy,
    _dir: TempDir,
}

impl Stage {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("cuts").tempdir_in("/tmp").unwrap();
        let place = dir.path().join("lossy");
        std::fs::create_dir(&place).unwrap();
        let lossy = Lossy::mount(&place);
        let device = LoopDevice::direct(&lossy.put(NAME, vec![0; MEDIUM]), 512);
        let options = ["-q", "-b4096", "-Jsize=4", "-Elazy_itable_init=0,nodiscard"].map(Path::new);
        run("mkfs.ext4", &[&options[..], &[device.node.as_path()]].concat());
        let mounted = Mounted::new(&device, dir.path().join("disks"));
        let image = mounted.0.join("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(SECTORS * SECTOR as u64).unwrap();
        // The disk is there from the start; nobody flushes its name later.
        run("sync", &[Path::new("--file-system"), &image]);
        Self { mounted, _device: device, lossy, _dir: dir }
    }

    pub fn site(&self) -> Site {
        let dir = tempfile::Builder::new().prefix("blkd").tempdir_in("/tmp").unwrap();
        Site::on(dir, self.mounted.0.join("disk.raw"))
    }

    /// The medium as a power cut could leave it now.
    fn cut(&self, dice: &mut Dice) -> Vec<u8> {
        // Of some cuts nothing is left, of some nearly all; what is near to each other often shares its fate.
        let (share, mut kept) = (dice.below(5), false);
        let keeps = || {
            if dice.below(4) == 0 {
                kept = dice.below(4) < share;
            }
            kept
        };
        self.lossy.after_any_power_cut(NAME, keeps).unwrap()
    }
}

/// What is wrong with the disk after a cut, by another host's programs: nothing of the memory is left.
fn judge(trial: &Trial, medium: &[u8]) -> Option<String> {
    let dir = tempfile::Builder::new().prefix("after").tempdir_in("/dev/shm").unwrap();
    let file = dir.path().join(NAME);
    std::fs::write(&file, medium).unwrap();
    let device = LoopDevice::new(&file, 512);
    let mounted = Mounted::new(&device, dir.path().join("disks"));
    let image = mounted.0.join("disk.raw");
    let site = Site::sharing(&image);
    let mut backend = start(&site, trial.engine, &[], &[], &[]);
    let mut machine = Machine::new(QUEUES, 64);
    machine.connect(&site.socket()).unwrap_or_else(|_| panic!("{}", backend.log()));
    let fault = lost(&read_all(&mut machine, &backend), &trial.writers);
    machine.disconnect();
    assert!(backend.terminate().success(), "{}", backend.log());
    let changed = |(id, content): (&u64, &Vec<u8>)| {
        let got = read_snapshot(&image, trial.engine, *id);
        (got != *content).then(|| format!("snapshot {id} is not what it was"))
    };
    fault.or_else(|| trial.snapshots.iter().find_map(changed))
}

#[test]
fn a_power_cut_takes_nothing_that_was_flushed_and_no_snapshot_that_was_told() {
    let (cuts, seed) = (count("SEMPERVIRT_LAYER_CUTS", 4), count("SEMPERVIRT_SEED", 1));
    let (mut done, mut deaths, mut held) = (0, 0, 0);
    let mut told = 0;
    for (n, &engine) in ENGINES.iter().enumerate() {
        let stage = Stage::new();
        let mut trial = Trial::new(stage.site(), engine, seed << 8 | 0x80 | n as u64, None);
        for cut in 0..cuts.div_ceil(ENGINES.len() as u64) {
            for _ in 0..1 + trial.writers.dice.below(3) {
                trial.stir();
            }
            if trial.writers.dice.below(8) == 0 {
                let spare = trial.spare();
                trial.active.kill();
                trial.go_on(spare, "a death between cuts");
                deaths += 1;
            }
            let pause = Duration::from_micros(trial.writers.dice.below(20_000));
            trial.writers.pump(&mut trial.machine, Instant::now() + pause);
            let medium = stage.cut(&mut trial.writers.dice);
            if let Some(fault) = judge(&trial, &medium) {
                panic!("cut {cut} of seed {seed}, {engine}: {fault}");
            }
            done += 1;
            held += trial.snapshots.len();
        }
        told += trial.told;
        trial.writers.finish(&mut trial.machine, &trial.active);
    }
    println!("cuts={done} deaths={deaths} snapshots={told} held={held} lost=0");
}

/// The judge sees that what was said to be flushed is not there.
#[test]
fn a_flush_that_is_left_out_would_be_noticed_after_a_cut() {
    let stage = Stage::new();
    let mut trial = Trial::new(stage.site(), "--engine=sync", 9, None);
    trial.snapshot(DEADLINE);
    trial.snapshots.clear();
    trial.active.fault(json!({"op": "flush", "errno": "OK"}));
    let end = Instant::now() + DEADLINE;
    let mut dice = Dice(9);
    loop {
        trial.writers.pump(&mut trial.machine, Instant::now() + Duration::from_millis(50));
        if judge(&trial, &stage.cut(&mut dice)).is_some() {
            break;
        }
        assert!(Instant::now() < end, "nothing was lost");
    }
}
