//! What the control socket answers; see `semper_control` for how.
//!
//! ```text
//!   {"id":1,"cmd":"status"}              -> {"id":1,"ok":{…}}
//!   {"id":3,"cmd":"threads","map":[0,1]} -> {"id":3,"ok":{"map":[0,1]}}   queue 1 to thread 1
//!   {"id":4,"cmd":"map"}                 -> {"id":4,"ok":{…}}      the page/block map; see block_map
//!   {"id":5,"cmd":"map-verify"}          -> {"id":5,"ok":{"started":true}}   progress is in "map"
//!   {"id":6,"cmd":"map-find","sector":8} -> {"id":6,"ok":{"addresses":[…]}}  or "address" -> sector
//!   {"id":7,"cmd":"map-export","verify":true} -> {"id":7,"ok":{"bytes":N}}   and N bytes of it
//!   {"id":7,"cmd":"map-blocks"}          -> {"id":7,"ok":{"bytes":N,"capacity":C,"held":H}}   and N
//!                                           bytes: of each touched block its number and its stamp,
//!                                           u64 each; the first H stand in a page; "limit": blocks
//!   {"id":7,"cmd":"map-touch","runs":[[8,2]]} -> {"id":7,"ok":{}}   blocks 8 and 9 were used, on
//!                                           another host
//!   {"id":8,"cmd":"handover","armed":true} -> {"id":8,"ok":{"armed":true,"owns_image":…}}
//!                                           give the image away as soon as no queue runs; or
//!                                           take back what was given away; in between queues wait
//!   {"id":9,"cmd":"claim","epoch":7,"claim":"32 digits"} -> {"id":9,"ok":{"claim":{…}}}
//!                                           what --await-claim waits for; starts queues that wait
//!   {"id":10,"cmd":"resize","size_bytes":N} -> {"id":10,"ok":{"size_bytes":N,"told":true}}
//!                                           makes the image larger, serves it, tells the front end
//!   {"id":2,"cmd":"fault","rule":{…}}    -> {"id":2,"ok":{}}      in builds for tests alone (feature
//!                                           faults); rule null switches faults off
//!   {"id":11,"cmd":"snapshot"}, "layers", "merge", "pin", "unpin", "undo", "quiesce", "resume"
//!                                           docs/design/snapshots.md has their requests and answers
//!   anything else                        -> {"id":…,"error":{"kind":"invalid","message":"…"}}
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use semper_control::Answer;
use semper_epoch::{Claim, Holder, Id};
use semper_layers::record::{Pin, State};
use semper_walls::Standing;
use serde::Deserialize;
use serde_json::Value;

use crate::answers::{
    self, Claimed, Counters, HandOver, MapBlocks, MapExport, Nothing, Resized, Status,
    VerifyStarted,
};
use crate::block_map;
use crate::device::Device;
#[cfg(feature = "faults")]
use crate::faults::{Faults, Rule};
use crate::layer_answers;
use crate::postcopy::Stage;
use crate::queue::Disk;
use crate::resize::NotResized;
use crate::session::Session;
use crate::snapshots::{LONGEST_QUIET, NotDone};
use crate::state::{QueueCounters, Timeline};
use crate::threads::ThreadMap;

/// The kind of a refusal that the same request will always get.
const INVALID: &str = "invalid";

/// Kind and message.
type Refusal = (&'static str, String);

/// What the control socket shows and switches.
pub(crate) struct Control {
    pub disk: Arc<Disk>,
    pub device: Arc<Mutex<Device>>,
    #[cfg(feature = "faults")]
    pub faults: Faults,
    pub engine: &'static str,
    pub session: Arc<Session>,
    pub walls: Standing,
}

#[derive(Deserialize)]
struct Request {
    #[serde(default)]
    id: Value,
    cmd: String,
    #[cfg(feature = "faults")]
    #[serde(default)]
    rule: Option<Rule>,
    #[serde(default)]
    armed: Option<bool>,
    #[serde(default)]
    epoch: Option<u64>,
    #[serde(default)]
    claim: Option<String>,
    #[serde(default)]
    map: Option<Vec<u16>>,
    #[serde(default)]
    size_bytes: Option<u64>,
    #[serde(flatten)]
    about: MapRequest,
    #[serde(flatten)]
    layers: LayersRequest,
}

/// What the commands of snapshots take.
#[derive(Deserialize)]
struct LayersRequest {
    snapshot: Option<u64>,
    reader: Option<String>,
    frozen: Option<bool>,
    wait: Option<bool>,
    through: Option<u64>,
    rate_bytes: Option<u64>,
    for_ms: Option<u64>,
    within_ms: Option<u64>,
}

/// What the commands of the page/block map take.
#[derive(Deserialize)]
struct MapRequest {
    address: Option<u64>,
    sector: Option<u64>,
    verify: Option<bool>,
    /// Bytes that the content index may take.
    index_bytes: Option<u64>,
    /// Blocks that may be named.
    limit: Option<u64>,
    /// First block and number, of each run.
    #[serde(default)]
    runs: Vec<(u64, u64)>,
}

impl Control {
    /// Answers one line.
    pub(crate) fn answer(&self, line: &str) -> Answer {
        let request: Request = match serde_json::from_str(line) {
            Ok(request) => request,
            Err(error) => {
                return Answer::refused(&Value::Null, INVALID, format!("not a request: {error}"));
            }
        };
        if request.cmd.starts_with("map") {
            return self.about_map(&request);
        }
        let id = request.id.clone();
        if let Some(answered) = self.about_layers(&request) {
            return answered
                .unwrap_or_else(|not| Answer::refused(&id, not.kind(), not.to_string()));
        }
        match self.carry_out(request) {
            Ok(answer) => answer,
            Err((kind, message)) => Answer::refused(&id, kind, message),
        }
    }

    fn carry_out(&self, request: Request) -> Result<Answer, Refusal> {
        let id = &request.id;
        Ok(match request.cmd.as_str() {
            "status" => Answer::ok(id, self.status()),
            #[cfg(feature = "faults")]
            "fault" => {
                self.faults.set(request.rule).map_err(|message| (INVALID, message))?;
                Answer::ok(id, Nothing {})
            }
            "handover" => {
                let armed = request.armed;
                let armed =
                    armed.ok_or((INVALID, "say whether it is armed: true or false".into()))?;
                let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
                device.set_hand_over(armed).map_err(|error| ("busy", error.to_string()))?;
                drop(device);
                Answer::ok(id, HandOver { armed, owns_image: self.disk.tenure.is_held() })
            }
            "claim" => {
                self.claim(request.epoch, request.claim.as_deref())?;
                Answer::ok(id, Claimed { claim: self.disk.tenure.claim() })
            }
            "resize" => {
                let size_bytes = request
                    .size_bytes
                    .ok_or((INVALID, "say how many bytes: \"size_bytes\"".to_owned()))?;
                let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
                let told = device.resize(size_bytes).map_err(|error| match error {
                    NotResized::NotHeld | NotResized::Served(_) => ("busy", error.to_string()),
                    NotResized::ReadOnly | NotResized::Layered | NotResized::Grow(_) => {
                        (INVALID, error.to_string())
                    }
                })?;
                drop(device);
                Answer::ok(id, Resized { size_bytes: self.disk.image.capacity(), told })
            }
            "threads" => {
                let map = self.rebind(request.map)?;
                Answer::ok(id, answers::Threads { map: map.as_slice() })
            }
            other => {
                let known = "\"status\", \"threads\", \"map\", \"map-verify\", \"map-find\", \
                             \"map-export\", \"map-blocks\", \"map-touch\", \"handover\", \
                             \"claim\", \"resize\", \"snapshot\", \"layers\", \"merge\", \"pin\", \
                             \"unpin\", \"undo\", \"quiesce\" and \"resume\"";
                return Err((INVALID, format!("unknown command {other:?}; known are {known}")));
            }
        })
    }

    /// `None`: the command is none of snapshots.
    fn about_layers(&self, request: &Request) -> Option<Result<Answer, NotDone>> {
        let (id, asked, layers) = (&request.id, &request.layers, &self.disk.snapshots);
        Some(match request.cmd.as_str() {
            "snapshot" => self.snapshot(asked).map(|taken| Answer::ok(id, taken)),
            "layers" => Ok(Answer::ok(id, layers.status())),
            "merge" => layers
                .merge(asked.through, asked.rate_bytes)
                .map(|merging| Answer::ok(id, layer_answers::Merging { merging })),
            "pin" | "unpin" => {
                let there = request.cmd == "pin";
                let pins = pin_of(asked).and_then(|pin| layers.set_pin(pin, there));
                pins.map(|pins| Answer::ok(id, layer_answers::Pins { pins }))
            }
            "undo" => self.undo(asked.snapshot).map(|undone| Answer::ok(id, undone)),
            "quiesce" => self.quiesce(asked.for_ms).map(|quiesced| Answer::ok(id, quiesced)),
            "resume" => {
                let held = self.device().resume(None);
                Ok(Answer::ok(id, layer_answers::Resumed { held }))
            }
            _ => return None,
        })
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot(&self, asked: &LayersRequest) -> Result<layer_answers::Snapshot, NotDone> {
        let layers = &self.disk.snapshots;
        let patience = time_of("within_ms", asked.within_ms.or(Some(LONGEST_MS)))?;
        let frozen = asked.frozen.unwrap_or(false);
        let (snapshot, pause) = layers.snapshot(&self.device, frozen, patience)?;
        let waits = asked.wait.unwrap_or(false);
        if waits {
            layers.wait_sealed(snapshot)?;
        }
        let state = if waits { State::Sealed } else { State::Opened }.name();
        Ok(layer_answers::Snapshot { snapshot, state, pause_us: pause.as_micros() as u64 })
    }

    fn quiesce(&self, for_ms: Option<u64>) -> Result<layer_answers::Quiesced, NotDone> {
        let time = time_of("for_ms", for_ms)?;
        let (for_ms, end) = (time.as_millis() as u64, Instant::now() + time);
        self.device().quiesce(end)?;
        let device = Arc::clone(&self.device);
        let wake = move || {
            thread::sleep(end.saturating_duration_since(Instant::now()));
            if device.lock().unwrap_or_else(PoisonError::into_inner).resume(Some(end)) {
                log::warn!("nobody has let the queues run again, so they do for_ms={for_ms}");
            }
        };
        if let Err(error) = thread::Builder::new().name("quiet".into()).spawn(wake) {
            self.device().resume(Some(end));
            return Err(NotDone::Busy(format!("nobody could wake the queues again: {error}")));
        }
        Ok(layer_answers::Quiesced { quiesced: true, for_ms })
    }

    fn undo(&self, snapshot: Option<u64>) -> Result<layer_answers::Undone, NotDone> {
        let snapshot = snapshot.ok_or_else(|| NotDone::Invalid("name the snapshot".to_owned()))?;
        let taken_back = self.disk.snapshots.undo(&self.device, snapshot)?;
        Ok(layer_answers::Undone { taken_back })
    }

    fn about_map(&self, request: &Request) -> Answer {
        let refuse = |kind: &str, message: String| Answer::refused(&request.id, kind, message);
        let id = &request.id;
        let Some(map) = &self.disk.map else {
            let cause = "this backend has no map: it was started with --no-map, or the disk is too \
                         large for one (its log says so)";
            return refuse(INVALID, cause.to_owned());
        };
        let &MapRequest { address, sector, verify, index_bytes, limit, ref runs } = &request.about;
        let index_bytes = index_bytes.unwrap_or(block_map::DEFAULT_INDEX_BYTES);
        let looks = match request.cmd.as_str() {
            "map-verify" => true,
            "map-export" => verify.unwrap_or(true),
            _ => false,
        };
        if looks && self.disk.shared.arrival().is_going_on() {
            let cause = "the guest's memory is still arriving; try again after the migration";
            return refuse("busy", cause.to_owned());
        }
        match request.cmd.as_str() {
            "map" => Answer::ok(id, map.stats()),
            "map-find" => match map.find(address, sector) {
                Ok(found) => Answer::ok(id, found),
                Err(message) => refuse(INVALID, message),
            },
            "map-verify" => match map.start_verification(index_bytes) {
                Ok(started) => Answer::ok(id, VerifyStarted { started }),
                Err(error) => refuse("failed", format!("cannot start a thread: {error}")),
            },
            "map-export" => match map.export(verify.unwrap_or(true), index_bytes) {
                Ok(bytes) => Answer::ok(id, MapExport { bytes: bytes.len() }).followed_by(bytes),
                Err(message) => refuse("busy", message),
            },
            "map-blocks" => {
                let (bytes, held) = map.blocks(limit);
                let capacity = self.disk.image.capacity();
                let told = MapBlocks { bytes: bytes.len(), capacity, held };
                Answer::ok(id, told).followed_by(bytes)
            }
            "map-touch" => {
                map.touch(runs);
                Answer::ok(id, Nothing {})
            }
            other => refuse(INVALID, format!("unknown command {other:?} of the map")),
        }
    }

    fn rebind(&self, map: Option<Vec<u16>>) -> Result<ThreadMap, Refusal> {
        let map = map.ok_or_else(|| "no map was given; name a thread for each queue".to_owned());
        let queues = self.disk.shared.queues.len();
        let map = map.and_then(|map| ThreadMap::new(map, queues)).map_err(|m| (INVALID, m))?;
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.rebind(&map).map_err(|error| ("failed", error.to_string()))?;
        log::info!("queues moved to other threads map={:?}", map.as_slice());
        Ok(map)
    }

    fn claim(&self, epoch: Option<u64>, id: Option<&str>) -> Result<(), Refusal> {
        let epoch = epoch.filter(|&epoch| epoch > 0);
        let claim = epoch.zip(id.and_then(Id::from_hex)).map(|(epoch, id)| Claim { epoch, id });
        let claim = claim.ok_or_else(|| {
            (INVALID, "name the epoch, from 1, and the claim, 32 hexadecimal digits".to_owned())
        })?;
        self.disk.tenure.give_claim(claim).map_err(|message| (INVALID, message))?;
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.start_waiting().map_err(|error| ("in-use", error.to_string()))
    }

    fn status(&self) -> Status {
        let Disk { image, serial, shared, map, poll, tenure, .. } = &*self.disk;
        let whole = shared.arrival() == Stage::Complete;
        let counters = shared.queues.iter().enumerate();
        let queues: Vec<_> = counters.map(|(index, each)| queue(index, each, whole)).collect();
        let threads = queues.iter().map(|queue| queue.thread).max().map_or(0, |n| n + 1);
        let replayed = queues.iter().map(|queue| queue.replayed).sum();
        let write_through = shared.write_through.load(Ordering::Relaxed);
        Status {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            state: shared.phase().name(),
            engine: self.engine,
            direct: image.direct(),
            owns_image: tenure.is_held(),
            standing: tenure.standing().name(),
            session: self.session.name(),
            resumed: shared.resumed.load(Ordering::Relaxed),
            claim: tenure.claim(),
            memory: shared.arrival().name(),
            read_only: image.read_only(),
            image: image.path().to_string_lossy().into_owned(),
            size_bytes: image.capacity(),
            block_size: image.block_size(),
            serial: String::from_utf8_lossy(serial).trim_end_matches('\0').to_owned(),
            num_queues: queues.len(),
            threads,
            poll_us: poll.as_micros() as u64,
            map: map.as_ref().map(|map| map.counts()),
            inflight: shared.tracked.load(Ordering::Relaxed),
            write_cache: if write_through { "write-through" } else { "write-back" },
            flush_failed: shared.flushes.has_failed(),
            walls: self.walls.clone(),
            timeline_ns: timeline(&shared.timeline),
            queues,
            counters: Counters {
                connections: get(&shared.connections),
                replayed,
                protocol_errors: get(&shared.protocol_errors),
                guest_errors: get(&shared.guest_errors),
                host_errors: get(&shared.host_errors),
            },
            last_error: shared.last_error(),
        }
    }
}

const LONGEST_MS: u64 = LONGEST_QUIET.as_millis() as u64;

fn time_of(name: &str, ms: Option<u64>) -> Result<Duration, NotDone> {
    let ms = ms.filter(|ms| (1..=LONGEST_MS).contains(ms)).ok_or_else(|| {
        NotDone::Invalid(format!("say how many milliseconds: \"{name}\", 1 to {LONGEST_MS}"))
    })?;
    Ok(Duration::from_millis(ms))
}

fn pin_of(asked: &LayersRequest) -> Result<Pin, NotDone> {
    let reader = asked.reader.as_deref().and_then(Holder::new);
    let pin = asked.snapshot.zip(reader).map(|(snapshot, reader)| Pin { snapshot, reader });
    let how = "name the snapshot, and its reader (1 to 40 bytes)";
    pin.ok_or_else(|| NotDone::Invalid(how.to_owned()))
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// `whole`: all of the guest's memory is there, so that a look at the rings waits for nothing.
fn queue(index: usize, queue: &QueueCounters, whole: bool) -> answers::Queue {
    answers::Queue {
        index,
        size: get(&queue.size),
        enabled: queue.running.load(Ordering::Relaxed),
        thread: get(&queue.thread),
        reads: get(&queue.reads),
        writes: get(&queue.writes),
        flushes: get(&queue.flushes),
        discards: get(&queue.discards),
        errors: get(&queue.errors),
        bytes_read: get(&queue.bytes_read),
        bytes_written: get(&queue.bytes_written),
        in_flight: get(&queue.in_flight),
        waiting: if whole { queue.waiting() } else { 0 },
        completed: get(&queue.completed),
        replayed: get(&queue.replayed),
        kicks: get(&queue.wakeups),
        polls: get(&queue.polls),
        calls: get(&queue.calls),
        latency: answers::Latency {
            sum_ns: queue.latency.0.sum(),
            octaves: queue.latency.0.octaves(),
        },
    }
}

fn timeline(timeline: &Timeline) -> answers::Timeline {
    let when = |milestone: &AtomicU64| Some(get(milestone)).filter(|&ns| ns != 0);
    answers::Timeline {
        process_start: when(&timeline.process_start),
        spare_ready: when(&timeline.spare_ready),
        lock_acquired: when(&timeline.lock_acquired),
        accepted: when(&timeline.accepted),
        started: when(&timeline.started),
        replayed: when(&timeline.replayed),
        first_completion: when(&timeline.first_completion),
    }
}
