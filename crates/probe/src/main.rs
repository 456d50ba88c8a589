//! The program: PID 1 of a guest, a service of one, or one of the subcommands on a host.

use std::process::ExitCode;

use semper_probe::init;
use semper_program::{Program, Status, Told};

mod host;

/// Under this name it fails.
const PROGRAM: Program = Program("semper-probe");

const USAGE: &str = "\
usage: semper-probe init                     (as PID 1 of a guest; /init in its image)
       semper-probe service                  (in a guest that has another PID 1)
       semper-probe serve --socket PATH      (the guest's commands, on a host, for tests)
       semper-probe write --device FILE [--seconds N] [--writers N] [--depth N] [--block-size N]
                          [--span-bytes N] [--mode write|mixed|read] [--flush-every N] [--seed N]
       semper-probe --version";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["--version"] => {
            println!("semper-probe {}", env!("CARGO_PKG_VERSION"));
            Ok(true)
        }
        ["--help"] => {
            println!("{USAGE}");
            Ok(true)
        }
        ["service"] => init::serve().map(|never| match never {}),
        ["serve", "--socket", path] => host::serve(path),
        ["write", options @ ..] => host::write(options),
        _ => {
            eprintln!("{USAGE}");
            return Status::Usage.into();
        }
    };
    PROGRAM.end(match done {
        Ok(true) => Ok(()),
        // What is wrong stands in the figures.
        Ok(false) => return Status::Failed.into(),
        Err(error) => Err(Told(Status::Failed, error.to_string())),
    })
}
