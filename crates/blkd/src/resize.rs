//! A disk that becomes larger while its guest runs: the image, then what is served of it, then the
//! front end is told to look, which tells the driver.

use semper_block::GrowError;

use crate::device::Device;

/// Why a disk keeps its size.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotResized {
    #[error("the disk is read-only; what its guest may not write it need not resize")]
    ReadOnly,
    #[error(
        "the disk has snapshots: its layers are as large as the disk was when they were opened, so it \
         keeps its size; stop the VM, merge them all (semper disk merge), and resize it then"
    )]
    Layered,
    #[error("this process does not have the image now; ask the one that serves the disk")]
    NotHeld,
    #[error(transparent)]
    Grow(#[from] GrowError),
    #[error("the image was made larger and cannot be served so: {0}")]
    Served(String),
}

impl Device {
    /// Makes the image `size` bytes large and serves all of it. Running queues are drained for the
    /// moment in which the size changes. Whether the front end was told; one that connects later
    /// reads the new size by itself.
    ///
    /// # Errors
    /// [`NotResized`].
    pub(crate) fn resize(&mut self, size: u64) -> Result<bool, NotResized> {
        let disk = self.disk();
        let image = &*disk.image;
        if image.read_only() {
            return Err(NotResized::ReadOnly);
        }
        if !disk.tenure.is_held() {
            return Err(NotResized::NotHeld);
        }
        if disk.snapshots.is_layered() {
            return Err(NotResized::Layered);
        }
        let before = image.capacity();
        image.grow(size)?;
        self.at_rest(|| {
            let refreshed = image.refresh_size();
            if let Some(map) = &disk.map {
                map.follow_image();
            }
            refreshed
        })
        .map_err(|error| NotResized::Served(error.to_string()))?;
        log::info!("the disk was resized size_bytes={size} before={before}");
        Ok(self.tell_capacity())
    }

    /// Has the front end read the size of the disk again, unless it knows that size. False: there is
    /// nobody to tell, or no way to.
    pub(crate) fn tell_capacity(&mut self) -> bool {
        let capacity = self.disk().image.capacity();
        if *self.capacity_told() == Some(capacity) {
            return true;
        }
        let Some(channel) = self.channel() else { return false };
        match channel.tell_config_changed() {
            Ok(()) => {
                *self.capacity_told() = Some(capacity);
                true
            }
            Err(error) => {
                log::warn!("the front end cannot be told the size error=\"{error}\"");
                false
            }
        }
    }
}
