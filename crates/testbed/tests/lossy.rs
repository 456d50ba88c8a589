//! The file system that loses what was not flushed loses just that.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use semper_testbed::Lossy;

#[test]
fn what_was_flushed_is_left_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let lossy = Lossy::mount(place.path());
    let path = lossy.put("disk.raw", vec![1; 8192]);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(&[2; 4096], 0).unwrap();
    assert_eq!(fs::read(&path).unwrap()[..4096], [2; 4096]);
    assert_eq!(lossy.after_power_cut("disk.raw").unwrap(), [1; 8192]);
    file.sync_data().unwrap();
    let left = lossy.after_power_cut("disk.raw").unwrap();
    assert!(left[..4096] == [2; 4096] && left[4096..] == [1; 4096]);
}

#[test]
fn a_name_is_left_when_its_directory_was_flushed() {
    let place = tempfile::tempdir().unwrap();
    let lossy = Lossy::mount(place.path());
    lossy.put("record", b"old".to_vec());
    let scratch = place.path().join("scratch");
    fs::write(&scratch, "new").unwrap();
    fs::rename(&scratch, place.path().join("record")).unwrap();
    assert_eq!(fs::read(place.path().join("record")).unwrap(), b"new");
    assert_eq!(lossy.after_power_cut("record").unwrap(), b"old");
    // The classic: the name is there, and what it names is not.
    assert_eq!(lossy.after_power_cut_with_names("record").unwrap(), b"");
    File::open(place.path().join("record")).unwrap().sync_all().unwrap();
    assert_eq!(lossy.after_power_cut("record").unwrap(), b"old");
    File::open(place.path()).unwrap().sync_all().unwrap();
    assert_eq!(lossy.after_power_cut("record").unwrap(), b"new");
}

#[test]
fn a_flush_that_fails_is_told_once() {
    let place = tempfile::tempdir().unwrap();
    let lossy = Lossy::mount(place.path());
    let file = File::options().write(true).open(lossy.put("disk.raw", vec![1; 4096])).unwrap();
    file.write_all_at(&[2; 512], 0).unwrap();
    lossy.fail_flushes(1);
    assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(lossy.after_power_cut("disk.raw").unwrap(), [1; 4096]);
    file.sync_data().unwrap();
    assert_eq!(lossy.after_power_cut("disk.raw").unwrap(), [1; 4096], "and all seems well");
}
