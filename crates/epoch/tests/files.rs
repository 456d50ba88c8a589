//! What a crash, a race, damage and a careless user may leave of a record.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use semper_epoch::record::{FILE_BYTES, SLOT_BYTES};
use semper_epoch::{
    Admission, Claim, Denied, Holder, Id, Record, admit, check_unclaimed, read, record_path,
    release,
};
use tempfile::TempDir;

const C1: Id = Id([0x11; 16]);
const C2: Id = Id([0x22; 16]);

fn claim(epoch: u64, id: Id) -> Claim {
    Claim { epoch, id }
}

fn host(name: &str) -> Holder {
    Holder::new(name).unwrap()
}

fn image() -> (TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.raw");
    fs::write(&image, b"").unwrap();
    let record = record_path(&image).unwrap();
    (directory, image, record)
}

fn present(path: &Path) -> Record {
    read(path).unwrap().unwrap()
}

#[test]
fn epochs_only_grow_and_the_image_keeps_its_id() {
    let (_directory, _, path) = image();
    assert_eq!(read(&path).unwrap(), None);
    assert_eq!(admit(&path, claim(3, C1), &host("a")).unwrap(), Admission::Advanced);
    let first = present(&path);
    assert_eq!((first.sequence, first.epoch, first.claim), (1, 3, C1));
    assert_ne!(first.image, Id::default());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&path).unwrap().len(), FILE_BYTES as u64);
    assert_eq!(admit(&path, claim(3, C1), &host("a")).unwrap(), Admission::Renewed);
    assert_eq!(present(&path), first);
    admit(&path, claim(5, C2), &host("b")).unwrap();
    let before = fs::read(&path).unwrap();
    for (epoch, id, words) in [
        (3, C1, "is held by b under epoch 5; the claim of a has epoch 3;"),
        (5, C1, "is held by b under epoch 5; the claim of a has epoch 5 and another id;"),
    ] {
        let refused = admit(&path, claim(epoch, id), &host("a")).unwrap_err();
        assert!(matches!(refused, Denied::Stale { .. }));
        assert!(
            refused.to_string().starts_with(&format!("{} {words}", path.display())),
            "{refused}"
        );
        assert!(!release(&path, claim(epoch, id)).unwrap());
    }
    assert_eq!(fs::read(&path).unwrap(), before);
    assert!(release(&path, claim(5, C2)).unwrap());
    assert!(present(&path).released);
    // Released is not forgotten; and who holds it again has it again.
    assert!(admit(&path, claim(4, C1), &host("a")).is_err());
    assert_eq!(admit(&path, claim(5, C2), &host("b")).unwrap(), Admission::Renewed);
    let again = present(&path);
    assert!(!again.released);
    assert_eq!(again.image, first.image);
}

#[test]
fn a_claimed_image_is_for_its_holder() {
    let (directory, image, path) = image();
    check_unclaimed(&image).unwrap();
    assert!(!path.exists());
    admit(&path, claim(3, C1), &host("a")).unwrap();
    let link = directory.path().join("link.raw");
    symlink(&image, &link).unwrap();
    for way in [&image, &link] {
        let refused = check_unclaimed(way).unwrap_err().to_string();
        assert!(refused.contains("disk.raw.epoch is held by a under epoch 3"), "{refused}");
    }
    release(&path, claim(3, C1)).unwrap();
    check_unclaimed(&image).unwrap();
    // An image that was given an id and never claimed is free as well.
    let identified = Record { sequence: 1, ..Record::default() };
    fs::write(&path, identified.encode()).unwrap();
    check_unclaimed(&image).unwrap();
}

#[test]
fn an_open_file_without_a_name_is_nobodys() {
    use std::os::fd::AsRawFd;

    let file = tempfile::tempfile().unwrap();
    check_unclaimed(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))).unwrap();
}

/// Every length of a write that was cut off: what is there is the claim before it or the whole
/// new one, and the same claim is admitted again.
#[test]
fn a_torn_write_leaves_the_record_before_it() {
    let (_directory, _, path) = image();
    admit(&path, claim(3, C1), &host("a")).unwrap();
    let before = fs::read(&path).unwrap();
    admit(&path, claim(4, C2), &host("b")).unwrap();
    let after = fs::read(&path).unwrap();
    let slot = (0..FILE_BYTES).find(|&i| before[i] != after[i]).unwrap() / SLOT_BYTES * SLOT_BYTES;
    for length in 0..=SLOT_BYTES {
        let mut torn = before.clone();
        torn[slot..slot + length].copy_from_slice(&after[slot..slot + length]);
        fs::write(&path, &torn).unwrap();
        let whole = torn == after;
        assert_eq!(present(&path).epoch, if whole { 4 } else { 3 }, "{length} bytes");
        assert_eq!(admit(&path, claim(3, C1), &host("a")).is_ok(), !whole);
        admit(&path, claim(4, C2), &host("b")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), after);
    }
}

/// The first record, cut off: nobody has been admitted by it, and the bytes do not say so either.
#[test]
fn a_torn_first_write_admits_nobody_by_mistake() {
    let (_directory, _, path) = image();
    admit(&path, claim(3, C1), &host("a")).unwrap();
    let whole = fs::read(&path).unwrap();
    for length in 0..SLOT_BYTES {
        let mut torn = whole.clone();
        torn[SLOT_BYTES + length..].fill(0);
        let complete = torn == whole;
        fs::write(&path, &torn).unwrap();
        match read(&path) {
            Ok(None) => assert_eq!(length, 0),
            Ok(Some(record)) => assert!(complete && record.epoch == 3),
            Err(refused) => assert!(matches!(refused, Denied::Damaged(_)) && !complete),
        }
    }
}

#[test]
fn what_cannot_be_read_refuses_the_image() {
    let (directory, image, path) = image();
    fs::write(&path, b"SVEPOCH1 but no more").unwrap();
    for refused in [check_unclaimed(&image), admit(&path, claim(9, C1), &host("a")).map(drop)] {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, Denied::Damaged(_)), "{refused}");
    }
    assert_eq!(fs::read(&path).unwrap(), b"SVEPOCH1 but no more");
    let last = Record { sequence: u64::MAX, ..Record::default() };
    fs::write(&path, last.encode()).unwrap();
    assert!(matches!(admit(&path, claim(9, C1), &host("a")), Err(Denied::Damaged(_))));
    fs::write(&path, b"").unwrap();
    admit(&path, claim(1, C1), &host("a")).unwrap();
    fs::remove_file(&path).unwrap();
    symlink(&image, &path).unwrap();
    for refused in [check_unclaimed(&image), admit(&path, claim(9, C1), &host("a")).map(drop)] {
        assert!(matches!(refused, Err(Denied::Io { .. })));
    }
    let absent = directory.path().join("absent/disk.raw.epoch");
    let refused = admit(&absent, claim(1, C1), &host("a")).unwrap_err().to_string();
    assert!(refused.contains("absent") && refused.contains("check the directory"), "{refused}");
}

#[test]
fn a_later_version_is_left_alone() {
    let (_directory, _, path) = image();
    admit(&path, claim(3, C1), &host("a")).unwrap();
    let script = "import struct, sys, zlib\n\
        slot = bytearray(open(sys.argv[1], 'rb').read()[512:])\n\
        struct.pack_into('<II', slot, 8, 3, 0)\n\
        struct.pack_into('<I', slot, 12, zlib.crc32(slot))\n\
        open(sys.argv[1], 'wb').write(bytes(512) + slot)";
    assert!(Command::new("python3").args(["-c", script]).arg(&path).status().unwrap().success());
    let before = fs::read(&path).unwrap();
    let refused = admit(&path, claim(9, C1), &host("a")).unwrap_err();
    assert!(matches!(refused, Denied::Newer { version: 3, .. }), "{refused}");
    assert!(refused.to_string().contains("has version 3"), "{refused}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

/// The processes are this test, run again: each counts up, and a claim is admitted at most once.
#[test]
fn two_processes_that_race_never_lower_an_epoch() {
    if let Ok(path) = std::env::var("RACE_FOR") {
        let first: u64 = std::env::var("RACE_FROM").unwrap().parse().unwrap();
        let won = (first..).step_by(2).take(200).filter(|&epoch| {
            let id = Id(u128::from(epoch).to_be_bytes());
            admit(Path::new(&path), claim(epoch, id), &host("racer")).is_ok()
        });
        println!("won={}=", won.count());
        return;
    }
    let (_directory, _, path) = image();
    let racers = [1, 2].map(|first| racer(&path, first));
    let won: u64 = racers
        .into_iter()
        .map(|racer| {
            let output = String::from_utf8(racer.wait_with_output().unwrap().stdout).unwrap();
            output.split('=').nth(1).unwrap().parse::<u64>().unwrap()
        })
        .sum();
    // Each sequence is one admitted claim: none was lost.
    assert_eq!(present(&path).sequence, won);
    assert_eq!(present(&path).epoch, 400);
}

#[test]
fn a_writer_that_is_killed_leaves_a_record_in_force() {
    let (_directory, _, path) = image();
    for round in 1..=20 {
        let from = round * 1000 + 1;
        let mut writer = racer(&path, from);
        while read(&path).unwrap().is_none_or(|record| record.epoch < from + round * 17) {
            std::thread::yield_now();
        }
        writer.kill().unwrap();
        writer.wait().unwrap();
        let left = present(&path);
        assert!(left.epoch >= from + round * 17 && left.epoch < from + 400);
        admit(&path, claim(left.epoch, left.claim), &host("racer")).unwrap();
    }
}

/// This program again, as one that claims an image 200 times.
fn racer(path: &Path, from: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "two_processes_that_race_never_lower_an_epoch", "--nocapture"])
        .env("RACE_FOR", path)
        .env("RACE_FROM", from.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}
