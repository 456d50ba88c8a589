//! A load generator for vhost-user-blk backends: a guest's block driver without the guest.
//!
//! It stands on `virtio-driver`, the library under libblkio, so that the rings are driven by code
//! that is not ours; `relay` adds what a guest's QEMU would: the in-flight region and, if asked
//! for, connecting again. Used by `semper disk tune` and by `python -m bench`.

mod histogram;
mod lane;
mod memory;
mod offsets;
mod options;
mod pace;
mod processor;
mod relay;
mod report;
mod run;
mod stamp;
mod watch;
mod worker;

use clap::Parser;
use options::Options;
use std::process::ExitCode;

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NO_CONNECTION: u8 = 3;
const LOST: u8 = 4;

fn main() -> ExitCode {
    let options = Options::parse();
    if let Err(sentence) = options.check() {
        eprintln!("semper-load: error: {sentence}");
        return ExitCode::from(USAGE);
    }
    let outcome = match run::run(&options) {
        Ok(outcome) => outcome,
        Err(error) => {
            eprintln!("semper-load: error: {error}");
            return ExitCode::from(match error {
                run::SetupError::TooSmall { .. } => USAGE,
                _ => NO_CONNECTION,
            });
        }
    };
    match serde_json::to_string_pretty(&report::Report::new(&options, &outcome)) {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("semper-load: error: {error}"),
    }
    if let Some(cause) = &outcome.lost {
        eprintln!("semper-load: error: {cause}; {} requests unanswered", outcome.hung);
        return ExitCode::from(LOST);
    }
    let wrong = outcome.tally.verified.wrong();
    if outcome.tally.errors + wrong > 0 {
        let errors = outcome.tally.errors;
        eprintln!("semper-load: error: {errors} failed requests, {wrong} wrong blocks");
        return ExitCode::from(FAILED);
    }
    ExitCode::SUCCESS
}
