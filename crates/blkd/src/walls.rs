//! The walls of this program: what is opened after its start, and so stays open.
//!
//! They are raised when the image, the sockets and the record were opened and the image was taken or
//! is about to be waited for, before any thread starts; for a spare that is long before it serves.
//! `docs/design/walls.md` says what is opened when.

use std::path::{Path, PathBuf};

use semper_block::Image;
use semper_layers::disk::{make_folder, places};
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
    for (path, access) in record(args, image).into_iter().chain(layers(args, image)) {
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

/// The layers of the image, which snapshots make and merges remove, and their maps.
fn layers(args: &Args, image: &Image) -> Vec<(PathBuf, Access)> {
    let makes = (args.layer_map.is_some() || args.merge.is_some()) && !image.read_only();
    let is_file = image.file().metadata().is_ok_and(|metadata| metadata.is_file());
    if makes && is_file && image.path().exists() {
        if let Err(error) = make_folder(image.path()) {
            log::warn!("no snapshot can be taken: no directory for layers error=\"{error}\"");
        }
        // Whether there are layers is noted in it.
        if args.epoch_file.is_none()
            && let Ok(path) = semper_epoch::record_path(image.path())
        {
            let _ = semper_epoch::make(&path);
        }
    }
    let writes = makes || args.snapshot.is_some();
    let places = places(image.path()).into_iter().map(|place| match (place.is_dir(), writes) {
        (true, true) => (place, Access::Keep),
        (true, false) => (place, Access::Read),
        (false, true) if makes => (place, Access::Write),
        (false, _) => (place, Access::Read),
    });
    // The directory is flushed with the first record.
    let beside =
        image.path().parent().filter(|_| makes).map(|folder| (folder.to_owned(), Access::List));
    let memory = args.layer_map.as_deref().and_then(Path::parent).filter(|_| makes);
    let memory = memory.map(|folder| (folder.to_owned(), Access::Keep));
    places.chain(beside).chain(memory).collect()
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
