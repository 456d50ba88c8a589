//! The walls of this program: what is opened after its start, and so stays open.
//!
//! They are raised when the image, the sockets and the record were opened and the image was taken or
//! is about to be waited for, before any thread starts; for a spare that is long before it serves.
//! `docs/design/walls.md` says what is opened when.

use std::path::{Path, PathBuf};

use semper_block::Image;
use semper_walls::{Access, Program, Standing, Walls};

use crate::args::Args;

/// Who connects is looked up here (`peers`), and how busy the host is (`contention`).
const PROCESSES: &str = "/proc";
/// How many processors there are.
const PROCESSORS: &str = "/sys/devices/system/cpu/online";
/// What a backtrace needs.
const ITSELF: &str = "/proc/self/exe";

/// Raises them. What could not be had is in the log.
pub(crate) fn raise(args: &Args, image: &Image) -> Standing {
    let mut walls = Walls::new(Program::Blkd)
        // The mapped engine opens it anew.
        .file(image.file(), if image.read_only() { Access::Read } else { Access::Write })
        .path(Path::new(PROCESSES), Access::Read)
        .path(Path::new(PROCESSORS), Access::Read)
        .path(Path::new(ITSELF), Access::Read);
    let sockets = [&args.socket_path, &args.control_socket, &args.session_socket];
    let kept = [&args.map_file, &args.flush_file];
    for (paths, access) in [
        (&sockets[..], Access::Sockets),
        (&kept[..], Access::Keep),
        (&[&args.peer_file][..], Access::Read),
    ] {
        // Each is made, replaced or removed under its name, which belongs to its directory.
        for folder in paths.iter().filter_map(|path| path.as_deref()?.parent()) {
            walls = walls.path(folder, access);
        }
    }
    for (path, access) in record(args, image) {
        walls = walls.path(&path, access);
    }
    #[cfg(feature = "crash-points")]
    if let Some(log) = std::env::var_os("SEMPER_DIE_LOG").map(PathBuf::from)
        && let Some(folder) = log.parent()
    {
        walls = walls.path(folder, Access::Keep);
    }
    let standing = walls.raise();
    for missing in standing.missing.split("; ").filter(|missing| !missing.is_empty()) {
        log::warn!("a wall is missing: {missing}");
    }
    standing
}

/// The record of claims, which is looked at when the image is taken.
fn record(args: &Args, image: &Image) -> Vec<(PathBuf, Access)> {
    let Some(path) = &args.epoch_file else {
        // Whether there is a claim that this process has not.
        let opened = PathBuf::from(format!("/proc/self/fd/{}", image.fd()));
        return semper_epoch::record_path(&opened)
            .map_or_else(|_| Vec::new(), |path| vec![(path, Access::Read)]);
    };
    // In the directory of the images nothing can be made any more.
    if let Err(error) = semper_epoch::make(path) {
        log::warn!("the image has no record of claims yet error=\"{error}\"");
    }
    let folder = path.parent().unwrap_or(Path::new(".")).to_owned();
    // The directory is flushed with the first record.
    vec![(path.clone(), Access::Write), (folder, Access::List)]
}
