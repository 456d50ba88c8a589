//! What the destination's backends are told: which blocks the guest has used.
//!
//! A backend that has just begun knows none, and the next move of this guest would find nothing to
//! refer to. What was referred to in this one was used. It is a hint: nothing is believed of it.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use semper_wire::BlockRef;
use serde_json::json;

use crate::args::MapSource;
use crate::disks::Disk;

/// Runs that are remembered.
const MAX_RUNS: usize = 4 << 20;
/// Runs of one request, which has to fit into a line of 64 KiB.
const TOLD: usize = 1024;
const PATIENCE: Duration = Duration::from_secs(2);

/// The blocks that were referred to.
#[derive(Debug)]
pub(crate) struct Touched {
    /// Control sockets, by disk.
    backends: Vec<Option<PathBuf>>,
    runs: Mutex<Vec<(BlockRef, u64)>>,
}

impl Touched {
    /// Of these disks.
    pub(crate) fn new(disks: &[Option<Disk>]) -> Self {
        let backend = |disk: &Option<Disk>| match disk.as_ref()?.map.as_ref()? {
            MapSource::Backend(socket) => Some(socket.clone()),
            MapSource::File(_) => None,
        };
        Self { backends: disks.iter().map(backend).collect(), runs: Mutex::default() }
    }

    pub(crate) fn add(&self, first: BlockRef, count: u64) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let last = runs.last_mut().filter(|(last, length)| follows(*last, *length, first));
        if let Some((_, length)) = last {
            *length += count;
            return;
        }
        if runs.len() < MAX_RUNS {
            runs.push((first, count));
        }
    }

    /// Tells every backend.
    pub(crate) fn tell(&self, connect: impl Fn(&Path) -> io::Result<UnixStream>) {
        for (number, socket) in (0..).zip(&self.backends) {
            let Some(socket) = socket else { continue };
            let runs = self.of(number);
            let path = socket.display();
            match connect(socket).and_then(|socket| send(&socket, &runs)) {
                Ok(()) => log::info!("told which blocks were used path={path} runs={}", runs.len()),
                Err(why) => log::warn!("a backend was not told path={path} error=\"{why}\""),
            }
        }
    }

    /// Runs of a disk, in order, each block once.
    fn of(&self, number: u16) -> Vec<(u64, u64)> {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let of = runs.iter().filter(|(first, _)| first.disk == number);
        let mut of: Vec<(u64, u64)> = of.map(|(first, count)| (first.block, *count)).collect();
        of.sort_unstable();
        of.dedup_by(|next, run| {
            let joins = next.0 <= run.0 + run.1;
            if joins {
                run.1 = run.1.max(next.0 + next.1 - run.0);
            }
            joins
        });
        of
    }
}

fn follows(last: BlockRef, length: u64, first: BlockRef) -> bool {
    last.disk == first.disk && last.block + length == first.block
}

fn send(mut socket: &UnixStream, runs: &[(u64, u64)]) -> io::Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut answers = BufReader::new(socket);
    for runs in runs.chunks(TOLD) {
        let request = json!({"id": 1, "cmd": "map-touch", "runs": runs});
        socket.write_all(format!("{request}\n").as_bytes())?;
        answers.read_line(&mut String::new())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_by_disk() {
        let touched = Touched::new(&[]);
        let at = |disk, block| BlockRef { disk, block };
        for (first, count) in [(at(0, 7), 3), (at(0, 10), 1), (at(1, 11), 1), (at(0, 2), 2)] {
            touched.add(first, count);
        }
        touched.add(at(0, 3), 5);
        assert_eq!(touched.of(0), [(2, 9)]);
        assert_eq!((touched.of(1), touched.of(2)), (vec![(11, 1)], vec![]));
    }
}
