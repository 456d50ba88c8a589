//! The walls around a program: what it can still ask of the kernel when a flaw in it is used against
//! its host. `docs/design/walls.md` has the whole picture.
//!
//! ```text
//!   no new privileges   nothing that is executed gains any (and nothing is executed)
//!   capabilities        none; one only where a file of the program's own is not to be had without
//!   memory              no core files, and as root not to be looked at by others
//!   Landlock            the files and directories that were named, and no other; ports of TCP, signals
//!                       and abstract sockets in the same way            (`landing`)
//!   seccomp             the system calls of one table, each with its reason            (`calls`)
//!   connections         those that a process beside makes, by number                   (`connects`)
//! ```
//!
//! A program raises its walls once, in its only thread: threads inherit them, and no call takes them
//! down. What this kernel does not have is left out and told ([`Standing::missing`]); that is the
//! operator's to judge, for a VM without one wall is better than none.

mod calls;
mod connects;
mod filter;
mod landing;
mod privileges;

#[cfg(feature = "breakout")]
pub mod breakout;

use std::fs::File;
use std::path::Path;

pub use connects::{Connects, Way};
pub use filter::{refuse_all_but_the_end, system_call_is_refused};
pub use landing::{Access, Tcp};
use serde::Serialize;

use crate::calls::Call;
use crate::landing::Ground;

/// Whose walls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `semper-blkd`.
    Blkd,
    /// `semper-blkd --export`, which serves nobody.
    Export,
    /// `semper-wired`.
    Wired,
    /// `semper-saved`.
    Saved,
    /// `semper-vfiod`.
    Vfiod,
    /// The same with a real PCI device behind it.
    VfiodPci,
    /// The process beside one that makes its connections ([`Connects`]).
    Connects,
}

impl Program {
    fn calls(self) -> Vec<&'static [Call]> {
        match self {
            Self::Blkd => vec![calls::ALL, calls::BLKD],
            Self::Export => vec![calls::ALL, calls::BLKD, calls::EXPORT],
            Self::Wired => vec![calls::ALL, calls::WIRED],
            Self::Saved => vec![calls::ALL, calls::SAVED],
            Self::Vfiod => vec![calls::ALL, calls::VFIOD],
            Self::VfiodPci => vec![calls::ALL, calls::VFIOD_PCI],
            Self::Connects => vec![calls::CONNECTS],
        }
    }
}

/// Which walls stand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Standing {
    /// Nothing that is executed gains privileges.
    pub no_new_privs: bool,
    /// The one that is left, or empty.
    pub capabilities: &'static str,
    /// Version of the kernel's Landlock; 0: none.
    pub landlock: i32,
    /// System calls are filtered.
    pub seccomp: bool,
    /// What could not be had, and why, with "; " between; empty when everything stands.
    pub missing: String,
}

impl Standing {
    fn lacks(&mut self, what: &str) {
        let between = if self.missing.is_empty() { "" } else { "; " };
        self.missing.push_str(between);
        self.missing.push_str(what);
    }
}

/// Walls in the making.
#[derive(Debug)]
pub struct Walls {
    program: Program,
    ground: Ground,
}

impl Walls {
    /// Around which nothing is left open but what the program's table of system calls says.
    pub fn new(program: Program) -> Self {
        Self { program, ground: Ground::default() }
    }

    /// Leaves open what is at `path`, a file or a directory with everything in it. What is not there
    /// needs no way to it.
    #[must_use]
    pub fn path(mut self, path: &Path, access: Access) -> Self {
        self.ground.path(path, access);
        self
    }

    /// Leaves an open file open for being opened again.
    #[must_use]
    pub fn file(mut self, file: &File, access: Access) -> Self {
        self.ground.file(file, access);
        self
    }

    /// Files are still to be named that may be of any user.
    #[must_use]
    pub fn any_owner(mut self) -> Self {
        self.ground.any_owner();
        self
    }

    /// Leaves a port open.
    #[must_use]
    pub fn tcp(mut self, tcp: Tcp) -> Self {
        self.ground.tcp(tcp);
        self
    }

    /// Raises them, around the calling thread and those that it starts from now on.
    pub fn raise(self) -> Standing {
        #[cfg(feature = "breakout")]
        if breakout::without_walls() {
            return Standing::default();
        }
        let mut standing = Standing::default();
        privileges::give_up(&self.ground, &mut standing);
        self.ground.enclose(&mut standing);
        filter::install(&self.program.calls(), &mut standing);
        standing
    }

    /// Raises further walls inside those that stand, before any thread: fewer files, ports and
    /// capabilities.
    pub fn narrow(self) -> Standing {
        let mut standing = Standing::default();
        #[cfg(feature = "breakout")]
        if breakout::without_walls() {
            return standing;
        }
        privileges::give_up_the_rest(&mut standing);
        self.ground.enclose(&mut standing);
        standing
    }
}

/// Runs `attempt`, and says what was in the way.
fn attempt<T, E: std::fmt::Display>(
    standing: &mut Standing,
    what: &str,
    result: Result<T, E>,
) -> Option<T> {
    result.map_err(|error| standing.lacks(&format!("{what}: {error}"))).ok()
}
