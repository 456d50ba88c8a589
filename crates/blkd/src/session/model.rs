//! Every death, at every step of every kind of message: the relay's own steps and the spare's own
//! decisions, against a front end that notices what it must not.
//!
//! **Real**: [`serve_one`], [`give_answer`], [`judge`], [`Known`] and [`Transcript`]. **Modelled**:
//! the connection, the shared page, the socket of the spares and the front end, all of which
//! outlive a process; and a device that answers each message with its name.
//!
//! [`Transcript`]: super::transcript::Transcript

use std::collections::VecDeque;

use vhost::vhost_user::message::FrontendReq as Request;

use super::mirror::Known;
use super::packet::{Kind, Packet};
use super::progress::{Phase, Progress};
use super::relay::{Steps, give_answer, serve_one};
use super::resume::{Verdict, Waiting, judge};
use crate::message::Message;

/// What the processes of a world get wrong, to show that this would be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    /// A message is taken when it is seen.
    TakenAtOnce,
    /// The spares are not told.
    NotTold,
    /// Nobody can see that an answer goes out.
    AnswerNotShown,
    /// The spare gives the answer also when it may have arrived.
    AnswersTwice,
    /// The spare never gives an answer.
    NeverAnswers,
    /// The spare does not look whether a message is still there.
    DoesNotLook,
    /// Nobody can see that a message may be gone.
    TakingNotShown,
    /// The spare does not look into the outbox.
    OutboxForgotten,
}

/// Why a run ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Death,
    /// Everything was said.
    Quiet,
}

/// What outlives a process.
struct World {
    mistake: Mistake,
    /// What the front end is still to say.
    script: VecDeque<Message>,
    /// Said, and not taken.
    sent: VecDeque<Message>,
    /// The question whose answer the front end waits for.
    asked: Option<Message>,
    /// Answered, and not sent.
    outbox: Option<Message>,
    /// Sent, and not read.
    answers: VecDeque<Message>,
    page: Progress,
    /// What a spare knows.
    spare: Known,
    /// From the message of this number on the first process's spare is told nothing.
    deaf_from: u64,
    /// Steps until the process dies.
    left: usize,
    ended: bool,
}

fn wants_answer(message: &Message) -> bool {
    let asks = [Request::GET_FEATURES, Request::GET_VRING_BASE, Request::GET_INFLIGHT_FD];
    asks.iter().any(|request| message.request() == *request as u32)
}

fn has_files(answer: &Message) -> bool {
    answer.request() == Request::GET_INFLIGHT_FD as u32
}

fn answer_to(message: &Message) -> Message {
    if wants_answer(message) {
        Message::new(message.request(), message.body())
    } else {
        Message::default()
    }
}

impl World {
    fn new(script: &[Message], mistake: Mistake) -> Self {
        let spare = Known { sequence: 1, ..Known::default() };
        Self {
            mistake,
            script: script.iter().cloned().collect(),
            sent: VecDeque::new(),
            asked: None,
            outbox: None,
            answers: VecDeque::new(),
            page: Progress { sequence: 1, phase: Phase::Idle },
            spare,
            deaf_from: u64::MAX,
            left: usize::MAX,
            ended: false,
        }
    }

    /// The front end reads its answer, and goes on unless it waits for one.
    fn front_end(&mut self) {
        while let Some(answer) = self.answers.pop_front() {
            let asked = self.asked.take().expect("an answer that nobody has asked for");
            assert_eq!(answer.bytes, answer_to(&asked).bytes, "the answer to something else");
        }
        while self.asked.is_none()
            && let Some(message) = self.script.pop_front()
        {
            if wants_answer(&message) {
                self.asked = Some(message.clone());
            }
            self.sent.push_back(message);
        }
    }

    fn step(&mut self) -> Result<(), End> {
        if self.left == 0 {
            return Err(End::Death);
        }
        self.left -= 1;
        Ok(())
    }
}

/// One process.
struct Process<'a> {
    world: &'a mut World,
    number: u64,
}

impl Process<'_> {
    /// A step that cannot tell of a death leaves it to the next one.
    fn dead(&mut self) -> bool {
        self.world.step().is_err()
    }
}

impl Steps for Process<'_> {
    type Error = End;

    fn see(&mut self) -> Result<Message, End> {
        self.world.step()?;
        self.world.front_end();
        let seen = self.world.sent.front().cloned().ok_or(End::Quiet)?;
        if self.world.mistake == Mistake::TakenAtOnce {
            self.world.sent.pop_front();
        }
        Ok(seen)
    }

    fn begin(&mut self) -> u64 {
        self.number += 1;
        if !self.dead() {
            self.world.page = Progress { sequence: self.number, phase: Phase::Handling };
        }
        self.number
    }

    fn handle(&mut self, message: &Message) -> (Message, Result<(), End>) {
        (answer_to(message), self.world.step())
    }

    fn tell(&mut self, message: &Message, answer: &Message) {
        let heard = self.number < self.world.deaf_from && self.world.mistake != Mistake::NotTold;
        if !self.dead() && heard {
            let parts = vec![message.clone(), answer.clone()];
            self.world.spare.follow(Packet::new(Kind::Exchange, self.number, parts));
        }
    }

    fn taking(&mut self, number: u64) {
        if !self.dead() && self.world.mistake != Mistake::TakingNotShown {
            self.world.page = Progress { sequence: number, phase: Phase::Taking };
        }
    }

    fn take(&mut self, _message: &Message) -> Result<(), End> {
        self.world.step()?;
        if self.world.mistake != Mistake::TakenAtOnce {
            self.world.sent.pop_front();
        }
        Ok(())
    }

    fn answering(&mut self, number: u64, answer: &Message) -> Result<(), End> {
        let mut phase = Phase::Sending;
        if !has_files(answer) {
            self.world.step()?;
            self.world.outbox = Some(answer.clone());
            phase = Phase::Answering;
        }
        self.world.step()?;
        if self.world.mistake != Mistake::AnswerNotShown {
            self.world.page = Progress { sequence: number, phase };
        }
        Ok(())
    }

    fn answer(&mut self, answer: &Message) -> Result<(), End> {
        self.world.step()?;
        let sent = if has_files(answer) { Some(answer.clone()) } else { self.world.outbox.take() };
        self.world.answers.extend(sent);
        // It may read the answer at once, or much later.
        Ok(())
    }

    fn done(&mut self, number: u64) {
        if !self.dead() {
            self.world.page = Progress { sequence: number, phase: Phase::Idle };
        }
    }
}

/// The spare goes on as `session::catch_up` does; says whether the connection goes on.
fn take_over(process: &mut Process<'_>, reads_first: bool) -> Result<bool, End> {
    if reads_first {
        process.world.front_end();
    }
    let known = process.world.spare.clone();
    let last = known.last.as_ref();
    let waiting = match process.world.sent.front() {
        _ if process.world.mistake == Mistake::DoesNotLook => Waiting::Nothing,
        None => Waiting::Nothing,
        Some(sent) if last.is_some_and(|last| last.request.bytes == sent.bytes) => Waiting::Same,
        Some(_) => Waiting::Other,
    };
    let looks = process.world.mistake != Mistake::OutboxForgotten;
    let unsent = looks && process.world.outbox.is_some();
    let mut verdict = judge(process.world.page, known.sequence, last, waiting, unsent);
    match (process.world.mistake, verdict) {
        (Mistake::AnswersTwice, Verdict::Doubt) => verdict = Verdict::Answer,
        (Mistake::NeverAnswers, Verdict::Answer | Verdict::Take) => verdict = Verdict::GoOn,
        _ => {}
    }
    process.number = known.sequence;
    match verdict {
        Verdict::GiveUp(cause) => {
            let deaf = process.world.deaf_from != u64::MAX;
            assert!(deaf || process.world.mistake != Mistake::None, "{cause}");
            return Ok(false);
        }
        // An answer that is not read yet has been sent.
        Verdict::Doubt if process.world.answers.is_empty() => return Ok(false),
        Verdict::Doubt => {}
        Verdict::Answer | Verdict::Take => {
            if verdict == Verdict::Take {
                let request = last.map(|last| last.request.clone()).unwrap_or_default();
                process.take(&request)?;
            }
            let answer = last.map(|last| last.answer.clone()).unwrap_or_default();
            give_answer(process, known.sequence, &answer)?;
        }
        Verdict::Send => {
            process.world.step()?;
            let sent = process.world.outbox.take();
            process.world.answers.extend(sent);
        }
        Verdict::GoOn => {}
    }
    let number = process.number;
    process.done(number);
    Ok(true)
}

/// Processes that follow each other until all is said; `deaths` are steps that each may take.
/// Says whether the connection went on to the end.
fn run(world: &mut World, deaths: &[usize], reads_first: bool) -> bool {
    let mut first = true;
    for left in deaths.iter().copied().chain([usize::MAX]) {
        world.left = left;
        let number = world.spare.sequence;
        let mut process = Process { world: &mut *world, number };
        let mut end = None;
        if !std::mem::take(&mut first) {
            match take_over(&mut process, reads_first) {
                // Its own spare is told everything.
                Ok(true) => process.world.deaf_from = u64::MAX,
                Ok(false) => return false,
                Err(death) => end = Some(death),
            }
        }
        let end = end.unwrap_or_else(|| {
            loop {
                if let Err(end) = serve_one(&mut process) {
                    break end;
                }
            }
        });
        if end == End::Quiet {
            world.front_end();
            world.ended = true;
            return true;
        }
    }
    unreachable!("the last process does not die")
}

fn script() -> Vec<Message> {
    let kinds = [
        Request::GET_FEATURES,
        Request::SET_FEATURES,
        Request::SET_PROTOCOL_FEATURES,
        Request::GET_INFLIGHT_FD,
        Request::SET_INFLIGHT_FD,
        Request::SET_MEM_TABLE,
        Request::SET_VRING_NUM,
        Request::SET_VRING_NUM,
        Request::SET_VRING_KICK,
        Request::SET_VRING_CALL,
        Request::SET_VRING_ENABLE,
        Request::GET_VRING_BASE,
        Request::GET_VRING_BASE,
        Request::SET_VRING_KICK,
        Request::RESET_DEVICE,
        Request::GET_FEATURES,
    ];
    kinds.iter().map(|kind| Message::new(*kind as u32, &[0; 40])).collect()
}

fn bytes(known: &Known) -> Vec<Vec<u8>> {
    known.transcript.messages().into_iter().map(|message| message.bytes).collect()
}

/// Explores; panics where the front end notices something. Gives the number of worlds, and of those
/// in which it had to connect again.
fn explore(mistake: Mistake) -> (usize, usize) {
    let script = script();
    let mut calm = World::new(&script, Mistake::None);
    assert!(run(&mut calm, &[], false));
    let longest = 11 * script.len();
    let (mut worlds, mut again) = (0, 0);
    for reads_first in [false, true] {
        for first in 0..longest {
            for second in (0..13).chain([usize::MAX]) {
                let mut world = World::new(&script, mistake);
                let deaths: &[usize] =
                    if second == usize::MAX { &[first] } else { &[first, second] };
                worlds += 1;
                if !run(&mut world, deaths, reads_first) {
                    again += 1;
                    continue;
                }
                check(&world, &calm);
            }
        }
    }
    (worlds, again)
}

fn check(world: &World, calm: &World) {
    assert!(world.asked.is_none(), "the front end waits for ever");
    assert!(world.sent.is_empty() && world.script.is_empty());
    if world.deaf_from == u64::MAX {
        assert_eq!(bytes(&world.spare), bytes(&calm.spare), "the spare knows otherwise");
    }
}

/// As [`explore`], with a spare that was let go in the middle. Gives the number of worlds in which
/// the front end did not have to connect again.
fn explore_deaf(mistake: Mistake) -> usize {
    let script = script();
    let mut calm = World::new(&script, Mistake::None);
    assert!(run(&mut calm, &[], false));
    let messages = 2..2 + script.len() as u64;
    let worlds = messages.flat_map(|deaf_from| (0..11 * script.len()).map(move |n| (deaf_from, n)));
    let mut kept = 0;
    for (deaf_from, death) in worlds {
        let mut world = World { deaf_from, ..World::new(&script, mistake) };
        if run(&mut world, &[death], true) {
            kept += 1;
            check(&world, &calm);
        }
    }
    kept
}

#[test]
fn a_spare_that_was_let_go_misses_no_message() {
    assert!(explore_deaf(Mistake::None) > 500);
}

#[test]
fn no_death_is_noticed_and_hardly_one_costs_the_connection() {
    let (worlds, again) = explore(Mistake::None);
    assert!(worlds > 3000);
    // Only between the announcement of an answer with files and the answer itself.
    assert!(again * 100 < worlds, "{again} of {worlds}");
    println!("{worlds} worlds, the front end connects again in {again}");
}

#[test]
fn mistakes_are_found() {
    let mistakes = [
        Mistake::TakenAtOnce,
        Mistake::NotTold,
        Mistake::AnswerNotShown,
        Mistake::AnswersTwice,
        Mistake::NeverAnswers,
        Mistake::DoesNotLook,
        Mistake::TakingNotShown,
        Mistake::OutboxForgotten,
    ];
    let (_, normal) = explore(Mistake::None);
    for mistake in mistakes {
        let explored = std::panic::catch_unwind(|| {
            explore_deaf(mistake);
            explore(mistake)
        });
        // What is not noticed as an error has to cost many connections.
        let found = explored.is_err() || explored.is_ok_and(|(_, again)| again > 2 * normal);
        assert!(found, "{mistake:?}");
    }
}
