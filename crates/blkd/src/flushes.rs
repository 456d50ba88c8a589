//! One failed flush fails all that follow, until the VM was stopped and started.
//!
//! The kernel tells an error of writing back once to each open file, and takes the pages that it
//! could not write for written (fsync(2)): a guest that flushes again would hear that all is well.
//! So a failed flush is latched, before the guest hears of it, in three places:
//!
//! | place | lasts until | for |
//! |---|---|---|
//! | this process | it ends | its own flushes |
//! | the in-flight region | the guest resets the device | a successor, without any file |
//! | the file that it was told (`--flush-file`) | whoever starts the VM anew removes it | a successor after a reset as well |
//!
//! What the guest has flushed is still carried out, so that as much as possible gets to the medium;
//! the answer is an error all the same. In write-through mode every write is a flush.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::inflight_map::InflightMap;

/// Whether flushes of the image have failed.
#[derive(Default)]
pub(crate) struct Flushes {
    failed: AtomicBool,
    file: OnceLock<PathBuf>,
    region: Mutex<Option<Arc<InflightMap>>>,
}

impl std::fmt::Debug for Flushes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flushes").field("failed", &self.failed).finish_non_exhaustive()
    }
}

/// What a failed flush means, and what is to be done.
pub(crate) fn explain(error: &str) -> String {
    format!(
        "{error}: a flush has failed, so what the guest wrote before may not be on the medium. The \
         kernel tells that once; every further flush of this disk is failed until the VM was stopped \
         and started. Check the storage, stop the VM, and check its file systems (fsck) or restore \
         them"
    )
}

impl Flushes {
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Where the next process finds what this one knows. Once.
    pub(crate) fn keep_in(&self, file: PathBuf) {
        // A second name is nobody's.
        let _ = self.file.set(file);
    }

    /// A flush has failed. To be called before the guest is told.
    pub(crate) fn fail(&self, explanation: &str) {
        if self.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        log::error!("{explanation}");
        if let Some(map) = &*self.region.lock().unwrap_or_else(PoisonError::into_inner) {
            map.device().set_flush_failed();
        }
        if let Some(file) = self.file.get()
            && let Err(error) = std::fs::write(file, format!("{explanation}\n"))
        {
            log::error!(
                "the next process will not know of it after a reset file={} error=\"{error}\"",
                file.display()
            );
        }
    }

    /// Whether an earlier process has left word in the file, and what: to be asked with the image's
    /// lock held.
    pub(crate) fn inherit(&self) -> Option<String> {
        let file = self.file.get()?;
        // However little of it was written: that it is there is the word.
        let left = match std::fs::read_to_string(file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            left => left.unwrap_or_default(),
        };
        self.failed.store(true, Ordering::Release);
        let said = left.trim();
        Some(if said.is_empty() { explain("Input/output error") } else { said.to_owned() })
    }

    /// The region that outlives this process from now on; gives true if it is from there that this
    /// process learns of a failed flush.
    pub(crate) fn attach(&self, map: &Arc<InflightMap>) -> bool {
        // Under the lock, so that a flush that fails meanwhile finds the new region.
        let mut region = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        if region.as_ref().is_some_and(|known| Arc::ptr_eq(known, map)) {
            return false;
        }
        *region = Some(Arc::clone(map));
        let inherited = map.device().flush_failed();
        if self.has_failed() {
            map.device().set_flush_failed();
        }
        inherited && !self.failed.swap(true, Ordering::AcqRel)
    }
}
