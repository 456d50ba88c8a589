//! Where a dead process stood with the front end's last message: a pure decision.
//!
//! | it showed | the spare knows | the connection has | so |
//! |---|---|---|---|
//! | idle | this message, or a connection's begin or end behind it | whatever | go on |
//! | handling | the message before | the message | go on: it is handled from the start |
//! | handling, taking | this message | the same message | take it, and give its answer |
//! | … | … and it has no answer | … | go on: it is handled once more, or it is the next |
//! | handling, taking | this message | nothing, or the next | it was taken: give its answer, if there is one |
//! | answering | this message, and the answer is in the outbox | whatever | send it from there |
//! | answering | this message, and the outbox is empty | whatever | the answer was sent: go on |
//! | sending | this message | the next | the answer has arrived: go on |
//! | sending | this message | nothing | unknown: go on if the front end has something unread |
//! | anything else | | | the spare was not told everything: give up |
//!
//! A message that has an answer is handled by one process only, if the spare knows the answer: a
//! region of memory that is there already cannot be added once more.
//!
//! *Give up* ends the connection; the front end connects again, and nothing is lost. An answer is
//! never given twice: the front end would take the second one for the answer to its next request.

use super::mirror::Exchange;
use super::progress::{Phase, Progress};

/// What the connection has to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    Nothing,
    /// A message that is byte for byte the last one that the spare knows.
    Same,
    Other,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    GoOn,
    /// Give the known answer first.
    Answer,
    /// Take the known message, and give its answer.
    Take,
    /// Send what is in the outbox.
    Send,
    /// Go on if the front end has not read everything, which is the answer then; otherwise give up.
    Doubt,
    GiveUp(&'static str),
}

/// `known` is the number of the last message that the spare knows, `last` that message; `unsent`:
/// there is something in the outbox.
pub(crate) fn judge(
    progress: Progress,
    known: u64,
    last: Option<&Exchange>,
    waiting: Waiting,
    unsent: bool,
) -> Verdict {
    let answer = last.is_some_and(|exchange| !exchange.answer.is_empty());
    match (progress.phase, progress.sequence.checked_sub(known)) {
        (Phase::Idle, Some(0)) => Verdict::GoOn,
        (Phase::Idle, None) if progress.sequence + 1 == known => Verdict::GoOn,
        (Phase::Handling, Some(1)) => match waiting {
            Waiting::Same | Waiting::Other => Verdict::GoOn,
            Waiting::Nothing => Verdict::GiveUp("a message was taken before the spare knew it"),
        },
        (Phase::Handling | Phase::Taking, Some(0)) => match waiting {
            Waiting::Same if answer => Verdict::Take,
            Waiting::Same => Verdict::GoOn,
            Waiting::Nothing | Waiting::Other if answer => Verdict::Answer,
            Waiting::Nothing | Waiting::Other => Verdict::GoOn,
        },
        (Phase::Answering, Some(0)) if unsent => Verdict::Send,
        (Phase::Answering, Some(0)) => Verdict::GoOn,
        (Phase::Sending, Some(0)) => match waiting {
            Waiting::Same | Waiting::Other => Verdict::GoOn,
            Waiting::Nothing => Verdict::Doubt,
        },
        _ => Verdict::GiveUp("the spare was not told everything"),
    }
}
