//! A disk written to a file of its own: one raw image, with holes where the disk has zeros. Of a disk that
//! is served a snapshot; of one that nobody serves and nobody has claimed, all that is on the medium.
//!
//! ```text
//!   pin (or lock) ─► TARGET.READER.partial: blocks of the chain, zeros left out ─► flush ─► TARGET ─► unpin
//! ```
//!
//! The target is complete and on the medium, or not there; nothing is overwritten. On stdout is a line
//! `{"done":…,"total":…}` (bytes) now and then, and `{"size_bytes":…,"data_bytes":…}` at the end.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use semper_block::Image;
use semper_epoch::check_unclaimed;
use semper_layers::BLOCK;
use semper_layers::chain::{Chain, Source};
use semper_layers::disk::{Disk, places};
use semper_layers::files::Files;
use semper_layers::keeper::{LayersError, set_pin};
use semper_layers::reader;
use semper_layers::record::{Pin, Refused};
use semper_walls::{Access, Program, Walls};
use serde_json::json;

use crate::args::Args;
use crate::failure::{Failure, system};

/// What is read at once.
const STEP: u64 = 1 << 20;
/// Blocks of one kind that are looked for at once.
const LOOK: u64 = 1 << 18;
const TELL_EVERY: Duration = Duration::from_millis(200);

/// Writes the snapshot that `args` name, or the whole disk, to `target`.
pub(crate) fn run(args: &Args, target: &Path) -> Result<(), Failure> {
    let image = args.blk_file.as_deref().ok_or_else(|| {
        Failure::Usage("no image was given; name one with --blk-file=IMAGE".to_owned())
    })?;
    let base = File::open(image).map_err(system("open the image"))?;
    let size =
        seek(&base, SeekFrom::End(0)).map_err(|e| system("find the image's size")(e.into()))?;
    let kept = base.try_clone().map_err(system("open the image"))?;
    let files = Disk::for_reading(image, kept, false).map_err(system("find the layers"))?;
    raise_walls(image, target).map_err(system("find the image's directory"))?;
    let write = |chain: &Chain, reader: &str| {
        let partial = beside(target, &format!(".{reader}.partial"));
        write(chain, &base, (&partial, target)).map_err(system("write the disk to its file"))
    };
    let (size_bytes, data_bytes) = match args.snapshot.zip(args.reader.clone()) {
        Some((snapshot, reader)) => {
            let pin = Pin { snapshot, reader };
            // Before anything is read of it.
            set_pin(&files, pin.clone(), true).map_err(Failure::Layers)?;
            let written = reader::open(&files, Some(snapshot), size)
                .map_err(Failure::Layers)
                .and_then(|chain| chain.ok_or_else(|| missing(snapshot)))
                .and_then(|chain| write(&chain, &pin.reader.to_string()));
            let unpinned = set_pin(&files, pin, false).map_err(Failure::Layers);
            written.and_then(|written| unpinned.map(|_| written))?
        }
        None => {
            let options =
                semper_block::OpenOptions { read_only: false, direct: false, block_size: None };
            let locked = Image::open(image, options).map_err(Failure::Image)?;
            locked.try_lock().map_err(Failure::Lock)?;
            check_unclaimed(image).map_err(Failure::Denied)?;
            let chain = reader::open(&files, None, size).map_err(Failure::Layers)?;
            let chain = match chain {
                Some(chain) => chain,
                None => Arc::new(Chain::of_image(files.base(), size)),
            };
            write(&chain, "whole")?
        }
    };
    println!("{}", json!({"size_bytes": size_bytes, "data_bytes": data_bytes}));
    Ok(())
}

/// What is opened from now on: layers and their maps, the records of layers and of claims, the target.
fn raise_walls(image: &Path, target: &Path) -> io::Result<()> {
    let image = image.canonicalize()?;
    let folder = |path: &Path| path.parent().unwrap_or(Path::new(".")).to_owned();
    let mut walls =
        Walls::new(Program::Export).path(&image, Access::Write).path(&folder(target), Access::Keep);
    for place in places(&image) {
        // The pin is written there.
        let access = if place.is_dir() { Access::Keep } else { Access::Read };
        walls = walls.path(&place, access);
    }
    let standing = walls.raise();
    if !standing.missing.is_empty() {
        log::warn!("walls are missing: {}", standing.missing);
    }
    Ok(())
}

fn missing(snapshot: u64) -> Failure {
    Failure::Layers(LayersError::from(Refused::Missing(snapshot)))
}

fn write(chain: &Chain, base: &File, (partial, target): (&Path, &Path)) -> io::Result<(u64, u64)> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(partial)?;
    let written = copy(chain, base, &file).and_then(|data| {
        file.sync_all()?;
        put_in_place(partial, target)?;
        Ok((chain.size, data))
    });
    // Under the other name it is the target, unless something failed.
    let _ = fs::remove_file(partial);
    written
}

/// Gives a file that was flushed its name, unless something has that name by now, and flushes the name;
/// as `sempervirt.disk.target` does. `partial` may be there afterwards.
fn put_in_place(partial: &Path, target: &Path) -> io::Result<()> {
    match fs::hard_link(partial, target) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(error),
        // A file system without hard links.
        Err(_) if fs::symlink_metadata(target).is_ok() => {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        Err(_) => fs::rename(partial, target)?,
    }
    flush_directory(target)
}

/// Copies what is not zeros; returns the bytes.
fn copy(chain: &Chain, base: &File, to: &File) -> io::Result<u64> {
    to.set_len(chain.size)?;
    let mut piece = vec![0; STEP as usize];
    let (mut at, mut copied, mut told) = (0, 0, Instant::now());
    while at < chain.size {
        let first = at / BLOCK;
        let last = ((chain.size - 1) / BLOCK).min(first + LOOK - 1);
        let (source, count) = chain.run(first, last);
        let end = ((first + count) * BLOCK).min(chain.size);
        while at < end {
            if told.elapsed() >= TELL_EVERY {
                println!("{}", json!({"done": at, "total": chain.size}));
                told = Instant::now();
            }
            let (from, until) = match source {
                Source::Zeros => (end, end),
                Source::Base => next_data(base, at, end)?,
                Source::Layer(_) => (at, end),
            };
            let until = until.min(from + STEP);
            let part = &mut piece[..(until - from) as usize];
            chain.read_at(part, from)?;
            copied += write_data(to, part, from)?;
            at = until;
        }
    }
    Ok(copied)
}

/// Where the image has data next, from `at` on: a range that ends by `end`, empty if there is none.
fn next_data(base: &File, at: u64, end: u64) -> io::Result<(u64, u64)> {
    match seek(base.as_fd(), SeekFrom::Data(at)) {
        Ok(data) if data >= end => Ok((end, end)),
        // A hole that ends within a block: the block is read whole.
        Ok(data) => {
            let hole = seek(base.as_fd(), SeekFrom::Hole(data))?;
            let from = (data / BLOCK * BLOCK).max(at);
            Ok((from, hole.next_multiple_of(BLOCK).min(end)))
        }
        Err(Errno::NXIO) => Ok((end, end)),
        // A file system that does not tell.
        Err(Errno::INVAL) => Ok((at, end)),
        Err(error) => Err(error.into()),
    }
}

/// Writes those blocks of `part` that are not zeros, in runs.
fn write_data(to: &File, part: &[u8], offset: u64) -> io::Result<u64> {
    let (mut written, mut begun) = (0, None);
    let blocks = part.len().div_ceil(BLOCK as usize);
    for n in 0..=blocks {
        let from = n * BLOCK as usize;
        let block = &part[from.min(part.len())..(from + BLOCK as usize).min(part.len())];
        if block.iter().any(|byte| *byte != 0) {
            begun.get_or_insert(from);
        } else if let Some(first) = begun.take() {
            let end = from.min(part.len());
            to.write_all_at(&part[first..end], offset + first as u64)?;
            written += (end - first) as u64;
        }
    }
    Ok(written)
}

fn flush_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(ending);
    path.into()
}
