//! The commands: names, arguments, and what each does.

use std::time::Duration;

use rustix::system::{RebootCommand, reboot};
use serde::Deserialize;
use serde_json::json;

use crate::clock::now_ns;
use crate::config::Config;
use crate::jobs::Asker;
use crate::protocol::{Answer, Failure, Request};
use crate::subject::{Probe, Role};
use crate::{binding, device, modules, net, program, single};

/// What a command came to, for now.
pub enum Outcome {
    /// The answer.
    Now(Answer),
    /// A job has taken the asker, and will answer.
    Later,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfRun {
    device: Option<String>,
    #[serde(default)]
    since_ns: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stop {
    device: Option<String>,
    #[serde(default)]
    verify: bool,
    #[serde(default = "ten_seconds")]
    deadline_s: f64,
    #[serde(default = "two_minutes")]
    verify_deadline_s: f64,
}

fn ten_seconds() -> f64 {
    10.0
}

fn two_minutes() -> f64 {
    120.0
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Since {
    #[serde(default)]
    since: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Beat {
    #[serde(default = "ten")]
    interval_ms: u64,
}

fn ten() -> u64 {
    10
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfDevice {
    device: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Port {
    port: u16,
}

/// Names of all commands, for the answer to an unknown one.
const NAMES: &str = "hello, ping, list, write_start, write_stop, stats, timeline, gaps, dmesg, \
    heartbeat_start, heartbeat_stop, flush, discard, write_zeroes, fill, read_raw, write_raw, \
    bind, unbind, net_up, tcp_echo_start, exec, reboot, poweroff";

fn guest_only(probe: &Probe, cmd: &str) -> Result<(), Failure> {
    match probe.role {
        Role::Guest => Ok(()),
        Role::Host => Err(Failure::unavailable(format!("{cmd} works only in a guest"))),
    }
}

fn seconds(value: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(value).map_err(|error| Failure::invalid(error.to_string()))
}

/// Carries out one request, or hands it to a job.
pub fn carry_out(probe: &mut Probe, request: &mut Request, asker: Asker) -> Outcome {
    match act(probe, request, asker) {
        Ok(outcome) => outcome,
        Err(failure) => Outcome::Now(Err(failure)),
    }
}

fn act(probe: &mut Probe, request: &mut Request, asker: Asker) -> Result<Outcome, Failure> {
    let cmd = request.cmd.clone();
    let job = |probe: &Probe, work: Box<dyn FnOnce() -> Answer + Send>| {
        probe.jobs.spawn(asker.clone(), work);
        Outcome::Later
    };
    let answer = match cmd.as_str() {
        "hello" => {
            let Nothing {} = request.arguments()?;
            Ok(probe.hello())
        }
        "ping" => {
            let Nothing {} = request.arguments()?;
            Ok(json!({"monotonic_ns": now_ns()}))
        }
        "list" => {
            let Nothing {} = request.arguments()?;
            Ok(json!({"devices": device::list()}))
        }
        "write_start" => {
            let config: Config = request.arguments()?;
            probe.runs.start(config)
        }
        "write_stop" => {
            let stop: Stop = request.arguments()?;
            let verify = stop.verify.then_some(seconds(stop.verify_deadline_s)?);
            let deadline = seconds(stop.deadline_s)?;
            probe.runs.stop(stop.device.as_deref(), verify, deadline, asker)?;
            return Ok(Outcome::Later);
        }
        "stats" => {
            let of: OfRun = request.arguments()?;
            probe.runs.stats(of.device.as_deref())
        }
        "timeline" => {
            let of: OfRun = request.arguments()?;
            probe.runs.timeline(of.device.as_deref(), of.since_ns)
        }
        "gaps" => {
            let of: OfRun = request.arguments()?;
            probe.runs.gaps(of.device.as_deref(), of.since_ns)
        }
        "dmesg" => {
            let since: Since = request.arguments()?;
            let log = probe.kernel_log.as_ref();
            let log = log.ok_or_else(|| Failure::unavailable("/dev/kmsg cannot be read"))?;
            Ok(json!({"lines": log.since(since.since)}))
        }
        "heartbeat_start" | "heartbeat_stop" => {
            let interval_ms = if cmd == "heartbeat_stop" {
                let Nothing {} = request.arguments()?;
                0
            } else {
                let beat: Beat = request.arguments()?;
                beat.interval_ms.max(1)
            };
            let set = probe.heartbeat.set(interval_ms);
            set.map(|()| json!({})).map_err(|error| Failure::failed(error.to_string()))
        }
        "flush" | "discard" | "write_zeroes" | "fill" | "read_raw" | "write_raw" => {
            let single: single::Single = request.arguments()?;
            return Ok(job(probe, Box::new(move || single.carry_out(&cmd))));
        }
        "bind" | "unbind" => {
            guest_only(probe, &cmd)?;
            let of: OfDevice = request.arguments()?;
            let change = if cmd == "bind" { binding::bind } else { binding::unbind };
            return Ok(job(probe, Box::new(move || change(&of.device))));
        }
        "net_up" => {
            guest_only(probe, &cmd)?;
            let interface: net::Interface = request.arguments()?;
            return Ok(job(probe, Box::new(move || interface.bring_up())));
        }
        "tcp_echo_start" => {
            let port: Port = request.arguments()?;
            net::start_echo(port.port)
        }
        "exec" => {
            guest_only(probe, &cmd)?;
            let program: program::Program = request.arguments()?;
            return Ok(job(probe, Box::new(move || program.run())));
        }
        "rescan" => {
            guest_only(probe, &cmd)?;
            let Nothing {} = request.arguments()?;
            return Ok(job(probe, Box::new(|| Ok(json!({"loaded": modules::load_matching()})))));
        }
        "reboot" | "poweroff" => {
            guest_only(probe, &cmd)?;
            let Nothing {} = request.arguments()?;
            let how =
                if cmd == "reboot" { RebootCommand::Restart } else { RebootCommand::PowerOff };
            // At once and without sync: the writers die in the middle of what they do.
            let Err(errno) = reboot(how) else { unreachable!("the machine is gone") };
            Err(Failure::failed(format!("{cmd}: {errno}")))
        }
        other => Err(Failure::invalid(format!("no command {other:?}; there are: {NAMES}"))),
    };
    Ok(Outcome::Now(answer))
}
