//! `semper-vfiod`: the mediator of a passed-through device, a vfio-user server whose VM can be moved
//! by an unmodified QEMU (US10963286B2). `docs/design/mediator.md` says how.
//!
//! ```text
//!   main thread       everything: messages, registers, the device, DMA, control commands; see `server`
//!   reader threads    take messages from QEMU's two connections, the device's and the shim's
//!   control threads   hand on the lines of the control socket
//!   spare thread      admits a spare, which goes on when this process dies; see `server::succession`
//!   signal thread     SIGTERM, SIGINT: ends what is in flight, exit 0
//! ```
//!
//! Exit status: see `semper_program`; 3 means that the image is another's, 4 that it cannot be used.
//!
//! The program is [`main`]; a library only so that fuzzers and tests reach its parsers.

mod answers;
mod args;
mod config;
mod control;
mod dma;
mod edu;
mod failure;
mod hardware;
#[doc(hidden)]
pub mod hostile;
mod inbox;
mod interrupts;
mod link;
pub mod message;
mod pace;
mod serve;
mod server;
mod shim;
mod tenure;
mod vfio;
mod walls;

use std::process::ExitCode;

use clap::Parser;
use semper_program::Program;

use crate::args::Args;

/// Under this name it logs and fails.
pub(crate) const PROGRAM: Program = Program("semper-vfiod");

/// The whole program, from its command line to its exit status.
pub fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_capabilities {
        println!("{}", serde_json::json!(answers::CAPABILITIES));
        return ExitCode::SUCCESS;
    }
    PROGRAM.log_to_stderr();
    let ended = serve::run(&args);
    semper_control::remove_sockets();
    PROGRAM.end(ended)
}
