//! What the control socket tells, as JSON. `crates/control/golden` has an example of each, against
//! which the program and its readers are tested.
//!
//! **Version rule.** A key may be added. To remove one, or to change its type or its meaning, is a
//! new version of the program's interface, and has to be borne by every reader first.

use std::fmt;

use serde::Serialize;

/// `status`, of either end. What an end does not know is 0, empty, or none.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    pub version: &'static str,
    pub pid: u32,
    /// "source" or "destination".
    pub end: &'static str,
    /// The name of a [`crate::progress::Phase`].
    pub state: &'static str,
    /// Since the process began.
    pub seconds: f64,
    /// Where a destination listens, with its port; none before, and at a source.
    pub address: Option<String>,
    /// The program at the other end; empty before it was heard of.
    pub peer: String,
    pub indexed_blocks: u64,
    pub stream_bytes: u64,
    pub wire_bytes_sent: u64,
    pub wire_bytes_received: u64,
    /// Of the stream, under way.
    pub backlog_bytes: u64,
    /// What the link carries of the stream, in bytes per second; none before it is known.
    pub switchover_bandwidth: Option<u64>,
    pub zero_pages: u64,
    pub pages: u64,
    /// Pages sent as references to blocks.
    pub references: u64,
    pub mismatches: u64,
    pub repaired: u64,
    /// Of the stream, neither pages nor their headers.
    pub other_bytes: u64,
    /// Why the source understands the stream no more, and passes it through as it is.
    pub passes_through: Option<&'static str>,
    /// Why the end has failed.
    pub error: Option<String>,
    /// What this process can still ask of the kernel.
    pub walls: semper_walls::Standing,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        serde_json::to_string(self).map_err(|_| fmt::Error)?.fmt(f)
    }
}
