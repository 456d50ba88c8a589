//! The figures of a run as JSON, the contract with `python -m bench`.

use crate::lane::Verified;
use crate::options::Options;
use crate::processor::Usage;
use crate::run::Outcome;
use crate::series::Told;
use semper_histogram::Histogram;
use serde::Serialize;
use std::time::Duration;

/// Raised when a key changes its meaning or goes away.
const VERSION: u32 = 1;

/// Latencies in microseconds.
#[derive(Debug, Serialize)]
pub struct LatencyUs {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    p99_9: f64,
    max: f64,
}

/// What a process used in the measured interval.
#[derive(Debug, Serialize)]
pub struct Process {
    cpu_s: f64,
    system_s: f64,
    cpu_us_per_io: f64,
    voluntary_switches: u64,
    involuntary_switches: u64,
    switches_per_io: f64,
}

/// Everything that is printed.
#[derive(Debug, Serialize)]
pub struct Report {
    version: u32,
    mode: String,
    block_size: u64,
    depth: u16,
    queues: u16,
    ring_size: u16,
    polling: bool,
    rate: Option<f64>,
    inflight: bool,
    capacity_bytes: u64,
    span_bytes: u64,
    seconds: f64,
    ios: u64,
    reads: u64,
    writes: u64,
    flushes: u64,
    iops: f64,
    mb_per_s: f64,
    latency_us: LatencyUs,
    flush_latency_us: LatencyUs,
    kicks_per_io: f64,
    sleeps_per_io: f64,
    own: Process,
    backend: Option<Process>,
    errors: u64,
    first_error: Option<String>,
    verified: Option<Verified>,
    series: Option<Told>,
    outages_ms: Vec<f64>,
    lost: Option<String>,
    hung: usize,
}

/// Rounds to `digits` decimals: more would be noise in the file.
fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

fn per(count: f64, of: u64) -> f64 {
    rounded(count / of.max(1) as f64, 4)
}

fn process(usage: &Usage, ios: u64) -> Process {
    let switches = usage.voluntary_switches + usage.involuntary_switches;
    Process {
        cpu_s: rounded(usage.cpu.as_secs_f64(), 6),
        system_s: rounded(usage.system.as_secs_f64(), 2),
        cpu_us_per_io: per(usage.cpu.as_secs_f64() * 1e6, ios),
        voluntary_switches: usage.voluntary_switches,
        involuntary_switches: usage.involuntary_switches,
        switches_per_io: per(switches as f64, ios),
    }
}

fn latency(of: &Histogram) -> LatencyUs {
    let us = |ns: u64| rounded(ns as f64 / 1e3, 2);
    LatencyUs {
        mean: rounded(of.mean() / 1e3, 2),
        p50: us(of.quantile(0.5)),
        p90: us(of.quantile(0.9)),
        p99: us(of.quantile(0.99)),
        p99_9: us(of.quantile(0.999)),
        max: us(of.max()),
    }
}

impl Report {
    /// The figures of `outcome`.
    pub fn new(options: &Options, outcome: &Outcome) -> Self {
        let tally = &outcome.tally;
        let ios = tally.reads + tally.writes;
        let seconds = outcome.measured.as_secs_f64();
        let rate = |amount: f64| if seconds > 0.0 { rounded(amount / seconds, 1) } else { 0.0 };
        Self {
            version: VERSION,
            mode: format!("{:?}", options.mode).to_lowercase(),
            block_size: options.block_size,
            depth: options.depth,
            queues: options.queues,
            ring_size: outcome.ring_size,
            polling: options.poll,
            rate: options.rate,
            inflight: outcome.inflight,
            capacity_bytes: outcome.capacity_bytes,
            span_bytes: outcome.span_bytes,
            seconds: rounded(seconds, 6),
            ios,
            reads: tally.reads,
            writes: tally.writes,
            flushes: tally.flushes,
            iops: rate(ios as f64),
            mb_per_s: rate(ios as f64 * options.block_size as f64 / 1e6),
            latency_us: latency(&tally.latency),
            flush_latency_us: latency(&tally.flush_latency),
            kicks_per_io: per(tally.kicks as f64, ios),
            sleeps_per_io: per(tally.sleeps as f64, ios),
            own: process(&outcome.own, ios),
            backend: outcome.backend.as_ref().map(|usage| process(usage, ios)),
            errors: tally.errors,
            first_error: tally.first_error.clone(),
            verified: options.verify.then(|| tally.verified.clone()),
            series: tally.series.as_ref().map(|series| series.told(outcome.started_ns)),
            outages_ms: outcome
                .outages
                .iter()
                .map(|outage: &Duration| rounded(outage.as_secs_f64() * 1e3, 3))
                .collect(),
            lost: outcome.lost.clone(),
            hung: outcome.hung,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::Tally;
    use clap::Parser;
    use semper_control::golden::check;
    use serde_json::json;

    #[test]
    fn what_went_wrong_is_told() {
        let socket = ["semper-load", "--socket=s", "--rate=2000", "--reconnect"];
        let options = Options::parse_from(socket);
        let first_error = Some("write at 4096: status 1".to_owned());
        let outcome = Outcome {
            tally: Tally { errors: 1, first_error, ..Tally::default() },
            started_ns: 0,
            measured: Duration::ZERO,
            own: Usage::default(),
            backend: None,
            capacity_bytes: 1 << 24,
            span_bytes: 1 << 24,
            ring_size: 128,
            inflight: true,
            outages: vec![Duration::from_millis(2)],
            lost: Some("the backend closed the connection".to_owned()),
            hung: 3,
        };
        check("load-report-failed", &json!(Report::new(&options, &outcome)));
    }
}
