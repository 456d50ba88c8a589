//! What a process keeps of commands, so that the next one can go on at any instant.
//!
//! ```text
//!   words   0 a flush was lost │ 1 last generation │ of each queue: generation, taken; generation, posted
//!   slots   state │ queue │ generation │ position │ posted at │ status │ the command, 8 words
//!
//!   free ──taken: before the queue's count says so──► taken ──its answer has a place──► answered ──► free
//!                                                                                         the entry is written
//! ```
//!
//! A command stands in a slot before it counts as taken: who comes between the two finds the slot, and
//! takes it for the same. It is *answered* once its place in the completion queue is known, and before
//! anything is written there: to write the same entry to the same place once more changes nothing, for
//! the place is not used for another before the slot is free. So what is taken is done again, and what
//! is answered is written again. Admin commands change the state that [`Controller::saved`] has, and are
//! answered from there.
//!
//! [`Controller::saved`]: crate::Controller
//!
//! Queues have a generation, so that nothing is taken for a later queue's of the same number.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use semper_device::ledger::{Cell, Ledger};

use crate::command::Command;
use crate::spec::IO_QUEUES_MOST;

/// Commands that are taken and not answered, or answered and not written.
pub const SLOTS: usize = 1024;
const LOST: usize = 0;
const GENERATION: usize = 1;
const QUEUES: usize = 2;
const QUEUE: usize = 4;
const FIRST: usize = QUEUES + QUEUE * (IO_QUEUES_MOST as usize + 1);
const SLOT: usize = 14;
/// All of them.
pub const WORDS: usize = FIRST + SLOT * SLOTS;

const FREE: u64 = 0;
const TAKEN: u64 = 1;
const ANSWERED: u64 = 2;

/// What stands in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub slot: u16,
    pub queue: u16,
    pub generation: u64,
    pub position: u64,
    /// Where its entry is written, counted since the queue began, and the status there.
    pub answered: Option<(u64, u16)>,
    pub command: Command,
}

/// See the module.
pub(crate) struct Journal {
    ledger: Arc<Ledger>,
    free: Vec<u16>,
}

impl Journal {
    /// In a ledger with [`WORDS`].
    pub(crate) fn new(ledger: Arc<Ledger>) -> Self {
        Self { ledger, free: (0..SLOTS as u16).rev().collect() }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.ledger.word(index)
    }

    fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
        #[cfg(test)]
        crate::deaths::at_a_store();
    }

    fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    pub(crate) fn put(&self, text: &str) {
        if !self.ledger.put(Cell::Device, text) {
            // Its bound is far above what a controller can have.
            log::error!("a spare could not go on with this device bytes={}", text.len());
        }
        #[cfg(test)]
        crate::deaths::at_a_store();
    }

    pub(crate) fn text(&self) -> Option<String> {
        self.ledger.get(Cell::Device)
    }

    /// A flush has failed: every later one fails, in whatever process.
    pub(crate) fn lose(&self) {
        self.set(LOST, 1);
    }

    pub(crate) fn has_lost(&self) -> bool {
        self.get(LOST) != 0
    }

    /// A number that no queue has had.
    pub(crate) fn next_generation(&self) -> u64 {
        let next = self.get(GENERATION) + 1;
        self.set(GENERATION, next);
        next
    }

    fn queue(queue: u16, completes: bool) -> usize {
        QUEUES + QUEUE * usize::from(queue) + 2 * usize::from(completes)
    }

    /// A queue begins, with so many commands taken or entries written.
    pub(crate) fn begin(&self, queue: u16, completes: bool, generation: u64, count: u64) {
        let at = Self::queue(queue, completes);
        self.set(at + 1, count);
        self.set(at, generation);
    }

    /// So many commands were taken, or entries written.
    pub(crate) fn count(&self, queue: u16, completes: bool, count: u64) {
        self.set(Self::queue(queue, completes) + 1, count);
    }

    /// That number, if it is one of this generation's.
    pub(crate) fn counted(&self, queue: u16, completes: bool, generation: u64) -> Option<u64> {
        let at = Self::queue(queue, completes);
        (self.get(at) == generation).then(|| self.get(at + 1))
    }

    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// A command is about to count as taken.
    pub(crate) fn take(
        &mut self,
        (queue, generation, position): (u16, u64, u64),
        command: &Command,
    ) -> Option<u16> {
        let slot = self.free.pop()?;
        let at = FIRST + SLOT * usize::from(slot);
        self.set(at + 1, queue.into());
        self.set(at + 2, generation);
        self.set(at + 3, position);
        for (index, word) in command.words().into_iter().enumerate() {
            self.set(at + 6 + index, word);
        }
        self.set(at, TAKEN);
        Some(slot)
    }

    /// Its entry is about to be written: at this place, with this status.
    pub(crate) fn answer(&self, slot: u16, position: u64, status: u16) {
        let at = FIRST + SLOT * usize::from(slot);
        self.set(at + 4, position);
        self.set(at + 5, status.into());
        self.set(at, ANSWERED);
    }

    /// Its entry is written, or nobody waits for one.
    pub(crate) fn free(&mut self, slot: u16) {
        self.set(FIRST + SLOT * usize::from(slot), FREE);
        self.free.push(slot);
    }

    /// Of no command is anything left: the controller was reset.
    pub(crate) fn free_all(&mut self) {
        for slot in 0..SLOTS {
            self.set(FIRST + SLOT * slot, FREE);
        }
        self.free = (0..SLOTS as u16).rev().collect();
    }

    /// What another process has left, each queue's in the order in which it was taken.
    pub(crate) fn left(&mut self) -> Vec<Kept> {
        let mut left = Vec::new();
        self.free.clear();
        for slot in (0..SLOTS as u16).rev() {
            let at = FIRST + SLOT * usize::from(slot);
            let state = self.get(at);
            if state != TAKEN && state != ANSWERED {
                self.free.push(slot);
                continue;
            }
            let answered = (self.get(at + 4), self.get(at + 5) as u16);
            left.push(Kept {
                slot,
                queue: self.get(at + 1) as u16,
                generation: self.get(at + 2),
                position: self.get(at + 3),
                answered: (state == ANSWERED).then_some(answered),
                command: Command::of_words(std::array::from_fn(|index| self.get(at + 6 + index))),
            });
        }
        left.sort_unstable_by_key(|kept| (kept.queue, kept.position));
        left
    }
}
