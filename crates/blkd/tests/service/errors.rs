//! Errors of the host reach the guest as errors of its requests, and the disk lives on.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::backend::{ENGINES, Site};
use crate::machine::{Ask, Machine, T_DISCARD};

const OK: u8 = 0;
const IOERR: u8 = 1;

fn every_engine(test: impl Fn(&str)) {
    ENGINES.iter().for_each(|engine| test(engine));
}

#[test]
fn injected_errors_reach_the_guest_and_leave_their_cause() {
    every_engine(|engine| {
        let site = Site::new(1 << 20);
        let mut backend = site.start(&[engine]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        assert_eq!(backend.status()["last_error"], json!(null));
        for (op, ask) in [
            ("read", Ask::read(8, 4096)),
            ("write", Ask::write(8, [1; 4096])),
            ("flush", Ask::flush()),
            ("discard", Ask::trim(T_DISCARD, 8, 8, 0)),
        ] {
            backend.fault(json!({"op": op, "errno": "EIO", "limit": 2}));
            let statuses: Vec<u8> = (0..3).map(|_| machine.ask(&backend, &ask).status).collect();
            // A flush that has failed stands for data that is lost: see `flushes`.
            let end = if op == "flush" { IOERR } else { OK };
            assert_eq!(statuses, [IOERR, IOERR, end], "{op}");
            let error = &backend.status()["last_error"];
            assert_eq!((&error["op"], &error["errno"]), (&json!(op), &json!(libc::EIO)));
            assert!(error["message"].as_str().unwrap().contains("Input/output error"));
            if op != "flush" {
                assert_eq!((&error["offset"], &error["length"]), (&json!(4096), &json!(4096)));
            }
        }
        backend.fault(json!(null));
        assert_eq!(machine.ask(&backend, &Ask::read(8, 4096)).status, OK);
        assert_eq!(backend.status()["counters"]["host_errors"], json!(9));
        assert!(backend.log().contains("ERROR blkd: read failed offset=4096 length=4096"));
        assert!(backend.is_alive());
    });
}

/// A small file system.
pub struct SmallTmpfs(pub PathBuf);

impl SmallTmpfs {
    /// Of so many megabytes.
    ///
    /// # Panics
    /// Where this process may not mount: run the tests as root, or with `unshare -rm`.
    pub fn mount(at: &Path, megabytes: u32) -> Self {
        std::fs::create_dir(at).unwrap();
        let target = CString::new(at.as_os_str().as_bytes()).unwrap();
        let options = CString::new(format!("size={megabytes}m")).unwrap();
        // SAFETY: four C strings that live across the call.
        let mounted = unsafe {
            libc::mount(
                c"none".as_ptr(),
                target.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        assert_eq!(mounted, 0, "no tmpfs mounted: run as root, or with unshare -rm");
        Self(at.to_owned())
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let target = CString::new(self.0.as_os_str().as_bytes()).unwrap();
        // SAFETY: a C string that lives across the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn a_full_file_system_reaches_the_guest_as_an_error_and_room_made_heals_it() {
    every_engine(|engine| {
        let dir = tempfile::Builder::new().prefix("full").tempdir_in("/tmp").unwrap();
        let small = SmallTmpfs::mount(&dir.path().join("small"), 1);
        let image = small.0.join("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let site = Site::on(dir, image);
        let backend = site.start(&[engine]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        let statuses: Vec<u8> = (0..256u64)
            .map(|n| machine.ask(&backend, &Ask::write(n * 16, vec![n as u8; 8192])).status)
            .collect();
        assert_eq!(statuses[0], OK);
        assert_eq!(statuses[255], IOERR, "2 MiB went into 1 MiB");
        let status = backend.status();
        let error = &status["last_error"];
        assert_eq!((&error["op"], &error["errno"]), (&json!("write"), &json!(libc::ENOSPC)));
        assert!(error["message"].as_str().unwrap().contains("No space left"), "{error}");
        // What was written before is there, and what is freed can be used.
        assert_eq!(machine.ask(&backend, &Ask::read(16, 8192)).data, [1; 8192]);
        assert_eq!(machine.ask(&backend, &Ask::trim(T_DISCARD, 0, 256, 0)).status, OK);
        assert_eq!(machine.ask(&backend, &Ask::write(255 * 16, [7; 8192])).status, OK);
        drop(backend);
        drop(site);
        drop(small);
    });
}

#[test]
fn an_image_truncated_under_us_gives_errors_and_never_ends_the_process() {
    every_engine(|engine| truncated(&Site::new(1 << 20), engine));
    every_engine(|engine| truncated(&Site::on_tmpfs(1 << 20), engine));
}

fn truncated(site: &Site, engine: &str) {
    std::fs::write(&site.image, vec![3; 1 << 20]).unwrap();
    let mut backend = site.start(&[engine]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::read(2040, 4096)).status, OK);
    let image = std::fs::OpenOptions::new().write(true).open(&site.image).unwrap();
    image.set_len(1 << 19).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::read(2040, 4096)).status, IOERR);
    let across = machine.ask(&backend, &Ask::read(1020, 4096));
    assert_eq!(across.status, IOERR);
    assert_eq!(machine.ask(&backend, &Ask::read(0, 4096)).data, [3; 4096]);
    let error = backend.status()["last_error"].clone();
    assert_eq!((&error["op"], &error["errno"]), (&json!("read"), &json!(libc::EIO)));
    assert!(backend.is_alive());
}

#[test]
fn a_delay_is_no_error() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    backend.fault(json!({"op": "any", "delay_ms": 30, "every": 2}));
    for n in 0..4u64 {
        assert_eq!(machine.ask(&backend, &Ask::write(n, [1; 512])).status, OK);
    }
    assert_eq!(backend.status()["last_error"], json!(null));
}

#[test]
fn nonsense_on_the_control_socket_is_answered() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    for (request, word) in [
        (json!({"id": 7, "cmd": "dance"}), "unknown command"),
        (json!({"id": 7, "cmd": "fault", "rule": {"op": "sing"}}), "unknown operation"),
        (json!({"id": 7, "cmd": "fault", "rule": {"errno": "EVIL"}}), "unknown errno"),
        (json!([1, 2]), "not a request"),
        (json!({"id": 7}), "cmd"),
    ] {
        let answer = backend.control(&request);
        assert_eq!(answer["error"]["kind"], json!("invalid"));
        assert!(answer["error"]["message"].as_str().unwrap().contains(word), "{answer}");
    }
    assert_eq!(backend.status()["state"], json!("listening"));
}
