//! A chain, or a snapshot, for who only reads: here or on another host, from the medium alone.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use semper_epoch::Id;

use crate::bits::{Bits, Identity};
use crate::chain::{Chain, Level};
use crate::disk::Disk;
use crate::files::{Access, Files};
use crate::keeper::{LayersError, open_level, read_record};
use crate::record::{Layer, LayerId, Refused};

/// Opens what is on the medium of an image's chain: all of it, or one snapshot. `None`: the image is
/// all of the disk. What a running guest has not flushed is not in it.
///
/// # Errors
/// [`LayersError`].
pub fn open(
    files: &dyn Files,
    snapshot: Option<LayerId>,
    size: u64,
) -> Result<Option<Arc<Chain>>, LayersError> {
    let record = read_record(files, Access::Read)?;
    let Some(record) = record else {
        return snapshot.map_or(Ok(None), |id| Err(Refused::Missing(id).into()));
    };
    let (below, size) = match snapshot {
        None => (LayerId::MAX, size),
        Some(id) => match record.layer(id).filter(|_| record.has_snapshot(id)) {
            Some(layer) => (id, layer.size),
            None => return Err(Refused::Missing(id).into()),
        },
    };
    let layers: Vec<_> = record.chain().iter().filter(|layer| layer.id < below).collect();
    if layers.is_empty() && snapshot.is_none() {
        return Ok(None);
    }
    let levels = layers.into_iter().map(|layer| level(files, record.chain, layer));
    let levels = levels.collect::<Result<_, _>>()?;
    let settled = Arc::new(AtomicBool::new(true));
    Ok(Some(Arc::new(Chain { base: files.base(), levels, size, settled })))
}

/// The chain of the image at `path`, which is open as `file`; `None` where the image is all of the disk.
/// `direct`: read around the page cache.
///
/// # Errors
/// [`LayersError`].
pub fn of_image(
    path: &Path,
    file: &File,
    (direct, size): (bool, u64),
) -> Result<Option<Arc<Chain>>, LayersError> {
    let failed = |source| {
        let (what, name) = ("look for the layers of", path.display().to_string());
        LayersError::Io { what, name, source }
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Ok(None);
    }
    let file = file.try_clone().map_err(failed)?;
    let files = Disk::for_reading(path, file, direct).map_err(failed)?;
    open(&files, None, size)
}

fn level(files: &dyn Files, chain: Id, layer: &Layer) -> Result<Arc<Level>, LayersError> {
    let memory = |identity: &Identity| Bits::anonymous(identity).map(Arc::new);
    open_level(files, chain, layer, (Access::Read, &memory))
}
