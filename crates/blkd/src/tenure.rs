//! How this process stands to its image, and the one way to take it.
//!
//! ```text
//!   opened ─────────────────────────────────────────────────────────┐
//!   awaiting claim ──"claim"──► incoming ──the first queue starts───┤
//!   waiting (a spare, in the kernel) ──the lock is free─────────────┼─take──► held ──┐
//!   handed over ◄──the last queue has stopped, and "handover" said so ─────────────── ┘
//!       └──"handover" says to take it back──────────────────────────┘
//!   refused ◄──take: the image is another's, or cannot be used; this process ends
//! ```
//!
//! While it is not held, the image is another's, and what was found out about it then may be wrong
//! by now. So everything that is not the same for ever is looked at in [`Tenure::take`], with the
//! lock held, and nowhere else:
//!
//! | what | where it is looked at again |
//! |---|---|
//! | the name, which may lead to another file, unless the image is pinned | [`Image::name`] |
//! | the size, of a file or of a block device | [`Image::refresh_size`] |
//! | the page/block map and its file, which are of one size | [`DiskMap::follow_image`] |
//! | whether flushes have failed | [`Flushes::inherit`] |
//! | who may write | [`Title::admit`] |
//! | the layers above it | [`Snapshots::take`] |
//! | the page cache, of which another host knows nothing | [`Image::drop_cache`] |
//!
//! What need not be: the mapping of the mapped engine (what lies beyond it goes through the other
//! engine, what is gone from below it is an error of the request), the alignment for direct I/O
//! (the file is the same), and whether it can be written (the kernel says so to each request).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use semper_block::{Image, ImageError, LockError, Name};
use semper_epoch::Claim;
use semper_title::Title;

use crate::answers;
use crate::block_map::DiskMap;
use crate::failure::Failure;
#[cfg(doc)]
use crate::flushes::Flushes;
use crate::snapshots::Snapshots;
use crate::state::{Shared, mark};

/// How this process stands to its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Standing {
    /// Opened, and about to be taken.
    Opened,
    /// For a VM that is still on another host, and so is the claim: must not be locked.
    AwaitingClaim,
    /// For a VM that is still with another backend: is taken when the first queue starts.
    Incoming,
    /// A spare: sleeps until whoever has the image is gone.
    Waiting,
    /// Locked, and admitted by the image's record: queues may run.
    Held,
    /// Given away; is taken back when somebody says so.
    HandedOver,
    /// The image is not for this process, which is about to end.
    Refused,
}

impl Standing {
    const ALL: [Self; 7] = [
        Self::Opened,
        Self::AwaitingClaim,
        Self::Incoming,
        Self::Waiting,
        Self::Held,
        Self::HandedOver,
        Self::Refused,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::AwaitingClaim => "awaiting-claim",
            Self::Incoming => "incoming",
            Self::Waiting => "waiting",
            Self::Held => "held",
            Self::HandedOver => "handed-over",
            Self::Refused => "refused",
        }
    }

    /// Whether who had the image before may have been on another host: the spare's predecessor
    /// never is, for they share one claim.
    fn follows_another_host(self) -> bool {
        matches!(self, Self::Incoming | Self::HandedOver)
    }
}

/// How long to wait for the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Who has the image keeps it.
    None,
    /// Who has the image is giving it away.
    For(Duration),
    /// Until who has the image is gone.
    Unlimited,
}

/// The image, and what this process is to it.
pub(crate) struct Tenure {
    image: Arc<Image>,
    shared: Arc<Shared>,
    title: Title,
    snapshots: Arc<Snapshots>,
    standing: AtomicU8,
}

impl Tenure {
    pub(crate) fn new(
        image: Arc<Image>,
        shared: Arc<Shared>,
        title: Title,
        snapshots: Arc<Snapshots>,
        standing: Standing,
    ) -> Self {
        let standing = match standing {
            Standing::Incoming if title.is_awaited() => Standing::AwaitingClaim,
            other => other,
        };
        if standing == Standing::Waiting {
            title.confirm();
        }
        Self { image, shared, title, snapshots, standing: AtomicU8::new(standing as u8) }
    }

    pub(crate) fn standing(&self) -> Standing {
        Standing::ALL[usize::from(self.standing.load(Ordering::Acquire))]
    }

    fn set(&self, standing: Standing) {
        self.standing.store(standing as u8, Ordering::Release);
    }

    /// Whether queues may run.
    pub(crate) fn is_held(&self) -> bool {
        self.standing() == Standing::Held
    }

    /// Takes the image, unless this process has it: its lock, then everything that may have changed
    /// before. `map`, once there is one, follows the image. No queue runs.
    ///
    /// # Errors
    /// [`Failure::Lock`]: another has it; nothing has changed, and this can be called again. With
    /// any other the process has nothing to serve, has let the image go, and must end.
    pub(crate) fn take(&self, patience: Patience, map: Option<&DiskMap>) -> Result<(), Failure> {
        let before = self.standing();
        if before == Standing::Held {
            return Ok(());
        }
        if self.snapshots.is_snapshot() {
            // Whoever writes the disk leaves it alone, and has the lock.
            self.snapshots.take(None).map_err(Failure::Layers)?;
            self.set(Standing::Held);
            return Ok(());
        }
        self.lock(patience).map_err(Failure::Lock)?;
        if let Err(failure) = self.look_again(before, map) {
            self.set(Standing::Refused);
            self.image.unlock();
            return Err(failure);
        }
        mark(&self.shared.timeline.lock_acquired);
        self.set(Standing::Held);
        Ok(())
    }

    fn lock(&self, patience: Patience) -> Result<(), LockError> {
        match patience {
            Patience::Unlimited => self.image.wait_lock(),
            Patience::None => self.image.try_lock(),
            Patience::For(time) => self.image.lock_within(time),
        }
    }

    /// With the lock held. What may refuse the image comes before the record, which is written:
    /// it stands beside whatever has the image's name now.
    fn look_again(&self, before: Standing, map: Option<&DiskMap>) -> Result<(), Failure> {
        let image = &*self.image;
        match image.name() {
            Name::Kept => {}
            Name::Replaced if image.pinned() => {
                let path = image.path().display();
                self.shared.report_image_error("name", (0, 0), libc::ESTALE, format!(
                    "image {path}: its name leads to another file now, and this process goes on \
                     with the image; put the image back before the VM is started again"
                ));
            }
            Name::Replaced => {
                return Err(Failure::Image(ImageError::Replaced(image.path().to_owned())));
            }
            // Nobody can have opened another one: who has it serves it, and it ends with him.
            Name::Removed => self.shared.report_image_error("name", (0, 0), libc::ENOENT, format!(
                "image {} was removed: only this process has it, and it is lost at its end; copy \
                 it from /proc/{}/fd/{}",
                image.path().display(),
                std::process::id(),
                image.fd()
            )),
        }
        if let Some(said) = self.shared.flushes.inherit() {
            self.shared.report_image_error("flush", (0, 0), libc::EIO, said);
        }
        let known = image.capacity();
        image.refresh_size().map_err(Failure::Image)?;
        let capacity = image.capacity();
        if capacity > known {
            log::info!("the image has grown size_bytes={capacity} before={known}");
        }
        if capacity < known {
            self.shared.report_image_error("size", (capacity, known - capacity), libc::EIO, format!(
                "image {} has shrunk from {known} to {capacity} bytes, and requests beyond its end \
                 fail; give it back its size (truncate --size={known}), and restore what it held \
                 there",
                image.path().display()
            ));
        }
        self.title.admit(image).map_err(Failure::Denied)?;
        self.snapshots.take(self.title.claim()).map_err(Failure::Layers)?;
        if let Some(map) = map {
            map.follow_image();
        }
        // Direct I/O has to look at what the cache holds with each request.
        if image.direct() || before.follows_another_host() {
            image.drop_cache();
        }
        Ok(())
    }

    /// Gives the image to whoever takes it next, if this process has it. No queue runs.
    pub(crate) fn give_away(&self) {
        if !self.is_held() {
            return;
        }
        self.set(Standing::HandedOver);
        self.snapshots.settle();
        self.snapshots.let_go();
        self.title.lapse();
        self.image.unlock();
        log::info!("gave the image away image={}", self.image.path().display());
    }

    /// Takes the claim that was awaited; the same one again is no error.
    ///
    /// # Errors
    /// A sentence, when this process has another, or none to wait for.
    pub(crate) fn give_claim(&self, claim: Claim) -> Result<(), String> {
        self.title.give(claim)?;
        if self.standing() == Standing::AwaitingClaim {
            self.set(Standing::Incoming);
        }
        Ok(())
    }

    pub(crate) fn claim(&self) -> answers::Claim {
        self.title.status()
    }

    /// An orderly end: whoever takes the image next needs no claim. The lock goes with the process.
    pub(crate) fn end(&self) {
        self.snapshots.end();
        self.title.release();
    }
}
