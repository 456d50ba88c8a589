//! The command line.

use clap::{Parser, ValueEnum};
use std::path::PathBuf;

/// What the requests are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Reads at random offsets.
    Randread,
    /// Writes at random offsets.
    Randwrite,
    /// Both at random offsets (see --read-percent).
    Mixed,
}

/// Drives a vhost-user-blk backend as a guest would, and prints what it did as JSON.
///
/// Exit status: 0 all went well; 1 a request failed or read back wrong; 2 wrong usage; 3 no
/// connection or handshake; 4 the backend died or hung under load.
#[derive(Clone, Debug, Parser)]
#[command(name = "semper-load", version)]
pub struct Options {
    /// The backend's vhost-user socket; waited for while it does not exist yet
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,

    /// What the requests are
    #[arg(long, value_enum, default_value = "randread")]
    pub mode: Mode,

    /// Reads among 100 requests of --mode=mixed
    #[arg(long, value_name = "N", default_value_t = 70, value_parser = clap::value_parser!(u64).range(0..=100))]
    pub read_percent: u64,

    /// Bytes of one request (suffix k or M)
    #[arg(long, value_name = "BYTES", default_value = "4k", value_parser = size)]
    pub block_size: u64,

    /// Requests in flight on each queue
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub depth: u16,

    /// Virtqueues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// Entries of each virtqueue; default: room for three descriptors for each request
    #[arg(long, value_name = "N")]
    pub queue_size: Option<u16>,

    /// Threads that share the queues; default: one for each queue
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    /// Measured time
    #[arg(long, value_name = "S", default_value_t = 1.0, conflicts_with = "count")]
    pub seconds: f64,

    /// Measured requests, over all queues, instead of a time
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,

    /// Requests per second over all queues, arriving at random instants whether or not the backend
    /// keeps up; those that find --depth in flight wait, which counts as latency. For exact times
    /// --poll; by default: the next request when one is complete
    #[arg(long, value_name = "N", value_parser = rate)]
    pub rate: Option<f64>,

    /// Load before the measurement
    #[arg(long, value_name = "S", default_value_t = 0.2)]
    pub warmup: f64,

    /// Use only the first part of the disk (suffix k, M or G)
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub span: Option<u64>,

    /// Use only each N-th block
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "verify", value_parser = clap::value_parser!(u64).range(1..))]
    pub stride: u64,

    /// The first block that is used
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "verify")]
    pub first: u64,

    /// Seed of the offsets
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Spin for completions; without it, sleep on the queue's eventfd
    #[arg(long)]
    pub poll: bool,

    /// Spin for so long before sleeping
    #[arg(long, value_name = "US", default_value_t = 0, conflicts_with = "poll")]
    pub poll_us: u64,

    /// Stamp every block written (number, sequence), compare every block read, and read everything
    /// written back at the end
    #[arg(long)]
    pub verify: bool,

    /// Flush after each N requests of a queue
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub flush_every: Option<u64>,

    /// Do without the in-flight region, as libblkio does
    #[arg(long)]
    pub no_inflight: bool,

    /// Do without event indexes: a notification for each request
    #[arg(long)]
    pub no_event_idx: bool,

    /// Connect again when the backend dies, as QEMU does
    #[arg(long)]
    pub reconnect: bool,

    /// How long to wait for the socket, for an answer, and for a completion before giving up
    #[arg(long, value_name = "S", default_value_t = 10.0)]
    pub patience: f64,

    /// Tell as well how many requests were complete in each N milliseconds, from the first one
    /// that was issued, warm-up included
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub series: Option<u64>,

    /// The process to account for: the backend
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
}

impl Options {
    /// Entries of each virtqueue.
    pub fn ring_size(&self) -> u16 {
        // A request takes a header, its data and a status byte, each a descriptor; one for a flush.
        let needed = (u32::from(self.depth) + 1) * 3;
        self.queue_size.unwrap_or(needed.next_power_of_two().max(128) as u16)
    }

    /// What cannot be told from one option alone.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn check(&self) -> Result<(), String> {
        if self.block_size == 0 || self.block_size % 512 != 0 || self.block_size > 16 << 20 {
            return Err("--block-size must be a multiple of 512, at most 16M".into());
        }
        let ring = self.ring_size();
        if !ring.is_power_of_two() || u32::from(ring) < u32::from(self.depth) * 3 {
            return Err(format!(
                "--queue-size must be a power of two, at least three times the depth: {}",
                self.depth * 3
            ));
        }
        if !(self.seconds > 0.0 && self.warmup >= 0.0 && self.patience > 0.0) {
            return Err("--seconds, --warmup and --patience must not be negative".into());
        }
        Ok(())
    }
}

/// Requests per second.
fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate.is_finite() => Ok(rate),
        _ => Err(format!("`{text}` is not a number of requests per second")),
    }
}

/// A number of bytes with an optional binary suffix.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("`{text}` is not a size such as 4096, 4k or 1G"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(size("4k"), Ok(4096));
        assert_eq!(size("512"), Ok(512));
        assert_eq!(size("2G"), Ok(2 << 30));
        assert!(size("k").is_err() && size("").is_err() && size("4x").is_err());
        assert!(size("99999999999G").is_err());
    }

    #[test]
    fn rates() {
        assert_eq!(rate("2e4"), Ok(20_000.0));
        assert!(rate("0").is_err() && rate("-1").is_err() && rate("inf").is_err());
    }

    #[test]
    fn rings_hold_what_is_in_flight() {
        for (depth, ring) in [(1, 128), (32, 128), (128, 512), (256, 1024)] {
            let options = Options::parse_from(["semper-load", "--socket=s"]);
            let options = Options { depth, ..options };
            assert_eq!(options.ring_size(), ring);
            assert!(options.check().is_ok());
        }
    }
}
