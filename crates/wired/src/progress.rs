//! What an end can tell about itself: written by those who carry, read by the control socket.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use semper_walls::Standing;
use semper_wire::{Counters, Judged};

use crate::answers::Status;

/// Where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Looking for the other end.
    Connecting,
    /// Reading blocks (source).
    Indexing,
    /// Waiting for the first byte.
    Ready,
    /// Carrying.
    Streaming,
    /// QEMU has written all; not all of it has arrived.
    Draining,
    /// All of the stream was taken by the other QEMU.
    Done,
    /// It was not, and will not be.
    Failed,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Connecting => "connecting",
            Phase::Indexing => "indexing",
            Phase::Ready => "ready",
            Phase::Streaming => "streaming",
            Phase::Draining => "draining",
            Phase::Done => "done",
            Phase::Failed => "failed",
        }
    }
}

struct Told {
    phase: Phase,
    counters: Counters,
    judged: Judged,
    address: Option<SocketAddr>,
    peer: String,
    lost: Option<&'static str>,
    failure: Option<String>,
    walls: Standing,
}

/// One for each process.
pub(crate) struct Progress {
    end: &'static str,
    began: Instant,
    told: Mutex<Told>,
    indexed: AtomicU64,
    wire: (AtomicU64, AtomicU64),
    mismatches: AtomicU64,
    backlog: AtomicU64,
    /// 0 as long as it is not known.
    link: AtomicU64,
}

impl Progress {
    pub(crate) fn new(end: &'static str) -> Self {
        let told = Told {
            phase: Phase::Connecting,
            counters: Counters::default(),
            judged: Judged::default(),
            address: None,
            peer: String::new(),
            lost: None,
            failure: None,
            walls: Standing::default(),
        };
        Self {
            end,
            began: Instant::now(),
            told: Mutex::new(told),
            indexed: AtomicU64::new(0),
            wire: (AtomicU64::new(0), AtomicU64::new(0)),
            mismatches: AtomicU64::new(0),
            backlog: AtomicU64::new(0),
            link: AtomicU64::new(0),
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn phase(&self, phase: Phase) {
        self.told().phase = phase;
        log::info!("{} state={}", self.end, phase.name());
    }

    pub(crate) fn indexed(&self, blocks: u64) {
        self.indexed.store(blocks, Ordering::Relaxed);
    }

    pub(crate) fn listening(&self, address: SocketAddr) {
        self.told().address = Some(address);
    }

    pub(crate) fn walls(&self, walls: Standing) {
        self.told().walls = walls;
    }

    pub(crate) fn peer(&self, program: &str) {
        program.clone_into(&mut self.told().peer);
    }

    pub(crate) fn encoded(&self, counters: Counters, lost: Option<&'static str>) {
        let mut told = self.told();
        (told.counters, told.lost) = (counters, lost);
    }

    pub(crate) fn decoded(&self, judged: Judged) {
        self.told().judged = judged;
    }

    pub(crate) fn wire(&self, (sent, received): (u64, u64)) {
        self.wire.0.store(sent, Ordering::Relaxed);
        self.wire.1.store(received, Ordering::Relaxed);
    }

    /// So many more references did not match; the encoder may hear of the last ones too late.
    pub(crate) fn mismatched(&self, references: usize) {
        self.mismatches.fetch_add(references as u64, Ordering::Relaxed);
    }

    /// Bytes of the stream under way, and what the link carries.
    pub(crate) fn flow(&self, backlog: u64, link: Option<u64>) {
        self.backlog.store(backlog, Ordering::Relaxed);
        self.link.store(link.unwrap_or(0), Ordering::Relaxed);
    }

    pub(crate) fn failed(&self, why: &str) {
        let mut told = self.told();
        told.phase = Phase::Failed;
        told.failure = Some(why.to_owned());
    }

    /// The canonical line and the control socket's answer.
    pub(crate) fn status(&self) -> Status {
        let told = self.told();
        let (source, destination) = (told.counters, told.judged);
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Status {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            end: self.end,
            state: told.phase.name(),
            seconds: self.began.elapsed().as_secs_f64(),
            address: told.address.map(|address| address.to_string()),
            peer: told.peer.clone(),
            indexed_blocks: get(&self.indexed),
            stream_bytes: source.stream_bytes.max(destination.stream_bytes),
            wire_bytes_sent: get(&self.wire.0),
            wire_bytes_received: get(&self.wire.1),
            backlog_bytes: get(&self.backlog),
            switchover_bandwidth: Some(get(&self.link)).filter(|&rate| rate > 0),
            zero_pages: source.zero_pages,
            pages: source.pages,
            references: source.references.max(destination.references),
            mismatches: get(&self.mismatches).max(destination.mismatches),
            repaired: destination.repaired,
            other_bytes: source.raw_bytes,
            passes_through: told.lost,
            error: told.failure.clone(),
            walls: told.walls.clone(),
        }
    }
}
