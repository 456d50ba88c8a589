//! Reads a saved state: the description first, and the memory when the disks are as they were.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::chunk;
use crate::description::Description;
use crate::format::{self, BODY_MAX, ENTRY, Entry, HEADER, Header, Kind};
use crate::image::{Image, open_file};
use crate::{CHUNK, CHUNK_PAGES, Error, PAGE, Progress};

/// A saved state whose parts, except the chunks, have been read and verified.
#[derive(Debug)]
pub struct Saved {
    /// What it says about itself.
    pub description: Description,
    /// The state of the devices, for QEMU.
    pub state: Vec<u8>,
    /// The fixed part.
    pub header: Header,
    entries: Vec<Entry>,
    file: File,
}

impl Saved {
    /// Reads and verifies all but the chunks.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let reading = || format!("read {}", path.display());
        let file = open_file(path).map_err(Error::io(reading()))?;
        let size = file.metadata().map_err(Error::io(reading()))?.len();
        let mut head = vec![0; HEADER.min(size as usize)];
        let read =
            |bytes: &mut [u8], at: u64| file.read_exact_at(bytes, at).map_err(Error::io(reading()));
        read(&mut head, 0)?;
        let header = Header::read(&head, size)?;
        // The file is at least as large as these together.
        let mut description = vec![0; header.description as usize];
        let mut state = vec![0; header.state as usize];
        let mut index = vec![0; header.chunks() as usize * ENTRY];
        read(&mut description, HEADER as u64)?;
        read(&mut state, (HEADER + description.len()) as u64)?;
        read(&mut index, header.index)?;
        if format::hash_parts(&header.write(), &description, &state, &index) != header.hash {
            return Err(Error::Corrupt("its parts do not fit together".into()));
        }
        let entries = index
            .as_chunks_of_entries()
            .map(|bytes| Entry::read(bytes, &header))
            .collect::<Result<_, _>>()?;
        let description = serde_json::from_slice(&description)
            .map_err(|error| Error::Corrupt(format!("its description: {error}")))?;
        Ok(Self { description, state, header, entries, file })
    }

    /// Writes the memory to `memory`, which holds nothing yet and has its size.
    ///
    /// `images` are the disks in the order of the description; whether they are in its state has
    /// to be checked before. Each chunk is verified.
    pub fn unpack(
        &self,
        memory: &File,
        images: &[Image],
        threads: usize,
        progress: Progress<'_>,
    ) -> Result<(), Error> {
        let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let work = || {
            let (mut body, mut pages) = (vec![0; BODY_MAX], vec![0; CHUNK]);
            loop {
                let number = next.fetch_add(1, Relaxed);
                let Some(entry) = self.entries.get(number as usize) else { return Ok(()) };
                let offset = number * CHUNK as u64;
                if let Err(error) = self.chunk(entry, images, memory, offset, &mut body, &mut pages)
                {
                    next.store(u64::MAX / 2, Relaxed); // the others need not go on
                    return Err(error);
                }
                progress(done.fetch_add(CHUNK as u64, Relaxed) + CHUNK as u64);
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().expect("a worker does not panic"))
        })
    }

    fn chunk(
        &self,
        entry: &Entry,
        images: &[Image],
        memory: &File,
        offset: u64,
        body: &mut [u8],
        pages: &mut [u8],
    ) -> Result<(), Error> {
        if entry.kind == Kind::Zeros {
            return Ok(());
        }
        let body = &mut body[..entry.length as usize];
        self.file.read_exact_at(body, entry.offset).map_err(Error::io("read a chunk"))?;
        let zeros = chunk::unpack(entry, body, pages, |block, target| {
            images
                .get(usize::from(block.image))
                .ok_or_else(|| Error::Corrupt("a block of a disk that it does not name".into()))?
                .read(block.block, target)
        })?;
        let mut first = 0;
        while first < CHUNK_PAGES {
            let rest = zeros >> first;
            let count = (rest.trailing_zeros() as usize).min(CHUNK_PAGES - first);
            if count == 0 {
                first += 1;
                continue;
            }
            memory
                .write_all_at(
                    &pages[first * PAGE..][..count * PAGE],
                    offset + (first * PAGE) as u64,
                )
                .map_err(Error::io("write the memory"))?;
            first += count;
        }
        Ok(())
    }
}

/// Entries, one after the other.
trait Entries {
    fn as_chunks_of_entries(&self) -> impl Iterator<Item = &[u8; ENTRY]>;
}

impl Entries for Vec<u8> {
    fn as_chunks_of_entries(&self) -> impl Iterator<Item = &[u8; ENTRY]> {
        self.chunks_exact(ENTRY).filter_map(|bytes| bytes.try_into().ok())
    }
}
