//! Commands about the controller [5].

use semper_device::page::Page;
use semper_device::{Bus, PAGE};

use crate::command::Command;
use crate::controller::Controller;
use crate::data;
use crate::identify;
use crate::queue::{Answer, Completion, Submission};
use crate::spec::{DATA_MOST, EVENTS_MOST, QUEUE_MOST, Status, admin};

/// What became of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is over.
    Answered(Status, u32),
    /// It ends when something else has.
    Postponed(Postponed),
    /// It ends when there is an event.
    Kept,
}

/// A queue that is deleted once its commands have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Postponed {
    /// The number of the command.
    pub id: u16,
    /// The queue.
    pub queue: u16,
}

impl Controller {
    /// Carries out a command of the admin queue.
    pub(crate) fn carry_out(
        &mut self,
        command: &Command,
        page: &Page,
        bus: &mut dyn Bus,
    ) -> Outcome {
        if command.is_fused() || command.transfer() != 0 {
            // SGLs are for I/O; by PCI Express the admin queue has PRPs.
            return Outcome::Answered(Status::FIELD, 0);
        }
        let done = |result: Result<u32, Status>| match result {
            Ok(result) => Outcome::Answered(Status::OK, result),
            Err(status) => Outcome::Answered(status, 0),
        };
        match command.opcode() {
            admin::IDENTIFY => done(self.identify(command, bus)),
            admin::GET_LOG => done(self.log(command, bus)),
            admin::CREATE_CQ => done(self.create_completion(command, page)),
            admin::CREATE_SQ => done(self.create_submission(command, page)),
            admin::DELETE_CQ => done(self.delete_completion(command)),
            admin::DELETE_SQ => self.delete_submission(command),
            admin::SET_FEATURES => {
                let (which, value) = (command.dword(10), command.dword(11));
                done(self.features.set(which, value, self.queues))
            }
            admin::GET_FEATURES => done(self.features.get(command.dword(10), self.queues)),
            // Commands are quick; none is ever found that could still be stopped.
            admin::ABORT => Outcome::Answered(Status::OK, 1),
            admin::EVENT if self.event_requests.len() < EVENTS_MOST => {
                self.event_requests.push(command.id());
                Outcome::Kept
            }
            admin::EVENT => Outcome::Answered(Status::EVENTS, 0),
            _ => Outcome::Answered(Status::OPCODE, 0),
        }
    }

    fn give(command: &Command, bytes: &[u8], bus: &mut dyn Bus) -> Result<u32, Status> {
        let mut at = 0;
        for (address, len) in data::ranges(command, bytes.len() as u64, bus)? {
            let part = &bytes[at..at + len as usize];
            bus.write(address, part).map_err(|_| Status::TRANSFER)?;
            at += part.len();
        }
        Ok(0)
    }

    fn identify(&mut self, command: &Command, bus: &mut dyn Bus) -> Result<u32, Status> {
        let page = self.told.identify(command.dword(10) as u8, command.namespace())?;
        Self::give(command, &page, bus)
    }

    fn log(&mut self, command: &Command, bus: &mut dyn Bus) -> Result<u32, Status> {
        let page = command.dword(10) as u8;
        let dwords =
            u64::from(command.dword(11) & 0xffff) << 16 | u64::from(command.dword(10) >> 16);
        let len = (dwords + 1) * 4;
        if len > DATA_MOST {
            return Err(Status::FIELD);
        }
        let offset = u64::from(command.dword(13)) << 32 | u64::from(command.dword(12));
        let units = (self.counters.bytes_read, self.counters.bytes_written);
        let log = identify::log(page, units)?;
        let from = usize::try_from(offset).ok().filter(|from| *from < log.len() && from % 4 == 0);
        let mut bytes = log[from.ok_or(Status::FIELD)?..].to_vec();
        bytes.resize(len as usize, 0);
        // Bit 15: the driver wants to be told of the same again.
        if page == 1 && command.dword(10) >> 15 & 1 == 0 {
            self.errors_masked = false;
        }
        Self::give(command, &bytes, bus)
    }

    fn new_queue(&self, command: &Command) -> Result<(u16, u32, u64), Status> {
        let (queue, size) = (command.dword(10) as u16, (command.dword(10) >> 16) + 1);
        if queue == 0 || queue > self.queues {
            return Err(Status::QUEUE_ID);
        }
        if !(2..=QUEUE_MOST).contains(&size) {
            return Err(Status::QUEUE_SIZE);
        }
        // Contiguous, as CAP says that they have to be.
        if command.dword(11) & 1 == 0 {
            return Err(Status::FIELD);
        }
        let base = command.prp1();
        if base % PAGE != 0 || base.checked_add(u64::from(QUEUE_MOST) * 64).is_none() {
            return Err(Status::PRP_OFFSET);
        }
        Ok((queue, size, base))
    }

    fn create_completion(&mut self, command: &Command, page: &Page) -> Result<u32, Status> {
        let (queue, size, base) = self.new_queue(command)?;
        if self.completions.contains_key(&queue) {
            return Err(Status::QUEUE_ID);
        }
        let (vector, interrupts) = ((command.dword(11) >> 16) as u16, command.dword(11) & 2 != 0);
        if vector > self.queues {
            return Err(Status::VECTOR);
        }
        let generation = self.begin_queue(queue, true);
        let completion = Completion::new(base, size, vector, interrupts);
        self.completions.insert(queue, Completion { generation, ..completion });
        self.silence(page, queue, true);
        Ok(0)
    }

    fn create_submission(&mut self, command: &Command, page: &Page) -> Result<u32, Status> {
        let (queue, size, base) = self.new_queue(command)?;
        let completes_in = (command.dword(11) >> 16) as u16;
        if self.submissions.contains_key(&queue) {
            return Err(Status::QUEUE_ID);
        }
        if completes_in == 0 || !self.completions.contains_key(&completes_in) {
            return Err(Status::CQ_INVALID);
        }
        let generation = self.begin_queue(queue, false);
        let submission = Submission::new(base, size, completes_in);
        self.submissions.insert(queue, Submission { generation, ..submission });
        self.silence(page, queue, false);
        Ok(0)
    }

    /// Nothing of an earlier queue of the same number counts for the new one.
    fn begin_queue(&self, queue: u16, completes: bool) -> u64 {
        let generation = self.next_generation();
        if let Some(journal) = &self.journal {
            journal.begin(queue, completes, generation, 0);
        }
        generation
    }

    /// A new queue begins with its doorbell at 0, whatever an earlier one has left there.
    fn silence(&mut self, page: &Page, queue: u16, completes: bool) {
        let at = usize::from(queue) * 2 + usize::from(completes);
        page.store(at, 0);
        self.seen[at] = 0;
    }

    fn delete_completion(&mut self, command: &Command) -> Result<u32, Status> {
        let queue = command.dword(10) as u16;
        if queue == 0 || !self.completions.contains_key(&queue) {
            return Err(Status::QUEUE_ID);
        }
        if self.submissions.values().any(|each| each.completes_in == queue) {
            return Err(Status::QUEUE_DELETION);
        }
        self.completions.remove(&queue);
        Ok(0)
    }

    fn delete_submission(&mut self, command: &Command) -> Outcome {
        let queue = command.dword(10) as u16;
        // Once: a driver that asks again and again would make a list without end.
        let begun = self.postponed.iter().any(|postponed| postponed.queue == queue);
        match self.submissions.get_mut(&queue) {
            Some(submission) if queue != 0 && !begun => {
                // Nothing more is taken from it.
                submission.head = submission.tail;
                Outcome::Postponed(Postponed { id: command.id(), queue })
            }
            _ => Outcome::Answered(Status::QUEUE_ID, 0),
        }
    }

    /// Deletes queues whose commands have ended; whether there were any.
    pub(crate) fn end_postponed(&mut self, page: &Page) -> bool {
        let (storage, again) = (&self.storage, &self.again);
        let is_busy = |queue: u16| {
            storage.is_busy_for(queue) || again.iter().any(|(begun, ..)| *begun == queue)
        };
        let (busy, over): (Vec<_>, Vec<_>) = std::mem::take(&mut self.postponed)
            .into_iter()
            .partition(|postponed: &Postponed| is_busy(postponed.queue));
        self.postponed = busy;
        for Postponed { id, queue } in &over {
            self.submissions.remove(queue);
            self.silence(page, *queue, false);
            self.answer(Answer::new(0, *id, Status::OK, 0));
        }
        self.changed |= !over.is_empty();
        !over.is_empty()
    }
}
