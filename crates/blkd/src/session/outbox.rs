//! An answer on its way to the front end, in a pipe that outlives the process.
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

use crate::message::{Files, Message};

/// What a pipe takes as a whole or not at all (PIPE_BUF).
const MOST: usize = 4096;

/// See the module.
#[derive(Clone)]
pub(crate) struct Outbox {
    out: Arc<OwnedFd>,
    into: Arc<OwnedFd>,
}

impl Outbox {
    /// An empty one.
    ///
    /// # Errors
    /// The system's, when it has no descriptor left.
    pub(crate) fn new() -> io::Result<Self> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { out: Arc::new(out), into: Arc::new(into) })
    }

    /// Another process's.
    pub(crate) fn of(files: Files) -> Option<Self> {
        let [out, into] = files.try_into().ok()?;
        Some(Self { out, into })
    }

    pub(crate) fn files(&self) -> Files {
        vec![Arc::clone(&self.out), Arc::clone(&self.into)]
    }

    /// Whether an answer can go this way.
    pub(crate) fn takes(answer: &Message) -> bool {
        answer.files.is_empty() && answer.bytes.len() <= MOST
    }

    /// Puts an answer in; what an ended connection has left there goes.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn put(&self, answer: &Message) -> io::Result<()> {
        let mut rest = [0; MOST];
        while !self.is_empty()? {
            rustix::io::read(&self.out, &mut rest)?;
        }
        rustix::io::write(&self.into, &answer.bytes)?;
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> io::Result<bool> {
        Ok(rustix::io::ioctl_fionread(&self.out)? == 0)
    }

    /// Sends what is there; waits while the front end does not read.
    ///
    /// # Errors
    /// The connection's.
    pub(crate) fn send(&self, stream: impl AsFd) -> io::Result<()> {
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
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::message::{peek, take};

    #[test]
    fn an_answer_is_in_one_place_or_the_other() {
        let (near, far) = UnixStream::pair().unwrap();
        let ours = Outbox::new().unwrap();
        let theirs = Outbox::of(ours.files()).unwrap();
        let answer = Message::new(1, &[7; 300]);
        ours.put(&answer).unwrap();
        assert!(!theirs.is_empty().unwrap());
        assert!(peek(&far, false).is_err());
        theirs.send(&near).unwrap();
        assert!(ours.is_empty().unwrap());
        assert_eq!(peek(&far, false).unwrap().unwrap().bytes, answer.bytes);
        take(&far, answer.bytes.len()).unwrap();
        ours.send(&near).unwrap();
        assert!(peek(&far, false).is_err(), "given twice");
    }

    #[test]
    fn what_an_ended_connection_has_left_is_not_sent_on_the_next() {
        let (near, far) = UnixStream::pair().unwrap();
        let outbox = Outbox::new().unwrap();
        outbox.put(&Message::new(1, b"lost")).unwrap();
        drop(far);
        assert!(outbox.send(&near).is_err());
        let (near, far) = UnixStream::pair().unwrap();
        outbox.put(&Message::new(2, b"")).unwrap();
        outbox.send(&near).unwrap();
        assert_eq!(peek(&far, false).unwrap().unwrap().request(), 2);
    }
}
