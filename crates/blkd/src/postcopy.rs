//! The receiving end of a postcopy migration: the guest runs before its memory is there.
//!
//! ```text
//!   complete ──ADVISE──► advised ──LISTEN──► listening ──END──► complete
//!                           │                    │ this process or its front end's connection dies
//!              memory comes ▼                    ▼
//!                        complete            inherited ──END──► complete
//! ```
//!
//! *advised*: there may be a postcopy. A front end that then gives its memory without *LISTEN* has all
//! of it already, and never says that there was no postcopy.
//!
//! *listening*: whoever touches a page that is missing, be it a thread or the kernel on its behalf,
//! sleeps (userfaultfd(2)) until the front end, which reads our faults, has placed the page and
//! wakes it. The front end finds the page by the addresses of our mappings; from a change of the
//! memory table until it has said that it knows the new ones, no queue runs.
//!
//! *inherited*: the front end (QEMU 10) tells a backend that comes later nothing of the postcopy,
//! and serves no faults of it. A missing page would be read as zeros, and stay zeros for the
//! guest as well. So a process that listens leaves a note in the in-flight region, and one that
//! finds it there starts no queue before the end of the postcopy; the guest's requests wait. The
//! front end tells the end to whoever is connected then; who connects later sees it by itself: the
//! files of the guest's memory have no holes any more.
//!
//! Specification: QEMU `docs/interop/vhost-user.rst`, "Postcopy".

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use semper_ring::GuestMemory;
use vhost::vhost_user::message::FrontendReq;

use crate::message::Message;

/// Addresses, in whole pages.
#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

// From linux/userfaultfd.h.
const API: u64 = 0xaa;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const MODE_MISSING: u64 = 1;
const IOCTL_WAKE: u64 = 1 << 2;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
/// Of /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

const PAGE: u64 = 4096;

/// How the guest's memory gets here.
#[derive(Default)]
pub(crate) enum Arrival {
    /// It is there.
    #[default]
    Complete,
    /// The front end has our descriptor.
    Advised(Userfault),
    /// Missing pages come when they are touched. `known`: the front end knows our mappings.
    Listening { faults: Userfault, known: bool },
    /// Pages are missing, and nobody would bring them.
    Inherited,
}

impl Arrival {
    pub(crate) fn stage(&self) -> Stage {
        match self {
            Arrival::Complete => Stage::Complete,
            Arrival::Advised(_) => Stage::Advised,
            Arrival::Listening { .. } => Stage::Listening,
            Arrival::Inherited => Stage::Inherited,
        }
    }
}

/// An [`Arrival`] for those who only look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    Complete,
    Advised,
    Listening,
    Inherited,
}

impl Stage {
    pub(crate) const ALL: [Self; 4] =
        [Stage::Complete, Stage::Advised, Stage::Listening, Stage::Inherited];

    /// Whether pages may be missing.
    pub(crate) fn is_going_on(self) -> bool {
        matches!(self, Stage::Listening | Stage::Inherited)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Stage::Complete => "complete",
            Stage::Advised => "advised",
            Stage::Listening => "listening",
            Stage::Inherited => "inherited",
        }
    }
}

/// Where a descriptor for page faults comes from behind walls, which leave no system call for it.
///
/// The device is kept rather than a descriptor, because that one would belong to the memory of this
/// process: at its death the kernel waits for whoever looks at the memory, and closes the image
/// only then. Before Linux 6.1 there is no such device.
pub(crate) enum PageFaults {
    Device(File),
    Opened(Userfault),
}

impl PageFaults {
    /// To be called before the walls are raised.
    ///
    /// # Errors
    /// The kernel's; `EPERM` without CAP_SYS_PTRACE and without access to /dev/userfaultfd.
    pub(crate) fn prepare() -> io::Result<Self> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open("/dev/userfaultfd");
        if let Ok(device) = device {
            let this = Self::Device(device);
            // Whether it is of use shall be known now.
            return this.open().map(|_| this);
        }
        // SAFETY: no memory is passed.
        Userfault::made_by(|flags| unsafe {
            libc::syscall(libc::SYS_userfaultfd, flags) as libc::c_int
        })
        .map(Self::Opened)
    }

    /// One for the postcopy that begins.
    ///
    /// # Errors
    /// The kernel's, or the process has no descriptor left.
    pub(crate) fn open(&self) -> io::Result<Userfault> {
        match self {
            // SAFETY: no memory is passed.
            Self::Device(device) => Userfault::made_by(|flags| unsafe {
                libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags)
            }),
            Self::Opened(userfault) => userfault.share().map(Userfault),
        }
    }
}

/// A descriptor from which the front end reads our faults.
pub(crate) struct Userfault(File);

impl Userfault {
    /// The kernel tells on it of its own faults as well: most data is copied by the kernel. `open`
    /// is the system call that makes the descriptor, with these flags.
    fn made_by(open: impl FnOnce(libc::c_int) -> libc::c_int) -> io::Result<Self> {
        let fd = open(libc::O_CLOEXEC | libc::O_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let this = Self(unsafe { File::from_raw_fd(fd) });
        let mut api = Api { api: API, features: 0, ioctls: 0 };
        this.call(UFFDIO_API, &mut api)?;
        if api.features & FEATURE_MISSING_SHMEM == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(this)
    }

    /// For the front end: it reads the faults, and wakes those who wait.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub(crate) fn share(&self) -> io::Result<File> {
        self.0.try_clone()
    }

    /// Has faults on all of this memory told from now on; again is no error.
    ///
    /// # Errors
    /// The kernel's: this memory is of a kind that cannot be missing.
    pub(crate) fn register(&self, memory: &GuestMemory) -> io::Result<()> {
        for range in ranges(memory) {
            // A huge page would be mapped, and count as present, when a part of it is.
            // SAFETY: advice on a range that `memory` keeps mapped; no content changes.
            unsafe {
                let start = std::ptr::with_exposed_provenance_mut(range.start as usize);
                libc::madvise(start, range.len as usize, libc::MADV_NOHUGEPAGE);
            }
            let mut register = Register { range, mode: MODE_MISSING, ioctls: 0 };
            self.call(UFFDIO_REGISTER, &mut register)?;
            if register.ioctls & IOCTL_WAKE == 0 {
                return Err(io::ErrorKind::Unsupported.into());
            }
        }
        Ok(())
    }

    /// All memory has arrived: what is missing from now on is zeros. Wakes whoever waits.
    pub(crate) fn unregister(&self, memory: &GuestMemory) {
        for mut range in ranges(memory) {
            if let Err(error) = self.call(UFFDIO_UNREGISTER, &mut range) {
                // The front end closes its descriptor, which has the same effect.
                log::warn!("memory stays registered for faults error=\"{error}\"");
            }
        }
    }

    fn call<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: each request goes with the structure that the kernel defines for it, by the
        // callers above; it lives across the call.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(argument)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// How often to look whether all memory is there.
const LOOK_MS: libc::c_int = 250;

/// Waits for a message, or until it is time to look at the memory again: then false.
pub(crate) fn wait_message(stream: &UnixStream) -> bool {
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the structure lives across the call.
    unsafe { libc::poll(&mut poll, 1, LOOK_MS) != 0 }
}

/// What a front end is answered that ends a postcopy, where the parser of its messages knows of none.
pub(crate) fn answer_to_end() -> Message {
    let mut answer = Message::new(FrontendReq::POSTCOPY_END as u32, &0u64.to_ne_bytes());
    answer.mark_answer();
    answer
}

fn ranges(memory: &GuestMemory) -> impl Iterator<Item = Range> + '_ {
    memory.mapped().map(|(spec, host, _)| {
        let host = host.expose_provenance() as u64;
        let start = host & !(PAGE - 1);
        Range { start, len: (host + spec.size).next_multiple_of(PAGE) - start }
    })
}
