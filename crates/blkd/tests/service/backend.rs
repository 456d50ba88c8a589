//! A disk image with a listening socket, and the processes of `semper-blkd` that serve it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything in these tests may take before it counts as hung.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// Every engine that does I/O, as an option.
pub const ENGINES: &[&str] = &[
    "--engine=sync",
    "--engine=nowait",
    "--engine=uring",
    #[cfg(target_arch = "x86_64")]
    "--engine=mmap",
];

/// Waits until `condition` gives a value.
///
/// # Panics
/// When it has not done so by the deadline.
pub fn wait_until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(1)); // poll interval
    }
}

/// The place of one disk: its image, and the socket that outlives its backends.
pub struct Site {
    dir: TempDir,
    /// The image.
    pub image: PathBuf,
    /// How many descriptors a backend may open unless it asks for more.
    pub descriptors: Option<u64>,
    listener: UnixListener,
}

impl Site {
    /// A disk of `size` zero bytes in a directory of its own.
    pub fn new(size: u64) -> Self {
        Self::within("/tmp", size)
    }

    /// As [`Site::new`], on tmpfs, which the mapped engine also writes through the mapping.
    pub fn on_tmpfs(size: u64) -> Self {
        Self::within("/dev/shm", size)
    }

    fn within(place: &str, size: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("blkd").tempdir_in(place).unwrap();
        let image = dir.path().join("disk.raw");
        File::create(&image).unwrap().set_len(size).unwrap();
        Self::on(dir, image)
    }

    /// Another place for the same image, as on another host.
    pub fn sharing(image: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("blkd").tempdir_in("/tmp").unwrap();
        Self::on(dir, image.to_owned())
    }

    /// As [`Site::new`], on an image that exists.
    pub fn on(dir: TempDir, image: PathBuf) -> Self {
        let listener = UnixListener::bind(dir.path().join("vhost.sock")).unwrap();
        Self { dir, image, descriptors: None, listener }
    }

    /// A path in the disk's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where front ends connect.
    pub fn socket(&self) -> PathBuf {
        self.path("vhost.sock")
    }

    /// Starts a backend on the inherited socket, with these further options.
    pub fn start(&self, options: &[&str]) -> Backend {
        self.start_in(options, &[])
    }

    /// As [`Site::start`], with variables in its environment.
    pub fn start_in(&self, options: &[&str], environment: &[(&str, &str)]) -> Backend {
        let fd = self.listener.as_raw_fd();
        let control = self.path(&format!("ctl-{}", sequence()));
        let log = control.with_extension("log");
        let mut command = program();
        command
            .arg(format!("--fd={fd}"))
            .arg(format!("--blk-file={}", self.image.display()))
            .arg(format!("--control-socket={}", control.display()))
            .args(options)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap());
        let descriptors = self.descriptors;
        // SAFETY: the system calls are async-signal-safe and touch one local variable.
        unsafe {
            command.pre_exec(move || {
                libc::fcntl(fd, libc::F_SETFD, 0);
                if let Some(most) = descriptors {
                    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                    libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
                    limit.rlim_cur = most;
                    libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        // SAFETY: a new descriptor that nobody else owns.
        let pidfd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, child.id(), 0);
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd as i32)
        };
        Backend { child, pidfd, control, log }
    }
}

/// A number that no other backend of this process has.
fn sequence() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The program under test.
pub fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_semper-blkd"))
}

/// A process of `semper-blkd`; it is killed when the value goes.
pub struct Backend {
    child: Child,
    pidfd: OwnedFd,
    control: PathBuf,
    log: PathBuf,
}

impl Backend {
    /// Its process identifier.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Becomes readable when the process has ended.
    pub fn pidfd(&self) -> i32 {
        self.pidfd.as_raw_fd()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and what became of it.
    pub fn terminate(&mut self) -> ExitStatus {
        // SAFETY: a signal to a child that was not waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        self.wait_exit()
    }

    /// Waits until the process has ended by itself.
    pub fn wait_exit(&mut self) -> ExitStatus {
        wait_until("the end of the backend", || self.child.try_wait().unwrap())
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Its control socket, once it is there.
    pub fn control_path(&self) -> &Path {
        wait_until("the control socket", || UnixStream::connect(&self.control).ok());
        &self.control
    }

    /// A connection to its control socket, unless it is dead.
    pub fn try_connect(&self) -> Option<UnixStream> {
        UnixStream::connect(&self.control).ok()
    }

    /// One request on its control socket, and the answer.
    pub fn control(&self, request: &Value) -> Value {
        let mut stream =
            wait_until("the control socket", || UnixStream::connect(&self.control).ok());
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// The same with a process that may die meanwhile: then there is no answer.
    #[cfg(feature = "crash-points")]
    pub fn try_control(&self, request: &Value) -> Option<Value> {
        let mut stream = self.try_connect()?;
        stream.set_read_timeout(Some(DEADLINE)).ok()?;
        stream.write_all(format!("{request}\n").as_bytes()).ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    /// Its state and counters.
    pub fn status(&self) -> Value {
        self.control(&json!({"id": 1, "cmd": "status"}))["ok"].clone()
    }

    /// Puts a fault rule into force, or none.
    pub fn fault(&self, rule: Value) {
        let answer = self.control(&json!({"id": 2, "cmd": "fault", "rule": rule}));
        assert_eq!(answer, json!({"id": 2, "ok": {}}));
    }

    /// Moves its queues to these threads.
    pub fn rebind(&self, map: &[u16]) {
        let answer = self.control(&json!({"id": 3, "cmd": "threads", "map": map}));
        assert_eq!(answer, json!({"id": 3, "ok": {"map": map}}));
    }

    /// Waits until its status has `value` at `pointer`.
    pub fn wait_status(&self, pointer: &str, value: &Value) -> Value {
        wait_until(&format!("{pointer} = {value}"), || {
            Some(self.status()).filter(|status| status.pointer(pointer) == Some(value))
        })
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of {}:\n{}", self.child.id(), self.log());
        }
    }
}

/// Runs the program to its end: exit status and what it said.
pub fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = program().args(arguments).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// The option that names an image.
pub fn blk_file(image: &Path) -> String {
    format!("--blk-file={}", image.display())
}
