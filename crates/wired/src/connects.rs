//! What an end connects to, by a process beside it (`semper_walls::Connects`): the end itself, which
//! reads what another host says, may not connect at all.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use semper_walls::{Program, Tcp, Walls, Way};

use crate::args::{EndArgs, MapSource};
use crate::failure::Failure;

const PATIENCE: Duration = Duration::from_secs(10);

/// The process beside.
#[derive(Clone, Debug)]
pub(crate) struct Connects {
    beside: Arc<semper_walls::Connects>,
    /// By the numbers of their ways; behind them is the other end's.
    places: Arc<[PathBuf]>,
}

impl Connects {
    /// Starts it, before anything is opened, and before any thread. It knows the backends of the
    /// disks, the QEMU that waits for a migration, and the other end.
    pub(crate) fn start(
        end: &EndArgs,
        qemu: Option<&Path>,
        other: Option<SocketAddr>,
    ) -> Result<Self, Failure> {
        let backends = end.disks.iter().filter_map(|disk| match &disk.map {
            Some(MapSource::Backend(path)) => Some(path.clone()),
            _ => None,
        });
        let places: Arc<[PathBuf]> = backends.chain(qemu.map(Path::to_owned)).collect();
        let ways = || {
            let unix = places.iter().cloned().map(|path| -> Way {
                Box::new(move || UnixStream::connect(&path).map(|socket| Some(socket.into())))
            });
            let tcp = other.map(|other| -> Way {
                Box::new(move || {
                    TcpStream::connect_timeout(&other, PATIENCE).map(|socket| Some(socket.into()))
                })
            });
            unix.chain(tcp).collect()
        };
        let mut walls = Walls::new(Program::Connects);
        if let Some(other) = other {
            walls = walls.tcp(Tcp::Connect(other.port()));
        }
        let beside = semper_walls::Connects::start(walls, ways)
            .map_err(Failure::system("start the process that makes connections"))?;
        Ok(Self { beside: Arc::new(beside), places })
    }

    /// Connects to a unix socket that was named.
    pub(crate) fn to(&self, path: &Path) -> io::Result<UnixStream> {
        let way = self.places.iter().position(|place| place == path);
        self.beside.ask(way.ok_or(io::ErrorKind::NotFound)?).map(UnixStream::from)
    }

    /// Connects to the other end.
    pub(crate) fn to_other_end(&self) -> io::Result<TcpStream> {
        self.beside.ask(self.places.len()).map(TcpStream::from)
    }
}
