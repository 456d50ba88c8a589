//! The image lock between open files of one process (open-file-description locks do not care).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use semper_block::{Image, LockError, OpenOptions};
use tempfile::TempDir;

fn image() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    (dir, path)
}

fn open(path: &std::path::Path, read_only: bool) -> Image {
    Image::open(path, OpenOptions { read_only, ..OpenOptions::default() }).unwrap()
}

/// Sends a copy of a descriptor into a socket: the open file then lives where no process shows it.
fn hide(socket: &UnixDatagram, fd: i32) {
    let mut space = [0u64; 4];
    // SAFETY: zeroed msghdr is valid; all pointers are to locals that live across the call, and
    // the control buffer is aligned and has room for one descriptor.
    unsafe {
        let mut byte = 0u8;
        let mut iov = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        message.msg_control = space.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd);
        assert_eq!(libc::sendmsg(socket.as_raw_fd(), &message, 0), 1);
    }
}

#[test]
fn one_writer_or_many_readers() {
    let (_dir, path) = image();
    let [reader, other_reader, writer] = [open(&path, true), open(&path, true), open(&path, false)];
    reader.try_lock().unwrap();
    other_reader.try_lock().unwrap();
    drop(reader);
    drop(other_reader);
    writer.try_lock().unwrap();
    drop(writer);
    open(&path, true).try_lock().unwrap();
}

/// A process that was killed in the middle of its I/O is gone before its locks are.
#[test]
fn a_lock_that_nobody_alive_holds_is_waited_for() {
    let (_dir, path) = image();
    let dead = open(&path, false);
    dead.try_lock().unwrap();
    let (inbox, outbox) = UnixDatagram::pair().unwrap();
    hide(&outbox, dead.fd());
    drop(dead);
    let next = open(&path, false);
    let waiting = std::thread::spawn(move || next.try_lock());
    // The receiver never asks for the descriptor: closing the socket closes the file, as the
    // end of its last I/O does in a kernel that cleans up after a process.
    let kept: [OwnedFd; 2] = [inbox.into(), outbox.into()];
    std::thread::yield_now();
    assert!(!waiting.is_finished());
    drop(kept);
    waiting.join().unwrap().unwrap();
}

#[test]
fn what_a_refused_process_had_locked_is_free_again() {
    let (_dir, path) = image();
    let reader = open(&path, true);
    reader.try_lock().unwrap();
    // This very process holds it, so the holder is not named; that takes the longest patience.
    let writer = open(&path, false);
    assert!(matches!(writer.try_lock(), Err(LockError::Held { .. })));
    let other_reader = open(&path, true);
    other_reader.try_lock().unwrap();
    drop((reader, other_reader));
    writer.try_lock().unwrap();
}
