//! The instants at which a process can die, by name.

/// An instant between two stores of a request's life. The names say what was done *last*.
///
/// The model checker dies at each; a build of the backend with the feature `crash-points` can be
/// told to (`SEMPER_DIE_AT`), so that the same list is proven twice: exhaustively in the model and
/// for real under a Linux guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Point {
    /// Before the counter is stored: the head was read from the available ring, nothing more.
    PopStart,
    /// The counter of the entry is stored, `inflight` is not.
    PopCounter,
    /// `inflight` is set; no I/O was started.
    PopMark,
    /// The I/O was handed to the engine (and may be done, half done, or not begun).
    IoSubmitted,
    /// The I/O is done; the status byte is not written.
    IoDone,
    /// The status byte is written.
    StatusStored,
    /// A used element is written behind the published index.
    UsedElement,
    /// The entry's `next` leads to the previous entry of the batch.
    BatchNext,
    /// `last_batch_head` names the entry.
    BatchHead,
    /// `used.idx` shows the batch to the driver; the region does not know yet.
    UsedIndex,
    /// One entry of the batch is cleared.
    ClearEntry,
    /// The region's `used_idx` is stored: the batch is finished.
    RegionIndex,
    /// The driver was not notified yet.
    CallPending,
    /// Recovery has read the header and changed nothing.
    RecoverStart,
    /// Recovery has cleared one entry of the last batch.
    RecoverClear,
    /// Recovery has stored the region's `used_idx`.
    RecoverIndex,
    /// One request was taken for replay; no I/O was started.
    ReplaySubmit,
    /// The replay of one request was published.
    ReplayPublished,
}

impl Point {
    /// All of them.
    pub const ALL: [Point; 18] = [
        Point::PopStart,
        Point::PopCounter,
        Point::PopMark,
        Point::IoSubmitted,
        Point::IoDone,
        Point::StatusStored,
        Point::UsedElement,
        Point::BatchNext,
        Point::BatchHead,
        Point::UsedIndex,
        Point::ClearEntry,
        Point::RegionIndex,
        Point::CallPending,
        Point::RecoverStart,
        Point::RecoverClear,
        Point::RecoverIndex,
        Point::ReplaySubmit,
        Point::ReplayPublished,
    ];

    /// The name in `SEMPER_DIE_AT` and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Point::PopStart => "pop-start",
            Point::PopCounter => "pop-counter",
            Point::PopMark => "pop-mark",
            Point::IoSubmitted => "io-submitted",
            Point::IoDone => "io-done",
            Point::StatusStored => "status-stored",
            Point::UsedElement => "used-element",
            Point::BatchNext => "batch-next",
            Point::BatchHead => "batch-head",
            Point::UsedIndex => "used-index",
            Point::ClearEntry => "clear-entry",
            Point::RegionIndex => "region-index",
            Point::CallPending => "call-pending",
            Point::RecoverStart => "recover-start",
            Point::RecoverClear => "recover-clear",
            Point::RecoverIndex => "recover-index",
            Point::ReplaySubmit => "replay-submit",
            Point::ReplayPublished => "replay-published",
        }
    }

    /// The point of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|point| point.name() == name)
    }
}

/// Called at each [`Point`]; may end the process, and must not change what it passes through.
pub trait Hook {
    /// The process has come to `point`.
    fn at(&mut self, point: Point);
}

/// The hook of a normal build: nothing, and no code.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHook;

impl Hook for NoHook {
    #[inline(always)]
    fn at(&mut self, _point: Point) {}
}
