//! For tests alone (feature `breakout`): the program tries to break out of its own walls.
//!
//! ```text
//!   SEMPER_BREAKOUT=NAME       what is tried, once the program has begun
//!   SEMPER_BREAKOUT_AT=WHAT    the path, process, port or name that it is tried on
//!   SEMPER_WALLS=none          the control: without walls
//! ```
//!
//! It prints `broke out` or `refused: CAUSE`, and ends.

use std::fs::File;
use std::io::{self, Read};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Whether the program is to have no walls.
pub fn without_walls() -> bool {
    std::env::var("SEMPER_WALLS").is_ok_and(|walls| walls == "none")
}

/// Tries what it is told, and ends; returns if it is told nothing.
///
/// # Panics
/// When it is told to try something that it does not know.
pub fn try_if_told() {
    let Ok(name) = std::env::var("SEMPER_BREAKOUT") else { return };
    let at = std::env::var("SEMPER_BREAKOUT_AT").unwrap_or_default();
    match attempt(&name, &at) {
        Ok(()) => println!("broke out"),
        Err(error) => println!("refused: {error}"),
    }
    std::process::exit(0);
}

fn attempt(name: &str, at: &str) -> io::Result<()> {
    let pid = || at.parse::<i32>().expect("a process");
    match name {
        "read" => File::open(at)?.read(&mut [0]).map(drop),
        "write" => File::options().write(true).open(at).map(drop),
        "create" => File::create_new(at).map(drop),
        "remove" => std::fs::remove_file(at),
        "list" => std::fs::read_dir(at).map(drop),
        "memory" => File::open(format!("/proc/{at}/mem")).map(drop),
        "root" => File::open(format!("/proc/{at}/root/etc/hostname")).map(drop),
        "udp" => UdpSocket::bind("127.0.0.1:0").map(drop),
        "tcp" => TcpStream::connect(format!("127.0.0.1:{at}")).map(drop),
        "abstract" => {
            UnixStream::connect_addr(&SocketAddr::from_abstract_name(at.as_bytes())?).map(drop)
        }
        "path" => UnixStream::connect(at).map(drop),
        "datagram" => UnixDatagram::unbound()?.send_to(b"broke out", at).map(drop),
        // Connected to each other, and yet they may send to others.
        "pair" => UnixDatagram::pair()?.0.send_to(b"broke out", at).map(drop),
        // /bin/echo, for example.
        "execute" => Err(Command::new(at).arg("broke out").exec()),
        "thread" => std::thread::Builder::new().spawn(|| ()).map(drop),
        "panic" => panic!("told to"),
        _ => by_call(name, at, pid),
    }
}

/// What has no function in the standard library. Some calls are made so that they fail behind the
/// question whether they may be made.
fn by_call(name: &str, at: &str, pid: impl Fn() -> i32) -> io::Result<()> {
    let text = format!("{at}\0");
    let path = text.as_ptr();
    let mut zeros = [0u64; 32];
    let anything = zeros.as_mut_ptr();
    // SAFETY: system calls with pointers that live across them; what they change is this process,
    // which ends, or what the test has made for it.
    let (status, behind) = unsafe {
        match name {
            "fork" => match libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) {
                0 => libc::_exit(0),
                pid => (pid, 0),
            },
            "trace" => (libc::syscall(libc::SYS_ptrace, libc::PTRACE_SEIZE, pid(), 0, 0), 0),
            "signal" => (libc::syscall(libc::SYS_kill, pid(), libc::SIGCONT), 0),
            "module" => {
                // Garbage: whoever may load modules is told that this is none.
                let garbage = libc::memfd_create(c"garbage".as_ptr(), 0);
                let loaded = libc::syscall(libc::SYS_finit_module, garbage, c"".as_ptr(), 0);
                (loaded, libc::EINVAL)
            }
            "bpf" => {
                // An array of one entry.
                *anything.cast::<[u32; 4]>() = [2, 4, 8, 1];
                (libc::syscall(libc::SYS_bpf, 0, anything, 64), 0)
            }
            "mount" => {
                let fs = c"no such file system".as_ptr();
                (libc::syscall(libc::SYS_mount, path, path, fs, 0, 0), libc::ENODEV)
            }
            "namespace" => (libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUTS), 0),
            "ring" => (libc::syscall(libc::SYS_io_uring_setup, 8, anything), 0),
            "userfaultfd" => (libc::syscall(libc::SYS_userfaultfd, 0), 0),
            "code" => {
                let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
                let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                (libc::syscall(libc::SYS_mmap, 0, 4096, access, kind, -1, 0), 0)
            }
            "device" => {
                // TIOCSTI puts words into the mouth of whoever uses a terminal; on a file it is
                // the wrong ioctl.
                let file = File::open("/proc/self/stat")?;
                (libc::syscall(libc::SYS_ioctl, file.as_raw_fd(), 0x5412, path), libc::ENOTTY)
            }
            "owner" => (libc::syscall(libc::SYS_setuid, 0), 0),
            _ => panic!("no such attempt: {name}"),
        }
    };
    let error = io::Error::last_os_error();
    if status >= 0 || behind != 0 && error.raw_os_error() == Some(behind) {
        return Ok(());
    }
    Err(error)
}
