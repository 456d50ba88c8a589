//! The walls of this program: what is opened after its start, and so stays open.
//!
//! Image, sockets, ring and page are opened before. What is left: the record of claims, which is looked
//! at when the image is taken, and the sockets' names, which are removed at the end.

use std::path::{Path, PathBuf};

use semper_block::Image;
use semper_walls::{Access, Program, Standing, Walls};

use crate::args::{Args, Kind};

/// What a backtrace needs.
const ITSELF: &str = "/proc/self/exe";

/// Raises them. What could not be had is in the log.
pub(crate) fn raise(args: &Args, image: Option<&Image>) -> Standing {
    let program = match args.kind {
        Kind::Pci => Program::VfiodPci,
        Kind::Nvme | Kind::Edu => Program::Vfiod,
    };
    let mut walls = Walls::new(program).path(Path::new(ITSELF), Access::Read);
    if let Some(image) = image {
        // The mapped engine opens it anew.
        let access = if image.read_only() { Access::Read } else { Access::Write };
        walls = walls.file(image.file(), access);
        for (path, access) in record(args, image) {
            walls = walls.path(&path, access);
        }
    }
    for path in
        [&args.socket_path, &args.shim_socket_path, &args.control_socket, &args.session_socket]
    {
        if let Some(folder) = path.as_deref().and_then(Path::parent) {
            walls = walls.path(folder, Access::Sockets);
        }
    }
    let standing = walls.raise();
    for missing in standing.missing.split("; ").filter(|missing| !missing.is_empty()) {
        log::warn!("a wall is missing: {missing}");
    }
    standing
}

/// The record of claims, as in `semper-blkd`.
fn record(args: &Args, image: &Image) -> Vec<(PathBuf, Access)> {
    let Some(path) = &args.epoch_file else {
        let opened = PathBuf::from(format!("/proc/self/fd/{}", image.fd()));
        return semper_epoch::record_path(&opened)
            .map_or_else(|_| Vec::new(), |path| vec![(path, Access::Read)]);
    };
    if let Err(error) = semper_epoch::make(path) {
        log::warn!("the image has no record of claims yet error=\"{error}\"");
    }
    let folder = path.parent().unwrap_or(Path::new(".")).to_owned();
    vec![(path.clone(), Access::Write), (folder, Access::List)]
}
