//! The line to the host: a virtio-serial port in a guest, a unix socket on a host.
//!
//! Never blocks. What the other end does not take is kept in memory; when the other end goes away,
//! everything unsent is dropped, and the next one to connect is greeted afresh.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use serde_json::Value;

/// A request line longer than this is garbage.
const LINE_MAX: usize = 4 << 20;
/// A host that lets more than this pile up gets no further events.
const PILE_MAX: usize = 16 << 20;

/// One end of the line.
pub struct Link {
    fd: OwnedFd,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    sent: usize,
}

impl Link {
    /// Takes a file descriptor that is set to O_NONBLOCK.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd, incoming: Vec::new(), outgoing: Vec::new(), sent: 0 }
    }

    /// Something waits to be written.
    pub fn is_piled(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// The host is far behind: events, which it did not ask for, are better left out.
    pub fn is_behind(&self) -> bool {
        self.outgoing.len() - self.sent > PILE_MAX
    }

    /// Forgets what was not sent and what was not read to its end.
    pub fn forget(&mut self) {
        self.incoming.clear();
        self.outgoing.clear();
        self.sent = 0;
    }

    /// Queues one line. Call [`Link::flush`] for it to leave.
    pub fn queue(&mut self, value: &Value) {
        self.outgoing.extend_from_slice(value.to_string().as_bytes());
        self.outgoing.push(b'\n');
    }

    /// Ends a line that an earlier boot may have left unfinished.
    pub fn queue_newline(&mut self) {
        self.outgoing.push(b'\n');
    }

    /// Writes what the other end takes.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.sent < self.outgoing.len() {
            match rustix::io::write(&self.fd, &self.outgoing[self.sent..]) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(())
    }

    /// Reads what is there and cuts it into lines. `None` = the other end is gone.
    pub fn read_lines(&mut self) -> io::Result<Option<Vec<Vec<u8>>>> {
        let mut chunk = [0; 16 << 10];
        loop {
            match rustix::io::read(&self.fd, &mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.incoming.extend_from_slice(&chunk[..count]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut lines = Vec::new();
        while let Some(end) = self.incoming.iter().position(|byte| *byte == b'\n') {
            let rest = self.incoming.split_off(end + 1);
            let mut line = std::mem::replace(&mut self.incoming, rest);
            line.pop();
            lines.push(line);
        }
        if self.incoming.len() > LINE_MAX {
            self.incoming.clear();
        }
        lines.retain(|line| !line.iter().all(u8::is_ascii_whitespace));
        Ok(Some(lines))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
