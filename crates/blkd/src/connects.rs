//! What this program connects to, by a process beside it (`semper_walls::Connects`): behind its walls it
//! connects to nothing itself.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use semper_spare::socket::connect_without_waiting;
use semper_walls::{Program, Walls, Way};

use crate::args::Args;
use crate::{door, service};

/// Which way is which.
const SESSION: usize = 0;
const DOOR: usize = 1;

/// The process beside.
#[derive(Clone)]
pub(crate) struct Connects(Arc<semper_walls::Connects>);

impl Connects {
    /// Starts it, before anything is opened, and before any thread.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn start(args: &Args) -> io::Result<Self> {
        let (session, door) = (args.session_socket.clone(), door_of(args));
        let ways = || -> Vec<Way> {
            vec![
                // It serves a door as well, which does not wait.
                Box::new(move || match &session {
                    Some(path) => connect_without_waiting(path).map(Some),
                    None => Ok(None),
                }),
                Box::new(move || match &door {
                    Some(path) => door::take_the_room(path).map(|()| None),
                    None => Ok(None),
                }),
            ]
        };
        let walls = Walls::new(Program::Connects);
        semper_walls::Connects::start(walls, ways).map(|beside| Self(Arc::new(beside)))
    }

    /// A link to whoever serves.
    ///
    /// # Errors
    /// As [`connect_without_waiting`].
    pub(crate) fn to_session(&self) -> io::Result<OwnedFd> {
        self.0.ask(SESSION)
    }

    /// Has the door shut (`door::take_the_room`), and does not wait for it.
    ///
    /// # Errors
    /// The system's, when that cannot be asked for.
    pub(crate) fn take_the_room(&self) -> io::Result<()> {
        self.0.tell(DOOR)
    }
}

fn door_of(args: &Args) -> Option<PathBuf> {
    match (args.fd, &args.socket_path) {
        (Some(fd), _) => door::place_of(fd),
        (None, Some(path)) => Some(path.clone()),
        (None, None) => service::socket().ok().flatten().and_then(door::place_of),
    }
}
