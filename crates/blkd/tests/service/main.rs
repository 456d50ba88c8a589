//! `semper-blkd` as a process, with a vhost-user front end that behaves like QEMU's.
//!
//! The tests of `crash_points` need a program that can be told to die:
//! `cargo test -p semper-blkd --features crash-points`.

mod backend;
mod block_map;
mod blocks;
mod claims;
#[cfg(feature = "crash-points")]
mod crash_points;
mod dirty_log;
mod durability;
mod errors;
mod golden;
mod handover;
mod hostile_chains;
mod layer_cuts;
mod layer_faults;
mod layer_hosts;
mod layer_kills;
mod machine;
mod negotiation;
mod ownership;
mod pager;
mod postcopy;
mod program;
mod recovery;
mod requests;
mod resize;
mod session;
mod snapshots;
mod sudden_death;
mod tenure;
mod threads;
mod walls;
mod writers;
