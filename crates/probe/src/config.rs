//! The arguments of `write_start`.

use serde::{Deserialize, Serialize};

use crate::ledger::Ledger;
use crate::protocol::Failure;
use crate::stamp::SECTOR;

const MAX_LANES: u32 = 1024;
const MAX_BLOCKS: u64 = 16 << 20;
/// The longest request in mode `overlap`, in blocks.
pub const MAX_STRETCH: u64 = 8;

/// What the lanes do.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Only write.
    Write,
    /// Write, and verify by reading back, in the proportion of `verify_ratio`.
    #[default]
    Mixed,
    /// Only read, and verify what an earlier run wrote.
    Read,
    /// As `mixed`, but all lanes write stretches of one to eight blocks anywhere in the span, so that
    /// requests in flight overlap; a small span makes that likely.
    Overlap,
}

/// The arguments of `write_start`.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `vda`, `serial:S` or a path.
    pub device: String,
    /// How many writers.
    #[serde(default = "defaults::writers")]
    pub writers: u32,
    /// Lanes of each writer.
    #[serde(default = "defaults::depth")]
    pub depth: u32,
    /// Bytes of a block; a multiple of 512.
    #[serde(default = "defaults::block_size")]
    pub block_size: u32,
    /// Where the span starts; a multiple of the block size.
    #[serde(default)]
    pub offset_bytes: u64,
    /// Length of the span; 0 = the rest of the device, at most 256 MiB (`overlap`: 64 blocks).
    #[serde(default)]
    pub span_bytes: u64,
    /// Of the choice of blocks.
    #[serde(default)]
    pub seed: u64,
    /// What the lanes do.
    #[serde(default)]
    pub mode: Mode,
    /// Share of reads in mode `mixed`.
    #[serde(default = "defaults::verify_ratio")]
    pub verify_ratio: f64,
    /// Each lane flushes after this many writes; 0 = never.
    #[serde(default)]
    pub flush_every: u32,
    /// A request that is out for longer is hung.
    #[serde(default = "defaults::hang_s")]
    pub hang_s: f64,
    /// Go on counting where the last run on this device stopped, instead of from zero.
    #[serde(default)]
    pub resume: bool,
}

mod defaults {
    pub fn writers() -> u32 {
        16
    }
    pub fn depth() -> u32 {
        1
    }
    pub fn block_size() -> u32 {
        4096
    }
    pub fn verify_ratio() -> f64 {
        0.3
    }
    pub fn hang_s() -> f64 {
        30.0
    }
}

impl Config {
    /// Checks the arguments against the device and fills in the span.
    pub fn checked(mut self, size_bytes: u64) -> Result<Self, Failure> {
        let block = u64::from(self.block_size);
        let wrong = |text: String| Err(Failure::invalid(format!("write_start: {text}")));
        if block == 0 || block % SECTOR as u64 != 0 || block > 1 << 20 {
            return wrong(format!("block_size {block} is not a multiple of 512 up to 1 MiB"));
        }
        if self.writers == 0 || self.depth == 0 || self.lanes() > MAX_LANES {
            return wrong(format!("writers times depth must be 1 to {MAX_LANES}"));
        }
        if self.offset_bytes % block != 0 || self.offset_bytes >= size_bytes {
            return wrong(format!("offset_bytes is no block of this device of {size_bytes} bytes"));
        }
        if !(0.0..=1.0).contains(&self.verify_ratio) || self.hang_s.is_nan() || self.hang_s <= 0.0 {
            return wrong("verify_ratio must be 0 to 1, and hang_s positive".to_owned());
        }
        let rest = size_bytes - self.offset_bytes;
        if self.span_bytes == 0 {
            let most = if self.mode == Mode::Overlap { 64 * block } else { 256 << 20 };
            self.span_bytes = rest.min(most);
        }
        self.span_bytes -= self.span_bytes % block;
        let needed = if self.mode == Mode::Overlap { 1 } else { u64::from(self.lanes()) };
        if self.span_bytes > rest || self.blocks() < needed {
            return wrong(format!(
                "a span of {} bytes does not fit the device ({rest} bytes) or gives a lane no block",
                self.span_bytes
            ));
        }
        if self.blocks() > MAX_BLOCKS {
            return wrong(format!("more than {MAX_BLOCKS} blocks; choose a smaller span_bytes"));
        }
        Ok(self)
    }

    /// Threads in all.
    pub fn lanes(&self) -> u32 {
        self.writers.saturating_mul(self.depth)
    }

    /// Blocks in the span.
    pub fn blocks(&self) -> u64 {
        self.span_bytes / u64::from(self.block_size)
    }

    /// Whether a ledger made for `other` describes the same blocks and owners.
    pub fn same_geometry(&self, other: &Self) -> bool {
        let key = |config: &Self| {
            let overlap = config.mode == Mode::Overlap;
            // Where lanes share blocks it does not matter how many there are.
            let lanes = if overlap { 0 } else { config.lanes() };
            (config.block_size, config.offset_bytes, config.span_bytes, lanes, overlap)
        };
        key(self) == key(other)
    }

    /// An empty ledger for these blocks.
    pub fn new_ledger(&self, run: u32) -> Ledger {
        Ledger::new(run, self.blocks() as usize, self.mode == Mode::Overlap)
    }

    /// Nanoseconds after which a request is hung.
    pub fn hang_ns(&self) -> u64 {
        (self.hang_s * 1e9) as u64
    }
}
