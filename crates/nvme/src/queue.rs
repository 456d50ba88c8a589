//! Submission and completion queues [4.1].

use std::collections::{BTreeMap, VecDeque};

use semper_device::{Bus, Unreachable};
use serde::{Deserialize, Serialize};

use crate::command::Command;
use crate::journal::Journal;
use crate::spec::{CQE, SQE, Status};

/// Entries of the largest queue of all: that of the administrator may be larger than the others.
pub const ADMIN_MOST: u32 = 4096;

/// Where commands come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submission {
    /// Of the guest.
    pub base: u64,
    /// Entries.
    pub size: u32,
    /// The next one that is taken.
    pub head: u32,
    /// One behind the last one that the driver has put there.
    pub tail: u32,
    /// Where its commands are completed.
    pub completes_in: u16,
    /// Tells it from others of the same number.
    #[serde(default)]
    pub generation: u64,
    /// Commands that were taken, counted from the first entry of its first round.
    #[serde(skip)]
    pub taken: u64,
}

/// Where commands are completed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// Of the guest.
    pub base: u64,
    /// Entries.
    pub size: u32,
    /// The next one that the driver looks at.
    pub head: u32,
    /// The next one that is written.
    pub tail: u32,
    /// Toggles each time round: tells a new entry from an old one.
    pub phase: bool,
    /// What is interrupted.
    pub vector: u16,
    /// Whether it is.
    pub interrupts: bool,
    /// For which there is no room yet.
    #[serde(default)]
    pub waiting: VecDeque<Answer>,
    /// Tells it from others of the same number.
    #[serde(default)]
    pub generation: u64,
}

/// What is told of a command that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The queue that it came from.
    pub queue: u16,
    /// Its number.
    pub id: u16,
    /// How it ended.
    pub status: u16,
    /// What depends on the command.
    pub result: u32,
    /// Where its command stands in the journal.
    #[serde(skip)]
    pub slot: Option<u16>,
}

impl Answer {
    /// Of a command that came from `queue`.
    pub fn new(queue: u16, id: u16, status: Status, result: u32) -> Self {
        Self { queue, id, status: status.0, result, slot: None }
    }
}

impl Submission {
    /// Of `size` entries at `base`, empty.
    pub fn new(base: u64, size: u32, completes_in: u16) -> Self {
        Self { base, size, head: 0, tail: 0, completes_in, generation: 0, taken: 0 }
    }

    /// Whether a saved one can be used.
    pub fn is_sane(&self) -> bool {
        (2..=ADMIN_MOST).contains(&self.size)
            && self.head < self.size
            && self.tail < self.size
            && self.base.checked_add(SQE * u64::from(self.size)).is_some()
    }

    /// Takes the next command, if there is one.
    ///
    /// # Errors
    /// [`Unreachable`]: the queue is no memory of the guest.
    pub fn pop(&mut self, bus: &dyn Bus) -> Result<Option<Command>, Unreachable> {
        if self.head == self.tail {
            return Ok(None);
        }
        let mut bytes = [0; SQE as usize];
        bus.read(self.base + SQE * u64::from(self.head), &mut bytes)?;
        self.head = (self.head + 1) % self.size;
        self.taken += 1;
        Ok(Some(bytes.into()))
    }
}

impl Completion {
    /// Of `size` entries at `base`, empty.
    pub fn new(base: u64, size: u32, vector: u16, interrupts: bool) -> Self {
        let waiting = VecDeque::new();
        let (phase, generation) = (true, 0);
        Self { base, size, head: 0, tail: 0, phase, vector, interrupts, waiting, generation }
    }

    /// Entries that were written, counted from the first one of a round with the phase set.
    pub(crate) fn posted(&self) -> u64 {
        u64::from(self.tail) + if self.phase { 0 } else { self.size.into() }
    }

    /// Goes on behind so many.
    pub(crate) fn go_on_behind(&mut self, posted: u64) {
        let size = u64::from(self.size);
        (self.tail, self.phase) = ((posted % size) as u32, posted / size % 2 == 0);
    }

    /// Whether a saved one can be used.
    pub fn is_sane(&self) -> bool {
        (2..=ADMIN_MOST).contains(&self.size)
            && self.head < self.size
            && self.tail < self.size
            && self.waiting.len() <= 2 * ADMIN_MOST as usize
            && self.base.checked_add(CQE * u64::from(self.size)).is_some()
    }

    /// Whether the driver has entries to look at.
    pub fn is_owed(&self) -> bool {
        self.head != self.tail
    }

    fn is_full(&self) -> bool {
        (self.tail + 1) % self.size == self.head
    }

    /// Writes what there is room for; gives whether anything was written.
    ///
    /// # Errors
    /// [`Unreachable`]: the queue is no memory of the guest.
    pub(crate) fn publish(
        &mut self,
        number: u16,
        submissions: &BTreeMap<u16, Submission>,
        mut journal: Option<&mut Journal>,
        bus: &mut dyn Bus,
    ) -> Result<bool, Unreachable> {
        let mut written = false;
        while !self.is_full() {
            let Some(answer) = self.waiting.pop_front() else { break };
            let slot = answer.slot.zip(journal.as_deref_mut());
            if let Some((slot, journal)) = &slot {
                journal.answer(*slot, self.posted(), answer.status);
            }
            // A queue that was deleted meanwhile has no head to tell of.
            let head = submissions.get(&answer.queue).map_or(0, |queue| queue.head as u16);
            let mut entry = [0; CQE as usize];
            entry[..4].copy_from_slice(&answer.result.to_le_bytes());
            entry[8..10].copy_from_slice(&head.to_le_bytes());
            entry[10..12].copy_from_slice(&answer.queue.to_le_bytes());
            entry[12..14].copy_from_slice(&answer.id.to_le_bytes());
            let status = answer.status << 1 | u16::from(self.phase);
            entry[14..].copy_from_slice(&status.to_le_bytes());
            bus.write(self.base + CQE * u64::from(self.tail), &entry)?;
            self.tail += 1;
            if self.tail == self.size {
                (self.tail, self.phase) = (0, !self.phase);
            }
            if let Some((slot, journal)) = slot {
                journal.count(number, true, self.posted());
                journal.free(slot);
            }
            written = true;
        }
        Ok(written)
    }
}
