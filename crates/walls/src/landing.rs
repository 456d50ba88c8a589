//! Landlock: which files, ports, sockets and processes there still are.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use crate::{Standing, attempt};

/// The version that is asked for; what an older kernel does not have is left out.
const WANTED: ABI = ABI::V7;

/// What is left open of a file, or of everything in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading it.
    Read,
    /// Reading and writing it.
    Write,
    /// The names in a directory.
    List,
    /// A directory in which sockets are made and removed.
    Sockets,
    /// A directory in which files are made, written, replaced and removed.
    Keep,
}

impl Access {
    fn rights(self, is_device: bool) -> BitFlags<AccessFs> {
        let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
        let rights = match self {
            Self::Read => AccessFs::ReadFile.into(),
            Self::Write => write,
            Self::List => AccessFs::ReadDir.into(),
            Self::Sockets => AccessFs::MakeSock | AccessFs::RemoveFile,
            Self::Keep => write | AccessFs::ReadDir | AccessFs::MakeReg | AccessFs::RemoveFile,
        };
        // Its size, and the size of its blocks.
        if is_device { rights | AccessFs::IoctlDev } else { rights }
    }

    /// As access(2) has it.
    fn mode(self) -> libc::c_int {
        match self {
            Self::Read => libc::R_OK,
            Self::Write => libc::R_OK | libc::W_OK,
            Self::List => libc::R_OK | libc::X_OK,
            Self::Sockets | Self::Keep => libc::R_OK | libc::W_OK | libc::X_OK,
        }
    }
}

/// A port that is left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tcp {
    /// To listen at; 0 is any.
    Listen(u16),
    /// To connect to, at any address.
    Connect(u16),
}

/// What is left open.
#[derive(Debug, Default)]
pub(crate) struct Ground {
    places: Vec<(OwnedFd, Access, bool)>,
    ports: Vec<Tcp>,
    any_owner: bool,
}

fn is_device(file: &File) -> bool {
    use std::os::unix::fs::FileTypeExt;
    file.metadata().is_ok_and(|metadata| {
        let kind = metadata.file_type();
        kind.is_block_device() || kind.is_char_device()
    })
}

impl Ground {
    pub(crate) fn path(&mut self, path: &Path, access: Access) {
        // A relative path without a directory has an empty one.
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let opened = File::options().read(true).custom_flags(libc::O_PATH).open(path);
        if let Ok(file) = opened {
            let device = is_device(&file);
            self.place(file.into(), access, device);
        }
    }

    pub(crate) fn file(&mut self, file: &File, access: Access) {
        let device = is_device(file);
        // Without a descriptor it is not opened again.
        if let Ok(copy) = file.as_fd().try_clone_to_owned() {
            self.place(copy, access, device);
        }
    }

    /// Memory that has no path is none of Landlock's business, which refuses to hear of it.
    fn place(&mut self, place: OwnedFd, access: Access, device: bool) {
        let rules = Ruleset::default().handle_access(AccessFs::ReadFile).and_then(Ruleset::create);
        let rule = PathBeneath::new(place.as_fd(), AccessFs::ReadFile);
        if rules.and_then(|rules| rules.add_rule(rule)).is_ok() {
            self.places.push((place, access, device));
        }
    }

    pub(crate) fn any_owner(&mut self) {
        self.any_owner = true;
    }

    pub(crate) fn tcp(&mut self, tcp: Tcp) {
        self.ports.push(tcp);
    }

    /// Whether all of it can be used with the capabilities in force.
    pub(crate) fn is_within_reach(&self) -> bool {
        let mut places = self.places.iter();
        !self.any_owner
            && places.all(|(place, access, _)| {
                let path = format!("/proc/self/fd/{}\0", place.as_raw_fd());
                // SAFETY: the path is a C string that lives across the call.
                let status = unsafe {
                    let path = path.as_ptr().cast();
                    libc::faccessat(libc::AT_FDCWD, path, access.mode(), libc::AT_EACCESS)
                };
                status == 0
            })
    }

    pub(crate) fn enclose(self, standing: &mut Standing) {
        let enclosed = attempt(standing, "Landlock", self.restrict());
        match enclosed {
            None => {}
            Some(RulesetStatus::NotEnforced) => {
                standing.lacks("Landlock: not in this kernel");
            }
            Some(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced) => {
                standing.landlock = version();
                standing.no_new_privs = true;
                for missing in lacking(standing.landlock) {
                    standing.lacks(&missing);
                }
            }
        }
    }

    fn restrict(&self) -> Result<RulesetStatus, RulesetError> {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(WANTED))?
            .handle_access(AccessNet::from_all(WANTED))?
            .scope(Scope::from_all(WANTED))?
            .create()?;
        for (place, access, device) in &self.places {
            let place: BorrowedFd<'_> = place.as_fd();
            rules = rules.add_rule(PathBeneath::new(place, access.rights(*device)))?;
        }
        for port in &self.ports {
            rules = rules.add_rule(match *port {
                Tcp::Listen(port) => NetPort::new(port, AccessNet::BindTcp),
                Tcp::Connect(port) => NetPort::new(port, AccessNet::ConnectTcp),
            })?;
        }
        Ok(rules.restrict_self()?.ruleset)
    }
}

/// The kernel's version of Landlock; 0 without.
fn version() -> i32 {
    const VERSION: libc::c_ulong = 1; // LANDLOCK_CREATE_RULESET_VERSION
    // SAFETY: no memory is passed.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, VERSION) };
    i32::try_from(version).unwrap_or(0).max(0)
}

/// What a version does not refuse.
fn lacking(version: i32) -> Vec<String> {
    let lacks = [
        (3, "truncating files by path"),
        (4, "ports of TCP"),
        (5, "the commands of devices"),
        (6, "signals and abstract sockets"),
    ];
    let mut lacking = Vec::new();
    for (since, what) in lacks {
        if version < since {
            lacking.push(format!("Landlock {version}: does not refuse {what} (since {since})"));
        }
    }
    lacking
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread of its own, which keeps the walls for itself.
    fn behind_walls<T: Send + 'static>(
        ground: Ground,
        look: impl FnOnce(Standing) -> T + Send + 'static,
    ) -> T {
        let run = move || {
            let mut standing = Standing::default();
            ground.enclose(&mut standing);
            look(standing)
        };
        std::thread::spawn(run).join().unwrap()
    }

    #[test]
    fn what_was_named_can_be_opened_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (own, read, other) =
            (folder.path().join("own"), folder.path().join("read"), folder.path().join("other"));
        std::fs::create_dir(&own).unwrap();
        std::fs::write(&read, "r").unwrap();
        std::fs::write(&other, "o").unwrap();
        let mut ground = Ground::default();
        ground.path(&own, Access::Keep);
        ground.path(&own, Access::Sockets);
        ground.path(&read, Access::Read);
        ground.path(&folder.path().join("absent"), Access::Write);
        behind_walls(ground, move |standing| {
            if standing.landlock == 0 {
                return;
            }
            std::fs::write(own.join("new"), "n").unwrap();
            std::fs::rename(own.join("new"), own.join("newer")).unwrap();
            std::fs::remove_file(own.join("newer")).unwrap();
            assert!(std::os::unix::net::UnixListener::bind(own.join("socket")).is_ok());
            assert!(std::fs::read(&read).is_ok());
            for refused in [
                std::fs::write(&read, "w").err(),
                std::fs::read(&other).err(),
                std::fs::write(other.with_extension("new"), "").err(),
                std::fs::remove_file(&other).err(),
                std::fs::read_dir(other.parent().unwrap()).err(),
            ] {
                let error = refused.expect("it was not refused");
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            }
        });
    }

    #[test]
    fn what_an_old_kernel_does_not_refuse_is_told() {
        assert!(lacking(7).is_empty());
        assert_eq!(lacking(2).len(), 4);
        assert!(lacking(5)[0].contains("signals"));
    }
}
