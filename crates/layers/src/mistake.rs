//! For the model: the ten mistakes that are put in one by one, to show that it would find them.

/// What is done wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub enum Mistake {
    /// There is one map, in the page cache beside the data.
    OneMap,
    /// The map in memory dies with the process.
    MemoryDies,
    /// What a flush writes of the map is looked at after the data's flush.
    LookAfterData,
    /// The map is flushed before the data.
    MapFirst,
    /// A flush takes the highest layer only.
    TopOnly,
    /// A record that is read is believed at once.
    BelieveRecord,
    /// The switch comes before the record is durable.
    SwitchFirst,
    /// "Sealed" is written before what lies below was flushed.
    SealUnflushed,
    /// "Dropped" is written before the image was flushed.
    DropUnflushed,
    /// A layer is merged under a pin.
    MergePinned,
}

#[cfg(test)]
impl Mistake {
    pub(crate) const ALL: [Self; 10] = [
        Self::OneMap,
        Self::MemoryDies,
        Self::LookAfterData,
        Self::MapFirst,
        Self::TopOnly,
        Self::BelieveRecord,
        Self::SwitchFirst,
        Self::SealUnflushed,
        Self::DropUnflushed,
        Self::MergePinned,
    ];
}

#[cfg(test)]
thread_local! {
    /// What this thread does wrong.
    pub(crate) static MADE: std::cell::Cell<Option<Mistake>> = const { std::cell::Cell::new(None) };
}

/// Whether a mistake is to be made. Never, outside of tests.
#[cfg(test)]
pub(crate) fn made(mistake: Mistake) -> bool {
    MADE.get() == Some(mistake)
}

/// Whether a mistake is to be made. Never, outside of tests.
#[cfg(not(test))]
#[inline]
pub(crate) const fn made(_: Mistake) -> bool {
    false
}
