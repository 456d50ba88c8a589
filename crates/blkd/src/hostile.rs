//! Doors for fuzzers and tests: each takes what an enemy controls and gives it to the real code.
//!
//! Nothing of the program goes through here, and nothing here is an interface for anybody else.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use semper_block::{Engine, Image, NullEngine, Op, OpenOptions};
use semper_inflight::{NoHook, TrackedQueue};
use semper_ring::ChainError;
use semper_title::Title;

use crate::block_map::{DiskMap, Keeping};
use crate::control::Control;
use crate::device::{Device, Offer};
use crate::queue::Disk;
use crate::request::{ID_SIZE, Parsed, Rules, Slot, parse};
use crate::session::Line;
use crate::session::mirror::Mirror;
use crate::snapshots::Snapshots;
use crate::state::Shared;
use crate::tenure::{Standing, Tenure};
use crate::threads::{Spawn, ThreadMap, Threads};
use crate::worker::Worker;

/// A disk for as many attacks as you like.
pub struct Target {
    disk: Arc<Disk>,
    /// What the control socket rebinds.
    device: OnceLock<Arc<Mutex<Device>>>,
}

/// What a descriptor chain was taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// I/O on this range of the disk, with segments of this many bytes in all.
    Io {
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Sum of the segments' lengths.
        segments: u64,
        /// Whether it is a read or a write.
        moves_data: bool,
    },
    /// Answered at once with a status byte.
    Answered(u8),
    /// No room for a status byte.
    Unanswerable,
}

impl Target {
    /// A disk on the image at `path`.
    ///
    /// # Panics
    /// When the image cannot be opened.
    pub fn new(path: &Path, read_only: bool, num_queues: u16) -> Self {
        let options = OpenOptions { read_only, ..OpenOptions::default() };
        let image = Image::open(path, options).expect("the target's image");
        let shared = Arc::new(Shared::new(num_queues));
        let (image, poll) = (Arc::new(image), Duration::from_micros(20));
        let map =
            DiskMap::new(&image, num_queues.into(), None, Keeping::Own).expect("the target's map");
        let map = Some(Arc::new(map));
        let (taken, their) = (Standing::Held, (Arc::clone(&image), Arc::clone(&shared)));
        let snapshots = Arc::new(Snapshots::none(&image, &shared));
        let layers = Arc::clone(&snapshots);
        let tenure = Tenure::new(their.0, their.1, Title::none(), layers, taken);
        let serial = [b's'; ID_SIZE];
        let disk = Disk { image, serial, shared, map, poll, tenure, snapshots };
        Self { disk: Arc::new(disk), device: OnceLock::new() }
    }

    /// Bytes that the guest sees.
    pub fn capacity(&self) -> u64 {
        self.disk.image.capacity()
    }

    /// Parses the chain at `head` as a queue's thread does; `room` is reused like a queue's slot.
    ///
    /// # Errors
    /// [`ChainError`].
    pub fn parse(
        &self,
        queue: &TrackedQueue<NoHook>,
        head: u16,
        room: &mut Room,
        write_through: bool,
    ) -> Result<Verdict, ChainError> {
        let Disk { image, serial, .. } = &*self.disk;
        let slot = &mut room.0;
        Ok(match parse(queue, head, slot, Rules { image, serial, write_through })? {
            Parsed::Io => Verdict::Io {
                offset: slot.offset,
                len: slot.len,
                segments: slot.io.segments().iter().map(|s| s.iov_len as u64).sum(),
                moves_data: matches!(slot.io.asked(), Op::Read | Op::Write { .. }),
            },
            Parsed::Answer { status, .. } => Verdict::Answered(status),
            Parsed::Unanswerable => Verdict::Unanswerable,
        })
    }

    /// A device with real threads and the engines that `make` gives, ready for front ends.
    ///
    /// # Panics
    /// When the system has no thread or descriptor left.
    pub fn device<E: Engine + 'static>(
        &self,
        threads: usize,
        make: fn() -> io::Result<E>,
    ) -> Server {
        Server { device: self.serving(threads, make) }
    }

    fn serving<E: Engine + 'static>(
        &self,
        threads: usize,
        make: fn() -> io::Result<E>,
    ) -> Arc<Mutex<Device>> {
        let disk = Arc::clone(&self.disk);
        let spawn: Spawn = Box::new(move |name| Worker::spawn(name, Arc::clone(&disk), make));
        let shared = Arc::clone(&self.disk.shared);
        let map = ThreadMap::round_robin(shared.queues.len() as u16, threads as u16);
        let threads = Threads::new(shared, map, spawn).expect("the target's threads");
        let offer = Offer { track: true, page_faults: false, prepared: None };
        Arc::new(Mutex::new(Device::new(Arc::clone(&self.disk), threads, offer)))
    }

    /// Answers one line of the control socket.
    ///
    /// # Panics
    /// When the system has no thread or descriptor left.
    pub fn control(&self, line: &str) -> String {
        let device = Arc::clone(self.device.get_or_init(|| self.serving(1, NullEngine::new)));
        let disk = Arc::clone(&self.disk);
        let control = Control {
            disk,
            device,
            #[cfg(feature = "faults")]
            faults: crate::faults::Faults::default(),
            engine: "null",
            session: Arc::default(),
            walls: semper_walls::Standing::default(),
        };
        control.answer(line).line.to_string()
    }
}

/// Room for one parsed request.
#[derive(Default)]
pub struct Room(Slot);

/// A device behind a vhost-user connection.
pub struct Server {
    device: Arc<Mutex<Device>>,
}

impl Server {
    /// Speaks vhost-user on `stream` until the other end breaks the connection or the rules; gives
    /// the number of messages handled. The device then finishes everything and is as new.
    pub fn serve(&self, stream: UnixStream) -> u64 {
        let mirror = Mirror::new().expect("a page");
        let mut line = Line::new(stream, &self.device, &mirror).expect("a pair of sockets");
        let mut handled = 0;
        while line.serve().is_ok() {
            handled += 1;
        }
        self.device.lock().unwrap_or_else(PoisonError::into_inner).disconnect();
        handled
    }
}
