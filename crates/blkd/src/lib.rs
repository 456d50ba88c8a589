//! `semper-blkd`: a vhost-user-blk backend whose guests survive its death.
//!
//! ```text
//!   main thread      opens the image, takes (or awaits) its lock, accepts front ends, speaks vhost-user
//!   queue threads    serve the virtqueues, no locks; see `worker`
//!   control threads  the control socket; see `control`
//!   signal thread    SIGTERM, SIGINT: drain, show everything to the guest, exit 0
//! ```
//!
//! Exit status: 0 ended as asked, 1 failed while running, 2 usage, 3 the image is another's (locked,
//! or given away: see `tenure` and `title`), 4 the image or its epoch record cannot be used.
//!
//! The program is [`main`]; a library only so that fuzzers and tests reach its parsers.

mod args;
mod block_map;
mod config;
mod contention;
mod control;
mod crash;
mod device;
mod dirty_log;
mod eventfd;
mod failure;
#[doc(hidden)]
pub mod hostile;
mod inflight_map;
mod overlap;
mod poll;
mod postcopy;
mod queue;
mod request;
mod serve;
mod state;
mod tenure;
mod threads;
mod title;
mod undertaker;
mod worker;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Args;
use crate::state::{Shared, mark};

/// The whole program, from its command line to its exit status.
pub fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_capabilities {
        println!("{}", serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]}));
        return ExitCode::SUCCESS;
    }
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format(|out, record| {
            use std::io::Write;
            let stamp = out.timestamp_millis();
            writeln!(out, "{stamp} {} blkd: {}", record.level(), record.args())
        })
        .init();
    let shared = Shared::new(args.num_queues);
    mark(&shared.timeline.process_start);
    match serve::run(args, shared) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => ExitCode::from(failure.report()),
    }
}
