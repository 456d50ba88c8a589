//! An answer on its way to whoever asked, in a pipe that outlives the process.
//!
//! To send an answer and to note that it was sent are two steps, and a process can die between them;
//! but no answer may be given twice. So an answer is put into a pipe, and the kernel moves it from
//! there into the connection by one system call (splice(2)), which no signal cuts in two: what is
//! still in the pipe was not sent, and what is not there any more was.
//!
//! Files do not go through a pipe.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

/// Bytes that a pipe which is empty takes at once.
pub const MOST: usize = 16 << 10;

/// See the module.
#[derive(Clone)]
pub struct Outbox {
    out: Arc<OwnedFd>,
    into: Arc<OwnedFd>,
}

impl Outbox {
    /// An empty one.
    ///
    /// # Errors
    /// The system's, when it has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self::of(Arc::new(out), Arc::new(into)))
    }

    /// Another process's, by its `ends`.
    #[must_use]
    pub fn of(out: Arc<OwnedFd>, into: Arc<OwnedFd>) -> Self {
        Self { out, into }
    }

    /// Where answers come out, and where they are put.
    #[must_use]
    pub fn ends(&self) -> [&Arc<OwnedFd>; 2] {
        [&self.out, &self.into]
    }

    /// Whether nothing is on its way.
    ///
    /// # Errors
    /// The system's.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(rustix::io::ioctl_fionread(&self.out)? == 0)
    }

    /// Puts an answer of at most `MOST` bytes in; what an ended connection has left there goes.
    ///
    /// # Errors
    /// The system's; `WriteZero` for one that does not go in as a whole.
    pub fn put(&self, answer: &[u8]) -> io::Result<()> {
        let mut rest = [0; 4096];
        while !self.is_empty()? {
            rustix::io::read(&self.out, &mut rest)?;
        }
        match rustix::io::write(&self.into, answer)? {
            len if len == answer.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Sends what is there; waits while the other end does not read.
    ///
    /// # Errors
    /// The connection's.
    pub fn send(&self, stream: impl AsFd) -> io::Result<()> {
        while !self.is_empty()? {
            match splice(&self.out, None, &stream, None, MOST, SpliceFlags::empty()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// All that has come.
    fn read(mut far: &UnixStream) -> Vec<u8> {
        far.set_nonblocking(true).unwrap();
        let mut got = vec![0; 2 * MOST];
        let mut len = 0;
        while let Ok(more @ 1..) = far.read(&mut got[len..]) {
            len += more;
        }
        got.truncate(len);
        got
    }

    #[test]
    fn an_answer_is_in_one_place_or_the_other_and_is_sent_once() {
        let (near, far) = UnixStream::pair().unwrap();
        let ours = Outbox::new().unwrap();
        let [out, into] = ours.ends();
        let theirs = Outbox::of(Arc::clone(out), Arc::clone(into));
        let answer: Vec<u8> = (0..MOST).map(|at| at as u8).collect();
        ours.put(b"left by an ended connection").unwrap();
        ours.put(&answer).unwrap();
        assert!(!theirs.is_empty().unwrap());
        assert_eq!(read(&far), b"");
        theirs.send(&near).unwrap();
        assert!(ours.is_empty().unwrap());
        assert_eq!(read(&far), answer);
        ours.send(&near).unwrap();
        assert_eq!(read(&far), b"", "given twice");
    }

    #[test]
    fn what_an_ended_connection_has_left_is_not_sent_on_the_next() {
        let (near, far) = UnixStream::pair().unwrap();
        let outbox = Outbox::new().unwrap();
        outbox.put(b"lost").unwrap();
        drop(far);
        assert!(outbox.send(&near).is_err());
        let (near, far) = UnixStream::pair().unwrap();
        outbox.put(b"told").unwrap();
        outbox.send(&near).unwrap();
        assert_eq!(read(&far), b"told");
    }
}
