//! What was admitted is on record after a power cut.

use std::fs::File;
use std::os::unix::fs::FileExt;

use semper_epoch::record::{FILE_BYTES, SLOT_BYTES, newest};
use semper_epoch::{Claim, Holder, Id, Record, admit, admit_confirmed, confirm, read, record_path};
use semper_testbed::Lossy;

const CLAIM: Claim = Claim { epoch: 7, id: Id([0x11; 16]) };
const NEWER: Claim = Claim { epoch: 8, id: Id([0x22; 16]) };

struct Stage {
    place: tempfile::TempDir,
    lossy: Lossy,
}

impl Stage {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let lossy = Lossy::mount(place.path());
        lossy.put("disk.raw", vec![0; 512]);
        Self { place, lossy }
    }

    fn path(&self) -> std::path::PathBuf {
        record_path(&self.place.path().join("disk.raw")).unwrap()
    }

    /// The claim that a power cut would leave on record.
    fn left(&self) -> Option<Claim> {
        let content = self.lossy.after_power_cut("disk.raw.epoch")?;
        let record = newest(&content).unwrap()?;
        Some(Claim { epoch: record.epoch, id: record.claim })
    }

    /// What a process leaves that dies between the write of its claim and the flush.
    fn unflushed(&self, claim: Claim) {
        let before = read(&self.path()).unwrap().unwrap_or_default();
        let (epoch, sequence) = (claim.epoch, before.sequence + 1);
        let record = Record { epoch, claim: claim.id, holder: host(), sequence, ..before };
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(false).open(self.path()).unwrap();
        file.write_all_at(&record.encode(), sequence % 2 * SLOT_BYTES as u64).unwrap();
    }
}

fn host() -> Holder {
    Holder::new("a").unwrap()
}

#[test]
fn a_new_record_and_its_name_are_left() {
    let stage = Stage::new();
    admit(&stage.path(), CLAIM, &host()).unwrap();
    assert_eq!(stage.left(), Some(CLAIM));
    admit(&stage.path(), NEWER, &host()).unwrap();
    assert_eq!(stage.left(), Some(NEWER));
}

#[test]
fn a_claim_that_stands_on_record_is_flushed_before_it_is_admitted() {
    let stage = Stage::new();
    admit(&stage.path(), CLAIM, &host()).unwrap();
    stage.unflushed(NEWER);
    // The control: whoever only looks believes what a power cut takes away.
    assert!(read(&stage.path()).unwrap().unwrap().is_held_by(NEWER));
    assert_eq!(stage.left(), Some(CLAIM));
    admit(&stage.path(), NEWER, &host()).unwrap();
    assert_eq!(stage.left(), Some(NEWER));
}

#[test]
fn the_name_of_a_file_whose_maker_died_is_flushed_as_well() {
    let stage = Stage::new();
    File::create(stage.path()).unwrap().set_len(FILE_BYTES as u64).unwrap();
    assert_eq!(stage.lossy.after_power_cut("disk.raw.epoch"), None);
    admit(&stage.path(), CLAIM, &host()).unwrap();
    assert_eq!(stage.left(), Some(CLAIM));
}

#[test]
fn a_spare_flushes_while_it_waits_and_not_when_a_guest_does() {
    let stage = Stage::new();
    assert_eq!(confirm(&stage.path(), CLAIM).unwrap(), None);
    admit(&stage.path(), CLAIM, &host()).unwrap();
    stage.unflushed(NEWER);
    assert_eq!(confirm(&stage.path(), CLAIM).unwrap(), None, "another's");
    let confirmed = confirm(&stage.path(), NEWER).unwrap().unwrap();
    assert_eq!(stage.left(), Some(NEWER));
    let flushes = stage.lossy.flushes();
    admit_confirmed(&stage.path(), NEWER, &host(), Some(&confirmed)).unwrap();
    assert_eq!(stage.lossy.flushes(), flushes);
    // What is on record by then may be another record with the same claim.
    stage.unflushed(NEWER);
    admit_confirmed(&stage.path(), NEWER, &host(), Some(&confirmed)).unwrap();
    assert_eq!(stage.lossy.flushes(), flushes + 1);
}

#[test]
fn a_flush_that_fails_admits_nobody() {
    let stage = Stage::new();
    admit(&stage.path(), CLAIM, &host()).unwrap();
    stage.lossy.fail_flushes(1);
    let refused = admit(&stage.path(), CLAIM, &host()).unwrap_err().to_string();
    assert!(refused.contains("Input/output error"), "{refused}");
    admit(&stage.path(), CLAIM, &host()).unwrap();
}
