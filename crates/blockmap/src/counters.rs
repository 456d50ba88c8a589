//! What a recorder has done, for whoever asks.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of one queue; one thread writes them.
#[derive(Debug, Default)]
pub struct Counters {
    recorded: AtomicU64,
    dropped: AtomicU64,
}

impl Counters {
    /// Pages associated, pages whose association was dropped.
    pub(crate) fn get(&self) -> (u64, u64) {
        (self.recorded.load(Ordering::Relaxed), self.dropped.load(Ordering::Relaxed))
    }

    pub(crate) fn add(&self, recorded: u64, dropped: u64) {
        let add = |counter: &AtomicU64, n| {
            if n > 0 {
                counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
            }
        };
        add(&self.recorded, recorded);
        add(&self.dropped, dropped);
    }
}
