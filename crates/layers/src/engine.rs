//! A decorator of any engine: it chooses the file of a request, and does in parts what lies in several.
//!
//! | request | goes to |
//! |---|---|
//! | read | the file that has each block: what lies together is a part, and all parts are under way at the same time |
//! | write | the highest layer. A block that it has not as data and that is written in part is completed first: read from below, written as a whole |
//! | discard, write zeroes | the highest layer, in whole blocks; what it did not have reads as zeros from then on |
//! | flush | data of each file that may not be on the medium, then the maps |
//!
//! Bits are set after the data was written and before the request ends: after a death the bits tell of
//! all that was completed, and what was in flight is done again. Requests that write parts of one block
//! are kept apart by `Image::try_enter`.
//!
//! Without layers a request costs one look at a number.

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use semper_block::{Engine, FileEngine, Io, Op, Submission};

use crate::BLOCK;
use crate::bits::Have;
use crate::chain::{Chain, Current, Level, Look, Source};
use crate::keeper::Pages;
use crate::mistake::{Mistake, made};

/// Parts of a read that are under way at the same time; what is behind them is submitted afterwards.
const PARTS: usize = 32;
/// With so many requests under way nothing is gained by more, and the kernel has room for them.
const ENOUGH: usize = 256;
/// Where in a token the number of a part stands, plus one.
const PART_SHIFT: u32 = 48;

/// An engine that serves the chain of an image, if there is one.
pub struct LayeredEngine<E> {
    inner: E,
    current: Arc<Current>,
    version: u64,
    chain: Option<Arc<Chain>>,
    /// Requests of which a part is under way, or something is left to do.
    pending: HashMap<u64, Pending>,
    reaped: Vec<(u64, i32)>,
    /// Boxed: a request stays where it is from its submission on.
    #[allow(clippy::vec_box)]
    spare: Vec<Box<Io>>,
}

/// What is left to do of a request.
struct Pending {
    chain: Arc<Chain>,
    /// What was submitted, unless it is the caller's own.
    io: Option<Box<Io>>,
    next: Next,
}

enum Next {
    /// Parts of a read are under way.
    Gather(Box<Gather>),
    /// Blocks are to be noted that were written from `offset` on; `stable`: and brought to the medium.
    Note { offset: u64, stable: bool },
    /// Blocks are to be noted that read as zeros.
    NoteZeros { first: u64, count: u64 },
    /// The rest of a block is being read, `done` bytes so far.
    Load(Box<Part>),
    /// The block is being written, `done` bytes so far.
    Store(Box<Part>),
    /// Files are being flushed.
    Flush(Box<Flush>),
}

/// A block that is written in part.
struct Part {
    block: u64,
    page: Pages,
    /// The guest's bytes.
    bytes: Vec<u8>,
    /// Where in the block they begin.
    at: usize,
    source: Source,
    done: usize,
    stable: bool,
}

/// A read of several files.
struct Gather {
    /// Bytes that each part asks for, and what has become of it.
    parts: Vec<(u64, Option<i32>)>,
    /// What was submitted for those that are, or were, under way; boxed, as they stay where they are.
    #[allow(clippy::vec_box)]
    ios: Vec<Box<Io>>,
}

impl Gather {
    /// The result: up to the first part that is short or failed. Its rest is submitted again, so an error
    /// that is not the first part's is met then.
    fn result(&self) -> i32 {
        let mut moved = 0;
        for (len, result) in &self.parts {
            let result = result.unwrap_or(0);
            match u64::try_from(result) {
                Err(_) if moved == 0 => return result,
                Err(_) => break,
                Ok(done) => moved += done.min(*len),
            }
            if u64::try_from(result).is_ok_and(|done| done < *len) {
                break;
            }
        }
        result_of(moved)
    }
}

/// A flush of several files.
struct Flush {
    looks: Vec<(Arc<Level>, Look)>,
    /// Files that are still to be flushed, the next one last.
    files: Vec<File>,
    /// The maps are written.
    mapped: bool,
    /// What the request answers.
    result: i32,
}

#[derive(Clone, Copy)]
enum File {
    Base,
    Data(usize),
    Map(usize),
}

/// The next system call, or the end.
enum Turn {
    Submit(Box<Io>, Next),
    End(i32),
}

impl<E: FileEngine> LayeredEngine<E> {
    /// Around an engine of the image.
    pub fn new(inner: E, current: Arc<Current>) -> Self {
        Self {
            inner,
            current,
            version: 0,
            chain: None,
            pending: HashMap::new(),
            reaped: Vec::new(),
            spare: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(crate) fn inner(&mut self) -> &mut E {
        &mut self.inner
    }

    /// The chain has changed.
    #[cold]
    fn follow(&mut self) {
        // What was submitted names descriptors, which the old chain keeps open.
        if let Err(error) = self.inner.flush() {
            // Nothing can be submitted then; the caller's next flush says so.
            let _ = error;
        }
        self.version = self.current.version();
        self.chain = self.current.get();
    }

    /// Submits to a file of the chain.
    ///
    /// # Safety
    /// As [`Engine::submit`].
    unsafe fn to(&mut self, chain: &Chain, source: Source, token: u64, io: &Io) -> Submission {
        // SAFETY: the caller's promise, handed on; the chain keeps the descriptors open.
        unsafe {
            match source {
                Source::Layer(n) => self.inner.submit_to(&chain.levels[n].targets.0, token, io),
                Source::Base | Source::Zeros => self.inner.submit(token, io),
            }
        }
    }

    /// # Safety
    /// As [`Engine::submit`].
    unsafe fn read(&mut self, chain: &Arc<Chain>, token: u64, io: &Io) -> Submission {
        let end = io.offset + io.len;
        let (source, count) = chain.run(io.offset / BLOCK, (end - 1) / BLOCK);
        let len = ((io.offset / BLOCK + count) * BLOCK).min(end) - io.offset;
        if source == Source::Zeros {
            // SAFETY: the caller keeps the segments mapped.
            unsafe { fill_zeros(io, len) };
            return Submission::Done(result_of(len));
        }
        // SAFETY: the caller's promise, handed on.
        unsafe {
            match len == io.len {
                true => self.to(chain, source, token, io),
                false => self.gather(chain, token, io),
            }
        }
    }

    /// Reads what lies in several files.
    ///
    /// # Safety
    /// As [`Engine::submit`].
    unsafe fn gather(&mut self, chain: &Arc<Chain>, token: u64, io: &Io) -> Submission {
        let (mut at, end) = (io.offset, io.offset + io.len);
        let parts = Vec::with_capacity(PARTS);
        let mut gather = Box::new(Gather { parts, ios: Vec::new() });
        let mut part = self.spare.pop().unwrap_or_default();
        while at < end
            && gather.parts.len() < PARTS
            && (gather.parts.is_empty() || self.inner.in_flight() < ENOUGH)
        {
            let (source, count) = chain.run(at / BLOCK, (end - 1) / BLOCK);
            let len = ((at / BLOCK + count) * BLOCK).min(end) - at;
            io.begin_part(&mut part, at - io.offset, len);
            let token = token | (gather.parts.len() as u64 + 1) << PART_SHIFT;
            // SAFETY: the caller's promise, handed on; the part lives in `pending` until it was reaped.
            let submission = unsafe {
                match source {
                    Source::Zeros => {
                        fill_zeros(&part, len);
                        Submission::Done(result_of(len))
                    }
                    Source::Base | Source::Layer(_) => self.to(chain, source, token, &part),
                }
            };
            at += len;
            match submission {
                Submission::Queued => {
                    let next = self.spare.pop().unwrap_or_default();
                    gather.ios.push(std::mem::replace(&mut part, next));
                    gather.parts.push((len, None));
                }
                Submission::Done(result) => {
                    gather.parts.push((len, Some(result)));
                    if u64::try_from(result) != Ok(len) {
                        break;
                    }
                }
            }
        }
        self.give_back(Some(part));
        match gather.ios.is_empty() {
            true => Submission::Done(gather.result()),
            false => self.hold(chain, token, None, Next::Gather(gather)),
        }
    }

    /// A part of a read has ended; the read's result if it was the last.
    fn gathered(&mut self, token: u64, result: i32) -> Option<i32> {
        let (n, token) = ((token >> PART_SHIFT) as usize - 1, token & ((1 << PART_SHIFT) - 1));
        let Next::Gather(gather) = &mut self.pending.get_mut(&token)?.next else { return None };
        gather.parts.get_mut(n)?.1 = Some(result);
        if gather.parts.iter().any(|(_, result)| result.is_none()) {
            return None;
        }
        let (result, ios) = (gather.result(), std::mem::take(&mut gather.ios));
        self.pending.remove(&token);
        ios.into_iter().for_each(|io| self.give_back(Some(io)));
        Some(result)
    }

    /// Keeps what is under way.
    fn hold(
        &mut self,
        chain: &Arc<Chain>,
        token: u64,
        io: Option<Box<Io>>,
        next: Next,
    ) -> Submission {
        self.pending.insert(token, Pending { chain: Arc::clone(chain), io, next });
        Submission::Queued
    }

    /// Takes a submission into account: goes on with what is done, keeps what is under way.
    fn keep(
        &mut self,
        chain: &Arc<Chain>,
        io: Option<Box<Io>>,
        next: Next,
        token: u64,
        submission: Submission,
    ) -> Submission {
        match submission {
            Submission::Queued => self.hold(chain, token, io, next),
            Submission::Done(result) => self.go_on(chain, token, (io, next), result),
        }
    }

    /// # Safety
    /// As [`Engine::submit`].
    unsafe fn write(
        &mut self,
        chain: &Arc<Chain>,
        token: u64,
        io: &Io,
        stable: bool,
    ) -> Submission {
        let Some(top) = chain.top().cloned() else { return Submission::Done(-libc::EROFS) };
        let n = chain.levels.len() - 1;
        let (offset, end) = (io.offset, io.offset + io.len);
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let block_end = |block: u64| ((block + 1) * BLOCK).min(chain.size);
        let has = |block: u64| top.bits.get(block) == Have::Data;
        let whole_first = offset == first * BLOCK && end >= block_end(first);
        if !whole_first && !has(first) {
            let len = block_end(first).min(end) - offset;
            return self.complete(chain, (token, io, len as usize), stable);
        }
        let whole_last = last == first || end >= block_end(last) || has(last);
        let len = if whole_last { io.len } else { last * BLOCK - offset };
        let noted_last = (offset + len - 1) / BLOCK;
        let new = !(first..=noted_last).all(has);
        let unmapped = stable && (new || top.needs_map_of(first, noted_last));
        let target = Source::Layer(n);
        if !new && !unmapped && len == io.len {
            // SAFETY: the caller's promise, handed on; so below.
            return unsafe { self.to(chain, target, token, io) };
        }
        let part = (len < io.len).then(|| {
            let mut part = self.spare.pop().unwrap_or_default();
            io.begin_part(&mut part, 0, len);
            part
        });
        // SAFETY: see above; the part lives in `pending` until it was reaped.
        let submission = unsafe { self.to(chain, target, token, part.as_deref().unwrap_or(io)) };
        let next = Next::Note { offset, stable: unmapped };
        self.keep(chain, part, next, token, submission)
    }

    /// Begins the write of a part of a block that the highest layer has not as data.
    fn complete(
        &mut self,
        chain: &Arc<Chain>,
        (token, io, len): (u64, &Io, usize),
        stable: bool,
    ) -> Submission {
        let block = io.offset / BLOCK;
        let source = chain.source_below(block);
        let part = Part {
            block,
            page: Pages::new(1),
            bytes: gather(io, len),
            at: (io.offset % BLOCK) as usize,
            source,
            done: if source == Source::Zeros { BLOCK as usize } else { 0 },
            stable,
        };
        self.go_on(chain, token, (None, Next::Load(part.into())), 0)
    }

    /// # Safety
    /// As [`Engine::submit`].
    unsafe fn trim(&mut self, chain: &Arc<Chain>, token: u64, io: &Io) -> Submission {
        let end = io.offset + io.len;
        let whole = io.offset % BLOCK == 0 && (end % BLOCK == 0 || end >= chain.size);
        let (Some(n), true) = (chain.levels.len().checked_sub(1), whole) else {
            // The caller writes zeros then.
            return Submission::Done(-libc::EOPNOTSUPP);
        };
        // SAFETY: the caller's promise, handed on.
        let submission = unsafe { self.to(chain, Source::Layer(n), token, io) };
        let (first, count) = (io.offset / BLOCK, end.div_ceil(BLOCK) - io.offset / BLOCK);
        self.keep(chain, None, Next::NoteZeros { first, count }, token, submission)
    }

    /// # Safety
    /// As [`Engine::submit`].
    unsafe fn flush_all(&mut self, chain: &Arc<Chain>, token: u64, io: &Io) -> Submission {
        let Some(n) = chain.levels.len().checked_sub(1) else { return Submission::Done(0) };
        if chain.is_settled() && !chain.levels[n].needs_map() {
            // SAFETY: the caller's promise, handed on.
            return unsafe { self.to(chain, Source::Layer(n), token, io) };
        }
        self.go_on(chain, token, (None, Next::Flush(Flush::new(chain, 0))), 0)
    }

    /// A system call of the request ended: the next one, or the end.
    fn go_on(
        &mut self,
        chain: &Arc<Chain>,
        token: u64,
        (mut io, mut next): (Option<Box<Io>>, Next),
        mut result: i32,
    ) -> Submission {
        loop {
            let now = match self.turn(chain, io, next, result) {
                Turn::End(result) => return Submission::Done(result),
                Turn::Submit(now, then) => {
                    next = then;
                    now
                }
            };
            // SAFETY: the memory that `now` names is in `pending` until it was reaped; the chain keeps the
            // descriptors open.
            let submission = unsafe {
                match &next {
                    Next::Load(part) => match part.source {
                        Source::Layer(n) => {
                            self.inner.submit_to(&chain.levels[n].targets.0, token, &now)
                        }
                        Source::Base | Source::Zeros => self.inner.submit(token, &now),
                    },
                    Next::Flush(flush) => match flush.files.last() {
                        Some(File::Data(n)) => {
                            self.inner.submit_to(&chain.levels[*n].targets.0, token, &now)
                        }
                        Some(File::Map(n)) => {
                            self.inner.submit_to(&flush.looks[*n].0.targets.1, token, &now)
                        }
                        Some(File::Base) | None => self.inner.submit(token, &now),
                    },
                    _ => match chain.top() {
                        Some(top) => self.inner.submit_to(&top.targets.0, token, &now),
                        None => Submission::Done(-libc::EROFS),
                    },
                }
            };
            match submission {
                Submission::Done(done) => (io, result) = (Some(now), done),
                Submission::Queued => return self.hold(chain, token, Some(now), next),
            }
        }
    }

    /// What follows a result.
    fn turn(&mut self, chain: &Chain, io: Option<Box<Io>>, next: Next, result: i32) -> Turn {
        if result < 0 {
            self.give_back(io);
            return Turn::End(result);
        }
        match next {
            // It has no system calls of its own.
            Next::Gather(_) => Turn::End(result),
            Next::Note { offset, stable } => {
                self.give_back(io);
                let asked = u64::from(result.unsigned_abs());
                note_written(chain, offset, asked)
                    .map_or_else(Turn::End, |done| self.end_write(chain, done, stable))
            }
            Next::NoteZeros { first, count } => match note(chain, first, count, Have::Zeros) {
                Ok(()) => Turn::End(result),
                Err(errno) => Turn::End(errno),
            },
            Next::Load(mut part) => {
                let before = part.done;
                part.done += (result.unsigned_abs() as usize).min(BLOCK as usize - before);
                let begun = io.is_some();
                // The end of the file: what is behind it is zeros.
                if part.done == BLOCK as usize || begun && part.done == before {
                    let (at, len) = (part.at, part.bytes.len());
                    part.page.bytes()[at..at + len].copy_from_slice(&part.bytes);
                    part.done = 0;
                    let io = self.page_io(io, &mut part, true);
                    return Turn::Submit(io, Next::Store(part));
                }
                let io = self.page_io(io, &mut part, false);
                Turn::Submit(io, Next::Load(part))
            }
            Next::Store(mut part) => {
                if result == 0 {
                    self.give_back(io);
                    return Turn::End(-libc::EIO);
                }
                part.done += (result.unsigned_abs() as usize).min(BLOCK as usize - part.done);
                if part.done < BLOCK as usize {
                    let io = self.page_io(io, &mut part, true);
                    return Turn::Submit(io, Next::Store(part));
                }
                self.give_back(io);
                match note(chain, part.block, 1, Have::Data) {
                    Ok(()) => self.end_write(chain, part.bytes.len() as u64, part.stable),
                    Err(errno) => Turn::End(errno),
                }
            }
            Next::Flush(mut flush) => {
                if io.is_some() {
                    flush.files.pop();
                }
                if flush.files.is_empty()
                    && let Err(error) = flush.write_maps()
                {
                    self.give_back(io);
                    return Turn::End(-error.raw_os_error().unwrap_or(libc::EIO));
                }
                if flush.files.is_empty() {
                    self.give_back(io);
                    flush.looks.iter().for_each(|(level, look)| level.flushed(look));
                    return Turn::End(flush.result);
                }
                let mut io = io.or_else(|| self.spare.pop()).unwrap_or_default();
                io.reset(Op::Flush);
                Turn::Submit(io, Next::Flush(flush))
            }
        }
    }

    /// A write is done, but for what `stable` asks.
    fn end_write(&mut self, chain: &Chain, done: u64, stable: bool) -> Turn {
        if !stable {
            return Turn::End(result_of(done));
        }
        self.turn(chain, None, Next::Flush(Flush::new(chain, result_of(done))), 0)
    }

    /// A read or write of what is left of a block's page.
    fn page_io(&mut self, io: Option<Box<Io>>, part: &mut Part, writes: bool) -> Box<Io> {
        let mut io = io.or_else(|| self.spare.pop()).unwrap_or_default();
        io.reset(if writes { Op::Write { stable: false } } else { Op::Read });
        let left = &mut part.page.bytes()[part.done..];
        io.offset = part.block * BLOCK + part.done as u64;
        io.len = left.len() as u64;
        io.iov.push(libc::iovec { iov_base: left.as_mut_ptr().cast(), iov_len: left.len() });
        io
    }

    fn give_back(&mut self, io: Option<Box<Io>>) {
        self.spare.extend(io.filter(|_| self.spare.len() < 64));
    }
}

impl Flush {
    /// Looks at the maps now: what is set later is not part of this flush.
    fn new(chain: &Chain, result: i32) -> Box<Self> {
        let top = chain.levels.len() - 1;
        let from = if chain.is_settled() { top } else { 0 };
        let mut looks: Vec<_> =
            chain.levels[from..].iter().map(|level| (Arc::clone(level), level.look())).collect();
        let mut files: Vec<_> = (from..=top).map(File::Data).collect();
        if !chain.is_settled() {
            files.push(File::Base);
        }
        let mapped = made(Mistake::MapFirst);
        if mapped {
            let maps = (0..looks.len()).map(File::Map);
            files.extend(maps);
            looks.iter_mut().for_each(|(level, look)| drop(level.write(look)));
        }
        Box::new(Self { looks, files, mapped, result })
    }

    /// The data is on the medium: writes what is known of the maps, which are flushed next.
    fn write_maps(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.mapped, true) {
            return Ok(());
        }
        for (n, (level, look)) in self.looks.iter_mut().enumerate() {
            if !look.is_empty() {
                level.write(look)?;
                self.files.push(File::Map(n));
            }
        }
        Ok(())
    }
}

/// Notes what was written from `offset` on; gives the bytes of it that count, or an error.
fn note_written(chain: &Chain, offset: u64, len: u64) -> Result<u64, i32> {
    let end = offset + len;
    // A block that was written in part, because the system call was short, is not one that is there.
    let whole = if end % BLOCK == 0 || end >= chain.size { end } else { end / BLOCK * BLOCK };
    let first = offset / BLOCK;
    let last = end.saturating_sub(1) / BLOCK;
    let has_last = chain.top().is_some_and(|top| top.bits.get(last) == Have::Data);
    let end = if has_last { end } else { whole };
    if end <= offset {
        return Err(if len == 0 { 0 } else { -libc::EAGAIN });
    }
    note(chain, first, end.div_ceil(BLOCK) - first, Have::Data)?;
    Ok(end - offset)
}

fn note(chain: &Chain, first: u64, count: u64, have: Have) -> Result<(), i32> {
    let Some(top) = chain.top() else { return Err(-libc::EROFS) };
    let noted = top.note(first, count, have);
    noted.map(drop).map_err(|error| -error.raw_os_error().unwrap_or(libc::EIO))
}

/// As the kernel bounds it (MAX_RW_COUNT): what is left is submitted again, from an aligned place on.
fn result_of(len: u64) -> i32 {
    i32::try_from(len.min(0x7fff_f000)).unwrap_or(i32::MAX)
}

/// The first `len` bytes of a write.
fn gather(io: &Io, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    for segment in io.segments() {
        let n = segment.iov_len.min(len - bytes.len());
        // SAFETY: the segment is mapped for its length (contract of `submit`).
        bytes.extend_from_slice(unsafe {
            std::slice::from_raw_parts(segment.iov_base.cast::<u8>(), n)
        });
    }
    bytes
}

/// Makes the first `len` bytes of a read zeros.
///
/// # Safety
/// The segments are mapped, and together at least as long.
unsafe fn fill_zeros(io: &Io, len: u64) {
    let mut left = len as usize;
    for segment in io.segments() {
        let n = segment.iov_len.min(left);
        // SAFETY: the caller's promise.
        unsafe { std::ptr::write_bytes(segment.iov_base.cast::<u8>(), 0, n) };
        left -= n;
    }
}

impl<E: FileEngine> Engine for LayeredEngine<E> {
    const CONCURRENT: bool = E::CONCURRENT;

    #[inline]
    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        if self.version != self.current.version() {
            self.follow();
        }
        let Some(chain) = self.chain.take() else {
            // SAFETY: the caller's promise, handed on; so below.
            return unsafe { self.inner.submit(token, io) };
        };
        let submission = match io.op {
            // SAFETY: see above; so in each of these.
            Op::Flush => unsafe { self.flush_all(&chain, token, io) },
            // SAFETY: see above.
            _ if io.len == 0 => unsafe { self.inner.submit(token, io) },
            // SAFETY: see above.
            Op::Read => unsafe { self.read(&chain, token, io) },
            // SAFETY: see above.
            Op::Write { stable } => unsafe { self.write(&chain, token, io, stable) },
            // SAFETY: see above.
            Op::Discard | Op::WriteZeroes { .. } => unsafe { self.trim(&chain, token, io) },
        };
        self.chain = Some(chain);
        submission
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }

    fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        if self.pending.is_empty() {
            // Also without requests: a chain that is not served any more keeps files open.
            if self.version != self.current.version() {
                self.follow();
            }
            return self.inner.reap(into);
        }
        let mut reaped = std::mem::take(&mut self.reaped);
        self.inner.reap(&mut reaped);
        for (token, result) in reaped.drain(..) {
            if token >> PART_SHIFT != 0 {
                let whole = token & ((1 << PART_SHIFT) - 1);
                into.extend(self.gathered(token, result).map(|result| (whole, result)));
                continue;
            }
            let result = match self.pending.remove(&token) {
                None => Submission::Done(result),
                Some(Pending { chain, io, next }) => self.go_on(&chain, token, (io, next), result),
            };
            if let Submission::Done(result) = result {
                into.push((token, result));
            }
        }
        self.reaped = reaped;
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn add_waker(&mut self, fd: RawFd) -> io::Result<()> {
        self.inner.add_waker(fd)
    }

    fn remove_waker(&mut self, fd: RawFd) {
        self.inner.remove_waker(fd);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.inner.wait()
    }
}
