//! The runs of the writers, one for each device, and the commands about them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::clock::now_ns;
use crate::config::Config;
use crate::device::Device;
use crate::jobs::{Asker, Jobs};
use crate::kmsg::Tally;
use crate::protocol::{Answer, Failure};
use crate::shared::{LaneState, Shared};
use crate::timeline::BIN_NS;
use crate::verify::{Report, verify};
use crate::wakeup::Wakeup;
use crate::writers::Run;

/// A `write_stop` that waits for its lanes.
struct Stopping {
    device: String,
    asker: Asker,
    deadline_ns: u64,
    verify: Option<Duration>,
}

/// All runs.
pub struct Runs {
    nonce: u128,
    wakeup: Wakeup,
    tally: Tally,
    runs: BTreeMap<String, Run>,
    newest: Option<String>,
    ledgers: u32,
    stopping: Vec<Stopping>,
}

fn json_of(value: impl serde::Serialize) -> Value {
    serde_json::to_value(value).expect("plain structures have a JSON form")
}

/// The answer to `stats`.
pub fn stats(shared: &Shared, running: bool, tally: &Tally) -> Value {
    let now = now_ns();
    let lanes = shared.lanes.lock().expect("a thread that panics ends the probe").clone();
    let sum = |field: fn(&LaneState) -> u64| -> u64 { lanes.iter().map(|lane| field(lane)).sum() };
    let wrong = shared.wrong();
    let [lost, torn, misplaced, foreign] = wrong.counts;
    let microseconds = |ns: u64| ns as f64 / 1000.0;
    json!({
        "device": shared.device.name,
        "running": running,
        "monotonic_ns": now,
        "writes": sum(|lane| lane.writes.load(Ordering::Relaxed)),
        "reads": sum(|lane| lane.reads.load(Ordering::Relaxed)),
        "verified": sum(|lane| lane.verified.load(Ordering::Relaxed)),
        "flushes": sum(|lane| lane.flushes.load(Ordering::Relaxed)),
        "late": sum(|lane| lane.late.load(Ordering::Relaxed)),
        "hung": shared.hung(now),
        "lanes_active": shared.active.load(Ordering::Acquire),
        "io_errors": shared.errors(),
        "io_error_count": shared.error_count.load(Ordering::Relaxed),
        "wrong": {"lost": lost, "torn": torn, "misplaced": misplaced, "foreign": foreign},
        "wrong_details": wrong.details,
        "kernel_errors": tally.counts(),
        "latency_us": {
            "p50": microseconds(shared.latency.quantile(0.5)),
            "p99": microseconds(shared.latency.quantile(0.99)),
            "max": microseconds(shared.latency.max()),
        },
    })
}

/// Verifies within `limit`; a verification that hangs is left behind, and said so.
fn verified_stats(shared: &Arc<Shared>, limit: Duration, tally: &Tally) -> Answer {
    let (sender, receiver) = channel();
    let verifier = Arc::clone(shared);
    let started = thread::Builder::new().name("verify".to_owned()).spawn(move || {
        let report = verify(&verifier);
        verifier.verifying.store(false, Ordering::Release);
        // Nobody listens any more if it took too long.
        let _ = sender.send(report);
    });
    if let Err(error) = started {
        return Err(Failure::failed(format!("cannot start the verification: {error}")));
    }
    let late = Report { hung: true, seconds: limit.as_secs_f64(), ..Report::default() };
    let report = receiver.recv_timeout(limit).unwrap_or(late);
    let mut stats = stats(shared, false, tally);
    stats["verified_final"] = json_of(report);
    Ok(stats)
}

impl Runs {
    /// No run yet.
    pub fn new(nonce: u128, wakeup: Wakeup, tally: Tally) -> Self {
        let runs = BTreeMap::new();
        Self { nonce, wakeup, tally, runs, newest: None, ledgers: 0, stopping: Vec::new() }
    }

    /// `write_start`. An earlier run's ledger on the same blocks is kept: what it wrote must still
    /// be there.
    pub fn start(&mut self, config: Config) -> Answer {
        let device = Device::find(&config.device)?;
        let size = device
            .size_bytes()
            .map_err(|error| Failure::failed(format!("cannot open {}: {error}", device.name)))?;
        let config = config.checked(size)?;
        let name = device.name.clone();
        let mut ledger = None;
        if let Some(earlier) = self.runs.get(&name) {
            let verifying = earlier.shared.verifying.load(Ordering::Acquire);
            if earlier.is_running() || !earlier.is_quiet() || verifying {
                return Err(Failure::unavailable(format!(
                    "a run on {name} goes on, or its requests did not come back"
                )));
            }
            let same = earlier.shared.config.same_geometry(&config);
            if config.resume {
                let same = same && earlier.shared.config.mode == config.mode;
                if !same {
                    return Err(Failure::invalid("resume needs the arguments of the last run"));
                }
                earlier.resume()?;
                self.newest = Some(name);
                return Ok(json!({"monotonic_ns": now_ns(), "config": config, "continued": true}));
            }
            ledger = same.then(|| Arc::clone(&earlier.shared.ledger));
        } else if config.resume {
            return Err(Failure::unavailable(format!("there is no run on {name} to resume")));
        }
        let continued = ledger.is_some();
        let ledger = ledger.unwrap_or_else(|| {
            self.ledgers += 1;
            Arc::new(config.new_ledger(self.ledgers))
        });
        let run = Run::start(config.clone(), device, self.nonce, ledger, self.wakeup.clone())?;
        self.runs.insert(name.clone(), run);
        self.newest = Some(name);
        Ok(json!({"monotonic_ns": now_ns(), "config": config, "continued": continued}))
    }

    fn find(&self, device: Option<&str>) -> Result<(&str, &Run), Failure> {
        let name = match device {
            Some(wanted) if self.runs.contains_key(wanted) => wanted.to_owned(),
            Some(wanted) => Device::find(wanted)?.name,
            None => self.newest.clone().unwrap_or_default(),
        };
        self.runs
            .get_key_value(&name)
            .map(|(name, run)| (name.as_str(), run))
            .ok_or_else(|| Failure::unavailable("there is no run: write_start comes first"))
    }

    /// `stats`; of a probe that never wrote, all zeroes are not made up: `running` is false.
    pub fn stats(&self, device: Option<&str>) -> Answer {
        let (_, run) = self.find(device)?;
        Ok(stats(&run.shared, run.is_running(), &self.tally))
    }

    /// `timeline`.
    pub fn timeline(&self, device: Option<&str>, since_ns: u64) -> Answer {
        let (_, run) = self.find(device)?;
        let since_ns = since_ns.max(run.shared.started_ns);
        let (start_ns, counts) = run.shared.timeline.counts(since_ns, now_ns());
        Ok(json!({"bin_ns": BIN_NS, "start_ns": start_ns, "counts": counts}))
    }

    /// `gaps`.
    pub fn gaps(&self, device: Option<&str>, since_ns: u64) -> Answer {
        let (_, run) = self.find(device)?;
        let (gaps, forgotten) = run.shared.gaps.since(since_ns);
        let now = now_ns();
        let open_since_ns = run.shared.gaps.open_since(now);
        Ok(json!({
            "gaps": gaps, "open_since_ns": open_since_ns, "forgotten": forgotten, "monotonic_ns": now,
        }))
    }

    /// `write_stop`: the answer comes when the lanes came back or the deadline passed, and after
    /// the final verification if one is wanted.
    pub fn stop(
        &mut self,
        device: Option<&str>,
        verify: Option<Duration>,
        deadline: Duration,
        asker: Asker,
    ) -> Result<(), Failure> {
        let (name, run) = self.find(device)?;
        run.request_stop();
        let device = name.to_owned();
        let deadline_ns = now_ns().saturating_add(deadline.as_nanos() as u64);
        self.stopping.push(Stopping { device, asker, deadline_ns, verify });
        Ok(())
    }

    /// Looks after the stops that wait.
    pub fn tend(&mut self, jobs: &Jobs) {
        let now = now_ns();
        let runs = &self.runs;
        self.stopping.retain(|stop| {
            let Some(run) = runs.get(&stop.device) else { return false };
            let quiet = run.is_quiet();
            if !quiet && now < stop.deadline_ns {
                return true;
            }
            if !quiet {
                run.shared.overdue.store(true, Ordering::Release);
            }
            let shared = Arc::clone(&run.shared);
            match stop.verify {
                Some(limit) => {
                    shared.verifying.store(true, Ordering::Release);
                    let tally = self.tally.clone();
                    jobs.spawn(stop.asker.clone(), move || verified_stats(&shared, limit, &tally));
                }
                None => jobs.answer(stop.asker.clone(), Ok(stats(&shared, false, &self.tally))),
            }
            false
        });
    }
}
