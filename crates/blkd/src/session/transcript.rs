//! What a front end has said so far, as far as it still counts: enough to say it again.
//!
//! A process that is told this, and then what comes, is in the same state as the one that was told
//! everything. It is kept as the messages themselves: their format is vhost-user's, which every
//! version of this program understands.

use std::collections::BTreeMap;

use vhost::vhost_user::message::FrontendReq as Request;

use crate::config;
use crate::message::{Files, Message};

/// What of a queue counts, in the order in which it is said again: the kick starts the queue, and
/// the call comes after it, for a queue signals a call that is new to it whatever the driver wants.
/// The process before may have died between a completion and its signal.
const QUEUE_ORDER: [Request; 7] = [
    Request::SET_VRING_NUM,
    Request::SET_VRING_BASE,
    Request::SET_VRING_ADDR,
    Request::SET_VRING_ERR,
    Request::SET_VRING_ENABLE,
    Request::SET_VRING_KICK,
    Request::SET_VRING_CALL,
];
/// What of the device counts, before its memory and its queues.
const DEVICE_ORDER: [Request; 6] = [
    Request::SET_PROTOCOL_FEATURES,
    Request::SET_OWNER,
    Request::SET_BACKEND_REQ_FD,
    Request::SET_FEATURES,
    // The write cache; the in-flight region knows better, once there is one.
    Request::SET_CONFIG,
    Request::SET_INFLIGHT_FD,
];
/// Bytes of a region in a message: guest address, size, address in the front end, offset in the
/// file.
const REGION: usize = 32;
/// Bytes before the regions: their number, or padding.
const REGIONS_AT: usize = 8;

/// A region of the guest's memory.
#[derive(Clone, Debug)]
struct Region {
    what: [u8; REGION],
    files: Files,
}

impl Region {
    /// Guest address and size.
    fn place(&self) -> &[u8] {
        &self.what[..16]
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transcript {
    device: BTreeMap<usize, Message>,
    regions: Vec<Region>,
    /// By queue, then by place in [`QUEUE_ORDER`].
    queues: BTreeMap<u32, BTreeMap<usize, Message>>,
    postcopy: Postcopy,
    /// The configuration space as the front end has read it, in the form of its answer.
    config: Option<Message>,
}

/// How far the guest's memory has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Postcopy {
    /// It is there.
    #[default]
    None,
    /// There may be a postcopy, unless there is memory first.
    Advised,
    Listening,
}

fn is(message: &Message, request: Request) -> bool {
    message.request() == request as u32
}

fn place(order: &[Request], message: &Message) -> Option<usize> {
    order.iter().position(|request| is(message, *request))
}

/// The capacity in a part of the configuration space (offset, size, flags, then bytes), if that part
/// begins with it: a number of sectors.
fn capacity_of(config: &Message) -> Option<u64> {
    let bytes: [u8; 8] = config.body().get(12..20)?.try_into().ok()?;
    (config.body_word(0) == 0).then(|| u64::from_le_bytes(bytes).saturating_mul(512))
}

impl Transcript {
    /// Takes down a message that was understood, and its answer.
    pub(crate) fn note(&mut self, message: &Message, answer: &Message) {
        if let Some(at) = place(&DEVICE_ORDER, message) {
            if is(message, Request::SET_FEATURES) {
                self.forget(Request::SET_CONFIG);
            }
            self.device.insert(at, message.clone());
        } else if let Some(at) = place(&QUEUE_ORDER, message) {
            self.queue_of(message).insert(at, message.clone());
        } else if is(message, Request::GET_VRING_BASE) {
            self.note_stop(message, answer);
        } else if is(message, Request::RESET_DEVICE) {
            self.reset();
        } else if is(message, Request::RESET_OWNER) {
            *self = Self::default();
        } else if is(message, Request::POSTCOPY_ADVISE) {
            self.postcopy = Postcopy::Advised;
        } else if is(message, Request::POSTCOPY_LISTEN) {
            self.postcopy = Postcopy::Listening;
        } else if is(message, Request::POSTCOPY_END) {
            self.postcopy = Postcopy::None;
        } else if is(message, Request::GET_CONFIG) {
            // Said again, the message has the answer's body.
            let read = if answer.is_empty() { message } else { answer };
            if capacity_of(read).is_some() {
                self.config = Some(Message::new(Request::GET_CONFIG as u32, read.body()));
            }
        } else {
            self.note_memory(message);
        }
    }

    /// The messages of a queue name it in different ways: a byte beside a flag where a file comes
    /// along, a word elsewhere.
    fn queue_of(&mut self, message: &Message) -> &mut BTreeMap<usize, Message> {
        const WITH_FILES: [Request; 3] =
            [Request::SET_VRING_KICK, Request::SET_VRING_CALL, Request::SET_VRING_ERR];
        let named = message.body_word(0);
        let with_files = WITH_FILES.iter().any(|request| is(message, *request));
        let queue = if with_files { named & 0xff } else { named };
        self.queues.entry(queue).or_default()
    }

    /// The queue goes on from where the answer says, once it is given a kick again.
    fn note_stop(&mut self, message: &Message, answer: &Message) {
        let queue = self.queue_of(message);
        let base = Message::new(Request::SET_VRING_BASE as u32, answer.body());
        for (at, request) in QUEUE_ORDER.into_iter().enumerate() {
            match request {
                Request::SET_VRING_BASE if !answer.is_empty() => {
                    queue.insert(at, base.clone());
                }
                Request::SET_VRING_KICK | Request::SET_VRING_CALL => {
                    queue.remove(&at);
                }
                _ => {}
            }
        }
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.forget(Request::SET_INFLIGHT_FD);
        self.forget(Request::SET_CONFIG);
    }

    fn forget(&mut self, request: Request) {
        self.device.retain(|_, message| !is(message, request));
    }

    fn note_memory(&mut self, message: &Message) {
        let body = message.body().get(REGIONS_AT..).unwrap_or_default();
        let regions: Vec<[u8; REGION]> =
            body.chunks_exact(REGION).filter_map(|chunk| chunk.try_into().ok()).collect();
        let region = |(what, file): (&[u8; REGION], &_)| Region {
            what: *what,
            files: vec![Clone::clone(file)],
        };
        let said = regions.iter().zip(&message.files).map(region);
        let comes = is(message, Request::SET_MEM_TABLE) || is(message, Request::ADD_MEM_REG);
        if comes && self.postcopy == Postcopy::Advised {
            self.postcopy = Postcopy::None;
        }
        if is(message, Request::SET_MEM_TABLE) {
            // Without regions it is the word that ends a change in a postcopy.
            if !regions.is_empty() {
                self.regions = said.collect();
            }
        } else if is(message, Request::ADD_MEM_REG) {
            let said: Vec<Region> = said.collect();
            self.regions.retain(|known| said.iter().all(|new| new.place() != known.place()));
            self.regions.extend(said);
        } else if is(message, Request::REM_MEM_REG)
            && let Some(gone) = regions.first()
        {
            self.regions.retain(|region| region.place() != &gone[..16]);
        }
    }

    /// What to say to a process that has heard nothing, in this order.
    pub(crate) fn messages(&self) -> Vec<Message> {
        let mut said = Vec::new();
        match self.postcopy {
            Postcopy::None => {}
            Postcopy::Advised => said.push(Message::new(Request::POSTCOPY_ADVISE as u32, &[])),
            Postcopy::Listening => said.push(Message::new(Request::POSTCOPY_LISTEN as u32, &[])),
        }
        said.extend(self.device.values().cloned());
        if !self.regions.is_empty() {
            let mut body = (self.regions.len() as u64).to_ne_bytes().to_vec();
            body.extend(self.regions.iter().flat_map(|region| region.what));
            let files = self.regions.iter().flat_map(|region| region.files.clone()).collect();
            said.push(Message::with_files(Request::SET_MEM_TABLE as u32, &body, files));
        }
        said.extend(self.queues.values().flat_map(|queue| queue.values().cloned()));
        said
    }

    /// All that another process has to know: what to say, and what was read.
    pub(crate) fn everything(&self) -> Vec<Message> {
        self.messages().into_iter().chain(self.config.clone()).collect()
    }

    /// Bytes that the front end takes the disk for, if it has looked.
    pub(crate) fn capacity(&self) -> Option<u64> {
        self.config.as_ref().and_then(capacity_of)
    }

    fn features(&self) -> u64 {
        let said = self.device.values().find(|message| is(message, Request::SET_FEATURES));
        said.map_or(0, |m| u64::from(m.body_word(0)) | u64::from(m.body_word(1)) << 32)
    }

    /// Whether another process may go on where this one stood, on the same connection.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn can_be_continued(&self) -> Result<(), &'static str> {
        if self.postcopy != Postcopy::None {
            // The front end reads the page faults of the process that has died, and no others.
            return Err("the guest's memory is still arriving");
        }
        if self.features() & config::F_LOG_ALL != 0 {
            return Err("writes are being logged for a migration");
        }
        let has = |messages: &BTreeMap<usize, Message>, request| {
            messages.values().any(|message| is(message, request))
        };
        let runs = self.queues.values().any(|queue| has(queue, Request::SET_VRING_KICK));
        if runs && !has(&self.device, Request::SET_INFLIGHT_FD) {
            return Err("requests in flight are not tracked");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use super::*;

    fn file() -> Files {
        vec![Arc::new(File::open("/dev/null").unwrap().into())]
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn say(transcript: &mut Transcript, request: Request, body: &[u32], files: Files) {
        let message = Message::with_files(request as u32, &words(body), files);
        transcript.note(&message, &Message::default());
    }

    fn region(address: u32) -> Vec<u32> {
        vec![address, 0, 4096, 0, address, 7, 0, 0]
    }

    fn requests(transcript: &Transcript) -> Vec<u32> {
        transcript.messages().iter().map(Message::request).collect()
    }

    fn running() -> Transcript {
        let mut said = Transcript::default();
        say(&mut said, Request::SET_VRING_CALL, &[1, 0], file());
        say(&mut said, Request::SET_FEATURES, &[0, 1], vec![]);
        say(&mut said, Request::SET_INFLIGHT_FD, &[0; 6], file());
        say(&mut said, Request::SET_MEM_TABLE, &[vec![1, 0], region(64)].concat(), file());
        say(&mut said, Request::SET_VRING_NUM, &[1, 256], vec![]);
        say(&mut said, Request::SET_VRING_KICK, &[1, 0], file());
        say(&mut said, Request::SET_VRING_ENABLE, &[1, 1], vec![]);
        said
    }

    #[test]
    fn it_is_said_again_in_an_order_that_starts_queues_last() {
        let expected = [
            Request::SET_FEATURES,
            Request::SET_INFLIGHT_FD,
            Request::SET_MEM_TABLE,
            Request::SET_VRING_NUM,
            Request::SET_VRING_ENABLE,
            Request::SET_VRING_KICK,
            Request::SET_VRING_CALL,
        ];
        assert_eq!(requests(&running()), expected.map(|request| request as u32));
    }

    #[test]
    fn said_again_it_is_the_same() {
        let mut again = Transcript::default();
        for message in running().messages() {
            again.note(&message, &Message::default());
        }
        let bytes = |said: &Transcript| -> Vec<Vec<u8>> {
            said.messages().into_iter().map(|message| message.bytes).collect()
        };
        assert_eq!(bytes(&again), bytes(&running()));
    }

    #[test]
    fn a_queue_that_was_stopped_has_no_kick_and_goes_on_from_the_answer() {
        let mut said = running();
        let ask = Message::new(Request::GET_VRING_BASE as u32, &words(&[1, 0]));
        said.note(&ask, &Message::new(Request::GET_VRING_BASE as u32, &words(&[1, 77])));
        let queue = said.queues[&1].values().map(|m| (m.request(), m.body_word(1)));
        let kept = [
            (Request::SET_VRING_NUM as u32, 256),
            (Request::SET_VRING_BASE as u32, 77),
            (Request::SET_VRING_ENABLE as u32, 1),
        ];
        assert_eq!(queue.collect::<Vec<_>>(), kept);
    }

    #[test]
    fn regions_come_and_go_one_by_one() {
        let mut said = running();
        for address in [128, 192, 128] {
            say(&mut said, Request::ADD_MEM_REG, &[vec![0, 0], region(address)].concat(), file());
        }
        say(&mut said, Request::REM_MEM_REG, &[vec![0, 0], region(64)].concat(), vec![]);
        let table = said.messages().into_iter().find(|m| is(m, Request::SET_MEM_TABLE)).unwrap();
        assert_eq!((table.body_word(0), table.files.len()), (2, 2));
        assert_eq!((table.body_word(2), table.body_word(10)), (192, 128));
    }

    #[test]
    fn a_reset_device_keeps_its_memory_and_no_queue() {
        let mut said = running();
        say(&mut said, Request::RESET_DEVICE, &[], vec![]);
        let left = [Request::SET_FEATURES as u32, Request::SET_MEM_TABLE as u32];
        assert_eq!(requests(&said), left);
    }

    #[test]
    fn the_capacity_that_was_read_is_known_to_who_hears_of_it_later() {
        let mut said = running();
        let words_of = |sectors| [vec![0, 60, 0, sectors, 0], vec![0; 13]].concat();
        let ask = Message::new(Request::GET_CONFIG as u32, &words(&words_of(0)));
        let answer = Message::new(Request::GET_CONFIG as u32, &words(&words_of(2048)));
        said.note(&ask, &answer);
        // The write cache's byte alone.
        let part = Message::new(Request::GET_CONFIG as u32, &words(&[32, 1, 0, 1, 0, 0]));
        said.note(&part, &part);
        let mut again = Transcript::default();
        for message in said.everything() {
            again.note(&message, &Message::default());
        }
        assert_eq!(again.capacity(), Some(1 << 20));
        // It is nothing to say again: the next process would take it for its own answer.
        assert_eq!(requests(&again), requests(&running()));
    }

    #[test]
    fn what_cannot_be_continued_says_why() {
        assert_eq!(running().can_be_continued(), Ok(()));
        let mut untracked = running();
        untracked.device.clear();
        assert!(untracked.can_be_continued().unwrap_err().contains("not tracked"));
        let mut logged = running();
        say(&mut logged, Request::SET_FEATURES, &[1 << 26, 1], vec![]);
        assert!(logged.can_be_continued().unwrap_err().contains("logged"));
        let mut arriving = running();
        say(&mut arriving, Request::POSTCOPY_ADVISE, &[], vec![]);
        assert!(arriving.can_be_continued().unwrap_err().contains("arriving"));
        let mut needless = arriving.clone();
        say(&mut needless, Request::ADD_MEM_REG, &[vec![0, 0], region(128)].concat(), file());
        assert_eq!(needless.can_be_continued(), Ok(()));
        say(&mut arriving, Request::POSTCOPY_LISTEN, &[], vec![]);
        say(&mut arriving, Request::ADD_MEM_REG, &[vec![0, 0], region(128)].concat(), file());
        assert!(arriving.can_be_continued().unwrap_err().contains("arriving"));
        say(&mut arriving, Request::POSTCOPY_END, &[], vec![]);
        assert_eq!(arriving.can_be_continued(), Ok(()));
    }

    #[test]
    fn nonsense_is_no_panic() {
        let mut said = Transcript::default();
        for request in 0..50 {
            for length in [0, 1, 7, 8, 12, 39, 40, 41, 300] {
                said.note(&Message::new(request, &vec![0xff; length]), &Message::default());
            }
        }
        said.note(&Message::default(), &Message::default());
        said.messages();
    }
}
