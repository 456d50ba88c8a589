//! Writes a saved state: beside its place first, and put there when all of it is durable.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{SeekFrom, seek};
use serde_json::Value;

use crate::answers::Figures;
use crate::chunk::{self, Counts};
use crate::description::{Described, Description};
use crate::format::{self, Entry, HEADER, Header};
use crate::image::{Blocks, Image};
use crate::{CHUNK, Error, PAGE, Progress};

/// What is to be saved.
#[derive(Debug)]
pub struct Order<'a> {
    /// The guest's memory, as a file.
    pub memory: &'a Path,
    /// The state of the devices, as QEMU wrote it.
    pub state: &'a Path,
    /// The agent's part of the description.
    pub vm: Value,
    /// The disks.
    pub images: &'a [Image],
    /// Where the saved state is to stand.
    pub output: &'a Path,
    /// How many threads work.
    pub threads: usize,
}

/// Removes what was begun, unless it was finished.
struct Part(Option<PathBuf>);

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// Saves. Nothing stands at `order.output` unless all of it does.
pub fn save(order: &Order<'_>, progress: Progress<'_>) -> Result<Figures, Error> {
    let writing = || format!("write {}", order.output.display());
    let name = order.output.file_name().ok_or_else(|| Error::Invalid("name a file".into()))?;
    let name = format!(".{}.{}.part", name.to_string_lossy(), std::process::id());
    let scratch = order.output.with_file_name(name);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&scratch)
        .map_err(Error::io(writing()))?;
    let mut part = Part(Some(scratch.clone()));

    let mut blocks = Blocks::default();
    let mut images = Vec::new();
    for (number, image) in order.images.iter().enumerate() {
        let number = u8::try_from(number).map_err(|_| Error::Invalid("too many disks".into()))?;
        image.sync()?;
        let identity = blocks.enter(number, image)?;
        images.push(Described { name: image.name.clone(), path: image.path.clone(), identity });
    }
    let description = Description { vm: order.vm.clone(), images };
    let description = serde_json::to_vec(&description).expect("no map has other keys than strings");
    let state = fs::read(order.state).map_err(Error::io("read the state of the devices"))?;
    if description.len() > format::DESCRIPTION_MAX || state.len() as u64 > format::STATE_MAX {
        return Err(Error::Invalid("the VM is too large to be described".into()));
    }
    let begin = (HEADER + description.len() + state.len()) as u64;
    let chunks = Chunks::open(order.memory, begin)?;
    chunks.work(order, &file, &blocks, progress)?;

    let entries = chunks.entries.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut index = Vec::with_capacity(entries.len() * format::ENTRY);
    entries.iter().for_each(|entry| entry.write(&mut index));
    let mut header = Header {
        memory: chunks.size,
        description: description.len() as u32,
        state: state.len() as u64,
        index: chunks.end.into_inner(),
        hash: [0; 16],
    };
    header.hash = format::hash_parts(&header.write(), &description, &state, &index);
    file.write_all_at(&index, header.index).map_err(Error::io(writing()))?;
    (&file)
        .write_all(&[&header.write()[..], &description, &state].concat())
        .and_then(|()| file.sync_all())
        .map_err(Error::io(writing()))?;
    fs::rename(&scratch, order.output).map_err(Error::io(writing()))?;
    part.0 = None;
    let folder = order.output.parent().filter(|path| !path.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io(writing()))?;
    let counts = chunks.counts.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Figures {
        memory: header.memory,
        file: header.index + index.len() as u64,
        zero_pages: counts.zero,
        block_pages: counts.block,
        data_pages: counts.data,
    })
}

/// The chunks, for several threads.
struct Chunks {
    memory: File,
    size: u64,
    /// Where there may be something else than zeros, as ends of ranges.
    data: Vec<(u64, u64)>,
    next: AtomicU64,
    /// Where the next body goes.
    end: AtomicU64,
    done: AtomicU64,
    entries: Mutex<Vec<Entry>>,
    counts: Mutex<Counts>,
}

impl Chunks {
    fn open(path: &Path, begin: u64) -> Result<Self, Error> {
        let doing = || format!("read the memory {}", path.display());
        let memory = File::open(path).map_err(Error::io(doing()))?;
        let size = memory.metadata().map_err(Error::io(doing()))?.len();
        if size == 0 || size % CHUNK as u64 != 0 {
            return Err(Error::Invalid(format!(
                "memory of {size} bytes is no whole number of chunks"
            )));
        }
        let (mut data, mut at) = (Vec::new(), 0);
        while at < size {
            let Ok(from) = seek(memory.as_fd(), SeekFrom::Data(at)) else { break };
            let to = seek(memory.as_fd(), SeekFrom::Hole(from)).unwrap_or(size);
            data.push((from, to));
            at = to;
        }
        Ok(Self {
            memory,
            size,
            data,
            next: AtomicU64::new(0),
            end: AtomicU64::new(begin),
            done: AtomicU64::new(0),
            entries: Mutex::new(vec![Entry::ZEROS; (size / CHUNK as u64) as usize]),
            counts: Mutex::default(),
        })
    }

    fn work(
        &self,
        order: &Order<'_>,
        file: &File,
        blocks: &Blocks,
        progress: Progress<'_>,
    ) -> Result<(), Error> {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..order.threads.max(1))
                .map(|_| scope.spawn(|| self.pack(order, file, blocks, progress)))
                .collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().expect("a worker does not panic"))
        })
    }

    fn pack(
        &self,
        order: &Order<'_>,
        file: &File,
        blocks: &Blocks,
        progress: Progress<'_>,
    ) -> Result<(), Error> {
        let (mut pages, mut scratch) = (vec![0; CHUNK], vec![0; PAGE]);
        let mut counts = Counts::default();
        loop {
            let number = self.next.fetch_add(1, Relaxed);
            let offset = number * CHUNK as u64;
            if offset >= self.size {
                break;
            }
            if self.has_data(offset) {
                let reading = Error::io("read the memory");
                self.memory.read_exact_at(&mut pages, offset).map_err(reading)?;
                let find = |page: &[u8]| blocks.find(page, order.images, &mut scratch);
                let packed = chunk::pack(&pages, find);
                self.keep(number, &packed, file, order.output)?;
                counts.zero += packed.counts.zero;
                counts.block += packed.counts.block;
                counts.data += packed.counts.data;
            } else {
                counts.zero += (CHUNK / PAGE) as u64;
            }
            progress(self.done.fetch_add(CHUNK as u64, Relaxed) + CHUNK as u64);
        }
        let mut all = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        all.zero += counts.zero;
        all.block += counts.block;
        all.data += counts.data;
        Ok(())
    }

    fn has_data(&self, offset: u64) -> bool {
        let later = self.data.partition_point(|(_, to)| *to <= offset);
        self.data.get(later).is_some_and(|(from, _)| *from < offset + CHUNK as u64)
    }

    fn keep(
        &self,
        number: u64,
        packed: &chunk::Packed,
        file: &File,
        output: &Path,
    ) -> Result<(), Error> {
        if packed.body.is_empty() {
            return Ok(());
        }
        let offset = self.end.fetch_add(packed.body.len() as u64, Relaxed);
        file.write_all_at(&packed.body, offset)
            .map_err(Error::io(format!("write {}", output.display())))?;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries[number as usize] = Entry { offset, ..packed.entry };
        Ok(())
    }
}
