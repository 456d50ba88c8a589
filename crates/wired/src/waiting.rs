//! A process that waits, ready, for its migration: on a host whose kernel is about to die, no program
//! may start any more.
//!
//! ```text
//!   agent ──► stdin: {"log": "/run/…/wired.log", "arguments": ["source", "--migration=…", …]}\n
//!             or the end of stdin: it was not needed, and ends
//! ```
//!
//! Its memory is locked while it waits, so that nothing of the program has to be read then; and once
//! it is needed, it goes before the guests.

use std::io::{BufRead, BufReader, Read, stdin};
use std::path::PathBuf;

use clap::Parser;
use rustix::fs::{Mode, OFlags};
use rustix::mm::MlockAllFlags;
use rustix::process::{Resource, getrlimit};
use semper_program::{Status, Told};
use serde::Deserialize;

use crate::args::{Args, Command};

/// A thousand disks with long paths.
const LINE_MAX: u64 = 8 << 20;
const NICE: i32 = -10;

/// What the agent asks of a process that waits.
#[derive(Debug, Deserialize, PartialEq)]
struct Order {
    /// Where it writes its log from now on.
    log: PathBuf,
    /// Its command line, without the name of the program.
    arguments: Vec<String>,
}

/// Waits; gives the command line, or nothing when the agent does not need the process any more.
pub(crate) fn wait() -> Result<Option<Args>, Told> {
    // Neither is needed for a migration: a host may not allow them.
    let _ = rustix::mm::mlockall(MlockAllFlags::CURRENT);
    // Under a limit, which binds once the capabilities are given up, no thread could be made then.
    if getrlimit(Resource::Memlock).current.is_none() {
        let _ = rustix::mm::mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT);
    }
    let mut line = String::new();
    let read = BufReader::new(stdin().take(LINE_MAX))
        .read_line(&mut line)
        .map_err(|error| usage(format!("stdin cannot be read: {error}")))?;
    if read == 0 {
        return Ok(None);
    }
    let order = parse(&line)?;
    write_to(&order.log)?;
    let _ = rustix::process::setpriority_process(None, NICE);
    command(order.arguments).map(Some)
}

fn parse(line: &str) -> Result<Order, Told> {
    if !line.ends_with('\n') {
        return Err(usage("the line on stdin has no end".into()));
    }
    serde_json::from_str(line)
        .map_err(|error| usage(format!("the line on stdin is not understood: {error}")))
}

fn command(arguments: Vec<String>) -> Result<Args, Told> {
    let whole = std::iter::once("semper-wired".to_owned()).chain(arguments);
    let args = Args::try_parse_from(whole).map_err(|error| usage(error.to_string()))?;
    match args.command {
        Command::Wait => Err(usage("it waits already".into())),
        Command::Source(_) | Command::Destination(_) => Ok(args),
    }
}

/// From now on stdout and stderr are at the end of that file.
fn write_to(log: &PathBuf) -> Result<(), Told> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
    let failed = |error| usage(format!("{} cannot be opened: {error}", log.display()));
    let file = rustix::fs::open(log, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    rustix::stdio::dup2_stdout(&file).map_err(failed)?;
    rustix::stdio::dup2_stderr(&file).map_err(failed)
}

fn usage(why: String) -> Told {
    Told(Status::Usage, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_one_line() {
        let line = "{\"log\": \"/x\", \"arguments\": [\"source\"]}\n";
        let order = Order { log: "/x".into(), arguments: vec!["source".into()] };
        assert_eq!(parse(line), Ok(order));
        for wrong in ["", "{}\n", "[]\n", "{\"log\": \"/x\"}\n", line.trim_end()] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn it_becomes_an_end_of_a_migration_and_nothing_else() {
        let source = [
            "source",
            "--migration=m",
            "--ca=/ca",
            "--cert=/c",
            "--key=/k",
            "--peer-name=b",
            "--qemu-socket=/s",
            "--connect=127.0.0.1:1",
        ];
        assert!(command(source.map(str::to_owned).into()).is_ok());
        assert!(command(vec!["wait".into()]).is_err());
        assert!(command(vec!["source".into()]).is_err());
        assert!(command(vec!["--help".into()]).is_err());
    }
}
