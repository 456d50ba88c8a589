//! `semper-blkd`: a vhost-user-blk backend whose guests survive its death.
//!
//! ```text
//!   main thread      opens the image, takes (or awaits) its lock, accepts front ends, speaks vhost-user
//!   queue threads    serve the virtqueues, no locks; see `worker`
//!   control threads  the control socket; see `control`
//!   session thread   tells the spares what the front end has said, or follows who serves; see `session`
//!   signal thread    SIGTERM, SIGINT: drain, show everything to the guest, exit 0
//!   processes beside one that connects, and nothing else (`connects`), and the memory reaper
//! ```
//!
//! Exit status: see `semper_program`; 3 means that the image is another's (locked, or given away: see
//! `tenure` and `semper_title`), 4 that the image or its epoch record cannot be used.
//!
//! The program is [`main`]; a library only so that fuzzers and tests reach its parsers.

mod answers;
mod args;
mod block_map;
mod channel;
mod config;
mod connects;
mod contention;
mod control;
mod crash;
mod descriptors;
mod device;
mod dirty_log;
mod door;
mod eventfd;
mod export;
mod failure;
mod faults;
mod flushes;
#[doc(hidden)]
pub mod hostile;
mod inflight_map;
mod layer_answers;
mod memory_reaper;
mod merge;
mod message;
mod overlap;
mod peers;
mod poll;
mod postcopy;
mod queue;
mod request;
mod resize;
mod serve;
mod service;
mod session;
mod snapshots;
mod state;
mod tenure;
mod threads;
mod urgency;
mod walls;
mod worker;

use std::process::ExitCode;

use clap::Parser;
use semper_program::Program;

use crate::answers::Capabilities;
use crate::args::Args;
use crate::state::{Shared, mark};

/// Under this name it logs and fails.
pub(crate) const PROGRAM: Program = Program("semper-blkd");

/// The whole program, from its command line to its exit status.
pub fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_capabilities {
        let capabilities = Capabilities {
            kind: "block",
            features: &["read-only", "blk-file", "session", "layers"],
        };
        println!("{}", serde_json::json!(capabilities));
        return ExitCode::SUCCESS;
    }
    PROGRAM.log_to_stderr();
    if let Some(target) = &args.export {
        return PROGRAM.end(export::run(&args, target));
    }
    if let Some(how) = args.merge {
        return PROGRAM.end(merge::run(&args, how));
    }
    let shared = Shared::new(args.num_queues);
    mark(&shared.timeline.process_start);
    if let Some(file) = &args.flush_file {
        shared.flushes.keep_in(file.clone());
    }
    let ended = serve::run(args, shared);
    semper_control::remove_sockets();
    PROGRAM.end(ended)
}
