//! What a service manager such as systemd gives to a program, and wants to hear of it: the listening
//! socket (sd_listen_fds(3)), and the word that it is ready (sd_notify(3)).

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The first of the descriptors that a service manager passes.
const FIRST: i32 = 3;

/// The socket that was passed to this process, None where there is none.
///
/// # Errors
/// A sentence for a number of sockets that is not one.
pub(crate) fn socket() -> Result<Option<i32>, String> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    chosen(&variable("LISTEN_PID"), &variable("LISTEN_FDS"), std::process::id())
}

fn chosen(pid: &str, count: &str, own: u32) -> Result<Option<i32>, String> {
    // A parent may have left the variables, which are for another process then.
    if pid.parse() != Ok(own) {
        return Ok(None);
    }
    match count.parse() {
        Ok(1) => Ok(Some(FIRST)),
        _ => Err(format!("LISTEN_FDS={count}: a disk has one socket; name one in its unit")),
    }
}

/// Whoever started this process, if that wants to hear how the process is.
pub(crate) struct Manager(Option<UnixDatagram>);

impl Manager {
    /// Connects: behind the walls it is too late for that. One that cannot be reached is told nothing.
    /// By this socket, as it sends datagrams, others could be reached as well, and no other process
    /// may speak for this one (`NotifyAccess=main`): so it is closed with the last word.
    pub(crate) fn connect() -> Self {
        let address = std::env::var_os("NOTIFY_SOCKET").unwrap_or_default();
        Self(connected(&address).ok().flatten())
    }

    /// It serves, and that is the last word.
    pub(crate) fn serves(self) {
        self.ready("serves");
    }

    /// It is ready; `status` says to people what it is doing.
    pub(crate) fn ready(&self, status: &str) {
        if let Some(socket) = &self.0 {
            // A manager that hangs does not hold the guest's disk up.
            let _ = socket.send(format!("READY=1\nSTATUS={status}").as_bytes());
        }
    }
}

fn connected(address: &OsStr) -> std::io::Result<Option<UnixDatagram>> {
    let address = match address.as_bytes() {
        [] => return Ok(None),
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(Some(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_taken_only_if_it_is_for_this_process() {
        assert_eq!(chosen("42", "1", 42), Ok(Some(3)));
        assert_eq!(chosen("41", "1", 42), Ok(None));
        assert_eq!(chosen("", "", 42), Ok(None));
        assert!(chosen("42", "2", 42).unwrap_err().contains("one socket"));
        assert!(chosen("42", "", 42).is_err());
    }

    #[test]
    fn who_listens_by_path_or_by_an_abstract_name_hears_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("semper-blkd-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (listener, address) in [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (UnixDatagram::bind_addr(&abstract_name).unwrap(), format!("@{name}").into()),
        ] {
            Manager(connected(&address).unwrap()).ready("waits");
            let mut told = [0; 64];
            let length = listener.recv(&mut told).unwrap();
            assert_eq!(&told[..length], b"READY=1\nSTATUS=waits");
        }
        // Who hears nothing any more is not waited for.
        let path = folder.path().join("silent");
        let _silent = UnixDatagram::bind(&path).unwrap();
        let manager = Manager(connected(path.as_os_str()).unwrap());
        (0..10_000).for_each(|_| manager.ready("waits"));
        assert!(connected(OsStr::new("")).unwrap().is_none());
        assert!(connected(OsStr::new("/nowhere/at/all")).is_err());
    }
}
