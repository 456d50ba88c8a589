//! `semper-saved`: writes and reads saved states. The agent is who calls it.
//!
//! What it has done comes as one JSON line on stdout, after lines {"done": bytes, "of": bytes}.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use semper_program::Program;
use semper_saved::answers::{Done, Restored, Shown};
use semper_saved::image::Image;
use semper_saved::restore::Saved;
use semper_saved::save::{Order, save};
use semper_saved::{Error, Progress};
use semper_walls::{Access, Standing, Walls};
use serde::Serialize;
use serde_json::json;

/// Writes and reads saved states of VMs: memory in which blocks of disks are named, not held.
#[derive(Parser)]
#[command(name = "semper-saved", version, about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Save the memory and the devices of a paused VM
    Save {
        /// The guest's memory, as a file
        #[arg(long)]
        memory: PathBuf,
        /// The state of the devices, as QEMU wrote it
        #[arg(long)]
        state: PathBuf,
        /// A JSON file about the VM
        #[arg(long)]
        vm: PathBuf,
        /// A disk of the VM; repeat it for each
        #[arg(long, value_name = "NAME=PATH", value_parser = named)]
        image: Vec<(String, PathBuf)>,
        /// Where the saved state is to stand; what is there is replaced at the end
        #[arg(long)]
        output: PathBuf,
    },
    /// Read a saved state into memory, if the disks are in the state that it belongs to
    Restore {
        /// The saved state
        #[arg(long)]
        file: PathBuf,
        /// The memory, a file of the right size with nothing in it
        #[arg(long)]
        memory: PathBuf,
        /// Where the state of the devices goes
        #[arg(long)]
        state: PathBuf,
        /// Another image for a disk
        #[arg(long, value_name = "NAME=PATH", value_parser = named)]
        image: Vec<(String, PathBuf)>,
    },
    /// Print what a saved state says about itself, as JSON
    Show {
        /// The saved state
        file: PathBuf,
    },
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=PATH")?;
    Ok((name.to_owned(), path.into()))
}

fn main() -> ExitCode {
    let mut command = Args::parse().command;
    if !matches!(command, Command::Show { .. }) {
        hurry();
    }
    // Which processors there are cannot be read behind walls.
    let threads = threads();
    let memory = own_memory(&mut command);
    raise_walls(&command, memory.as_ref());
    #[cfg(feature = "breakout")]
    semper_walls::breakout::try_if_told();
    PROGRAM.end(run(command, threads))
}

const PROGRAM: Program = Program("semper-saved");

/// The memory may be another process's to name (/proc/PID/fd/N), which nobody can do behind walls: it
/// is opened before them, and then called by a descriptor of this process. What cannot be opened is
/// told when it is to be used.
fn own_memory(command: &mut Command) -> Option<File> {
    let (path, write) = match command {
        Command::Save { memory, .. } => (memory, false),
        Command::Restore { memory, .. } => (memory, true),
        Command::Show { .. } => return None,
    };
    let file = OpenOptions::new().read(true).write(write).open(&path).ok()?;
    *path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    Some(file)
}

/// What is opened from now on, as the command line has it. What a saved state says is read behind
/// walls; but it names the disks, so that files can still be read until these are open.
fn raise_walls(command: &Command, memory: Option<&File>) {
    let mut walls = Walls::new(semper_walls::Program::Saved);
    let folder = |path: &Path| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        parent.unwrap_or(Path::new(".")).to_owned()
    };
    match command {
        Command::Save { state, vm, image, output, .. } => {
            for path in [state, vm].into_iter().chain(image.iter().map(|(_, path)| path)) {
                walls = walls.path(path, Access::Read);
            }
            let layers = image.iter().flat_map(|(_, path)| semper_layers::disk::places(path));
            for place in layers {
                walls = walls.path(&place, Access::Read);
            }
            walls = walls.path(&folder(output), Access::Keep);
        }
        Command::Restore { state, .. } => {
            walls = walls
                .path(Path::new("/"), Access::Read)
                .any_owner()
                .path(&folder(state), Access::Keep);
        }
        Command::Show { file } => walls = walls.path(file, Access::Read),
    }
    if let Some(memory) = memory {
        walls = walls.file(memory, Access::Write);
    }
    warn(&walls.raise());
}

/// On stderr, where the agent keeps it.
fn warn(standing: &Standing) {
    if !standing.missing.is_empty() {
        eprintln!("{}: walls are missing: {}", PROGRAM.0, standing.missing);
    }
}

/// A guest stands still until this is done: goes before others, where that may be decided. Where
/// the kernel shares out processors among sessions first, it takes a session of its own.
fn hurry() {
    const NICE: i32 = -10;
    let _ = rustix::process::setsid();
    let _ = fs::write("/proc/self/autogroup", NICE.to_string());
    let _ = rustix::process::nice(NICE);
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get().min(8))
}

/// Says how far the work is, ten times a second.
struct Reporter {
    of: u64,
    last: Mutex<Instant>,
}

impl Reporter {
    fn new(of: u64) -> Self {
        Self { of, last: Mutex::new(Instant::now()) }
    }

    fn report(&self, done: u64) {
        let Ok(mut last) = self.last.try_lock() else { return };
        if last.elapsed() >= Duration::from_millis(100) {
            *last = Instant::now();
            say(&Done { done, of: self.of });
        }
    }
}

/// A line on stdout; nobody who reads it is no reason to stop.
fn say(value: &impl Serialize) {
    let _ = writeln!(std::io::stdout().lock(), "{}", json!(value));
}

fn run(command: Command, threads: usize) -> Result<(), Error> {
    match command {
        Command::Save { memory, state, vm, image, output } => {
            let vm = fs::read(&vm).map_err(Error::io("read the description"))?;
            let vm = serde_json::from_slice(&vm)
                .map_err(|error| Error::Invalid(format!("the description: {error}")))?;
            let images = image
                .iter()
                .map(|(name, path)| Image::open(name, path))
                .collect::<Result<Vec<_>, _>>()?;
            let size = fs::metadata(&memory).map_or(0, |data| data.len());
            let reporter = Reporter::new(size);
            let progress: Progress<'_> = &|done| reporter.report(done);
            let order = Order {
                memory: &memory,
                state: &state,
                vm,
                images: &images,
                output: &output,
                threads,
            };
            say(&save(&order, progress)?);
        }
        Command::Restore { file, memory, state, image } => {
            restore(&file, &memory, &state, &image, threads)?
        }
        Command::Show { file } => {
            let saved = Saved::open(&file)?;
            let size = fs::metadata(&file).map_or(0, |data| data.len());
            say(&Shown {
                memory: saved.header.memory,
                file: size,
                state: saved.header.state,
                description: &saved.description,
            });
        }
    }
    Ok(())
}

fn restore(
    file: &Path,
    memory: &Path,
    state: &Path,
    others: &[(String, PathBuf)],
    threads: usize,
) -> Result<(), Error> {
    let saved = Saved::open(file)?;
    let mut images = Vec::new();
    for described in &saved.description.images {
        let other = others.iter().find(|(name, _)| *name == described.name);
        let path = other.map_or(&described.path, |(_, path)| path);
        let image = Image::open(&described.name, path)?;
        image.check(&described.identity)?;
        images.push(image);
    }
    fs::write(state, &saved.state).map_err(Error::io("write the state of the devices"))?;
    let target = open_memory(memory)?;
    let size = target.metadata().map_err(Error::io("look at the memory"))?.len();
    if size != saved.header.memory {
        return Err(Error::Invalid(format!(
            "the memory has {size} bytes, the saved state {}",
            saved.header.memory
        )));
    }
    // Everything is open.
    warn(&Walls::new(semper_walls::Program::Saved).narrow());
    let reporter = Reporter::new(size);
    saved.unpack(&target, &images, threads, &|done| reporter.report(done))?;
    say(&Restored { memory: size });
    Ok(())
}

fn open_memory(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(Error::io(format!("open {}", path.display())))
}
