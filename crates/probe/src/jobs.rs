//! Work that may block: a thread for each job, and the way of its answer back to the loop.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use serde_json::Value;

use crate::protocol::{Answer, Failure};
use crate::wakeup::Wakeup;

/// Whom an answer goes to.
#[derive(Clone, Debug)]
pub struct Asker {
    /// The request's own, to be given back.
    pub id: Value,
    /// Which connection of the host asked; an answer to an earlier one is dropped.
    pub connection: u64,
}

/// Gives jobs a thread and takes their answers.
pub struct Jobs {
    sender: Sender<(Asker, Answer)>,
    wakeup: Wakeup,
}

impl Jobs {
    /// No job yet; their answers come out of the receiver, each with a wake-up.
    pub fn new(wakeup: Wakeup) -> (Self, Receiver<(Asker, Answer)>) {
        let (sender, answers) = channel();
        (Self { sender, wakeup }, answers)
    }

    /// Runs `work` on a thread; its result is the answer.
    pub fn spawn(&self, asker: Asker, work: impl FnOnce() -> Answer + Send + 'static) {
        let (sender, wakeup) = (self.sender.clone(), self.wakeup.clone());
        let answer_to = asker.clone();
        let started = thread::Builder::new().name("job".to_owned()).spawn(move || {
            // The loop outlives every job, or the probe is gone anyway.
            let _ = sender.send((asker, work()));
            wakeup.wake();
        });
        if let Err(error) = started {
            self.answer(answer_to, Err(Failure::failed(format!("cannot start a job: {error}"))));
        }
    }

    /// Answers without a thread, from within the loop.
    pub fn answer(&self, asker: Asker, answer: Answer) {
        let _ = self.sender.send((asker, answer));
        self.wakeup.wake();
    }
}
