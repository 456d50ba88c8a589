//! `semper-wired`: the two ends of a migration. The format and the state machines are in
//! `semper_wire`; here are sockets, TLS, disks and threads.
//!
//! ```text
//!   source QEMU ──unix──► semper-wired source ══TLS══► semper-wired destination ──unix──► QEMU
//!               ◄────────────── return path ─────────────────────────────────────────────
//! ```
//!
//! Each process carries one migration and ends. Exit status: 0 all of the stream was delivered, 1
//! it was not, 2 usage. What a broken connection means to a migration stays QEMU's business: either
//! end that fails closes its QEMU's socket, and that QEMU sees what it would see without us.
//!
//! The program is [`main`]; a library only so that tests reach its parts.

mod admission;
mod answers;
mod args;
mod carrier;
mod channel;
mod connects;
mod control;
mod destination;
mod disks;
mod failure;
mod indexing;
mod maps;
mod pipeline;
mod progress;
mod reader;
mod source;
mod tls;
mod touched;
#[cfg(feature = "unsafe-no-verify")]
mod trial;
mod waiting;
mod walls;

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use semper_program::Program;

use crate::args::{Args, Command};
use crate::progress::Progress;

/// Under this name it logs and fails.
const PROGRAM: Program = Program("semper-wired");

/// The whole program, from its command line to its exit status.
pub fn main() -> ExitCode {
    PROGRAM.log_to_stderr();
    run(&Args::parse())
}

/// The same as a program for tests that can be told to corrupt a guest.
#[cfg(feature = "unsafe-no-verify")]
pub fn trial_main() -> ExitCode {
    use clap::{CommandFactory, FromArgMatches};
    use semper_program::{Status, Told};

    const TRIAL: Program = Program("semper-wired-trial");
    PROGRAM.log_to_stderr();
    let command = Args::command().name(TRIAL.0).after_help(trial::HELP);
    let args = Args::from_arg_matches(&command.get_matches());
    let args = args.unwrap_or_else(|error| error.exit());
    match trial::begin() {
        Ok(()) => run(&args),
        Err(why) => TRIAL.report(&Told(Status::Usage, why)).into(),
    }
}

fn run(args: &Args) -> ExitCode {
    let progress = Arc::new(Progress::new(args.command.name()));
    let ended = match &args.command {
        Command::Source(source) => source::run(source, &progress),
        Command::Destination(destination) => destination::run(destination, &progress),
        Command::Wait => match waiting::wait() {
            Ok(Some(args)) => return run(&args),
            Ok(None) => return ExitCode::SUCCESS,
            Err(told) => return PROGRAM.report(&told).into(),
        },
    };
    semper_control::remove_sockets();
    PROGRAM.end(ended)
}
