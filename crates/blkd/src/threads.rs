//! Which thread serves which queue.
//!
//! The number of queues for each thread is the caller's decision (US11210127B2: read for every
//! device when the VM starts, from what was configured or calibrated); this module makes the
//! threads, and changes them while the VM runs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::state::Shared;
use crate::worker::{Order, Worker};

/// Makes a thread with an engine of its own.
pub(crate) type Spawn = Box<dyn Fn(String) -> io::Result<Worker> + Send>;

/// The thread of each queue: thread numbers, dense from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ThreadMap(Vec<u16>);

impl ThreadMap {
    /// Queue i on thread i modulo `threads`.
    pub(crate) fn round_robin(queues: u16, threads: u16) -> Self {
        Self((0..queues).map(|queue| queue % threads.max(1)).collect())
    }

    /// Checks a map for a disk with that many queues.
    ///
    /// # Errors
    /// A sentence with the cause and the remedy.
    pub(crate) fn new(map: Vec<u16>, queues: usize) -> Result<Self, String> {
        if map.len() != queues {
            return Err(format!(
                "the map names threads for {} queues, and the disk has {queues}; name one for each",
                map.len()
            ));
        }
        let threads = map.iter().max().map_or(0, |most| usize::from(*most) + 1);
        if let Some(unused) = (0..threads).find(|n| !map.iter().any(|t| usize::from(*t) == *n)) {
            return Err(format!(
                "thread {unused} of the map has no queue; number threads from 0 without gaps"
            ));
        }
        Ok(Self(map))
    }

    /// How many threads it takes.
    pub(crate) fn threads(&self) -> usize {
        self.0.iter().max().map_or(0, |most| usize::from(*most) + 1)
    }

    /// The thread of each queue.
    pub(crate) fn as_slice(&self) -> &[u16] {
        &self.0
    }
}

/// The threads of a disk.
pub(crate) struct Threads {
    shared: Arc<Shared>,
    spawn: Spawn,
    workers: Vec<Worker>,
    map: Vec<u16>,
}

impl Threads {
    /// # Errors
    /// The system's, when it has no thread left, and the engine's.
    pub(crate) fn new(shared: Arc<Shared>, map: ThreadMap, spawn: Spawn) -> io::Result<Self> {
        let mut threads = Self { shared, spawn, workers: Vec::new(), map: Vec::new() };
        threads.grow(&map)?;
        threads.map = vec![0; map.0.len()];
        map.0.iter().enumerate().for_each(|(queue, thread)| threads.assign(queue, *thread));
        Ok(threads)
    }

    /// The thread that serves a queue.
    pub(crate) fn of(&self, queue: usize) -> &Worker {
        &self.workers[usize::from(self.map[queue])]
    }

    /// How many threads there are.
    pub(crate) fn count(&self) -> usize {
        self.workers.len()
    }

    /// Gives an order to every thread.
    pub(crate) fn all(&self, order: impl Fn() -> Order) {
        self.workers.iter().for_each(|worker| worker.order(order()));
    }

    /// Queues that `map` gives to another thread than now.
    pub(crate) fn moving(&self, map: &ThreadMap) -> Vec<(usize, u16)> {
        let pairs = map.0.iter().zip(&self.map).enumerate();
        pairs.filter(|(_, (new, old))| new != old).map(|(queue, (new, _))| (queue, *new)).collect()
    }

    /// Makes the threads that `map` needs beside those that there are.
    ///
    /// # Errors
    /// The system's or the engine's; nothing has changed then but perhaps a thread without queues.
    pub(crate) fn grow(&mut self, map: &ThreadMap) -> io::Result<()> {
        while self.workers.len() < map.threads() {
            let worker = (self.spawn)(format!("queues-{}", self.workers.len()))?;
            self.workers.push(worker);
        }
        Ok(())
    }

    /// Gives a queue that no thread serves at present to a thread that exists.
    pub(crate) fn assign(&mut self, queue: usize, thread: u16) {
        self.map[queue] = thread;
        self.shared.queues[queue].thread.store(u64::from(thread), Ordering::Relaxed);
    }

    /// Ends the threads that have no queue any more.
    pub(crate) fn shrink(&mut self) {
        let needed = self.map.iter().max().map_or(0, |most| usize::from(*most) + 1);
        self.workers.drain(needed..).for_each(|worker| worker.order(Order::End));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.workers.drain(..).for_each(|worker| worker.order(Order::End));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_names_a_thread_for_each_queue_and_a_queue_for_each_thread() {
        assert_eq!(ThreadMap::round_robin(5, 2).as_slice(), [0, 1, 0, 1, 0]);
        assert_eq!(ThreadMap::round_robin(2, 8).threads(), 2);
        assert_eq!(ThreadMap::new(vec![1, 0, 1], 3).map(|map| map.threads()), Ok(2));
        assert!(ThreadMap::new(vec![0, 0], 3).unwrap_err().contains("2 queues"));
        assert!(ThreadMap::new(vec![0, 2], 2).unwrap_err().contains("thread 1"));
        assert!(ThreadMap::new(vec![u16::MAX], 1).unwrap_err().contains("thread 0"));
    }
}
