//! The door: front ends come in only while somebody is there to speak with them.
//!
//! A listening socket completes connections by itself, for as many as its backlog holds. The disk's
//! socket outlives its backends, so QEMU, coming back after a death, used to be connected to nobody,
//! and waited in the handshake with its main loop: the whole VM stood still, for as long as this one
//! disk had no backend. So the backlog has room for one, and a connection of our own, the *plug*,
//! takes that room whenever nobody accepts:
//!
//! ```text
//!   backlog          [plug]                       [ ] ◄ QEMU                 [plug]
//!   this process     serves, or starts, or died   accept: throws it away,    serves
//!                    QEMU waits in connect(2),    then gets QEMU, and
//!                    in a thread of its own       plugs anew
//! ```
//!
//! - Who connects waits in the kernel, and is let in the moment a process accepts; one that does not
//!   want to wait gets EAGAIN. QEMU connects in a thread of its own, so its main loop goes on.
//! - The plug is in the backlog, which belongs to the socket and not to a process. It stays when its
//!   maker dies, and also when the agent does.
//! - What does not work: to shut the listening socket down is for ever (listen(2) does not undo it),
//!   and a backlog of 0 is room for one all the same.
//! - The plug is made by the process beside (`connects`), which nobody waits for: a process that dies
//!   between its accept of the plug and the next plug, some 50 µs, leaves room.
//!   The agent, which holds the same socket, turns away whoever came in then, when it has no backend.
//!
//! A plug is known by its own address, an abstract one that begins with [`PREFIX`].

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::state::now_ns;

/// How the names of plugs begin; `sempervirt.host.sockets` makes and knows the same.
const PREFIX: &[u8] = b"semper-plug-";

/// The socket that front ends connect to.
pub(crate) struct Door<P> {
    listener: UnixListener,
    plug: P,
}

impl<P: Fn() -> io::Result<()>> Door<P> {
    /// Narrows the backlog; the door is shut when the first front end is in. `plug` has
    /// [`take_the_room`] called, by whoever may connect.
    pub(crate) fn new(listener: UnixListener, plug: P) -> Self {
        // SAFETY: no memory is passed; of a socket that listens already only the backlog changes.
        if unsafe { libc::listen(listener.as_raw_fd(), 0) } != 0 {
            let error = io::Error::last_os_error();
            log::warn!("front ends will be let in while nobody serves error=\"{error}\"");
        }
        Self { listener, plug }
    }

    /// Waits for a front end, and shuts the door behind it.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, address) = self.listener.accept()?;
            if is_plug(&address) {
                continue;
            }
            self.shut();
            return Ok(stream);
        }
    }

    /// Keeps others out: a front end is in, whichever way.
    pub(crate) fn shut(&self) {
        if let Err(error) = (self.plug)() {
            log::warn!("another front end will be let in error=\"{error}\"");
        }
    }
}

/// Where the door is that listens at an inherited descriptor; none, if that is no door with a path.
pub(crate) fn place_of(fd: i32) -> Option<PathBuf> {
    // SAFETY: plain data, of which zeros are a value; the kernel writes at most `length` bytes. What
    // is no socket is refused.
    let (address, length) = unsafe {
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        let mut length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        if libc::getsockname(fd, (&raw mut address).cast(), &mut length) != 0 {
            return None;
        }
        (address, length as usize)
    };
    let start = std::mem::offset_of!(libc::sockaddr_un, sun_path);
    let path = address.sun_path.get(..length.checked_sub(start)?)?;
    let bytes: Vec<u8> =
        path.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
    let named = i32::from(address.sun_family) == libc::AF_UNIX && !bytes.is_empty();
    named.then(|| PathBuf::from(OsString::from_vec(bytes)))
}

/// Takes the room in the backlog of the door at `path`, unless somebody else has it already.
///
/// # Errors
/// The system's.
pub(crate) fn take_the_room(path: &Path) -> io::Result<()> {
    let unique = format!("{}-{}", std::process::id(), now_ns());
    let (own, own_len) = address(&[b"\0", PREFIX, unique.as_bytes()].concat())?;
    let (door, door_len) = address(path.as_os_str().as_bytes())?;
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is passed.
    let plug = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if plug < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else has it.
    let plug = unsafe { OwnedFd::from_raw_fd(plug) };
    // SAFETY: both addresses live across the calls, and have at least as many bytes as is said.
    let status = unsafe {
        match libc::bind(plug.as_raw_fd(), (&raw const own).cast(), own_len) {
            0 => libc::connect(plug.as_raw_fd(), (&raw const door).cast(), door_len),
            failed => failed,
        }
    };
    match io::Error::last_os_error() {
        _ if status == 0 => Ok(()),
        // Whoever has the room waits for this process, as for a plug.
        error if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        error => Err(error),
    }
}

fn is_plug(address: &SocketAddr) -> bool {
    address.as_abstract_name().is_some_and(|name| name.starts_with(PREFIX))
}

/// A socket address of these bytes, a path or (from NUL on) an abstract name, and its length.
fn address(bytes: &[u8]) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: plain data, of which zeros are a value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let length = std::mem::offset_of!(libc::sockaddr_un, sun_path) + bytes.len();
    Ok((address, length as libc::socklen_t))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Long enough for a connection that nothing holds up.
    const SOON: Duration = Duration::from_millis(300);
    const LATE: Duration = Duration::from_secs(20);

    fn connect(path: &Path) -> mpsc::Receiver<UnixStream> {
        let (sender, receiver) = mpsc::channel();
        let path = path.to_owned();
        std::thread::spawn(move || sender.send(UnixStream::connect(path).unwrap()));
        receiver
    }

    #[test]
    fn who_comes_while_nobody_accepts_waits_outside_and_is_let_in_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door");
        let listener = UnixListener::bind(&path).unwrap();
        let kept = listener.try_clone().unwrap();

        let first = connect(&path);
        let door = Door::new(listener, || take_the_room(&path));
        let mut served = door.accept().unwrap();
        served.write_all(b"1").unwrap();
        first.recv_timeout(LATE).unwrap().read_exact(&mut [0]).unwrap();

        // The process that serves dies, and with it the connection; the socket lives on in `kept`.
        drop((door, served));
        let second = connect(&path);
        assert!(second.recv_timeout(SOON).is_err(), "connected to nobody");

        let next = Door::new(kept, || take_the_room(&path));
        let mut served = next.accept().unwrap();
        served.write_all(b"2").unwrap();
        second.recv_timeout(LATE).unwrap().read_exact(&mut [0]).unwrap();
        let third = connect(&path);
        assert!(third.recv_timeout(SOON).is_err(), "a second front end is let in");
    }

    #[test]
    fn without_a_door_who_comes_is_connected_to_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door");
        let listener = UnixListener::bind(&path).unwrap();
        let first = connect(&path);
        drop(listener.accept().unwrap());
        drop(first);
        connect(&path).recv_timeout(LATE).unwrap();
    }

    #[test]
    fn a_door_is_known_by_its_descriptor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door");
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(place_of(listener.as_raw_fd()), Some(path));
        let (unnamed, _) = UnixStream::pair().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for other in [unnamed.as_raw_fd(), tcp.as_raw_fd(), -1] {
            assert_eq!(place_of(other), None);
        }
    }

    #[test]
    fn a_name_that_is_too_long_is_no_plug() {
        assert!(address(&[b'x'; 108]).is_err());
        let (made, length) = address(b"\0semper-plug-1").unwrap();
        assert_eq!((made.sun_path[1], length), (b's' as libc::c_char, 2 + 14));
    }
}
