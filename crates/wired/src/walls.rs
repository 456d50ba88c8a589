//! The walls of this program: what is opened after its start, and so stays open. They are raised
//! before anything is read that the other end, QEMU or a disk says.

use std::path::Path;

use semper_walls::{Access, Program, Standing, Walls};

use crate::args::{EndArgs, MapSource};

/// Raises them, around sockets that are there; `listens` is what QEMU connects to.
pub(crate) fn raise(end: &EndArgs, listens: Option<&Path>) -> Standing {
    let mut walls = Walls::new(Program::Wired);
    for path in [&end.ca, &end.cert, &end.key] {
        walls = walls.path(path, Access::Read);
    }
    for disk in &end.disks {
        walls = walls.path(&disk.path, Access::Read);
        for place in semper_layers::disk::places(&disk.path) {
            walls = walls.path(&place, Access::Read);
        }
        if let Some(MapSource::File(path)) = &disk.map {
            walls = walls.path(path, Access::Read);
        }
    }
    for folder in [end.control_socket.as_deref(), listens].into_iter().flatten() {
        walls = walls.path(folder.parent().unwrap_or(Path::new(".")), Access::Sockets);
    }
    let standing = walls.raise();
    if !standing.missing.is_empty() {
        log::warn!("walls are missing: {}", standing.missing);
    }
    standing
}
