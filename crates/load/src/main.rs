//! A load generator for vhost-user-blk backends: a guest's block driver without the guest.
//!
//! It stands on `virtio-driver`, the library under libblkio, so that the rings are driven by code
//! that is not ours; `relay` adds what a guest's QEMU would: the in-flight region and, if asked
//! for, connecting again. Used by `semper disk tune` and by `python -m bench`.

mod lane;
mod memory;
mod offsets;
mod options;
mod pace;
mod processor;
mod relay;
mod report;
mod run;
mod series;
mod stamp;
mod watch;
mod worker;

use clap::Parser;
use options::Options;
use report::Report;
use semper_program::{Program, Status, Told};
use std::process::ExitCode;

/// Under this name it fails.
const PROGRAM: Program = Program("semper-load");

fn main() -> ExitCode {
    PROGRAM.end(measure(&Options::parse()))
}

fn measure(options: &Options) -> Result<(), Told> {
    options.check().map_err(|sentence| Told(Status::Usage, sentence))?;
    let outcome = run::run(options).map_err(|error| {
        let status = match error {
            run::SetupError::TooSmall { .. } => Status::Usage,
            _ => Status::Conflict,
        };
        Told(status, error.to_string())
    })?;
    let report = serde_json::to_string_pretty(&Report::new(options, &outcome));
    println!("{}", report.map_err(|error| Told(Status::Failed, error.to_string()))?);
    if let Some(cause) = &outcome.lost {
        let hung = outcome.hung;
        return Err(Told(Status::Unusable, format!("{cause}; {hung} requests unanswered")));
    }
    let (errors, wrong) = (outcome.tally.errors, outcome.tally.verified.wrong());
    match errors + wrong {
        0 => Ok(()),
        _ => Err(Told(Status::Failed, format!("{errors} failed requests, {wrong} wrong blocks"))),
    }
}
