//! What the control socket tells, as JSON. `crates/control/golden` has an example of each, against
//! which the programs and their readers are tested.
//!
//! **Version rule.** A key may be added. To remove one, or to change its type or its meaning, is a
//! new version of the program's interface, and has to be borne by every reader first.

pub(crate) use semper_title::Status as Claim;
use serde::Serialize;

use crate::state::LastError;

/// `status`.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    pub version: &'static str,
    pub pid: u32,
    /// The name of a [`crate::state::Phase`].
    pub state: &'static str,
    pub engine: &'static str,
    pub direct: bool,
    /// The image is locked, and may be written.
    pub owns_image: bool,
    /// The name of a [`crate::tenure::Standing`].
    pub standing: &'static str,
    /// "off", "alone" or "followed" when it serves, "seeking" or "following" in a spare.
    pub session: &'static str,
    /// It took over the front end's connection from the process before.
    pub resumed: bool,
    pub claim: Claim,
    /// How far the guest's memory has come: the name of a [`crate::postcopy::Stage`].
    pub memory: &'static str,
    pub read_only: bool,
    pub image: String,
    pub size_bytes: u64,
    pub block_size: u32,
    pub serial: String,
    pub num_queues: usize,
    pub threads: u64,
    pub poll_us: u64,
    /// None without a page/block map.
    pub map: Option<MapCounts>,
    /// Requests in flight are tracked.
    pub inflight: bool,
    /// "write-through" or "write-back".
    pub write_cache: &'static str,
    /// A flush has failed, and so does every one from then on.
    pub flush_failed: bool,
    /// What this process can still ask of the kernel.
    pub walls: semper_walls::Standing,
    pub timeline_ns: Timeline,
    pub queues: Vec<Queue>,
    pub counters: Counters,
    pub last_error: Option<LastError>,
}

/// Milestones, as CLOCK_MONOTONIC in ns; none that were not reached.
#[derive(Debug, Serialize)]
pub(crate) struct Timeline {
    pub process_start: Option<u64>,
    pub spare_ready: Option<u64>,
    pub lock_acquired: Option<u64>,
    pub accepted: Option<u64>,
    pub started: Option<u64>,
    pub replayed: Option<u64>,
    pub first_completion: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Queue {
    pub index: usize,
    pub size: u64,
    /// It runs.
    pub enabled: bool,
    pub thread: u64,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub errors: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub in_flight: u64,
    /// Made available by the driver, and not taken yet.
    pub waiting: u64,
    /// Given back, with whatever status.
    pub completed: u64,
    pub replayed: u64,
    /// Sleeps that ended.
    pub kicks: u64,
    /// Requests found by looking before a sleep.
    pub polls: u64,
    /// Interrupts given.
    pub calls: u64,
    pub latency: Latency,
}

/// How long requests took, from the turn in which they were taken until they were shown to the driver.
#[derive(Debug, Serialize)]
pub(crate) struct Latency {
    /// All of them, added up.
    pub sum_ns: u64,
    /// How many took below 2 ns, 2 to 3, 4 to 7 …, up to the last power of two that has any.
    pub octaves: Vec<u64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Counters {
    pub connections: u64,
    /// Of all queues.
    pub replayed: u64,
    pub protocol_errors: u64,
    pub guest_errors: u64,
    pub host_errors: u64,
}

/// `claim`.
#[derive(Debug, Serialize)]
pub(crate) struct Claimed {
    pub claim: Claim,
}

/// `handover`.
#[derive(Debug, Serialize)]
pub(crate) struct HandOver {
    pub armed: bool,
    pub owns_image: bool,
}

/// `resize`.
#[derive(Debug, Serialize)]
pub(crate) struct Resized {
    /// Of the disk from now on.
    pub size_bytes: u64,
    /// The front end was told; otherwise it reads the size when it connects.
    pub told: bool,
}

/// `threads`.
#[derive(Debug, Serialize)]
pub(crate) struct Threads<'a> {
    /// The thread of each queue.
    pub map: &'a [u16],
}

/// `fault`, `map-touch`: done.
#[derive(Debug, Serialize)]
pub(crate) struct Nothing {}

/// What a status says of the map.
#[derive(Debug, Serialize)]
pub(crate) struct MapCounts {
    pub recorded: u64,
    pub dropped: u64,
}

/// `map`.
#[derive(Debug, Serialize)]
pub(crate) struct Map {
    pub page_size: usize,
    /// Of the guest's memory.
    pub pages: u64,
    /// Pages of which a block is known.
    pub associated: u64,
    /// Of the disk.
    pub blocks: u64,
    /// Blocks that were ever read or written.
    pub touched: u64,
    pub recorded: u64,
    pub dropped: u64,
    pub index_blocks: u64,
    pub memory: MapMemory,
    pub running: Option<Running>,
    pub verification: Option<Verification>,
}

/// Bytes.
#[derive(Debug, Serialize)]
pub(crate) struct MapMemory {
    pub associations: u64,
    pub versions: u64,
    pub touched: u64,
    pub index: u64,
    pub total: u64,
    pub bound: u64,
}

/// A verification under way.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Running {
    /// "index" or "pages".
    pub step: &'static str,
    pub done: u64,
    pub total: u64,
}

/// The last verification.
#[derive(Debug, Serialize)]
pub(crate) struct Verification {
    /// Seconds since 1970.
    pub time: f64,
    pub seconds: f64,
    pub pages: u64,
    pub zero: u64,
    pub associated: u64,
    pub verified_associated: u64,
    pub verified_content: u64,
    pub verified_zero: u64,
    pub indexed: u64,
    pub hashed: u64,
    pub busy: u64,
    pub beyond_limit: u64,
    pub unreadable: u64,
}

/// `map-verify`.
#[derive(Debug, Serialize)]
pub(crate) struct VerifyStarted {
    /// False: one was running.
    pub started: bool,
}

/// `map-find`: of a page, or of a sector.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Found {
    Page { sector: Option<u64> },
    Sector { addresses: Vec<u64> },
}

/// `map-export`; the bytes follow.
#[derive(Debug, Serialize)]
pub(crate) struct MapExport {
    pub bytes: usize,
}

/// `map-blocks`; the bytes follow: of each block its number and its stamp.
#[derive(Debug, Serialize)]
pub(crate) struct MapBlocks {
    pub bytes: usize,
    /// Of the disk, in bytes.
    pub capacity: u64,
    /// So many of the blocks, the first ones, stand in a page.
    pub held: usize,
}

/// `--print-capabilities`, as the conventions for vhost-user programs have it.
#[derive(Debug, Serialize)]
pub(crate) struct Capabilities {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub features: &'static [&'static str],
}
