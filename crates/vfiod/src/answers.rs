//! What the control socket answers. Each has its golden file in `crates/control/golden`.

use semper_device::Counters as DeviceCounters;
use semper_title::Status as Claim;
use semper_walls::Standing;
use serde::Serialize;

use crate::config::Write;

/// `--print-capabilities`.
#[derive(Debug, Serialize)]
pub(crate) struct Capabilities {
    pub kind: &'static str,
    pub features: &'static [&'static str],
}

pub(crate) const CAPABILITIES: Capabilities = Capabilities {
    kind: "passthrough",
    features: &["nvme", "edu", "pci", "shim", "mediated-dma", "spare"],
};

/// `status`.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    pub version: &'static str,
    pub pid: u32,
    /// Of the device: "nvme", "edu", "nvme-pci", "plain-pci".
    pub kind: &'static str,
    /// "waiting", "running", "captured", "quiesced" or "incoming".
    pub state: &'static str,
    /// Who goes on if this process dies: "off" (nobody ever), "alone", "following" or "ready".
    pub spare: &'static str,
    /// This process went on for one that died.
    pub resumed: bool,
    /// A flush has failed, and every further one fails.
    pub flush_failed: bool,
    /// QEMU is there.
    pub connected: bool,
    /// So is the shim.
    pub shim: bool,
    pub owns_image: bool,
    pub claim: Claim,
    /// None for a device without one.
    pub image: Option<String>,
    pub size_bytes: u64,
    pub block_size: u32,
    pub read_only: bool,
    pub serial: String,
    pub engine: &'static str,
    /// "direct" or "trapped".
    pub doorbells: &'static str,
    pub counters: Counters,
    pub last_error: Option<String>,
    pub walls: Standing,
}

/// In `status`.
#[derive(Debug, Serialize)]
pub(crate) struct Counters {
    #[serde(flatten)]
    pub device: DeviceCounters,
    /// Doorbells that were seen in the guest's page.
    pub doorbells_direct: u64,
    /// That came by the shim.
    pub doorbells_captured: u64,
    /// That came as messages of the device.
    pub doorbells_trapped: u64,
    pub interrupts: u64,
    pub interrupts_held: u64,
    pub vectors: usize,
    pub dma_refused: u64,
    pub protocol_errors: u64,
    pub dirty_pages: u64,
    pub mediated_bytes: u64,
}

/// `configuration`.
#[derive(Debug, Serialize)]
pub(crate) struct Configuration {
    /// Hexadecimal.
    pub config: String,
    pub before: Vec<Write>,
    pub after: Vec<Write>,
    pub msix_table: Table,
}

/// In `configuration`.
#[derive(Debug, Serialize)]
pub(crate) struct Table {
    pub bar: u8,
    pub offset: u64,
    pub vectors: u16,
    /// In the guest's memory, while the guest has it there.
    pub address: Option<u64>,
    /// Hexadecimal; none while QEMU cannot be asked.
    pub table: Option<String>,
}

/// `msix`.
#[derive(Debug, Serialize)]
pub(crate) struct Written {
    pub written: usize,
}

/// `capture`.
#[derive(Debug, Serialize)]
pub(crate) struct Captured {
    pub on: bool,
    /// Where the page of doorbells is in the guest's memory.
    pub page: Option<u64>,
}

/// `round`.
#[derive(Debug, Serialize)]
pub(crate) struct Round {
    pub writes: String,
    pub count: usize,
    /// There were more than are kept: `export` makes up for it.
    pub overflowed: bool,
}

/// `replay`.
#[derive(Debug, Serialize)]
pub(crate) struct Replayed {
    pub replayed: usize,
}

/// `quiesce`.
#[derive(Debug, Serialize)]
pub(crate) struct Quiesced {
    pub drained: usize,
}

/// `touch`.
#[derive(Debug, Serialize)]
pub(crate) struct Touched {
    pub pages: usize,
}

/// `export`.
#[derive(Debug, Serialize)]
pub(crate) struct Exported {
    pub state: String,
    pub bytes: usize,
}

/// `import`.
#[derive(Debug, Serialize)]
pub(crate) struct Imported {
    /// That will be interrupted once more.
    pub vectors: usize,
    /// Registers that were replayed with another value than the state has.
    pub differing: usize,
}

/// `release`.
#[derive(Debug, Serialize)]
pub(crate) struct Released {
    pub owns_image: bool,
}

/// `claim`.
#[derive(Debug, Serialize)]
pub(crate) struct Claimed {
    pub claim: Claim,
}

/// `resume`.
#[derive(Debug, Serialize)]
pub(crate) struct Resumed {
    pub kicked: usize,
}
