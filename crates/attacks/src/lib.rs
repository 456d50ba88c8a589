//! What an enemy can do, each attack as a function of bytes.
//!
//! A fuzzer (`fuzz/`) looks for bytes that break something; `tests/` here replays what fuzzers
//! have found and tries some thousand random inputs in every test run. An attack panics when the
//! code under attack panics or breaks a promise; otherwise it returns.
//!
//! | attack | enemy | code under attack |
//! |---|---|---|
//! | [`ring`] | a guest | `semper_ring`: tables, rings, notifications, over many steps |
//! | [`region`] | a front end | `semper_inflight`: recovery from any bytes |
//! | [`request`] | a guest | `semper_blkd`: from chain to I/O; the configuration space |
//! | [`messages`] | a front end and its guest | `semper_blkd`: the vhost-user device with its threads |
//! | [`control`] | a local client | `semper_blkd`: the lines of the control socket |
//! | [`epoch`] | who writes beside an image, a crash | `semper_epoch`: the epoch record |
//! | [`layers`] | who writes beside an image, a crash | `semper_layers`: the record and the maps |
//! | [`map`] | who gives a map | `semper_blockmap`: the export format |
//! | [`nvme`] | a guest | `semper_nvme`: registers, doorbells, commands; its state, moved |
//! | [`vfio`] | a client, and its guest | `semper_vfiod`: messages, configuration space, control lines |
//! | [`saved`] | who gives a saved state | `semper_saved`: the format |
//! | [`stream`] | a QEMU and its guest | `semper_wire`: any migration stream comes out as it went in |
//! | [`source`] | the host that a VM comes from | `semper_wire`: the destination's state machine |
//! | [`destination`] | the host that it goes to | `semper_wire`: the source's state machine |

mod bytes;
mod control;
mod epoch;
mod erratic;
mod ground;
mod layers;
mod map;
mod messages;
mod nvme;
mod region;
mod request;
mod ring;
mod saved;
mod vfio;
mod wire;

pub use control::control;
pub use epoch::epoch;
pub use layers::layers;
pub use map::map;
pub use messages::messages;
pub use nvme::nvme;
pub use region::region;
pub use request::request;
pub use ring::ring;
pub use saved::saved;
pub use vfio::vfio;
pub use wire::{destination, source, stream};

/// An attack: it panics if it succeeds.
pub type Attack = fn(&[u8]);

/// All attacks, by the names that the fuzz targets have.
pub const ALL: [(&str, Attack); 14] = [
    ("ring", ring),
    ("region", region),
    ("request", request),
    ("messages", messages),
    ("control", control),
    ("epoch", epoch),
    ("layers", layers),
    ("map", map),
    ("nvme", nvme),
    ("vfio", vfio),
    ("saved", saved),
    ("stream", stream),
    ("source", source),
    ("destination", destination),
];
