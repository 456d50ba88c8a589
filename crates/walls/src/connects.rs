//! A process beside a program that makes the connections which the program may have, and no other.
//!
//! ```text
//!   semper-blkd   ──── number ──────────────►   semper-connects
//!                 ◄─── an open connection ──
//! ```
//!
//! A program that was taken over must not connect to whatever socket its user may: QEMU's monitor, a
//! service of the host. No wall of this kernel says which paths may be connected to, and connect(2)
//! has the path in memory, where no filter sees it. So the call is in no program's table. Before it
//! raises its walls, and before it opens an image, whose locks a fork would share, the program forks a
//! process that knows the *ways* (what to connect to, and how) from its command line. All that can be
//! said to it is the number of a way. It has nothing of the program's but stderr, walls of its own
//! ([`Program::Connects`](crate::Program)), and ends with the program.
//!
//! Its command line is the program's; it is told by its name, as the memory reaper of `semper-blkd`.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::Walls;

/// As `sempervirt.host.procfs` knows it.
const NAME: &std::ffi::CStr = c"semper-connects";

/// How something is connected to, in the process beside; with the connection, if that is to be
/// handed over.
pub type Way = Box<dyn Fn() -> io::Result<Option<OwnedFd>>>;

/// The first byte of a request; the others are the number of the way.
const TELL: u8 = 0;
const ASK: u8 = 1;

/// The process beside, for the program.
#[derive(Debug)]
pub struct Connects {
    link: OwnedFd,
    /// Who waits for an answer.
    asking: Mutex<()>,
}

impl Connects {
    /// Starts it. To be called by the main thread, with whose end it ends, before any other thread
    /// and before a file is opened that has a lock. `ways` is called over there, before the `walls`.
    ///
    /// # Errors
    /// The system's, when it has no process or descriptor left.
    pub fn start(walls: Walls, ways: impl FnOnce() -> Vec<Way>) -> io::Result<Self> {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (link, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
        // SAFETY: plain system calls on memory that lives across them. The child has a copy of this
        // process' memory and of its only thread, and does not return.
        unsafe {
            // It begins with its name, so that nobody takes it for the program at any instant.
            let mut name = [0u8; 16];
            libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
            libc::prctl(libc::PR_SET_NAME, NAME.as_ptr());
            let child = libc::fork();
            if child == 0 {
                libc::_exit(match beside(&theirs, walls, ways) {
                    Ok(()) => 0,
                    Err(_) => 1,
                });
            }
            let error = io::Error::last_os_error();
            libc::prctl(libc::PR_SET_NAME, name.as_ptr());
            if child < 0 {
                return Err(error);
            }
        }
        Ok(Self { link, asking: Mutex::new(()) })
    }

    /// Has a connection made, and waits for it.
    ///
    /// # Errors
    /// What connecting failed with; `BrokenPipe` when the process beside has ended.
    pub fn ask(&self, way: usize) -> io::Result<OwnedFd> {
        let _asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        self.say(ASK, way, SendFlags::NOSIGNAL)?;
        let mut answer = [0; size_of::<i32>()];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut files = RecvAncillaryBuffer::new(&mut room);
        let got = loop {
            let mut into = [IoSliceMut::new(&mut answer)];
            match rustix::net::recvmsg(&self.link, &mut into, &mut files, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                got => break got?.bytes,
            }
        };
        if got < answer.len() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        match i32::from_ne_bytes(answer) {
            0 => files
                .drain()
                .find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut files) => files.next(),
                    _ => None,
                })
                .ok_or_else(|| io::ErrorKind::Unsupported.into()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Has a connection made that nobody is given, and waits for nothing: a failure is in the log.
    ///
    /// # Errors
    /// The system's: the process beside has ended, or hears nothing.
    pub fn tell(&self, way: usize) -> io::Result<()> {
        self.say(TELL, way, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn say(&self, how: u8, way: usize, flags: SendFlags) -> io::Result<()> {
        let [low, high] =
            u16::try_from(way).map_err(|_| io::ErrorKind::InvalidInput)?.to_ne_bytes();
        rustix::net::send(&self.link, &[how, low, high], flags)?;
        Ok(())
    }
}

/// The process beside, from its first to its last instruction.
fn beside(link: &OwnedFd, walls: Walls, ways: impl FnOnce() -> Vec<Way>) -> io::Result<()> {
    // SAFETY: no memory but that of a set of signals is passed.
    unsafe {
        // The end of the link says the same; but another process could have the other end.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // The signals of a terminal, which the program takes in its own way, are none of its business.
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        // By which a call that is refused is told.
        libc::sigdelset(&mut all, libc::SIGSYS);
        libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
    }
    close_all_but(&[libc::STDERR_FILENO, link.as_raw_fd()]);
    let ways = ways();
    let missing = walls.raise().missing;
    if !missing.is_empty() {
        log::debug!("around connections walls are missing: {missing}");
    }
    let mut request = [0; 3];
    loop {
        let got = match rustix::net::recv(link, &mut request[..], RecvFlags::empty()) {
            Err(rustix::io::Errno::INTR) => continue,
            got => got?.0,
        };
        if got == 0 {
            return Ok(());
        }
        let [how, low, high] = request;
        let way = usize::from(u16::from_ne_bytes([low, high]));
        let made = match ways.get(way) {
            Some(connect) => connect(),
            None => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        match (how, made) {
            (ASK, made) => answer(link, made)?,
            (_, Ok(_)) => {}
            (_, Err(error)) => log::warn!("not connected way={way} error=\"{error}\""),
        }
    }
}

fn answer(link: &OwnedFd, made: io::Result<Option<OwnedFd>>) -> io::Result<()> {
    let number = match &made {
        Ok(_) => 0,
        Err(error) if error.kind() == io::ErrorKind::TimedOut => libc::ETIMEDOUT,
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    };
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut files = SendAncillaryBuffer::new(&mut room);
    let file = made.ok().flatten();
    let borrowed = file.as_ref().map(|file| [file.as_fd()]);
    if let Some(file) = &borrowed {
        files.push(SendAncillaryMessage::ScmRights(file));
    }
    let bytes = number.to_ne_bytes();
    rustix::net::sendmsg(link, &[IoSlice::new(&bytes)], &mut files, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Closes every descriptor but these, which are in order.
fn close_all_but(kept: &[RawFd]) {
    let mut from: libc::c_uint = 0;
    for &fd in kept {
        let fd = fd as libc::c_uint;
        if fd > from {
            // SAFETY: nobody uses them: the process has begun with copies of another's.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd + 1;
    }
    // SAFETY: see above.
    unsafe { libc::syscall(libc::SYS_close_range, from, libc::c_uint::MAX, 0) };
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::Path;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::Program;

    fn to(path: &Path) -> Connects {
        let path = path.to_owned();
        let way: Way =
            Box::new(move || UnixStream::connect(&path).map(|socket| Some(socket.into())));
        Connects::start(Walls::new(Program::Connects), || vec![way]).unwrap()
    }

    /// The process beside that this process, or another, has started.
    fn beside_of(parent: i32) -> Option<i32> {
        let line = format!("(semper-connects) S {parent} ");
        let found = std::fs::read_dir("/proc").unwrap().flatten();
        let mut numbers = found.filter_map(|it| it.file_name().to_str()?.parse().ok());
        numbers.find(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            stat.is_ok_and(|stat| stat.contains(&line))
        })
    }

    fn soon<T>(mut find: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(found) = find() {
                return found;
            }
            assert!(Instant::now() < end, "not in time");
            std::thread::sleep(Duration::from_millis(2)); // poll interval
        }
    }

    #[test]
    fn what_was_named_is_connected_to_and_nothing_else_can_be_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let connects = to(&path);
        assert_eq!(connects.ask(0).unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        for way in [1, 2, 256, usize::from(u16::MAX), usize::MAX] {
            assert_eq!(connects.ask(way).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        // What no program of ours says.
        for words in [&[ASK][..], &[7; 3], &[9; 4096]] {
            rustix::net::send(&connects.link, words, SendFlags::NOSIGNAL).unwrap();
        }
        rustix::net::recv(&connects.link, &mut [0; 4][..], RecvFlags::empty()).unwrap();
        connects.tell(0).unwrap();
        drop(listener.accept().unwrap());
        let mut socket = UnixStream::from(connects.ask(0).unwrap());
        let (mut theirs, _) = listener.accept().unwrap();
        socket.write_all(b"here").unwrap();
        let mut said = [0; 4];
        theirs.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"here");
        // Nobody else has it.
        drop(socket);
        assert_eq!(theirs.read(&mut said).unwrap(), 0);
    }

    /// A program in a process of its own, which starts the process beside and waits for its death.
    fn program(path: &Path, and: impl FnOnce(&Connects)) -> i32 {
        // SAFETY: the child only does what a child of a process with threads may, but for its memory,
        // which the C library keeps in order across a fork.
        unsafe {
            match libc::fork() {
                0 => {
                    let connects = to(path);
                    and(&connects);
                    loop {
                        libc::pause();
                    }
                }
                pid => pid,
            }
        }
    }

    #[test]
    fn it_has_walls_of_its_own_and_nothing_of_the_program_and_ends_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let image = std::fs::File::create(folder.path().join("image")).unwrap();
        let (until, told) = io::pipe().unwrap();
        // Another process that has the program's end of the link, until the end of this test.
        let holds_the_link = |_: &Connects| {
            // SAFETY: the child makes nothing but system calls.
            unsafe {
                if libc::fork() == 0 {
                    libc::close(told.as_raw_fd());
                    libc::read(until.as_raw_fd(), [0u8].as_mut_ptr().cast(), 1);
                    libc::_exit(0);
                }
            }
        };
        for and in [&holds_the_link as &dyn Fn(&Connects), &|_: &Connects| ()] {
            let program = program(&folder.path().join("socket"), and);
            let beside = soon(|| beside_of(program));
            let status = |field: &str| {
                let status = std::fs::read_to_string(format!("/proc/{beside}/status")).unwrap();
                let mut lines = status.lines();
                lines.find_map(|line| Some(line.strip_prefix(field)?.trim().to_owned())).unwrap()
            };
            assert_eq!(soon(|| Some(status("Seccomp:")).filter(|mode| mode == "2")), "2");
            assert_eq!(status("CapEff:"), "0000000000000000");
            assert_eq!(status("NoNewPrivs:"), "1");
            // Who may not look at it cannot count; the service's tests are run as root.
            if let Ok(files) = std::fs::read_dir(format!("/proc/{beside}/fd")) {
                let files: Vec<_> =
                    files.flatten().filter_map(|it| it.path().read_link().ok()).collect();
                assert_eq!(files.len(), 2, "{files:?}");
            }
            // SAFETY: processes of this test.
            unsafe {
                libc::kill(program, libc::SIGKILL);
                libc::waitpid(program, std::ptr::null_mut(), 0);
            }
            soon(|| {
                let stat = std::fs::read_to_string(format!("/proc/{beside}/stat"));
                stat.map_or(true, |stat| stat.contains(") Z ")).then_some(())
            });
        }
        drop(image);
    }
}
