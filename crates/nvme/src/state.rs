//! What is saved and restored: JSON, with a version. Fields may be added with a default; what an older
//! release cannot do without is a new version.

use std::collections::{BTreeMap, VecDeque};

use semper_device::page::Page;
use serde::{Deserialize, Serialize};

use crate::admin::Postponed;
use crate::controller::{Controller, Registers};
use crate::features::Features;
use crate::journal::Kept;
use crate::queue::{Answer, Completion, Submission};
use crate::spec::{EVENTS_MOST, Status, cc, csts};

/// Of this module's format.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    kind: String,
    queues: u16,
    blocks: u64,
    block_size: u32,
    registers: Registers,
    submissions: BTreeMap<u16, Submission>,
    completions: BTreeMap<u16, Completion>,
    doorbells: Vec<u32>,
    event_requests: Vec<u16>,
    events: VecDeque<u32>,
    errors_masked: bool,
    postponed: Vec<Postponed>,
    features: Features,
    /// A reset is to come to its end.
    #[serde(default)]
    resetting: bool,
}

/// What the doorbells are known to be without those of the state. One that nobody has replayed says
/// nothing new: its queue stands where its commands were taken, and no entry is taken twice.
fn replayed_doorbells(saved: &Saved, here: &[u32], page: &Page) -> Vec<u32> {
    let known = |(at, value): (usize, &u32)| {
        let (queue, completes) = ((at / 2) as u16, at % 2 == 1);
        let stands = match completes {
            true => saved.completions.get(&queue).map(|queue| queue.head),
            false => saved.submissions.get(&queue).map(|queue| queue.head),
        };
        if page.take_told(at) { *value } else { stands.unwrap_or(*value) }
    };
    here.iter().enumerate().map(known).collect()
}

impl Controller {
    pub(crate) fn saved(&self) -> String {
        let saved = Saved {
            version: VERSION,
            kind: "nvme".to_owned(),
            queues: self.queues,
            blocks: self.told.blocks,
            block_size: self.told.block_size,
            registers: self.registers,
            submissions: self.submissions.clone(),
            completions: self.completions.clone(),
            doorbells: self.seen.clone(),
            event_requests: self.event_requests.clone(),
            events: self.events.clone(),
            errors_masked: self.errors_masked,
            postponed: self.postponed.clone(),
            features: self.features.clone(),
            resetting: self.resetting,
        };
        // Strings, numbers, and maps with numbers as keys: nothing that JSON does not have.
        serde_json::to_string(&saved).unwrap_or_default()
    }

    pub(crate) fn take_saved(
        &mut self,
        text: &str,
        page: &Page,
        replayed: bool,
    ) -> Result<usize, String> {
        let saved: Saved = serde_json::from_str(text)
            .map_err(|error| format!("it is no state of an NVMe controller: {error}"))?;
        self.check(&saved)?;
        if saved.resetting {
            return Err("it is in the middle of a reset".to_owned());
        }
        let here: Vec<_> = (0..saved.doorbells.len()).map(|at| page.load(at)).collect();
        let values = |registers: &Registers| {
            let Registers { mask, cc, aqa, asq, acq, .. } = *registers;
            [mask.into(), cc.into(), aqa.into(), asq, acq]
        };
        let pairs = values(&self.registers).into_iter().zip(values(&saved.registers));
        let differing = pairs.filter(|(ours, theirs)| ours != theirs).count()
            + here.iter().zip(&saved.doorbells).filter(|(ours, theirs)| ours != theirs).count();
        let doorbells = match replayed {
            true => replayed_doorbells(&saved, &here, page),
            false => saved.doorbells.clone(),
        };
        if !replayed {
            self.registers = saved.registers;
        }
        // What no register shows is the same either way; but nobody has enabled a controller to which
        // that was not replayed.
        let off = replayed && self.registers.cc & cc::EN == 0;
        self.registers.csts = if off { 0 } else { saved.registers.csts };
        (self.submissions, self.completions) = (saved.submissions, saved.completions);
        for (at, value) in doorbells.iter().enumerate() {
            let queue = (at / 2) as u16;
            if at % 2 == 0 {
                let queue = self.submissions.get_mut(&queue);
                queue.filter(|queue| *value < queue.size).into_iter().for_each(|q| q.tail = *value);
            } else {
                let queue = self.completions.get_mut(&queue);
                queue.filter(|queue| *value < queue.size).into_iter().for_each(|q| q.head = *value);
            }
            page.store(at, *value);
        }
        self.seen = doorbells;
        self.event_requests = saved.event_requests;
        (self.events, self.errors_masked) = (saved.events, saved.errors_masked);
        (self.postponed, self.features) = (saved.postponed, saved.features);
        (self.told.blocks, self.told.block_size) = (saved.blocks, saved.block_size);
        self.told.read_only = self.storage.is_read_only();
        self.begin_anew();
        Ok(differing)
    }

    /// Here the queues count from where they stand.
    fn begin_anew(&mut self) {
        for (number, queue) in &mut self.submissions {
            queue.taken = queue.head.into();
            if let Some(journal) = &self.journal {
                queue.generation = journal.next_generation();
                journal.begin(*number, false, queue.generation, queue.taken);
            }
        }
        for (number, queue) in &mut self.completions {
            if let Some(journal) = &self.journal {
                queue.generation = journal.next_generation();
                journal.begin(*number, true, queue.generation, queue.posted());
            }
        }
        let text = self.saved();
        if let Some(journal) = &mut self.journal {
            journal.free_all();
            journal.put(&text);
        }
    }

    /// Goes on where another process has ended: with its queues as they were at that instant, the
    /// doorbells as they are now, and the commands that it had.
    pub(crate) fn take_over(&mut self, page: &Page) -> Result<(), String> {
        let Some(journal) = &mut self.journal else { return Ok(()) };
        if journal.has_lost() {
            self.storage.lose();
        }
        let left = journal.left();
        // A controller that nobody has written to.
        let Some(text) = journal.text() else { return Ok(()) };
        let mut saved: Saved = serde_json::from_str(&text)
            .map_err(|error| format!("what was kept is no state of an NVMe controller: {error}"))?;
        self.check(&saved)?;
        let Some(journal) = &mut self.journal else { return Ok(()) };
        for (number, queue) in &mut saved.submissions {
            let counted = journal.counted(*number, false, queue.generation);
            queue.taken = counted.filter(|_| *number != 0).unwrap_or(queue.head.into());
        }
        for (number, queue) in saved.completions.iter_mut().filter(|(number, _)| **number != 0) {
            // What waited is done again, and answered then.
            queue.waiting.clear();
            if let Some(posted) = journal.counted(*number, true, queue.generation) {
                queue.go_on_behind(posted);
            }
        }
        self.again.clear();
        let admin_head = saved.completions.get(&0).map(|queue| queue.head);
        for (at, seen) in self.seen.iter_mut().enumerate() {
            *seen = page.load(at);
            let queue = (at / 2) as u16;
            let (size, place) = if at % 2 == 0 {
                let Some(queue) = saved.submissions.get_mut(&queue) else { continue };
                (queue.size, &mut queue.tail)
            } else {
                let Some(queue) = saved.completions.get_mut(&queue) else { continue };
                (queue.size, &mut queue.head)
            };
            if *seen < size {
                *place = *seen;
            }
        }
        if let Some((queue, was)) = saved.completions.get_mut(&0).zip(admin_head) {
            // Answers that were written, and that the driver has seen, after this was kept.
            let size = queue.size;
            let taken = (queue.head + size - was) % size;
            let there = (queue.tail + size - was) % size;
            let seen = (taken.saturating_sub(there) as usize).min(queue.waiting.len());
            queue.waiting.drain(..seen);
            queue.go_on_behind(queue.posted() + seen as u64);
        }
        for Kept { slot, queue, generation, position, answered, command } in left {
            let submission = saved
                .submissions
                .get_mut(&queue)
                .filter(|submission| submission.generation == generation && queue != 0);
            let completes_in = submission.as_ref().map(|submission| submission.completes_in);
            let completion =
                completes_in.and_then(|completes_in| saved.completions.get_mut(&completes_in));
            let (Some(submission), Some(completion)) = (submission, completion) else {
                journal.free(slot);
                continue;
            };
            submission.taken = submission.taken.max(position.saturating_add(1));
            let Some((posted, status)) = answered else {
                self.again.push_back((queue, slot, command));
                continue;
            };
            completion.go_on_behind(posted);
            if (completion.tail + 1) % completion.size == completion.head {
                // The driver has seen the entry: there was room for it, and there is none now.
                completion.go_on_behind(posted.saturating_add(1));
                journal.free(slot);
            } else {
                let answer = Answer::new(queue, command.id(), Status(status), 0);
                completion.waiting.push_front(Answer { slot: Some(slot), ..answer });
            }
        }
        for (number, queue) in &mut saved.submissions {
            // Of a queue that is being deleted nothing more is taken.
            let deleted = saved.postponed.iter().any(|postponed| postponed.queue == *number);
            let head = (queue.taken % u64::from(queue.size)) as u32;
            queue.head = if deleted { queue.tail } else { head };
            journal.count(*number, false, queue.taken);
        }
        self.registers = saved.registers;
        (self.submissions, self.completions) = (saved.submissions, saved.completions);
        self.event_requests = saved.event_requests;
        (self.events, self.errors_masked) = (saved.events, saved.errors_masked);
        (self.postponed, self.features) = (saved.postponed, saved.features);
        (self.told.blocks, self.told.block_size) = (saved.blocks, saved.block_size);
        self.told.read_only = self.storage.is_read_only();
        self.resetting = saved.resetting;
        Ok(())
    }

    /// Whatever a saved state says, nothing in it is believed before it is found to be possible here.
    fn check(&self, saved: &Saved) -> Result<(), String> {
        let here = (self.storage.block_size(), self.storage.capacity());
        let there = (saved.block_size, saved.blocks.checked_mul(saved.block_size.into()));
        let ready = saved.registers.csts & csts::RDY != 0;
        let admin_is_there =
            saved.submissions.contains_key(&0) && saved.completions.contains_key(&0);
        let known = |queue: u16| queue <= self.queues;
        let told = if saved.version != VERSION {
            format!("its version is {}, and this release has {VERSION}", saved.version)
        } else if saved.kind != "nvme" {
            format!("it is of a device of kind {:?}", saved.kind)
        } else if saved.queues != self.queues {
            format!("it has {} I/O queues, and this controller {}", saved.queues, self.queues)
        } else if saved.blocks > 0 && (there.0 != here.0 || there.1.is_none_or(|n| n > here.1)) {
            format!(
                "its namespace has {} blocks of {} bytes, and the image here has {} bytes in blocks \
                 of {}",
                saved.blocks, saved.block_size, here.1, here.0
            )
        } else if ready && !admin_is_there {
            "its admin queues are missing".to_owned()
        } else if ready && saved.registers.cc & cc::EN == 0 && !saved.resetting {
            "it is ready without being enabled".to_owned()
        } else if saved.doorbells.len() != self.seen.len() {
            "it has another number of doorbells".to_owned()
        } else if saved.event_requests.len() > EVENTS_MOST
            || saved.events.len() > 64
            || saved.postponed.len() > 1024
        {
            "it has more commands than there can be".to_owned()
        } else if !saved.submissions.iter().all(|(id, q)| {
            known(*id) && q.is_sane() && saved.completions.contains_key(&q.completes_in)
        }) || !saved
            .completions
            .iter()
            .all(|(id, q)| known(*id) && q.is_sane() && q.vector <= self.queues)
            || !saved
                .postponed
                .iter()
                .all(|Postponed { queue, .. }| *queue != 0 && saved.submissions.contains_key(queue))
        {
            "one of its queues cannot be".to_owned()
        } else {
            return Ok(());
        };
        Err(told)
    }
}
