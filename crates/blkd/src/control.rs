//! The control socket: JSON lines, one request and one answer each.
//!
//! ```text
//!   {"id":1,"cmd":"status"}              -> {"id":1,"ok":{…}}
//!   {"id":2,"cmd":"fault","rule":{…}}    -> {"id":2,"ok":{}}      rule null switches faults off
//!   {"id":3,"cmd":"threads","map":[0,1]} -> {"id":3,"ok":{"map":[0,1]}}   queue 1 to thread 1
//!   {"id":4,"cmd":"map"}                 -> {"id":4,"ok":{…}}      the page/block map; see block_map
//!   {"id":5,"cmd":"map-verify"}          -> {"id":5,"ok":{"started":true}}   progress is in "map"
//!   {"id":6,"cmd":"map-find","sector":8} -> {"id":6,"ok":{"addresses":[…]}}  or "address" -> sector
//!   {"id":7,"cmd":"map-export","verify":true} -> {"id":7,"ok":{"bytes":N}}   and N bytes of it
//!   {"id":8,"cmd":"handover","armed":true} -> {"id":8,"ok":{"armed":true,"owns_image":…}}
//!                                           give the image away as soon as no queue runs
//!   {"id":9,"cmd":"claim","epoch":7,"claim":"32 digits"} -> {"id":9,"ok":{"claim":{…}}}
//!                                           what --await-claim waits for; starts queues that wait
//!   anything else                        -> {"id":…,"error":{"kind":"invalid","message":"…"}}
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use semper_block::{FaultRule, FaultSwitch};
use semper_epoch::{Claim, Id};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::block_map;
use crate::device::Device;
use crate::queue::Disk;
use crate::threads::ThreadMap;

/// Longest request line, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// What the control socket shows and switches.
pub(crate) struct Control {
    pub disk: Arc<Disk>,
    pub device: Arc<Mutex<Device>>,
    pub faults: FaultSwitch,
    pub engine: &'static str,
}

#[derive(Deserialize)]
struct Request {
    #[serde(default)]
    id: Value,
    cmd: String,
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
    #[serde(flatten)]
    about: MapRequest,
}

/// What the commands of the page/block map take.
#[derive(Deserialize)]
struct MapRequest {
    address: Option<u64>,
    sector: Option<u64>,
    verify: Option<bool>,
    /// Bytes that the content index may take.
    index_bytes: Option<u64>,
}

/// One answer: a line, and what follows it.
pub(crate) struct Answer {
    pub line: Value,
    pub bytes: Vec<u8>,
}

impl From<Value> for Answer {
    fn from(line: Value) -> Self {
        Self { line, bytes: Vec::new() }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    op: Option<String>,
    errno: Option<String>,
    #[serde(default)]
    every: u64,
    #[serde(default)]
    limit: u64,
    #[serde(default)]
    delay_ms: u64,
}

/// Serves clients until the process ends, each in a thread of its own.
///
/// # Errors
/// The system's, when it has no thread left.
pub(crate) fn spawn(listener: UnixListener, control: Control) -> io::Result<()> {
    let control = Arc::new(control);
    let accept = move || {
        for client in listener.incoming() {
            let Ok(client) = client else {
                // Out of descriptors, most likely: try again when some may be free.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            let control = Arc::clone(&control);
            let serve = move || control.serve(&client);
            if let Err(error) = std::thread::Builder::new().name("control".into()).spawn(serve) {
                log::warn!("cannot serve a control client error=\"{error}\"");
            }
        }
    };
    std::thread::Builder::new().name("control".into()).spawn(accept).map(drop)
}

impl Control {
    fn serve(&self, client: &UnixStream) {
        let mut reader = BufReader::new(client);
        let mut line = String::new();
        loop {
            line.clear();
            match reader.by_ref().take(MAX_LINE).read_line(&mut line) {
                Ok(n) if n > 0 => {}
                _ => return,
            }
            let answer = self.answer(&line);
            let mut text = answer.line.to_string();
            text.push('\n');
            let mut out = client;
            let sent = out.write_all(text.as_bytes()).and_then(|()| out.write_all(&answer.bytes));
            if !line.ends_with('\n') || sent.is_err() {
                return;
            }
        }
    }

    pub(crate) fn answer(&self, line: &str) -> Answer {
        let invalid = |id: Value, message: String| json!({"id": id, "error": {"kind": "invalid", "message": message}});
        let request: Request = match serde_json::from_str(line) {
            Ok(request) => request,
            Err(error) => return invalid(Value::Null, format!("not a request: {error}")).into(),
        };
        if request.cmd.starts_with("map") {
            return self.about_map(&request);
        }
        let answer = match request.cmd.as_str() {
            "status" => json!({"id": request.id, "ok": self.status()}),
            "fault" => match request.rule.map(fault_rule).transpose() {
                Ok(rule) => {
                    log::warn!("fault injection rule={rule:?}");
                    self.faults.set(rule);
                    json!({"id": request.id, "ok": {}})
                }
                Err(message) => invalid(request.id, message),
            },
            "handover" => match request.armed {
                Some(armed) => {
                    self.device.lock().unwrap_or_else(PoisonError::into_inner).set_hand_over(armed);
                    json!({"id": request.id, "ok": {"armed": armed, "owns_image": self.owns_image()}})
                }
                None => invalid(request.id, "say whether it is armed: true or false".to_owned()),
            },
            "claim" => match self.claim(request.epoch, request.claim.as_deref()) {
                Ok(()) => json!({"id": request.id, "ok": {"claim": self.disk.title.status()}}),
                Err((kind, message)) => {
                    json!({"id": request.id, "error": {"kind": kind, "message": message}})
                }
            },
            "threads" => match self.rebind(request.map) {
                Ok(map) => json!({"id": request.id, "ok": {"map": map.as_slice()}}),
                Err((kind, message)) => {
                    json!({"id": request.id, "error": {"kind": kind, "message": message}})
                }
            },
            other => invalid(
                request.id,
                format!(
                    "unknown command {other:?}; known are \"status\", \"fault\", \"threads\", \
                     \"map\", \"map-verify\", \"map-find\", \"map-export\", \"handover\" and \
                     \"claim\""
                ),
            ),
        };
        answer.into()
    }

    fn about_map(&self, request: &Request) -> Answer {
        let refuse = |kind: &str, message: String| {
            json!({"id": request.id, "error": {"kind": kind, "message": message}}).into()
        };
        let ok = |ok: Value| json!({"id": request.id, "ok": ok}).into();
        let Some(map) = &self.disk.map else {
            let cause = "this backend was started with --no-map; start it without";
            return refuse("invalid", cause.to_owned());
        };
        let MapRequest { address, sector, verify, index_bytes } = request.about;
        let index_bytes = index_bytes.unwrap_or(block_map::DEFAULT_INDEX_BYTES);
        match request.cmd.as_str() {
            "map" => ok(map.stats()),
            "map-find" => match map.find(address, sector) {
                Ok(found) => ok(found),
                Err(message) => refuse("invalid", message),
            },
            "map-verify" => match map.start_verification(index_bytes) {
                Ok(started) => ok(json!({"started": started})),
                Err(error) => refuse("failed", format!("cannot start a thread: {error}")),
            },
            "map-export" => match map.export(verify.unwrap_or(true), index_bytes) {
                Ok(bytes) => {
                    let line = json!({"id": request.id, "ok": {"bytes": bytes.len()}});
                    Answer { line, bytes }
                }
                Err(message) => refuse("busy", message),
            },
            other => refuse("invalid", format!("unknown command {other:?} of the map")),
        }
    }

    fn rebind(&self, map: Option<Vec<u16>>) -> Result<ThreadMap, (&'static str, String)> {
        let map = map.ok_or_else(|| "no map was given; name a thread for each queue".to_owned());
        let queues = self.disk.shared.queues.len();
        let map = map.and_then(|map| ThreadMap::new(map, queues)).map_err(|m| ("invalid", m))?;
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.rebind(&map).map_err(|error| ("failed", error.to_string()))?;
        log::info!("queues moved to other threads map={:?}", map.as_slice());
        Ok(map)
    }

    fn claim(&self, epoch: Option<u64>, id: Option<&str>) -> Result<(), (&'static str, String)> {
        let epoch = epoch.filter(|&epoch| epoch > 0);
        let claim = epoch.zip(id.and_then(Id::from_hex)).map(|(epoch, id)| Claim { epoch, id });
        let claim = claim.ok_or_else(|| {
            ("invalid", "name the epoch, from 1, and the claim, 32 hexadecimal digits".to_owned())
        })?;
        self.disk.title.give(claim).map_err(|message| ("invalid", message))?;
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.start_waiting().map_err(|error| ("in-use", error.to_string()))
    }

    fn owns_image(&self) -> bool {
        self.disk.shared.owns_image.load(Ordering::Relaxed)
    }

    fn status(&self) -> Value {
        let Disk { image, serial, shared, map, poll, title } = &*self.disk;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let when = |milestone: &AtomicU64| match get(milestone) {
            0 => Value::Null,
            ns => json!(ns),
        };
        let timeline = &shared.timeline;
        let queues: Vec<Value> = shared
            .queues
            .iter()
            .enumerate()
            .map(|(index, queue)| {
                json!({
                    "index": index,
                    "size": get(&queue.size),
                    "enabled": queue.running.load(Ordering::Relaxed),
                    "thread": get(&queue.thread),
                    "reads": get(&queue.reads),
                    "writes": get(&queue.writes),
                    "flushes": get(&queue.flushes),
                    "discards": get(&queue.discards),
                    "errors": get(&queue.errors),
                    "bytes_read": get(&queue.bytes_read),
                    "bytes_written": get(&queue.bytes_written),
                    "in_flight": get(&queue.in_flight),
                    "replayed": get(&queue.replayed),
                    "kicks": get(&queue.wakeups),
                    "polls": get(&queue.polls),
                    "calls": get(&queue.calls),
                })
            })
            .collect();
        let threads =
            shared.queues.iter().map(|queue| get(&queue.thread)).max().map_or(0, |n| n + 1);
        let replayed: u64 = shared.queues.iter().map(|queue| get(&queue.replayed)).sum();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "state": shared.phase().name(),
            "engine": self.engine,
            "direct": image.direct(),
            "owns_image": self.owns_image(),
            "claim": title.status(),
            "read_only": image.read_only(),
            "image": image.path().to_string_lossy(),
            "size_bytes": image.capacity(),
            "block_size": image.block_size(),
            "serial": String::from_utf8_lossy(serial).trim_end_matches('\0'),
            "num_queues": shared.queues.len(),
            "threads": threads,
            "poll_us": poll.as_micros(),
            "map": map.as_ref().map(|map| map.counts()),
            "inflight": shared.tracked.load(Ordering::Relaxed),
            "write_cache": if shared.write_through.load(Ordering::Relaxed) {
                "write-through"
            } else {
                "write-back"
            },
            "timeline_ns": {
                "process_start": when(&timeline.process_start),
                "standby_ready": when(&timeline.standby_ready),
                "lock_acquired": when(&timeline.lock_acquired),
                "accepted": when(&timeline.accepted),
                "started": when(&timeline.started),
                "replayed": when(&timeline.replayed),
                "first_completion": when(&timeline.first_completion),
            },
            "queues": queues,
            "counters": {
                "connections": get(&shared.connections),
                "replayed": replayed,
                "protocol_errors": get(&shared.protocol_errors),
                "guest_errors": get(&shared.guest_errors),
                "host_errors": get(&shared.host_errors),
            },
            "last_error": shared.last_error(),
        })
    }
}

fn fault_rule(rule: Rule) -> Result<FaultRule, String> {
    const OPS: [&str; 6] = ["any", "read", "write", "flush", "discard", "write-zeroes"];
    if let Some(op) = &rule.op
        && !OPS.contains(&op.as_str())
    {
        return Err(format!("unknown operation {op:?}; known are {OPS:?}"));
    }
    let errno = match rule.errno.as_deref() {
        None => None,
        Some("EIO") => Some(libc::EIO),
        Some("ENOSPC") => Some(libc::ENOSPC),
        Some("EDQUOT") => Some(libc::EDQUOT),
        Some("EROFS") => Some(libc::EROFS),
        Some("ETIMEDOUT") => Some(libc::ETIMEDOUT),
        Some(other) => {
            return Err(format!(
                "unknown errno {other:?}; known are EIO, ENOSPC, EDQUOT, EROFS, ETIMEDOUT"
            ));
        }
    };
    Ok(FaultRule {
        op: rule.op.filter(|op| op != "any"),
        errno,
        every: rule.every,
        limit: rule.limit,
        delay: Duration::from_millis(rule.delay_ms),
    })
}
