//! How this process stands to its image, and the one way to take it.
//!
//! ```text
//!   opened ──────────────────────────────────┐
//!   awaiting claim ──"claim"──► incoming ────┼─take──► held ──"release"──► handed over ──take──► held
//!   followed (a spare) ──who had it has died─┘
//! ```
//!
//! As in `semper-blkd` (`crates/blkd/src/tenure.rs`): what was found out about the image while another
//! had it is looked at again with the lock held.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use semper_block::{Image, ImageError, Name};
use semper_epoch::{Claim, record_path};
use semper_title::{Status, Title};

use crate::failure::Failure;

/// How long who gives the image away may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long requests of a dead process may take to end.
const INHERITING: Duration = Duration::from_secs(600);

/// How this process stands to its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Opened,
    Followed,
    Incoming,
    Held,
    HandedOver,
}

/// The image, and what this process is to it.
pub(crate) struct Tenure {
    image: Arc<Image>,
    title: Title,
    standing: Standing,
    flushing: Arc<AtomicBool>,
}

impl Tenure {
    pub(crate) fn new(image: Arc<Image>, title: Title, incoming: bool) -> Self {
        let standing = if incoming { Standing::Incoming } else { Standing::Opened };
        Self { image, title, standing, flushing: Arc::default() }
    }

    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    /// A spare's: the image is another's, and may be given away meanwhile.
    pub(crate) fn follow(&mut self) {
        self.standing = Standing::Followed;
        if !self.title.is_awaited() {
            self.title.confirm();
        }
    }

    /// The process that this one followed has died, and had the image or had not.
    pub(crate) fn inherit(&mut self, held: bool, claim: Option<Claim>) -> Result<(), String> {
        if let Some(claim) = claim.filter(|_| self.title.is_awaited()) {
            self.title.give(claim)?;
        }
        if !held {
            self.standing = Standing::HandedOver;
        }
        Ok(())
    }

    pub(crate) fn is_held(&self) -> bool {
        self.standing == Standing::Held
    }

    pub(crate) fn is_awaited(&self) -> bool {
        self.title.is_awaited()
    }

    pub(crate) fn claim(&self) -> Status {
        self.title.status()
    }

    /// Takes the image, unless this process has it.
    ///
    /// # Errors
    /// [`Failure`]; the image is not held, and this can be called again.
    pub(crate) fn take(&mut self) -> Result<(), Failure> {
        let patience = match self.standing {
            Standing::Held => return Ok(()),
            Standing::Opened => Duration::ZERO,
            // What the dead process has begun keeps the lock until it has ended in the kernel.
            Standing::Followed => INHERITING,
            Standing::Incoming | Standing::HandedOver => PATIENCE,
        };
        let locked = match patience {
            Duration::ZERO => self.image.try_lock(),
            patience => self.image.lock_within(patience),
        };
        locked.map_err(Failure::Lock)?;
        if let Err(failure) = self.look_again() {
            self.title.lapse();
            self.image.unlock();
            return Err(failure);
        }
        if patience == PATIENCE {
            // Another host may have written it.
            self.image.drop_cache();
        }
        self.standing = Standing::Held;
        Ok(())
    }

    fn look_again(&self) -> Result<(), Failure> {
        let image = &*self.image;
        if image.name() == Name::Replaced && !image.pinned() {
            return Err(Failure::Image(ImageError::Replaced(image.path().to_owned())));
        }
        image.refresh_size().map_err(Failure::Image)?;
        self.title.admit(image).map_err(Failure::Denied)?;
        let opened = format!("/proc/self/fd/{}", image.fd());
        if let Ok(record) = record_path(Path::new(&opened)) {
            let record = semper_epoch::read(&record).map_err(Failure::Denied)?;
            if record.is_some_and(|record| record.layered) {
                return Err(Failure::Layered(image.path().to_owned()));
            }
        }
        Ok(())
    }

    /// Has what was written so far put on stable storage, in a thread beside, unless one is at it: of
    /// an image that is about to be given away, so that little is left to do when the guest waits.
    pub(crate) fn flush_early(&self) {
        if !self.is_held() || self.image.read_only() || self.flushing.swap(true, Ordering::Relaxed)
        {
            return;
        }
        // Opened anew, without the lock: a flush is not ended by SIGKILL, and would keep it.
        let opened = File::open(format!("/proc/self/fd/{}", self.image.fd()));
        let flushing = Arc::clone(&self.flushing);
        let flush = move || {
            if let Err(error) = opened.and_then(|file| file.sync_data()) {
                // What is lost is told to whoever gives the image away.
                log::warn!("the image was not flushed early error=\"{error}\"");
            }
            flushing.store(false, Ordering::Relaxed);
        };
        if let Err(error) = std::thread::Builder::new().name("flush".into()).spawn(flush) {
            self.flushing.store(false, Ordering::Relaxed);
            log::warn!("no thread to flush the image with error=\"{error}\"");
        }
    }

    /// Gives the image to whoever takes it next. Nothing is in flight.
    ///
    /// # Errors
    /// The system's: what was written is perhaps not where another host looks for it. The image is kept.
    pub(crate) fn give_away(&mut self) -> io::Result<()> {
        self.give_away_after(File::sync_data)
    }

    fn give_away_after(&mut self, flush: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        if !self.is_held() {
            return Ok(());
        }
        if !self.image.read_only() {
            // Opened anew: of what was lost the kernel tells each opened file once, and the guest's next
            // flush is to be told as well.
            flush(&File::open(format!("/proc/self/fd/{}", self.image.fd()))?)?;
        }
        self.standing = Standing::HandedOver;
        self.title.lapse();
        self.image.unlock();
        log::info!("gave the image away image={}", self.image.path().display());
        Ok(())
    }

    /// Takes the claim that was awaited; the same one again is no error.
    ///
    /// # Errors
    /// A sentence, when this process has another, or none to wait for.
    pub(crate) fn give_claim(&self, claim: Claim) -> Result<(), String> {
        self.title.give(claim)
    }

    /// An orderly end: whoever takes the image next needs no claim.
    pub(crate) fn end(&self) {
        if self.is_held() {
            self.title.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use semper_block::OpenOptions;

    use super::*;

    #[test]
    fn an_image_that_cannot_be_flushed_is_kept() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let open = || Arc::new(Image::open(file.path(), OpenOptions::default()).unwrap());
        let other = open();
        let mut tenure = Tenure::new(open(), Title::none(), false);
        tenure.take().unwrap();
        let error = tenure.give_away_after(|_| Err(io::Error::from_raw_os_error(libc::EIO)));
        assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(tenure.is_held() && other.try_lock().is_err());
        // And goes on where it is, or is given away by the next try.
        tenure.take().unwrap();
        tenure.give_away().unwrap();
        assert!(!tenure.is_held() && other.try_lock().is_ok());
    }
}
