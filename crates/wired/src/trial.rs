//! What only a corruption campaign may do to a destination: believe every block, and hold back its
//! reads of the disks until the blocks were overwritten.
//!
//! Compiled only with the feature `unsafe-no-verify`, and even then in force only in the program
//! `semper-wired-trial`: `semper-wired` never calls [`begin`].
//!
//! ```text
//!   {"cmd":"reads","hold":true}    every read waits from now on
//!   {"cmd":"reads","step":1}       lets one of them go (or more)
//!   {"cmd":"reads","hold":false}   lets all of them go
//!   {"cmd":"reads","delay_ms":5}   every read begins so much later
//!     -> {"hold":…,"delay_ms":…,"reads":N,"waits":{"disk":0,"block":7,"count":3}}   or null
//! ```

use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use semper_wire::BlockRef;
use serde_json::{Value, json};

/// What the environment may say, in [`VARIABLE`], with commas between.
pub(crate) const HELP: &str = "\
This is not semper-wired but a program for tests, which can be told to corrupt a guest.

SEMPER_WIRED_TRIAL=WORD,… in the environment:
  no-verify    a destination gives QEMU whatever stands in the blocks, unverified
  hold-reads   a destination's reads of disks wait from the beginning

The control socket of a destination also knows, all parts optional:
  {\"cmd\":\"reads\",\"hold\":BOOL,\"step\":N,\"delay_ms\":N}
which holds the reads back, lets N of them go, or delays each, and answers how it is now:
  {\"hold\":BOOL,\"delay_ms\":N,\"reads\":N,\"waits\":{\"disk\":N,\"block\":N,\"count\":N}}";
const VARIABLE: &str = "SEMPER_WIRED_TRIAL";

static TRIAL: OnceLock<Trial> = OnceLock::new();

struct Trial {
    verify: bool,
    gate: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Default)]
struct Gate {
    hold: bool,
    /// Reads that may go although others wait.
    steps: u64,
    delay: Duration,
    /// Reads that went.
    reads: u64,
    waits: Option<(BlockRef, usize)>,
}

/// Takes the words of the environment.
///
/// # Errors
/// A word that is not known.
pub(crate) fn begin() -> Result<(), String> {
    let (mut verify, mut hold) = (true, false);
    let words = std::env::var(VARIABLE).unwrap_or_default();
    for word in words.split(',').filter(|word| !word.is_empty()) {
        match word {
            "no-verify" => verify = false,
            "hold-reads" => hold = true,
            _ => return Err(format!("{VARIABLE}: unknown word {word:?}")),
        }
    }
    log::warn!("this is a trial; a guest may be corrupted verify={verify}");
    let gate = Mutex::new(Gate { hold, ..Gate::default() });
    let _ = TRIAL.set(Trial { verify, gate, changed: Condvar::new() });
    Ok(())
}

/// Whether blocks are verified.
pub(crate) fn verifies() -> bool {
    TRIAL.get().is_none_or(|trial| trial.verify)
}

/// Called before each read of a disk.
pub(crate) fn before_read(first: BlockRef, count: usize) {
    let Some(trial) = TRIAL.get() else { return };
    let mut gate = trial.gate();
    gate.waits = Some((first, count));
    while gate.hold && gate.steps == 0 {
        gate = trial.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
    }
    gate.steps = gate.steps.saturating_sub(1);
    gate.reads += 1;
    gate.waits = None;
    let delay = gate.delay;
    drop(gate);
    thread::sleep(delay);
}

/// The command `reads`.
pub(crate) fn answer(request: &Value) -> Option<Value> {
    let trial = TRIAL.get().filter(|_| request["cmd"] == "reads")?;
    let mut gate = trial.gate();
    if let Some(hold) = request["hold"].as_bool() {
        (gate.hold, gate.steps) = (hold, 0);
    }
    if let Some(steps) = request["step"].as_u64() {
        gate.steps += steps;
    }
    if let Some(delay) = request["delay_ms"].as_u64() {
        gate.delay = Duration::from_millis(delay);
    }
    trial.changed.notify_all();
    let waits = gate
        .waits
        .map(|(first, count)| json!({"disk": first.disk, "block": first.block, "count": count}));
    Some(json!({
        "hold": gate.hold,
        "delay_ms": gate.delay.as_millis() as u64,
        "reads": gate.reads,
        "waits": waits,
    }))
}

impl Trial {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
