//! What layers stand on: files that can be read, written and flushed. Real ones are in
//! [`crate::disk`]; the model (`crate::model`) has some that lose what was not flushed.

use std::io;
use std::sync::Arc;

use semper_block::Target;

use crate::bits::{Bits, Identity};
use crate::record::{Layer, LayerId};

/// What a layer's files are called by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Under which they are written.
    pub epoch: u64,
    /// The layer.
    pub id: LayerId,
}

impl From<&Layer> for Key {
    fn from(layer: &Layer) -> Self {
        Self { epoch: layer.writer.epoch, id: layer.id }
    }
}

/// A file beside an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The record.
    Record,
    /// A layer's blocks.
    Data(Key),
    /// A layer's map, on the medium.
    Map(Key),
}

/// One open file.
pub trait Bytes: Send + Sync {
    /// Reads; less than asked for only at the end of the file.
    ///
    /// # Errors
    /// The system's.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of it.
    ///
    /// # Errors
    /// The system's.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes zeros of a range, giving its space back where that is possible.
    ///
    /// # Errors
    /// The system's.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Everything that was written, by whomever, is on the medium at the return.
    ///
    /// # Errors
    /// The system's.
    fn sync(&self) -> io::Result<()>;

    /// Bytes of it.
    ///
    /// # Errors
    /// The system's.
    fn size(&self) -> io::Result<u64>;

    /// How engines reach it. The descriptors live as long as the file.
    fn target(&self) -> Target;
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Never written, and not locked.
    Read,
    /// Locked: what a dead process may still be writing has ended.
    Write,
}

/// The files of one disk.
pub trait Files: Send + Sync {
    /// What a file is called in messages.
    fn name(&self, part: Part) -> String;

    /// The image.
    fn base(&self) -> Arc<dyn Bytes>;

    /// Opens a file; `None` if there is none.
    ///
    /// # Errors
    /// The system's.
    fn open(&self, part: Part, access: Access) -> io::Result<Option<Arc<dyn Bytes>>>;

    /// Makes a file of so many bytes, in the place of one that is there, and locks it.
    ///
    /// # Errors
    /// The system's.
    fn create(&self, part: Part, size: u64) -> io::Result<Arc<dyn Bytes>>;

    /// Removes a file; none is no error.
    ///
    /// # Errors
    /// The system's.
    fn remove(&self, part: Part) -> io::Result<()>;

    /// The names of files that were made are on the medium at the return.
    ///
    /// # Errors
    /// The system's.
    fn sync_names(&self) -> io::Result<()>;

    /// The layers of which there are files.
    ///
    /// # Errors
    /// The system's.
    fn layers(&self) -> io::Result<Vec<Key>>;

    /// The bits of a layer in memory that outlives the process: what an earlier process has set.
    ///
    /// # Errors
    /// The system's.
    fn memory(&self, identity: &Identity) -> io::Result<Arc<Bits>>;

    /// Lets go of that memory.
    fn forget(&self, layer: Key);

    /// Notes in the epoch record, on the medium, whether there are layers.
    ///
    /// # Errors
    /// The system's, and that the record is another's.
    fn mark(&self, layered: bool) -> io::Result<()>;

    /// Keeps the guest's writes away from a block, until [`Files::leave`]. False: one is on its way, or some
    /// other has the block; try again soon.
    fn try_alone(&self, block: u64) -> bool;

    /// Ends [`Files::try_alone`].
    fn leave(&self, block: u64);

    /// Whether the epoch record says that there are layers.
    ///
    /// # Errors
    /// The system's.
    fn is_marked(&self) -> io::Result<bool>;
}
