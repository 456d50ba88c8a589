//! PID 1: from the kernel's first call to the control loop.
//!
//! ```text
//!   mounts ──► modules that match ──► the port org.sempervirt.probe ──► control loop, for ever
//!                   ▲                        │ not there yet
//!                   └────────────────────────┘
//! ```
//!
//! It never returns: if it cannot go on, it says why on the console and powers the machine off, for a
//! kernel whose PID 1 ends only panics.
//!
//! In a guest with a PID 1 of its own (`serve`) mounts, modules and shell are that one's business, and
//! an end is an end.

use std::convert::Infallible;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::panic;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

use crate::control::Control;
use crate::link::Link;
use crate::modules;
use crate::program::BUSYBOX;
use crate::subject::Role;

/// Name of the virtio-serial port.
pub const PORT: &str = "org.sempervirt.probe";
const NONE: Option<&CStr> = None;

/// The shell on the console, while one runs.
static SHELL: Mutex<Option<Child>> = Mutex::new(None);

fn mount_all() -> io::Result<()> {
    let nodev = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    for (source, target, flags) in [
        ("proc", "/proc", nodev),
        ("sysfs", "/sys", nodev),
        ("devtmpfs", "/dev", MountFlags::NOSUID),
        ("tmpfs", "/tmp", MountFlags::NOSUID),
    ] {
        let _ = fs::create_dir_all(target);
        match mount(source, target, source, flags, NONE) {
            // The kernel mounts /dev by itself where it is configured to.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(errno) => return Err(io::Error::other(format!("mount {target}: {errno}"))),
        }
    }
    Ok(())
}

/// A guest that hangs must say so: within 30 s, and every time.
fn set_timeouts() {
    for (name, value) in [
        ("hung_task_timeout_secs", "30"),
        ("hung_task_check_interval_secs", "5"),
        ("hung_task_warnings", "-1"),
        ("printk_devkmsg", "on"),
    ] {
        // Not every kernel has every one of them.
        let _ = fs::write(format!("/proc/sys/kernel/{name}"), value);
    }
}

fn find_port() -> Option<PathBuf> {
    let entries = fs::read_dir("/sys/class/virtio-ports").ok()?;
    for entry in entries.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT {
            return Some(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    None
}

fn wait_for_port() -> io::Result<Link> {
    loop {
        modules::load_matching();
        if let Some(path) = find_port() {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            match open(&path, flags, Mode::empty()) {
                Ok(fd) => return Ok(Link::new(fd)),
                Err(rustix::io::Errno::NOENT) => {}
                Err(errno) => {
                    return Err(io::Error::other(format!("{}: {errno}", path.display())));
                }
            }
        }
        housekeeping();
        thread::sleep(Duration::from_millis(5));
    }
}

fn wants_shell() -> bool {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    cmdline.split_whitespace().any(|word| word == "semper.shell")
}

fn start_shell() {
    let script = "exec setsid -c sh -l <>/dev/ttyS0 >&0 2>&1";
    let child = Command::new(BUSYBOX)
        .args(["sh", "-c", script])
        .env("PATH", "/bin")
        .env("PS1", "guest:\\w# ")
        .spawn();
    match child {
        Ok(child) => *SHELL.lock().expect("a thread that panics ends the probe") = Some(child),
        Err(error) => eprintln!("semper-probe: no shell: {error}"),
    }
}

/// Starts the shell again when it ended. Orphans are not buried: a wait for any child would take away
/// the exit status that a job waits for, and what little runs here leaves few.
fn housekeeping() {
    let mut shell = SHELL.lock().expect("a thread that panics ends the probe");
    let ended = shell.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(Some(_))));
    drop(shell.take_if(|_| ended));
    drop(shell);
    if ended {
        start_shell();
    }
}

fn draw_nonce() -> io::Result<u128> {
    let mut bytes = [0; 16];
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u128::from_ne_bytes(bytes))
}

/// Serves the port for as long as the machine lives.
pub fn serve() -> io::Result<Infallible> {
    set_timeouts();
    let mut control = Control::new(Role::Guest, draw_nonce()?, housekeeping)?;
    let mut link = wait_for_port()?;
    loop {
        control.serve(&mut link)?;
    }
}

fn live() -> io::Result<Infallible> {
    mount_all()?;
    if wants_shell() {
        start_shell();
    }
    serve()
}

fn power_off(cause: &str) -> ! {
    eprintln!("semper-probe: cannot go on, powering off: {cause}");
    let _ = reboot(RebootCommand::PowerOff);
    std::process::abort();
}

/// Is PID 1 until the machine ends.
pub fn run() -> ! {
    panic::set_hook(Box::new(|info| power_off(&info.to_string())));
    match live() {
        Ok(never) => match never {},
        Err(error) => power_off(&error.to_string()),
    }
}
