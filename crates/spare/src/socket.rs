//! The socket by which a spare follows the process that serves. Packets keep their bounds and their
//! files together.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Listens for spares; the socket is removed at an orderly end (`semper_control::remember`). Whoever
/// listens has what is served, so a socket that is there belongs to a process that has ended.
///
/// # Errors
/// The system's; `AlreadyExists` for something that is no socket.
pub fn listen(path: &Path, backlog: i32) -> io::Result<OwnedFd> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            let what = format!("{} is there, and no socket", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
        }
        Ok(_) => std::fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = new(SocketFlags::empty())?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&listener, backlog)?;
    semper_control::remember(path)?;
    Ok(listener)
}

/// Waits for a spare. Whoever follows has the guest's memory: it must be of our own user.
///
/// # Errors
/// The system's; `PermissionDenied`.
pub fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    let link = rustix::net::accept_with(listener, SocketFlags::CLOEXEC)?;
    // SAFETY: the call takes nothing and cannot fail.
    let own = unsafe { libc::geteuid() };
    match credentials(&link)?.uid {
        uid if uid == own => Ok(link),
        uid => Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {uid}"))),
    }
}

/// Becomes a spare that follows the process at `path`.
///
/// # Errors
/// The system's; `ConnectionRefused` and `NotFound` while nobody serves.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    connected(new(SocketFlags::empty())?, path)
}

/// The same, with `WouldBlock` where others wait already; nor does anything else wait at this socket.
///
/// # Errors
/// As [`connect`].
pub fn connect_without_waiting(path: &Path) -> io::Result<OwnedFd> {
    connected(new(SocketFlags::NONBLOCK)?, path)
}

fn connected(link: OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    rustix::net::connect(&link, &SocketAddrUnix::new(path)?)?;
    Ok(link)
}

/// Who is at the other end of a unix socket: process, user and group. The pid is 0 for a process of
/// another namespace, for which the type of the crate `rustix` has no value.
///
/// # Errors
/// The system's: this is no connected unix socket.
pub fn credentials(connection: impl AsFd) -> io::Result<libc::ucred> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `peer`.
    let status = unsafe {
        libc::getsockopt(
            connection.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &mut len,
        )
    };
    if status == 0 { Ok(peer) } else { Err(io::Error::last_os_error()) }
}

fn new(flags: SocketFlags) -> io::Result<OwnedFd> {
    let (kind, flags) = (SocketType::SEQPACKET, flags | SocketFlags::CLOEXEC);
    Ok(rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_of_a_process_that_has_ended_is_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("session");
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(listen(&path, 1).unwrap());
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let listener = listen(&path, 1).unwrap();
        let _link = connect(&path).unwrap();
        let follower = accept(&listener).unwrap();
        assert_eq!(credentials(&follower).unwrap().pid as u32, std::process::id());
        let file = folder.path().join("file");
        std::fs::write(&file, "something").unwrap();
        assert_eq!(listen(&file, 1).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&file).unwrap(), b"something");
    }
}
