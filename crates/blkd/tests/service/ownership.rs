//! The image lock, the spare, and the end on request.

use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use serde_json::json;

use crate::backend::{Backend, ENGINES, Site, blk_file, run, wait_until};
use crate::machine::{Ask, Machine, Waited};

/// Locks one byte of the image as another program would; gives the file that holds the lock.
fn lock_byte(site: &Site, kind: i32, byte: i64) -> std::fs::File {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(&site.image)
        .unwrap();
    set_lock(&file, kind, byte);
    file
}

fn set_lock(file: &std::fs::File, kind: i32, byte: i64) {
    use std::os::fd::AsRawFd;
    // SAFETY: flock is plain data; the call reads it.
    let locked = unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        (lock.l_type, lock.l_start, lock.l_len) = (kind as i16, byte, 1);
        libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock)
    };
    assert_eq!(locked, 0);
}

#[test]
fn a_second_backend_is_refused_and_told_who_has_the_image() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    backend.wait_status("/state", &json!("listening"));
    let socket = format!("--socket-path={}", site.path("other.sock").display());
    for reader in [false, true] {
        let mut arguments = vec![socket.clone(), blk_file(&site.image)];
        if reader {
            arguments.push("--read-only".to_owned());
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (code, _, said) = run(&arguments);
        assert_eq!(code, 3, "{said}");
        let holder = format!("semper-blkd (pid {})", backend.pid());
        assert!(said.contains(&holder) && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let site = Site::new(1 << 20);
    let first = site.start(&["--read-only"]);
    let second = site.start(&["--read-only"]);
    first.wait_status("/state", &json!("listening"));
    second.wait_status("/state", &json!("listening"));
    let socket = format!("--socket-path={}", site.path("other.sock").display());
    let (code, _, said) = run(&[&socket, &blk_file(&site.image)]);
    assert_eq!(code, 3, "{said}");
}

#[test]
fn what_qemu_locks_we_respect() {
    let site = Site::new(1 << 20);
    let socket = format!("--socket-path={}", site.path("other.sock").display());
    let arguments = [socket.as_str(), &blk_file(&site.image)];
    // Byte 201: "others may not write"; byte 101: "I write".
    for byte in [201, 101] {
        let held = lock_byte(&site, libc::F_RDLCK, byte);
        let (code, _, said) = run(&arguments);
        assert_eq!(code, 3, "byte {byte}: {said}");
        // Not by closing the file: a test beside this one may be about to start a program with a copy of it.
        set_lock(&held, libc::F_UNLCK, byte);
    }
    let backend = site.start(&[]);
    backend.wait_status("/state", &json!("listening"));
}

#[test]
fn what_we_lock_qemu_respects() {
    let qemu_img = |arguments: &[&str]| {
        let output = Command::new("qemu-img").args(arguments).output().ok()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Some((output.status.success(), said))
    };
    let site = Site::new(1 << 20);
    let image = site.image.to_str().unwrap();
    if qemu_img(&["--version"]).is_none() {
        eprintln!("no qemu-img here; `what_qemu_locks_we_respect` covers the bytes");
        return;
    }
    let copy = site.path("copy").to_str().unwrap().to_owned();
    let resize = ["resize", "-f", "raw", image, "2M"];
    let convert = ["convert", "-f", "raw", "-O", "raw", image, &copy];
    let backend = site.start(&[]);
    backend.wait_status("/state", &json!("listening"));
    for command in [&convert[..], &resize[..]] {
        let (worked, said) = qemu_img(command).unwrap();
        assert!(!worked && said.contains("lock"), "{command:?}: {said}");
    }
    drop(backend);
    for command in [&convert[..], &resize[..]] {
        assert_eq!(qemu_img(command).unwrap(), (true, String::new()));
    }
}

#[test]
fn a_spare_takes_over_by_itself_when_the_active_process_is_killed() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let mut active = site.start(&[engine]);
        active.wait_status("/state", &json!("listening"));
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        let mut expected = [0u8; 12];
        for round in 0..5u8 {
            let spare = site.start(&[engine, "--spare"]);
            let status = wait_until("a spare that is ready", || {
                Some(spare.status()).filter(|s| s["timeline_ns"]["spare_ready"].is_u64())
            });
            assert_eq!(status["state"], json!("spare"));
            assert_eq!(status["timeline_ns"]["lock_acquired"], json!(null));
            // Some of these are in the middle of it when the process dies.
            active.fault(json!({"op": "write", "delay_ms": 20, "every": 3}));
            for (n, slot) in expected.iter_mut().enumerate() {
                *slot = round * 12 + n as u8 + 1;
                machine.submit(0, &Ask::write(n as u64 * 8, vec![*slot; 4096]));
            }
            active.kill();
            machine.disconnect();
            machine.connect(&site.socket()).unwrap();
            assert_eq!(machine.wait_all(&spare), Waited::Answered);
            for (n, value) in expected.iter().enumerate() {
                let answer = machine.ask(&spare, &Ask::read(n as u64 * 8, 4096));
                assert_eq!(answer.data, vec![*value; 4096], "{engine} round {round} block {n}");
            }
            active = spare;
        }
    }
}

#[test]
fn of_two_spares_one_takes_over_and_the_other_waits_on() {
    let site = Site::new(1 << 20);
    let mut active = site.start(&[]);
    active.wait_status("/state", &json!("listening"));
    let spares = [site.start(&["--spare"]), site.start(&["--spare"])];
    for spare in &spares {
        spare.wait_status("/state", &json!("spare"));
    }
    active.kill();
    wait_until("one of two", || {
        let serving = spares.iter().filter(|s| s.status()["state"] == json!("listening"));
        (serving.count() == 1).then_some(())
    });
    let waiting = spares.iter().filter(|s| s.status()["state"] == json!("spare"));
    assert_eq!(waiting.count(), 1);
}

/// The kernel ends the I/O of a killed process, and frees its locks, some time after the process is
/// gone. A backend that is started in between waits for that instead of giving up.
#[test]
fn a_killed_backend_can_be_replaced_at_once() {
    let site = Site::new(1 << 20);
    let mut machine = Machine::new(1, 64);
    for round in 0..20u8 {
        let mut backend = site.start(&["--engine=uring"]);
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.wait_all(&backend), Waited::Answered);
        (0..8).for_each(|n| _ = machine.submit(0, &Ask::write(n * 8, vec![round; 4096])));
        backend.kill();
        machine.disconnect();
    }
}

#[test]
fn a_spare_ends_when_told_to() {
    let site = Site::new(1 << 20);
    let active = site.start(&[]);
    active.wait_status("/state", &json!("listening"));
    let mut spare = site.start(&["--spare"]);
    spare.wait_status("/state", &json!("spare"));
    assert_eq!(spare.terminate().code(), Some(0));
    assert_eq!(active.status()["state"], json!("listening"));
}

#[test]
fn sigterm_finishes_what_is_in_flight() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let mut backend = site.start(&[engine]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        backend.fault(json!({"op": "any", "delay_ms": 10}));
        let tickets: Vec<_> =
            (0..8).map(|n| machine.submit(0, &Ask::write(n, [n as u8 + 1; 512]))).collect();
        assert_eq!(backend.terminate().code(), Some(0));
        machine.reap();
        // What it had taken it has answered; what it had not, the next one takes: no replay.
        let answered = tickets.iter().filter(|ticket| machine.is_answered(**ticket)).count();
        let next = site.start(&[engine]);
        machine.disconnect();
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.wait_all(&next), Waited::Answered);
        assert_eq!(next.status()["counters"]["replayed"], json!(0), "{answered} were answered");
        assert!(backend.log().contains("everything in flight was finished"));
    }
}

/// The process that shares the backend's memory.
fn memory_reaper(backend: &Backend) -> i32 {
    beside(backend, "blkd-reaper")
}

/// The process of that name which the backend has started.
fn beside(backend: &Backend, name: &str) -> i32 {
    let pid = backend.pid();
    let children = format!("/proc/{pid}/task/{pid}/children");
    wait_until(name, || {
        let children = std::fs::read_to_string(&children).unwrap();
        let named = |child: &&str| {
            let told = std::fs::read_to_string(format!("/proc/{child}/comm"));
            told.is_ok_and(|told| told.trim_end() == name)
        };
        children.split_whitespace().find(named)?.parse().ok()
    })
}

fn is_gone(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.is_empty() || stat.contains(") Z ")
}

#[test]
fn the_lock_is_free_before_the_memory_of_the_dead_process_is() {
    for &engine in ENGINES {
        let site = Site::on_tmpfs(1 << 20);
        let mut active = site.start(&[engine]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        // So that the image and the guest's memory are in the page tables.
        assert_eq!(machine.ask(&active, &Ask::write(0, [1; 4096])).status, 0);
        let reaper = memory_reaper(&active);
        wait_until("a reaper with nothing but what tells it of the end", || {
            let files = std::fs::read_dir(format!("/proc/{reaper}/fd")).unwrap().count();
            (files == 1).then_some(())
        });
        let spare = site.start(&[engine, "--spare"]);
        spare.wait_status("/state", &json!("spare"));
        // SAFETY: signals to a process of ours.
        unsafe { libc::kill(reaper, libc::SIGSTOP) };
        active.kill();
        wait_until("the lock", || {
            spare.status()["timeline_ns"]["lock_acquired"].is_u64().then_some(())
        });
        assert!(!is_gone(reaper));
        // SAFETY: as above.
        unsafe { libc::kill(reaper, libc::SIGCONT) };
        wait_until("the end of the reaper", || is_gone(reaper).then_some(()));
        machine.disconnect();
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.ask(&spare, &Ask::read(0, 4096)).data, [1; 4096]);
    }
}

#[test]
fn a_backend_without_the_processes_beside_it_serves_on() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    for (at, name) in ["blkd-reaper", "semper-connects"].into_iter().enumerate() {
        let beside = beside(&backend, name);
        // SAFETY: a signal to a process of ours.
        unsafe { libc::kill(beside, libc::SIGKILL) };
        wait_until("its end", || is_gone(beside).then_some(()));
        assert_eq!(machine.ask(&backend, &Ask::write(at as u64 * 8, [1; 4096])).status, 0);
        machine.disconnect();
        machine.connect(&site.socket()).unwrap();
        assert_eq!(machine.ask(&backend, &Ask::read(at as u64 * 8, 4096)).data, [1; 4096]);
    }
}
