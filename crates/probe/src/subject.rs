//! What the commands act on: the probe without its link and its loop.

use std::io;

use serde_json::{Value, json};

use crate::clock::now_ns;
use crate::heartbeat::Heartbeat;
use crate::jobs::Jobs;
use crate::kmsg::{KernelLog, Tally};
use crate::runs::Runs;
use crate::wakeup::Wakeup;

/// Where the probe runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// PID 1 of a guest: everything is allowed.
    Guest,
    /// A process on a host, for tests: the machine itself is left alone.
    Host,
}

/// Everything that the commands act on.
pub struct Probe {
    /// Where the probe runs.
    pub role: Role,
    /// Drawn at boot.
    pub nonce: u128,
    /// The writers.
    pub runs: Runs,
    /// The kernel's log, where it may be read.
    pub kernel_log: Option<KernelLog>,
    /// The beat.
    pub heartbeat: Heartbeat,
    /// Work that may block.
    pub jobs: Jobs,
}

impl Probe {
    /// With no run yet.
    pub fn new(role: Role, nonce: u128, jobs: Jobs, wakeup: &Wakeup) -> io::Result<Self> {
        let tally = Tally::default();
        Ok(Self {
            role,
            nonce,
            runs: Runs::new(nonce, wakeup.clone(), tally.clone()),
            kernel_log: KernelLog::open(tally).ok(),
            heartbeat: Heartbeat::new()?,
            jobs,
        })
    }

    /// What the probe says of itself.
    pub fn hello(&self) -> Value {
        json!({
            "nonce": format!("{:032x}", self.nonce),
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": rustix::system::uname().release().to_string_lossy(),
            "monotonic_ns": now_ns(),
        })
    }

    /// Looks after the stops that wait.
    pub fn tend(&mut self) {
        self.runs.tend(&self.jobs);
    }
}
