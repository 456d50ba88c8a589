//! Sleeping on eventfds without reading them: edge-triggered epoll.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Wakes at each write to any of its eventfds.
pub(crate) struct Sleeper {
    epoll: OwnedFd,
}

impl Sleeper {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no preconditions; the result is checked and then owned.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fd is a new descriptor that nobody else owns.
        Ok(Self { epoll: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    pub(crate) fn add(&mut self, fd: RawFd) -> io::Result<()> {
        // Edge-triggered: each write to the eventfd is an edge, whatever the counter says.
        let mut event =
            libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET) as u32, u64: 0 };
        self.control(libc::EPOLL_CTL_ADD, fd, &mut event)
    }

    pub(crate) fn remove(&mut self, fd: RawFd) {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // The descriptor is about to be closed, which removes it as well.
        let _ = self.control(libc::EPOLL_CTL_DEL, fd, &mut event);
    }

    fn control(&mut self, op: i32, fd: RawFd, event: &mut libc::epoll_event) -> io::Result<()> {
        // SAFETY: event lives across the call.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), op, fd, event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(crate) fn sleep(&mut self) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
        // SAFETY: the kernel writes at most 16 entries.
        let n = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), 16, -1) };
        if n >= 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        }
    }
}
