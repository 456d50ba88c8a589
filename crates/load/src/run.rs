//! One run: set-up, phases, watching over the backend, and what comes out of it.

use crate::lane::{Lane, Load, Tally};
use crate::memory::Memory;
use crate::offsets::{Blocks, Order, Random};
use crate::options::{Mode, Options};
use crate::processor::Usage;
use crate::relay::{self, Relay};
use crate::watch::{Event, Watch};
use crate::worker::{self, Control, Waiting};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioFeatureFlags,
};

/// Why a run has no figures at all.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Nobody listens, or the handshake failed.
    #[error("no connection to {socket}: {source}")]
    Connection {
        /// The backend's socket.
        socket: String,
        /// What went wrong.
        source: io::Error,
    },
    /// The device is smaller than one block for each lane.
    #[error("the disk or --span has {bytes} bytes: too few for this load")]
    TooSmall {
        /// The part that would be used.
        bytes: u64,
    },
    /// The process to account for is not there.
    #[error("process {pid}: {source}")]
    Process {
        /// Its number.
        pid: u32,
        /// What went wrong.
        source: io::Error,
    },
    /// Out of memory or threads.
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// What the measured interval showed.
pub struct Outcome {
    /// Everything the lanes counted.
    pub tally: Tally,
    /// When the load began, by CLOCK_MONOTONIC.
    pub started_ns: u64,
    /// Length of the measured interval.
    pub measured: Duration,
    /// What this process used in it.
    pub own: Usage,
    /// What the backend used in it, if it was asked for and still lived.
    pub backend: Option<Usage>,
    /// Size of the disk.
    pub capacity_bytes: u64,
    /// The part of it that was used.
    pub span_bytes: u64,
    /// Entries of each virtqueue.
    pub ring_size: u16,
    /// Whether the backend had an in-flight region.
    pub inflight: bool,
    /// Outages that ended with a new connection.
    pub outages: Vec<Duration>,
    /// Why the run ended early.
    pub lost: Option<String>,
    /// Requests never answered.
    pub hung: usize,
}

type Transport = VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>;

struct Device {
    // In the order in which they have to go.
    lanes: Vec<Lane>,
    transport: Box<VirtioBlkTransport>,
    _memory: Memory,
    capacity_bytes: u64,
    span_bytes: u64,
}

/// Runs the load to its end.
///
/// # Errors
/// There was no load at all. A backend that fails later is told in the outcome.
pub fn run(options: &Options) -> Result<Outcome, SetupError> {
    let account = |pid| Usage::of(pid).map_err(|source| SetupError::Process { pid, source });
    options.pid.map(account).transpose()?;
    let connection =
        |source| SetupError::Connection { socket: options.socket.display().to_string(), source };
    let (events, inbox) = mpsc::channel();
    let relay_events = forward(events.clone())?;
    let settings = relay::Settings {
        socket: options.socket.clone(),
        queues: options.queues,
        inflight: !options.no_inflight,
        patience: Duration::from_secs_f64(options.patience),
        reconnect: options.reconnect,
    };
    let relay = Relay::start(settings, relay_events).map_err(connection)?;
    let device = match set_up(options, &relay.path) {
        Ok(device) => device,
        Err(SetupError::Connection { socket, source }) => {
            relay.join();
            // The relay knows the cause; the library only that nobody answered.
            let cause = inbox.try_iter().find_map(|event| match event {
                Event::Relay(relay::Event::Lost(cause)) => Some(io::Error::other(cause)),
                _ => None,
            });
            return Err(SetupError::Connection { socket, source: cause.unwrap_or(source) });
        }
        Err(error) => return Err(error),
    };
    let outcome = drive(options, device, &events, &inbox);
    relay.join();
    Ok(outcome)
}

/// A channel for the relay that leads into the run's own.
fn forward(events: Sender<Event>) -> io::Result<Sender<relay::Event>> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().name("events".into()).spawn(move || {
        for event in receiver {
            if events.send(Event::Relay(event)).is_err() {
                return;
            }
        }
    })?;
    Ok(sender)
}

fn set_up(options: &Options, path: &std::path::Path) -> Result<Device, SetupError> {
    let connection =
        |source| SetupError::Connection { socket: options.socket.display().to_string(), source };
    let path = path.to_str().ok_or_else(|| connection(io::ErrorKind::InvalidInput.into()))?;
    let mut features = VirtioFeatureFlags::VERSION_1.bits()
        | (VirtioBlkFeatureFlags::MQ
            | VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::BLK_SIZE
            | VirtioBlkFeatureFlags::RO)
            .bits();
    if !options.no_event_idx {
        features |= VirtioFeatureFlags::RING_EVENT_IDX.bits();
    }
    let transport = Transport::new(path, features).map_err(connection)?;
    let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
    let queues = usize::from(options.queues);
    let depth = usize::from(options.depth);
    let capacity_bytes = transport.get_config().map_err(connection)?.capacity.to_native() * 512;
    let span_bytes = options.span.map_or(capacity_bytes, |span| span.min(capacity_bytes));
    let memory = Memory::new(queues * depth, options.block_size as usize)?;
    // Before the rings, as QEMU does: a ring that starts may already have requests to replay.
    transport
        .map_mem_region(memory.address(), memory.length(), memory.fd(), 0)
        .map_err(connection)?;
    let rings = VirtioBlkQueue::setup_queues(&mut *transport, queues, options.ring_size())
        .map_err(connection)?;

    let blocks = span_bytes / options.block_size;
    let load = load(options);
    let mut lanes = Vec::with_capacity(queues);
    for (index, ring) in rings.into_iter().enumerate() {
        let number = index as u64;
        let own = lane_blocks(options, blocks, number)
            .filter(|own| !options.verify || own.count() > depth as u64)
            .ok_or(SetupError::TooSmall { bytes: span_bytes })?;
        let random = Random::new(options.seed.wrapping_mul(0x1_0000_01b3).wrapping_add(number));
        let notifier = transport.get_submission_notifier(index);
        let call = transport.get_completion_fd(index);
        let flags = fcntl_getfl(&call).map_err(io::Error::from)?;
        fcntl_setfl(&call, flags - OFlags::NONBLOCK).map_err(io::Error::from)?;
        let first = index * depth;
        lanes.push(Lane::new(ring, notifier, call, load, &memory, first, own, random));
    }
    Ok(Device { lanes, transport, _memory: memory, capacity_bytes, span_bytes })
}

fn load(options: &Options) -> Load {
    let nonce = || {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Random::new(clock.as_nanos() as u64 ^ u64::from(std::process::id())).next_u64()
    };
    Load {
        mode: options.mode,
        read_percent: options.read_percent,
        block_size: options.block_size as usize,
        depth: usize::from(options.depth),
        flush_every: options.flush_every,
        nonce: options.verify.then(nonce),
        budget: options.count.map(|count| count.div_ceil(u64::from(options.queues))),
        interval_ns: options.rate.map(|rate| 1e9 * f64::from(options.queues) / rate),
        series_ns: options.series.map(|ms| ms * 1_000_000),
    }
}

fn lane_blocks(options: &Options, blocks: u64, lane: u64) -> Option<Blocks> {
    let lanes = u64::from(options.queues);
    let order = match options.mode {
        Mode::Read | Mode::Write => Order::Sequential,
        Mode::Randread | Mode::Randwrite | Mode::Mixed => Order::Random,
    };
    if options.verify {
        return Blocks::new(blocks, lane, lanes, order);
    }
    let all = Blocks::new(blocks, options.first, options.stride, order)?;
    let start = all.count() / lanes * lane;
    Some(all.starting_at(start))
}

/// Starts the workers, moves them through the phases, and gathers what they counted.
fn drive(
    options: &Options,
    mut device: Device,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
) -> Outcome {
    let control = Control::default();
    let calls: Vec<_> = device.lanes.iter().map(|lane| Arc::clone(&lane.call)).collect();
    let queues = device.lanes.len();
    let threads = options.threads.map_or(queues, usize::from).min(queues);
    let share = queues.div_ceil(threads);
    let waiting = if options.poll {
        Waiting::Spin
    } else {
        Waiting::Sleep(Duration::from_micros(options.poll_us))
    };
    let mut watch = Watch::new(options, &control, calls, inbox, queues.div_ceil(share));
    let interval = thread::scope(|scope| {
        for lanes in device.lanes.chunks_mut(share) {
            let (control, events) = (&control, events.clone());
            scope.spawn(move || {
                let drained = events.clone();
                let outcome = worker::run(lanes, control, waiting, move || {
                    let _ = drained.send(Event::Drained);
                });
                let _ = events.send(match outcome {
                    Ok(()) => Event::Ended,
                    Err(error) => Event::Failed(error.to_string()),
                });
            });
        }
        watch.phases()
    });
    let mut tally = Tally::default();
    device.lanes.iter().for_each(|lane| tally.merge(&lane.tally));
    let hung = device.lanes.iter().map(Lane::in_flight).sum();
    let outcome = Outcome {
        tally,
        started_ns: control.started_ns,
        measured: interval.length,
        own: interval.own,
        backend: interval.backend,
        capacity_bytes: device.capacity_bytes,
        span_bytes: device.span_bytes,
        ring_size: options.ring_size(),
        inflight: watch.inflight,
        outages: watch.outages,
        lost: watch.lost,
        hung,
    };
    drop(device.lanes);
    drop(device.transport);
    outcome
}
