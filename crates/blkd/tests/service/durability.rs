//! What a guest was told to be on the medium is there after a power cut, with every engine; and a
//! flush that has failed is never followed by one that succeeds.
//!
//! The disks are on a file system that loses what was not flushed ([`Lossy`]): an image file, and a
//! loop device on a file there. Each loss that is expected is seen as well, so that these tests can
//! fail.

use semper_testbed::{LoopDevice, Lossy};
use serde_json::json;

use crate::backend::{Backend, ENGINES, Site};
use crate::machine::{Ask, Machine, T_DISCARD, T_WRITE_ZEROES};

const OK: u8 = 0;
const IOERR: u8 = 1;
const SIZE: usize = 1 << 20;
const NAME: &str = "disk.raw";

/// A disk on a file system that loses.
struct Stage {
    site: Site,
    // In the order in which they are given up.
    _device: Option<LoopDevice>,
    lossy: Lossy,
}

impl Stage {
    /// The image, or a block device on it.
    fn new(sector: Option<u32>) -> Self {
        let dir = tempfile::Builder::new().prefix("lossy").tempdir_in("/tmp").unwrap();
        let place = dir.path().join("fs");
        std::fs::create_dir(&place).unwrap();
        let lossy = Lossy::mount(&place);
        let file = lossy.put(NAME, vec![0x77; SIZE]);
        let device = sector.map(|sector| LoopDevice::new(&file, sector));
        let image = device.as_ref().map_or(file, |device| device.node.clone());
        Self { site: Site::on(dir, image), _device: device, lossy }
    }

    /// The range as a power cut would leave it now.
    fn left(&self, sector: usize, len: usize) -> Vec<u8> {
        self.lossy.after_power_cut(NAME).unwrap()[sector * 512..][..len].to_vec()
    }
}

/// Every engine, through the page cache and around it, on a file and on devices.
fn every_way(test: impl Fn(&Stage, &[&str])) {
    for sector in [None, Some(512), Some(4096)] {
        let cached = ENGINES.iter().map(|engine| vec![*engine]);
        let direct = ["--engine=sync", "--engine=nowait", "--engine=uring"];
        for way in cached.chain(direct.map(|engine| vec![engine, "--direct"])) {
            test(&Stage::new(sector), &way);
        }
    }
}

fn connected(stage: &Stage, options: &[&str]) -> (Backend, Machine) {
    let backend = stage.site.start(options);
    let mut machine = Machine::new(1, 64);
    machine.connect(&stage.site.socket()).unwrap();
    (backend, machine)
}

/// What changes the disk, and what it leaves of 16 sectors.
fn changes() -> [(Ask, u8); 3] {
    [
        (Ask::write(64, vec![5; 8192]), 5),
        (Ask::trim(T_WRITE_ZEROES, 128, 16, 0), 0),
        (Ask::trim(T_WRITE_ZEROES, 192, 16, 1), 0),
    ]
}

fn sector_of(ask: &Ask) -> usize {
    match ask.kind {
        T_DISCARD | T_WRITE_ZEROES => u64::from_le_bytes(ask.out[..8].try_into().unwrap()) as usize,
        _ => ask.sector as usize,
    }
}

#[test]
fn what_was_flushed_survives_a_power_cut() {
    every_way(|stage, options| {
        let (backend, mut machine) = connected(stage, options);
        for (ask, value) in changes() {
            assert_eq!(machine.ask(&backend, &ask).status, OK, "{options:?} {}", ask.kind);
            assert!(stage.left(sector_of(&ask), 8192) == [0x77; 8192], "flushed by nobody");
            assert_eq!(machine.ask(&backend, &Ask::flush()).status, OK);
            assert!(stage.left(sector_of(&ask), 8192) == [value; 8192], "{options:?} {}", ask.kind);
        }
        // The control: a flush that is left out is noticed.
        backend.fault(json!({"op": "flush", "errno": "OK"}));
        assert_eq!(machine.ask(&backend, &Ask::write(0, [6; 4096])).status, OK);
        assert_eq!(machine.ask(&backend, &Ask::flush()).status, OK);
        assert!(stage.left(0, 4096) == [0x77; 4096], "{options:?}: nothing was lost");
    });
}

#[test]
fn in_write_through_mode_everything_survives_a_power_cut() {
    every_way(|stage, options| {
        let (backend, mut machine) = connected(stage, options);
        machine.set_write_cache(false);
        let parts = [(Ask::trim(T_WRITE_ZEROES, 259, 9, 0), 0), (Ask::write(261, [3; 1024]), 3)];
        for (ask, value) in changes().into_iter().chain(parts) {
            let (sector, len) = (sector_of(&ask), if sector_of(&ask) > 256 { 1024 } else { 8192 });
            assert_eq!(machine.ask(&backend, &ask).status, OK, "{options:?} {}", ask.kind);
            assert!(stage.left(sector, len) == vec![value; len], "{options:?} {}", ask.kind);
        }
        // A discard need not leave zeros; here it does.
        assert_eq!(machine.ask(&backend, &Ask::trim(T_DISCARD, 320, 16, 0)).status, OK);
        assert!(stage.left(320, 8192) == [0; 8192], "{options:?}: not flushed");
        // The control.
        backend.fault(json!({"op": "flush", "errno": "OK"}));
        assert_eq!(machine.ask(&backend, &Ask::trim(T_WRITE_ZEROES, 384, 16, 0)).status, OK);
        assert!(stage.left(384, 8192) == [0x77; 8192], "{options:?}: nothing was lost");
    });
}

/// The kernel's own word of pages that it could not write back: to each open file once.
#[test]
fn pages_that_could_not_be_written_back_fail_every_flush() {
    for engine in ENGINES {
        let stage = Stage::new(None);
        // The control: what any other program hears.
        let other = std::fs::File::options().write(true).open(&stage.site.image).unwrap();
        let (mut active, mut machine) = connected(&stage, &[engine]);
        // First, because the kernel may write pages back at any time.
        stage.lossy.fail_writes(true);
        assert_eq!(machine.ask(&active, &Ask::write(64, vec![5; 8192])).status, OK, "{engine}");
        assert_eq!(machine.ask(&active, &Ask::flush()).status, IOERR, "{engine}");
        stage.lossy.fail_writes(false);
        assert_eq!(other.sync_data().unwrap_err().raw_os_error(), Some(libc::EIO), "{engine}");
        other.sync_data().unwrap();
        assert!(stage.left(64, 8192) == [0x77; 8192], "{engine}: nothing was lost");
        assert_eq!(machine.ask(&active, &Ask::flush()).status, IOERR, "{engine}");
        active.kill();
        machine.disconnect();
        let next = stage.site.start(&[engine]);
        machine.connect(&stage.site.socket()).unwrap();
        assert_eq!(machine.ask(&next, &Ask::flush()).status, IOERR, "{engine}");
    }
}

/// Zeros are written where nobody makes them, more than one system call takes; holes are left out.
#[test]
fn a_file_system_without_holes_gets_its_zeros_written() {
    for engine in ENGINES {
        let stage = Stage::new(None);
        stage.lossy.refuse_fallocate();
        let (backend, mut machine) = connected(&stage, &[engine]);
        machine.set_write_cache(false);
        let mut expected = vec![0x77; SIZE];
        for (sector, sectors, flags) in [(3, 1, 0), (9, 300, 1), (1024, 1000, 0)] {
            let ask = Ask::trim(T_WRITE_ZEROES, sector, sectors, flags);
            assert_eq!(machine.ask(&backend, &ask).status, OK, "{engine}");
            expected[sector as usize * 512..][..sectors as usize * 512].fill(0);
        }
        let discard = Ask::trim(T_DISCARD, 400, 64, 0);
        assert_eq!(machine.ask(&backend, &discard).status, OK, "{engine}");
        assert!(stage.left(0, SIZE) == expected, "{engine}");
        assert_eq!(backend.status()["counters"]["host_errors"], json!(0));
    }
}

#[test]
fn a_flush_covers_what_a_dead_predecessor_wrote() {
    every_way(|stage, options| {
        let (mut active, mut machine) = connected(stage, options);
        assert_eq!(machine.ask(&active, &Ask::write(64, vec![5; 8192])).status, OK);
        active.kill();
        machine.disconnect();
        let next = stage.site.start(options);
        machine.connect(&stage.site.socket()).unwrap();
        assert!(stage.left(64, 8192) == [0x77; 8192]);
        assert_eq!(machine.ask(&next, &Ask::flush()).status, OK);
        assert!(stage.left(64, 8192) == [5; 8192], "{options:?}");
    });
}

/// The kernel tells of it once: the same file system without us says OK to the second flush.
#[test]
fn after_a_flush_that_failed_every_other_one_fails_until_the_vm_begins_anew() {
    every_way(|stage, options| {
        let file = stage.site.path("flush-failed");
        let mut options = options.to_vec();
        let flush_file = format!("--flush-file={}", file.display());
        options.push(&flush_file);
        let (mut active, mut machine) = connected(stage, &options);
        let flush =
            |machine: &mut Machine, backend: &Backend| machine.ask(backend, &Ask::flush()).status;
        assert_eq!(machine.ask(&active, &Ask::write(64, vec![5; 8192])).status, OK);
        stage.lossy.fail_flushes(1);
        assert_eq!(flush(&mut machine, &active), IOERR, "{options:?}");
        assert!(stage.left(64, 8192) == [0x77; 8192], "lost");
        assert_eq!(flush(&mut machine, &active), IOERR, "{options:?}");
        let status = active.status();
        assert_eq!(status["flush_failed"], json!(true));
        let said = status["last_error"]["message"].as_str().unwrap().to_owned();
        for words in ["Input/output error", "until the VM was stopped and started", "fsck"] {
            assert!(said.contains(words), "{said}");
        }
        // What was not lost is served, and flushed as well as may be.
        assert_eq!(machine.ask(&active, &Ask::write(256, [6; 4096])).status, OK);
        assert_eq!(flush(&mut machine, &active), IOERR);
        assert!(stage.left(256, 4096) == [6; 4096]);
        // The next process, from the in-flight region; and after a reset, from the file.
        for (reset, flush_file) in [(false, None), (true, Some(&flush_file))] {
            active.kill();
            machine.disconnect();
            if reset {
                machine.reset();
            }
            let mut options = options.clone();
            options.retain(|option| !option.starts_with("--flush-file"));
            options.extend(flush_file.map(String::as_str));
            active = stage.site.start(&options);
            machine.connect(&stage.site.socket()).unwrap();
            assert_eq!(flush(&mut machine, &active), IOERR, "{options:?} reset {reset}");
            assert_eq!(active.status()["last_error"]["message"], json!(said));
        }
        // A region that is made by a process that knows has it as well.
        machine.disconnect();
        machine.reset();
        machine.connect(&stage.site.socket()).unwrap();
        active.kill();
        machine.disconnect();
        let mut plain = options.clone();
        plain.pop();
        active = stage.site.start(&plain);
        machine.connect(&stage.site.socket()).unwrap();
        assert_eq!(flush(&mut machine, &active), IOERR, "{options:?}");
        // In write-through mode every write is a flush.
        machine.set_write_cache(false);
        assert_eq!(machine.ask(&active, &Ask::write(64, [5; 512])).status, IOERR);
        // The end of the VM, and its next start. It is also the control: nothing else fails here.
        active.kill();
        machine.disconnect();
        machine.reset();
        std::fs::remove_file(&file).unwrap();
        let next = stage.site.start(&options);
        machine.connect(&stage.site.socket()).unwrap();
        assert_eq!(flush(&mut machine, &next), OK, "{options:?}");
        assert_eq!(next.status()["flush_failed"], json!(false));
    });
}
