//! What a process that was taken over by its guest can do to its host: nothing of this list.

use std::fs::File;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::backend::{ENGINES, Site, program, wait_until};

/// Ended by the test.
struct Bystander(Child);

impl Bystander {
    fn start() -> Self {
        Self(Command::new("sleep").arg("600").spawn().unwrap())
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the program says that tries `name` on `at` from where it would serve.
fn try_it(site: &Site, name: &str, at: &str, walls: &str) -> String {
    let output = program()
        .arg(format!("--socket-path={}", site.path("front").display()))
        .arg(format!("--blk-file={}", site.image.display()))
        .arg(format!("--control-socket={}", site.path("control").display()))
        .arg(format!("--session-socket={}", site.path("session").display()))
        .arg("--engine=nowait")
        .envs([("SEMPER_BREAKOUT", name), ("SEMPER_BREAKOUT_AT", at), ("SEMPER_WALLS", walls)])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let _ = std::fs::remove_file(site.path("front"));
    let _ = std::fs::remove_file(site.path("control"));
    String::from_utf8_lossy(&said).into_owned()
}

/// Refused by Landlock or seccomp; and without walls it can be done, by root.
fn is_refused(site: &Site, name: &str, at: &str) {
    let said = try_it(site, name, at, "all");
    let refused = ["refused: ", "is none that this program makes"];
    assert!(refused.iter().any(|word| said.contains(word)), "{name} {at}: {said}");
    assert!(!said.contains("broke out"), "{name} {at}: {said}");
    let said = try_it(site, name, at, "none");
    assert!(said.contains("broke out"), "the control, {name} {at}: {said}");
}

#[test]
fn files_of_others_are_out_of_reach() {
    let site = Site::new(1 << 20);
    let other = Site::new(1 << 20);
    let bystander = Bystander::start();
    let new = other.path("new").to_string_lossy().into_owned();
    is_refused(&site, "read", "/etc/shadow");
    is_refused(&site, "read", &other.image.to_string_lossy());
    is_refused(&site, "write", &other.image.to_string_lossy());
    is_refused(&site, "list", "/etc");
    is_refused(&site, "create", &new);
    is_refused(&site, "remove", &new);
    is_refused(&site, "memory", &bystander.pid());
    is_refused(&site, "root", &bystander.pid());
}

#[test]
fn processes_and_sockets_of_others_are_out_of_reach() {
    let site = Site::new(1 << 20);
    let bystander = Bystander::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("semper-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    is_refused(&site, "trace", &bystander.pid());
    is_refused(&site, "signal", &bystander.pid());
    is_refused(&site, "abstract", &name);
    is_refused(&site, "tcp", &listener.local_addr().unwrap().port().to_string());
    is_refused(&site, "udp", "");
    // With a path, as QEMU's monitor has one: no wall of this kernel knows which.
    let (monitor, log) = (site.path("monitor"), site.path("log"));
    let _monitor = UnixListener::bind(&monitor).unwrap();
    let _log = UnixDatagram::bind(&log).unwrap();
    is_refused(&site, "path", &monitor.to_string_lossy());
    is_refused(&site, "datagram", &log.to_string_lossy());
    is_refused(&site, "pair", &log.to_string_lossy());
}

#[test]
fn the_kernel_is_asked_for_nothing_else() {
    let site = Site::new(1 << 20);
    for call in
        ["fork", "bpf", "mount", "namespace", "ring", "userfaultfd", "code", "device", "owner"]
    {
        is_refused(&site, call, "/tmp");
    }
    is_refused(&site, "execute", "/bin/echo");
    // Not every kernel has modules, or lets root load them.
    if try_it(&site, "module", "", "none").contains("broke out") {
        is_refused(&site, "module", "");
    }
    // The control from the other side: what a program does all the time is not in the way.
    assert!(try_it(&site, "thread", "", "all").contains("broke out"));
    assert!(try_it(&site, "read", &site.image.to_string_lossy(), "all").contains("broke out"));
}

#[test]
fn a_refused_call_and_a_panic_leave_a_trace() {
    let site = Site::new(1 << 20);
    let said = try_it(&site, "userfaultfd", "", "all");
    let number = format!("system call {} is none", libc::SYS_userfaultfd);
    assert!(said.lines().last().unwrap().contains(&number), "{said}");
    let output = program()
        .arg(format!("--socket-path={}", site.path("front").display()))
        .arg(format!("--blk-file={}", site.image.display()))
        .envs([("SEMPER_BREAKOUT", "panic"), ("RUST_BACKTRACE", "1")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("told to") && said.contains("serve.rs"), "{said}");
    assert!(!said.contains("system call"), "{said}");
}

/// What the kernel says of a process and of each of its threads.
fn kernel_says(pid: u32, field: &str) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut values = Vec::new();
    for thread in threads.flatten() {
        let status = std::fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        values.extend(
            status
                .lines()
                .filter_map(|line| line.strip_prefix(field).map(|value| value.trim().to_owned())),
        );
    }
    values
}

#[test]
fn every_thread_is_behind_the_walls_and_so_are_the_processes_beside() {
    for engine in ENGINES {
        let site = Site::new(1 << 20);
        let session = format!("--session-socket={}", site.path("session").display());
        let options = [*engine, "--num-queues=2", "--threads=2", session.as_str()];
        let active = site.start(&options);
        active.wait_status("/standing", &json!("held"));
        let spare = site.start(&[&options[..], &["--spare"]].concat());
        spare.wait_status("/standing", &json!("waiting"));
        for process in [&active, &spare] {
            for (field, value) in [
                ("NoNewPrivs:", "1"),
                ("Seccomp:", "2"),
                ("CapPrm:", "0000000000000000"),
                ("CapEff:", "0000000000000000"),
                ("CapBnd:", "0000000000000000"),
            ] {
                let values = kernel_says(process.pid(), field);
                assert!(values.len() > 3, "{values:?}");
                assert!(values.iter().all(|found| found == value), "{field}: {values:?}");
            }
            assert_eq!(process.status()["walls"]["seccomp"], json!(true));
        }
        for process in [&active, &spare] {
            for name in ["blkd-reaper", "semper-connects"] {
                let seccomp = kernel_says(beside(name, process.pid()), "Seccomp:");
                assert_eq!(seccomp, ["2"], "{engine} {name}");
            }
        }
    }
}

#[test]
fn the_process_that_connects_has_no_file_of_the_image_and_dies_with_the_backend() {
    let site = Site::new(1 << 20);
    let session = format!("--session-socket={}", site.path("session").display());
    let mut active = site.start(&[session.as_str()]);
    active.wait_status("/standing", &json!("held"));
    let connects = beside("semper-connects", active.pid());
    let files = std::fs::read_dir(format!("/proc/{connects}/fd")).unwrap().flatten();
    let files: Vec<_> = files.filter_map(|it| it.path().read_link().ok()).collect();
    // The link, and stderr: neither the image, whose lock it would share, nor the door.
    assert_eq!(files.len(), 2, "{files:?}");
    assert!(files.iter().all(|file| *file != site.image), "{files:?}");
    for field in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(kernel_says(connects, field), ["0000000000000000"]);
    }
    active.kill();
    wait_until("the end of the process that connects", || {
        let stat = std::fs::read_to_string(format!("/proc/{connects}/stat"));
        stat.map_or(true, |stat| stat.contains(") Z ")).then_some(())
    });
}

/// The process of that name beside a backend: what will take its memory apart, for example.
fn beside(name: &str, parent: u32) -> u32 {
    wait_until(name, || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let mut numbers = processes.filter_map(|it| it.file_name().to_str()?.parse().ok());
        numbers.find(|&pid| {
            std::fs::read_to_string(format!("/proc/{pid}/stat"))
                .is_ok_and(|stat| stat.contains(&format!("({name}) S {parent} ")))
        })
    })
}

#[test]
fn an_image_of_another_user_costs_one_capability() {
    let site = Site::new(1 << 20);
    std::os::unix::fs::chown(&site.image, Some(65534), Some(65534)).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    File::open(&site.image).unwrap().set_permissions(mode).unwrap();
    let backend = site.start(&[]);
    backend.wait_status("/standing", &json!("held"));
    assert_eq!(backend.status()["walls"]["capabilities"], json!("dac_override"));
    let values = kernel_says(backend.pid(), "CapEff:");
    assert!(values.iter().all(|value| value == "0000000000000002"), "{values:?}");
}
