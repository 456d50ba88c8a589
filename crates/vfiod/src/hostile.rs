//! For fuzzers and attacks: a mediator without threads, to which messages and lines are given.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use semper_block::{Image, OpenOptions, SyncEngine};
use semper_device::Device;
use semper_nvme::{Controller, Settings, Store};
use semper_walls::Standing;

use crate::args::Doorbells;
use crate::edu::Edu;
use crate::inbox::{Event, Port, Teller, inbox};
use crate::link;
use crate::message::Message;
use crate::server::{Facts, Server};

/// Bytes of the file that a message can bring along.
const FILE: u64 = 256 << 10;

/// A mediator.
pub struct Target {
    server: Server,
    /// Without it the mediator would have nobody to hear of.
    _teller: Teller,
    memory: File,
}

impl Target {
    /// Of an NVMe controller on this image, or of the small device.
    ///
    /// # Panics
    /// When the system has no descriptor left.
    pub fn new(image: Option<&Path>, incoming: bool) -> Self {
        let device: Box<dyn Device> = match image {
            Some(image) => {
                let image = Image::open(image, OpenOptions::default()).expect("the image");
                let engine = SyncEngine::new(image.fd()).expect("an engine");
                let settings = Settings { serial: "attacked".to_owned(), queues: 2 };
                let storage = Box::new(Store::new(Arc::new(image), engine));
                Box::new(Controller::new(settings, storage))
            }
            None => Box::new(Edu::default()),
        };
        let (teller, inbox) = inbox().expect("an eventfd");
        let facts = Facts {
            engine: "sync",
            serial: "attacked".to_owned(),
            doorbells: Doorbells::Direct,
            line: true,
            walls: Standing::default(),
        };
        let mut server = Server::new(device, None, incoming, inbox, facts).expect("a page");
        // Nobody answers here, and each question that waits for an answer would take half a minute.
        server.patience = Duration::from_millis(1);
        // SAFETY: the name is a string; the result is checked and then owned.
        let memory = unsafe {
            let fd = libc::memfd_create(c"attack".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "a file in memory");
            File::from_raw_fd(fd)
        };
        memory.set_len(FILE).expect("room");
        Self { server, _teller: teller, memory }
    }

    /// A message of the client, for the device or the shim, with a file or without.
    ///
    /// # Panics
    /// When the attack succeeds, or there is no descriptor left.
    pub fn message(&mut self, shim: bool, command: u16, flags: u32, body: Vec<u8>, file: bool) {
        let copy = || OwnedFd::from(self.memory.try_clone().expect("a descriptor"));
        let files = file.then(copy).into_iter().collect();
        let message = Message { id: 1, command, flags, error: 0, body, files };
        let port = if shim { Port::Shim } else { Port::Device };
        self.server.hear(Event::Message(port, message));
        self.server.turn();
    }

    /// From now on it keeps what a spare needs.
    ///
    /// # Panics
    /// When the system has no descriptor left.
    pub fn be_followed(&mut self) {
        self.server.be_followed([None, None]).expect("a ledger");
    }

    /// A packet of a process that a guest has taken over, to its spare.
    ///
    /// # Panics
    /// When the attack succeeds, or there is no descriptor left.
    pub fn packet(&mut self, bytes: &[u8], files: usize) {
        let copy = || OwnedFd::from(self.memory.try_clone().expect("a descriptor"));
        let files = (0..files).map(|_| copy()).collect();
        if let Some(packet) = link::decode(bytes, files) {
            let _ = self.server.follow(packet);
        }
    }

    /// A line of the control socket.
    pub fn line(&mut self, line: &str) {
        if let Ok(request) = serde_json::from_str(line) {
            let answer = self.server.answer(&request);
            assert!(answer.line["ok"].is_object() != answer.line["error"].is_object());
        }
    }
}
