//! The real code on files that lose what was not flushed: random histories of a guest's requests,
//! snapshots, merges, deaths and power cuts.
//!
//! [`Store`] keeps of each file what is durable and every version of each page since; a power cut
//! leaves any of these, sector by sector if it likes. A death leaves the newest, and what the kernel
//! was still carrying out. [`Disk`] is an engine on such files: it answers at once or later, does some
//! requests in part, and in any order. The guest is a queue with requests in flight, which the next
//! process does again.
//!
//! What is held against it: after a death each sector is what was completed last; after a power cut
//! something that was written no earlier than what the last flush had promised; and each snapshot that
//! was told is, read by another from the medium alone, what the guest had at the switch.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use semper_block::{
    Absorbed, Engine, FileEngine, Image, Io, Op, OpenOptions, Prepared, Submission, Target,
};
use semper_epoch::{Claim, Holder, Id};

use crate::BLOCK;
use crate::bits::{Bits, CHUNK_BLOCKS, Identity};
use crate::chain::Current;
use crate::engine::LayeredEngine;
use crate::files::{Access, Bytes, Files, Key, Part};
use crate::keeper::{Keeper, LayersError, Progress, Shorten};
use crate::mistake::{MADE, Mistake, made};
use crate::plan::{Act, Aim};
use crate::reader;
use crate::record::{LayerId, Pin, Refused};

const SECTOR: u64 = 512;
/// Two chunks of the maps, and a last block that is a part.
const SIZE: u64 = CHUNK_BLOCKS * BLOCK + 2 * BLOCK + 2 * SECTOR;
/// Where the guest writes: from sector, sectors.
const PLACES: [(u64, u64); 2] = [(0, 24), (CHUNK_BLOCKS * 8, 18)];

/// Steps through 2^64 numbers (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

type Page = [u8; BLOCK as usize];

#[derive(Default)]
struct Content {
    durable: HashMap<u64, Box<Page>>,
    /// Every version since, the newest last.
    versions: HashMap<u64, Vec<Box<Page>>>,
    size: u64,
    durable_size: u64,
    /// It cannot be flushed.
    broken: bool,
}

impl Content {
    fn page(&self, page: u64) -> Option<&Page> {
        let newest = self.versions.get(&page).and_then(|versions| versions.last());
        newest.or_else(|| self.durable.get(&page)).map(|page| &**page)
    }

    fn read(&self, into: &mut [u8], offset: u64) -> usize {
        let len = (into.len() as u64).min(self.size.saturating_sub(offset)) as usize;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let (page, from) = (at / BLOCK, (at % BLOCK) as usize);
            let n = (BLOCK as usize - from).min(len - done);
            match self.page(page) {
                Some(page) => into[done..done + n].copy_from_slice(&page[from..from + n]),
                None => into[done..done + n].fill(0),
            }
            done += n;
        }
        len
    }

    fn write(&mut self, bytes: &[u8], offset: u64) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (page, from) = (at / BLOCK, (at % BLOCK) as usize);
            let n = (BLOCK as usize - from).min(bytes.len() - done);
            let mut new = self.page(page).copied().unwrap_or([0; BLOCK as usize]);
            new[from..from + n].copy_from_slice(&bytes[done..done + n]);
            self.versions.entry(page).or_default().push(Box::new(new));
            done += n;
        }
        self.size = self.size.max(offset + bytes.len() as u64);
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let len = len.min(self.size.saturating_sub(offset));
        self.write(&vec![0; len as usize], offset);
    }

    fn sync(&mut self) {
        for (page, mut versions) in self.versions.drain() {
            self.durable.extend(versions.pop().map(|newest| (page, newest)));
        }
        self.durable_size = self.size;
    }

    /// Any of the versions of each page, or a mixture of two.
    fn lose(&mut self, dice: &mut Dice) {
        let mut pages: Vec<_> = self.versions.drain().collect();
        pages.sort_unstable_by_key(|(page, _)| *page);
        for (page, versions) in pages {
            let before = self.durable.get(&page).map_or([0; BLOCK as usize], |page| **page);
            let choose = |dice: &mut Dice| match dice.below(versions.len() as u64 + 1) as usize {
                0 => before,
                n => *versions[n - 1],
            };
            let mut kept = choose(dice);
            if dice.one_in(3) {
                let other = choose(dice);
                for sector in 0..8 {
                    if dice.one_in(2) {
                        let range = sector * 512..(sector + 1) * 512;
                        kept[range.clone()].copy_from_slice(&other[range]);
                    }
                }
            }
            self.durable.insert(page, Box::new(kept));
        }
        // A size is set when a file is made, which is flushed before anybody relies on it.
        self.size = if dice.one_in(2) { self.size } else { self.durable_size };
        self.durable_size = self.size;
    }
}

struct File {
    fd: RawFd,
    /// It is reached around the page cache, as layers and images may be.
    direct: bool,
    content: Mutex<Content>,
}

impl File {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }
}

/// A file as the code under test has it open.
struct Open(Arc<File>);

impl Bytes for Open {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(self.0.content().read(into, offset))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.0.direct && bytes.as_ptr().addr() % SECTOR as usize != 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.0.content().write(bytes, offset);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.content().zero(offset, len);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut content = self.0.content();
        if content.broken {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        content.sync();
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.content().size)
    }

    fn target(&self) -> Target {
        Target {
            fd: self.0.fd,
            flushed: self.0.fd,
            #[cfg(target_arch = "x86_64")]
            mapping: None,
        }
    }
}

/// All files of one disk, and the memory of its host.
struct Store {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    files: Vec<Arc<File>>,
    names: BTreeMap<Part, Arc<File>>,
    /// Names as they are on the medium.
    durable_names: BTreeMap<Part, Arc<File>>,
    memory: HashMap<Key, Arc<Bits>>,
    marked: bool,
    /// Blocks that the guest is writing to.
    busy: HashSet<u64>,
}

impl Store {
    fn new() -> Arc<Self> {
        let mut state = State::default();
        let mut content = Content::default();
        (content.size, content.durable_size) = (SIZE, SIZE);
        state.files.push(Arc::new(File { fd: 0, direct: true, content: Mutex::new(content) }));
        Arc::new(Self { state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn file(&self, fd: RawFd) -> Arc<File> {
        Arc::clone(&self.state().files[fd as usize])
    }

    fn forget_memory(&self) {
        self.state().memory.clear();
    }

    fn lose_power(&self, dice: &mut Dice) {
        let mut state = self.state();
        state.files.iter().for_each(|file| file.content().lose(dice));
        // Of each name that was made or removed since, the one or the other.
        let all: Vec<Part> =
            state.names.keys().chain(state.durable_names.keys()).copied().collect();
        for part in all {
            let (now, before) = (state.names.get(&part).cloned(), state.durable_names.get(&part));
            let kept = if dice.one_in(2) { now } else { before.cloned() };
            match kept {
                Some(file) => drop(state.names.insert(part, file)),
                None => drop(state.names.remove(&part)),
            }
        }
        state.durable_names = state.names.clone();
        state.memory.clear();
    }
}

struct Host(Arc<Store>);

impl Files for Host {
    fn name(&self, part: Part) -> String {
        format!("{part:?}")
    }

    fn base(&self) -> Arc<dyn Bytes> {
        Arc::new(Open(self.0.file(0)))
    }

    fn open(&self, part: Part, _: Access) -> io::Result<Option<Arc<dyn Bytes>>> {
        let file = self.0.state().names.get(&part).cloned();
        Ok(file.map(|file| Arc::new(Open(file)) as Arc<dyn Bytes>))
    }

    fn create(&self, part: Part, size: u64) -> io::Result<Arc<dyn Bytes>> {
        let mut state = self.0.state();
        let fd = state.files.len() as RawFd;
        let content = Mutex::new(Content { size, ..Content::default() });
        let direct = matches!(part, Part::Data(_));
        let file = Arc::new(File { fd, direct, content });
        state.files.push(Arc::clone(&file));
        state.names.insert(part, Arc::clone(&file));
        Ok(Arc::new(Open(file)))
    }

    fn remove(&self, part: Part) -> io::Result<()> {
        self.0.state().names.remove(&part);
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.0.state();
        state.durable_names = state.names.clone();
        Ok(())
    }

    fn layers(&self) -> io::Result<Vec<Key>> {
        let keys = self.0.state().names.keys().copied().collect::<Vec<_>>();
        let key = |part| match part {
            Part::Record => None,
            Part::Data(key) | Part::Map(key) => Some(key),
        };
        Ok(keys.into_iter().filter_map(key).collect())
    }

    fn memory(&self, identity: &Identity) -> io::Result<Arc<Bits>> {
        let key = Key { epoch: identity.writer.epoch, id: identity.layer };
        let new = Arc::new(Bits::anonymous(identity)?);
        Ok(Arc::clone(self.0.state().memory.entry(key).or_insert(new)))
    }

    fn forget(&self, layer: Key) {
        self.0.state().memory.remove(&layer);
    }

    fn mark(&self, layered: bool) -> io::Result<()> {
        self.0.state().marked = layered;
        Ok(())
    }

    fn try_alone(&self, block: u64) -> bool {
        !self.0.state().busy.contains(&block)
    }

    fn leave(&self, _: u64) {}

    fn is_marked(&self) -> io::Result<bool> {
        Ok(self.0.state().marked)
    }
}

/// What the kernel carries out.
struct Call {
    token: u64,
    fd: RawFd,
    op: Op,
    offset: u64,
    len: u64,
    iov: Vec<libc::iovec>,
    /// The bytes of a write, as they were.
    bytes: Vec<u8>,
    result: Option<i32>,
}

impl Call {
    fn carry_out(&mut self, file: &File) -> i32 {
        let mut content = file.content();
        let result = match self.op {
            Op::Read => {
                let mut bytes = vec![0; self.len as usize];
                let read = content.read(&mut bytes, self.offset);
                let mut left = &bytes[..read];
                for segment in &self.iov {
                    let (now, rest) = left.split_at(segment.iov_len.min(left.len()));
                    // SAFETY: the caller of `submit` keeps the segments until the call was reaped.
                    unsafe {
                        let into = segment.iov_base.cast::<u8>();
                        std::ptr::copy_nonoverlapping(now.as_ptr(), into, now.len());
                    }
                    left = rest;
                }
                read as i32
            }
            Op::Write { stable } => {
                content.write(&self.bytes, self.offset);
                if stable {
                    content.sync();
                }
                self.bytes.len() as i32
            }
            Op::Flush => {
                content.sync();
                0
            }
            Op::Discard | Op::WriteZeroes { .. } => {
                content.zero(self.offset, self.len);
                0
            }
        };
        self.result = Some(result);
        result
    }
}

/// An engine on the files of a store.
struct Disk {
    store: Arc<Store>,
    dice: Dice,
    calls: Vec<Call>,
}

impl Disk {
    fn start(&mut self, fd: RawFd, token: u64, io: &Io) -> Submission {
        let mut len = io.len;
        if matches!(io.op, Op::Read | Op::Write { .. }) && self.dice.one_in(6) && len > SECTOR {
            len = SECTOR * (1 + self.dice.below(len / SECTOR));
        }
        let (mut iov, mut bytes, mut left) = (Vec::new(), Vec::new(), len as usize);
        for segment in io.segments() {
            let iov_len = segment.iov_len.min(left);
            left -= iov_len;
            iov.push(libc::iovec { iov_len, ..*segment });
            if matches!(io.op, Op::Write { .. }) {
                // SAFETY: the caller keeps the segments mapped.
                bytes.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(segment.iov_base.cast::<u8>(), iov_len)
                });
            }
        }
        let (op, offset) = (io.op, io.offset);
        let mut call = Call { token, fd, op, offset, len, iov, bytes, result: None };
        let file = self.store.file(fd);
        match self.dice.below(3) {
            0 => return Submission::Done(call.carry_out(&file)),
            1 => drop(call.carry_out(&file)),
            _ => {}
        }
        self.calls.push(call);
        Submission::Queued
    }

    /// The process is dead; the kernel may still have done what it was doing.
    fn die(&mut self) {
        for mut call in std::mem::take(&mut self.calls) {
            if call.result.is_none() && call.op != Op::Read && self.dice.one_in(2) {
                call.carry_out(&self.store.file(call.fd));
            }
        }
    }
}

impl FileEngine for Disk {
    unsafe fn submit_to(&mut self, target: &Target, token: u64, io: &Io) -> Submission {
        self.start(target.fd, token, io)
    }
}

impl Engine for Disk {
    const CONCURRENT: bool = true;

    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        self.start(0, token, io)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// One call, any of them.
    fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        if self.calls.is_empty() {
            return;
        }
        let which = self.dice.below(self.calls.len() as u64) as usize;
        let mut call = self.calls.swap_remove(which);
        let result = match call.result {
            Some(result) => result,
            None => call.carry_out(&self.store.file(call.fd)),
        };
        into.push((call.token, result));
    }

    fn in_flight(&self) -> usize {
        self.calls.len()
    }

    fn add_waker(&mut self, _: RawFd) -> io::Result<()> {
        Ok(())
    }

    fn remove_waker(&mut self, _: RawFd) {}

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a sector may be: the content, and the number of its write.
type Version = (u64, u64);

/// One request of the guest.
struct Request {
    op: Op,
    first: u64,
    count: u64,
    /// Of a write: the number, and what each sector gets.
    version: Version,
    io: Box<Io>,
    memory: Vec<u64>,
    /// Of a flush: what each sector was when it began.
    before: HashMap<u64, Version>,
}

impl Request {
    fn blocks(&self) -> std::ops::RangeInclusive<u64> {
        self.first / 8..=(self.first + self.count.max(1) - 1) / 8
    }

    fn prepare(&mut self, image: &Image) -> Prepared {
        self.io.reset(self.op);
        if self.op == Op::Flush {
            return self.io.prepare(image, false);
        }
        (self.io.offset, self.io.len) = (self.first * SECTOR, self.count * SECTOR);
        if matches!(self.op, Op::Read | Op::Write { .. }) {
            // In two segments, which end anywhere.
            let (base, len) = (self.memory.as_mut_ptr().cast::<u8>(), self.count as usize * 512);
            let cut = len / 3 / 8 * 8;
            // SAFETY: inside the memory, which has `len` bytes.
            let rest = unsafe { base.add(cut) };
            self.io.iov.push(libc::iovec { iov_base: base.cast(), iov_len: cut });
            self.io.iov.push(libc::iovec { iov_base: rest.cast(), iov_len: len - cut });
            self.io.iov.retain(|segment| segment.iov_len > 0);
        }
        self.io.prepare(image, false)
    }
}

struct World<'a> {
    dice: Dice,
    store: Arc<Store>,
    image: &'a Image,
    current: Arc<Current>,
    engine: LayeredEngine<Disk>,
    keeper: Keeper,
    claim: Claim,
    requests: BTreeMap<u64, Request>,
    number: u64,
    /// What was completed last.
    now: HashMap<u64, Version>,
    /// What a power cut may leave, oldest first.
    allowed: HashMap<u64, Vec<Version>>,
    /// At the switch of the snapshot that is being taken.
    taken: Option<(LayerId, HashMap<u64, Version>)>,
    told: BTreeMap<LayerId, (HashMap<u64, Version>, bool)>,
}

fn sectors() -> impl Iterator<Item = u64> {
    PLACES.into_iter().flat_map(|(first, count)| first..first + count)
}

type Fault = String;

fn open(
    store: &Arc<Store>,
    claim: Claim,
    seed: u64,
) -> Result<(Arc<Current>, LayeredEngine<Disk>, Keeper), Fault> {
    let current = Arc::new(Current::default());
    let files = Arc::new(Host(Arc::clone(store)));
    let keeper = Keeper::open(files, claim, Arc::clone(&current), (SIZE, Id([9; 16])))
        .map_err(|error| format!("the chain is not opened: {error}"))?;
    let disk = Disk { store: Arc::clone(store), dice: Dice(seed), calls: Vec::new() };
    Ok((Arc::clone(&current), LayeredEngine::new(disk, current), keeper))
}

impl<'a> World<'a> {
    fn new(seed: u64, image: &'a Image) -> Result<Self, Fault> {
        let (store, claim) = (Store::new(), Claim { epoch: 1, id: Id([1; 16]) });
        let (current, engine, keeper) = open(&store, claim, seed)?;
        image.set_layered(false);
        Ok(Self {
            dice: Dice(seed),
            store,
            image,
            current,
            engine,
            keeper,
            claim,
            requests: BTreeMap::new(),
            number: 0,
            now: sectors().map(|sector| (sector, (0, 0))).collect(),
            allowed: sectors().map(|sector| (sector, vec![(0, 0)])).collect(),
            taken: None,
            told: BTreeMap::new(),
        })
    }

    /// A new request, unless it overlaps one in flight.
    fn ask(&mut self) -> Result<(), Fault> {
        let (start, room) = PLACES[self.dice.below(2) as usize];
        let first = self.dice.below(room);
        let count = (1 + self.dice.below(12)).min(room - first);
        let (first, count) = if self.dice.one_in(3) {
            // Whole blocks, as file systems have them.
            let first = first / 8 * 8;
            (first, count.next_multiple_of(8).min(room - first))
        } else {
            (first, count)
        };
        let op = match self.dice.below(16) {
            0..7 => Op::Write { stable: false },
            7 => Op::Write { stable: true },
            8 => Op::WriteZeroes { unmap: true },
            9 => Op::WriteZeroes { unmap: false },
            10..12 => Op::Flush,
            _ => Op::Read,
        };
        self.number += 1;
        let content = if matches!(op, Op::WriteZeroes { .. }) { 0 } else { self.number };
        let mut request = Request {
            op,
            first: start + first,
            count: if op == Op::Flush { 0 } else { count },
            version: (self.number, content),
            io: Box::default(),
            memory: vec![content; count as usize * 64],
            before: if op == Op::Flush { self.now.clone() } else { HashMap::new() },
        };
        let overlaps = |other: &Request| {
            let (a, b) = (request.blocks(), other.blocks());
            other.op != Op::Flush && a.start() <= b.end() && b.start() <= a.end()
        };
        if op != Op::Flush && self.requests.values().any(overlaps) {
            return Ok(());
        }
        if let Op::Write { .. } | Op::WriteZeroes { .. } = op {
            let sectors = request.first..request.first + request.count;
            sectors.for_each(|s| self.allowed.entry(s).or_default().push(request.version));
            self.store.state().busy.extend(request.blocks());
        }
        let ready = request.prepare(self.image);
        let token = self.number;
        self.requests.insert(token, request);
        if ready != Prepared::Ready {
            return Err("a request cannot be prepared".to_owned());
        }
        self.submit(token)
    }

    fn submit(&mut self, token: u64) -> Result<(), Fault> {
        loop {
            let Some(request) = self.requests.get_mut(&token) else { return Ok(()) };
            // SAFETY: the request and its memory stay until its token was reaped, or the engine is
            // dropped with all its calls.
            let submission = unsafe { self.engine.submit(token, &request.io) };
            let Submission::Done(result) = submission else { return Ok(()) };
            if self.absorb(token, result)? {
                return Ok(());
            }
        }
    }

    /// Whether the request is done.
    fn absorb(&mut self, token: u64, result: i32) -> Result<bool, Fault> {
        let Some(request) = self.requests.get_mut(&token) else {
            return Err(format!("token {token} was given back twice"));
        };
        match request.io.absorb(result, self.image) {
            Absorbed::More => return Ok(false),
            Absorbed::Failed(errno) => return Err(format!("{:?} failed: {errno}", request.op)),
            Absorbed::Finished => {}
        }
        let Some(request) = self.requests.remove(&token) else { return Ok(true) };
        let sectors = request.first..request.first + request.count;
        if matches!(request.op, Op::Write { .. } | Op::WriteZeroes { .. }) {
            let mut state = self.store.state();
            state.busy.retain(|block| !request.blocks().contains(block));
        }
        match request.op {
            Op::Read => {
                for (n, sector) in sectors.enumerate() {
                    let (_, wanted) = self.now[&sector];
                    let got = &request.memory[n * 64..(n + 1) * 64];
                    if got.iter().any(|word| *word != wanted) {
                        return Err(format!("sector {sector} is read as {}, not {wanted}", got[0]));
                    }
                }
            }
            Op::Flush => self.promise(&request.before),
            Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard => {
                for sector in sectors {
                    self.now.insert(sector, request.version);
                    if request.op == (Op::Write { stable: true }) {
                        let only = HashMap::from([(sector, request.version)]);
                        self.promise(&only);
                    }
                }
            }
        }
        Ok(true)
    }

    /// A flush, or a write of these alone, has ended.
    fn promise(&mut self, before: &HashMap<u64, Version>) {
        for (sector, (number, _)) in before {
            let allowed = self.allowed.entry(*sector).or_default();
            allowed.retain(|(written, _)| written >= number);
        }
    }

    fn reap(&mut self) -> Result<(), Fault> {
        let mut reaped = Vec::new();
        self.engine.reap(&mut reaped);
        for (token, result) in reaped {
            if !self.absorb(token, result)? {
                self.submit(token)?;
            }
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Fault> {
        let mut turns = 0;
        while !self.requests.is_empty() {
            self.reap()?;
            turns += 1;
            if turns > 100_000 {
                return Err("requests do not end".to_owned());
            }
        }
        Ok(())
    }

    /// A step of what goes on, or something new.
    fn maintain(&mut self) -> Result<(), Fault> {
        if self.dice.one_in(24) {
            return self.undo();
        }
        let Some((aim, act, layer, _)) = self.keeper.doing() else {
            let aim = match self.keeper.left_over() {
                Some(aim) => aim,
                None if self.dice.one_in(2) => Aim::Snapshot,
                None => self.choose_merge()?,
            };
            // What is refused is tried again later.
            let _ = self.keeper.begin(aim, SIZE, false);
            return Ok(());
        };
        if act == Act::Switch {
            self.drain()?;
            if aim == Aim::Snapshot {
                self.taken = Some((layer, self.now.clone()));
            }
        }
        if act == Act::Switch && aim == Aim::Snapshot && self.dice.one_in(8) {
            return self.take_back(layer);
        }
        if act == Act::EnterMerging {
            // They go; those that have a pin must not.
            self.told.retain(|id, (_, pinned)| *id > layer || *pinned);
        }
        let progress = self.keeper.step().map_err(|error| format!("{act:?}: {error}"))?;
        if act == Act::Switch {
            self.image.set_layered(true);
            if aim == Aim::Snapshot && self.dice.one_in(6) {
                return self.take_back(layer);
            }
        }
        if progress == Progress::Over
            && aim == Aim::Snapshot
            && let Some((id, content)) = self.taken.take()
        {
            let pinned = self.dice.one_in(2);
            if pinned {
                let pin = pin(id);
                let change = self.keeper.change(|record| record.pin(pin));
                change.map_err(|error| format!("a snapshot that was told has no pin: {error}"))?;
            }
            self.told.insert(id, (content, pinned));
        }
        Ok(())
    }

    /// A snapshot is given up before any request: the disk is what it was.
    fn take_back(&mut self, layer: LayerId) -> Result<(), Fault> {
        self.taken = None;
        match self.keeper.take_back(layer) {
            Ok(true) => {}
            other => return Err(format!("layer {layer} is not taken back: {other:?}")),
        }
        if self.keeper.record().layer(layer).is_some() {
            return Err(format!("layer {layer} is still on record"));
        }
        self.image.set_layered(self.current.get().is_some());
        self.check_now("a snapshot that was given up")
    }

    /// The newest snapshot is given up at any time: it may be too late for that.
    fn undo(&mut self) -> Result<(), Fault> {
        self.drain()?;
        let Some(newest) = self.keeper.record().top().map(|layer| layer.id) else { return Ok(()) };
        let merges = self.keeper.doing().is_some_and(|(aim, ..)| aim == Aim::Merge);
        match self.keeper.take_back(newest) {
            Ok(true) if merges => Err(format!("layer {newest} is taken back during a merge")),
            Ok(true) => {
                self.taken = None;
                self.told.remove(&newest);
                self.image.set_layered(self.current.get().is_some());
                self.check_now("a snapshot that was given up late")
            }
            // Pinned, or nobody's any more.
            Ok(false) if self.told.get(&newest).is_none_or(|(_, pinned)| *pinned) => Ok(()),
            Ok(false) => {
                let given_up = self.keeper.give_up(newest);
                given_up.map_err(|error| format!("layer {newest} is not given up: {error}"))?;
                self.told.remove(&newest);
                Ok(())
            }
            Err(LayersError::Refused(Refused::Pinned { .. })) => Ok(()),
            Err(error) => Err(format!("layer {newest} is not taken back: {error}")),
        }
    }

    /// The disk is not served any more; layers go into the image, also the last one, if nothing happens
    /// meanwhile. Then it is served again.
    fn shorten(&mut self) -> Result<(), Fault> {
        self.drain()?;
        if let Some(chain) = self.current.get()
            && self.dice.one_in(2)
        {
            chain.sync().map_err(|error| error.to_string())?;
        }
        self.die();
        let through = if self.dice.one_in(2) { LayerId::MAX } else { self.dice.below(8) };
        if self.told.iter().any(|(id, (_, pinned))| *id <= through && *pinned) {
            return self.reopen();
        }
        self.told.retain(|id, _| *id > through);
        let seed = self.dice.roll();
        let (_, _, mut keeper) = open(&self.store, self.claim, seed)?;
        let mut how = Shorten::Through(through);
        let dies = self.dice.one_in(2);
        loop {
            match keeper.begin_to_shorten(&mut how, SIZE) {
                Ok(true) => {}
                Ok(false) => break,
                Err(LayersError::Refused(Refused::Pinned { .. })) => break,
                Err(error) => return Err(format!("the chain is not made shorter: {error}")),
            }
            while let Some((_, act, ..)) = keeper.doing() {
                if dies && self.dice.one_in(12) {
                    if self.dice.one_in(2) {
                        return self.lose_power();
                    }
                    self.reopen()?;
                    return self.check_now("a death while it was not served");
                }
                keeper.step().map_err(|error| format!("{act:?}, not served: {error}"))?;
            }
        }
        if through == LayerId::MAX && self.told.is_empty() && !keeper.record().layers.is_empty() {
            return Err(format!("layers are left: {:?}", keeper.record().layers));
        }
        drop(keeper);
        if self.dice.one_in(3) {
            return self.lose_power();
        }
        self.reopen()?;
        self.check_now("merges while it was not served")
    }

    /// Lets the lowest snapshots go, with their pins or not.
    fn choose_merge(&mut self) -> Result<Aim, Fault> {
        let unpinned = self.told.iter().find(|(_, (_, pinned))| *pinned).map(|(id, _)| *id);
        if let Some(id) = unpinned
            && self.dice.one_in(3)
        {
            let change = self.keeper.change(|record| Ok(record.unpin(&pin(id))));
            change.map_err(|error| error.to_string())?;
            self.told.entry(id).and_modify(|(_, pinned)| *pinned = false);
        }
        Ok(Aim::Merge)
    }

    /// The process dies. What was in flight is the next one's.
    fn die(&mut self) {
        self.engine.inner().die();
        self.taken = None;
    }

    fn reopen(&mut self) -> Result<(), Fault> {
        let seed = self.dice.roll();
        // The dead process' memory goes before the next one looks.
        (self.current, self.engine, self.keeper) = open(&self.store, self.claim, seed)?;
        if self.keeper.needs_layer() {
            if self.keeper.left_over() == Some(Aim::Seal) {
                self.finish(Aim::Seal)?;
            }
            self.finish(Aim::Extend)?;
        }
        self.image.set_layered(self.current.get().is_some());
        Ok(())
    }

    fn finish(&mut self, aim: Aim) -> Result<(), Fault> {
        self.keeper.begin(aim, SIZE, false).map_err(|error| format!("{aim:?}: {error}"))?;
        self.keeper.finish().map_err(|error| format!("{aim:?}: {error}"))
    }

    fn kill(&mut self) -> Result<(), Fault> {
        self.die();
        if made(Mistake::MemoryDies) {
            self.store.forget_memory();
        }
        self.reopen()?;
        // All that was in flight is done again, in order.
        let tokens: Vec<u64> = self.requests.keys().copied().collect();
        for token in tokens {
            if let Some(request) = self.requests.get_mut(&token) {
                request.memory.fill(request.version.1);
                request.prepare(self.image);
            }
            self.submit(token)?;
        }
        self.drain()?;
        self.check_now("a death")
    }

    fn check_now(&mut self, after: &str) -> Result<(), Fault> {
        let got = self.content();
        match sectors().find(|sector| got[sector] != self.now[sector].1) {
            None => Ok(()),
            Some(s) => {
                Err(format!("after {after} sector {s} is {}, not {:?}", got[&s], self.now[&s]))
            }
        }
    }

    fn lose_power(&mut self) -> Result<(), Fault> {
        self.die();
        self.requests.clear();
        self.store.state().busy.clear();
        self.store.lose_power(&mut self.dice);
        if self.dice.one_in(3) {
            self.claim.epoch += 1;
        }
        self.reopen()?;
        let got = self.content();
        for sector in sectors() {
            let (got, allowed) = (got[&sector], &self.allowed[&sector]);
            let Some(version) = allowed.iter().rev().find(|(_, content)| *content == got) else {
                return Err(format!(
                    "after a power cut sector {sector} is {got}, not of {allowed:?}"
                ));
            };
            self.now.insert(sector, *version);
        }
        self.allowed = self.now.iter().map(|(sector, version)| (*sector, vec![*version])).collect();
        Ok(())
    }

    /// The disk goes to another host in order.
    fn hand_over(&mut self) -> Result<(), Fault> {
        self.drain()?;
        if let Some(chain) = self.current.get() {
            chain.sync().map_err(|error| error.to_string())?;
        }
        self.die();
        self.store.forget_memory();
        self.claim.epoch += 1;
        self.reopen()?;
        self.check_now("a hand-over")
    }

    /// What the guest would read.
    fn content(&self) -> HashMap<u64, u64> {
        let base = self.store.file(0);
        let chain = self.current.get();
        read_sectors(|bytes, offset| match &chain {
            Some(chain) => drop(chain.read_at(bytes, offset)),
            None => drop(base.content().read(bytes, offset)),
        })
    }

    /// Each snapshot that was told is there, for another who has nothing but the medium's files.
    fn check_snapshots(&self) -> Result<(), Fault> {
        let host = Host(Arc::clone(&self.store));
        for (id, (content, _)) in &self.told {
            let chain = match reader::open(&host, Some(*id), SIZE) {
                Ok(Some(chain)) => chain,
                Ok(None) => return Err(format!("snapshot {id} is not there")),
                Err(error) => return Err(format!("snapshot {id}: {error}")),
            };
            let got = read_sectors(|bytes, offset| drop(chain.read_at(bytes, offset)));
            if let Some(s) = sectors().find(|sector| got[sector] != content[sector].1) {
                let wanted = content[&s].1;
                return Err(format!("sector {s} of snapshot {id} is {}, not {wanted}", got[&s]));
            }
        }
        Ok(())
    }
}

fn pin(snapshot: LayerId) -> Pin {
    Pin { snapshot, reader: Holder::new("twin").unwrap() }
}

fn read_sectors(read: impl Fn(&mut [u8], u64)) -> HashMap<u64, u64> {
    let mut got = HashMap::new();
    for (first, count) in PLACES {
        let mut bytes = vec![0; (count * SECTOR) as usize];
        read(&mut bytes, first * SECTOR);
        for (n, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let words: HashSet<u64> =
                sector.chunks(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect();
            let torn = u64::MAX;
            got.insert(first + n as u64, if words.len() == 1 { sector_word(sector) } else { torn });
        }
    }
    got
}

fn sector_word(sector: &[u8]) -> u64 {
    u64::from_le_bytes(sector[..8].try_into().unwrap())
}

fn history(seed: u64, image: &Image) -> Result<(), Fault> {
    let mut world = World::new(seed, image)?;
    for _ in 0..60 {
        match world.dice.below(32) {
            0..12 => world.ask()?,
            12..18 => world.reap()?,
            18..28 => world.maintain()?,
            28 => world.kill()?,
            29 => world.lose_power()?,
            30 => world.check_snapshots()?,
            _ if world.dice.one_in(6) => world.hand_over()?,
            _ if world.dice.one_in(4) => world.shorten()?,
            _ => {}
        }
    }
    world.kill()?;
    world.check_snapshots()?;
    world.lose_power()?;
    world.check_snapshots()
}

/// The first of so many histories in which something is wrong.
fn find(mistake: Option<Mistake>, seeds: std::ops::Range<u64>) -> Option<(u64, Fault)> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let image = Image::open(file.path(), OpenOptions::default()).unwrap();
    MADE.set(mistake);
    let found = seeds.into_iter().find_map(|seed| {
        history(seed.wrapping_mul(0x2545_f491_4f6c_dd1d), &image).err().map(|e| (seed, e))
    });
    MADE.set(None);
    found
}

/// A snapshot is given up whose disk merges the layer below already: what the guest writes from then on
/// must not go to the layer that is being copied, and goes with that layer.
#[test]
fn a_snapshot_is_not_taken_back_while_the_layer_below_is_merged() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let image = Image::open(file.path(), OpenOptions::default()).unwrap();
    for merges in [true, false] {
        let mut keeper = World::new(1, &image).unwrap().keeper;
        for _ in 0..2 {
            keeper.begin(Aim::Snapshot, SIZE, false).unwrap();
            keeper.finish().unwrap();
        }
        keeper.give_up_through(1).unwrap();
        if merges {
            keeper.begin(Aim::Merge, SIZE, false).unwrap();
            while keeper.doing().is_some_and(|(_, act, ..)| act != Act::Copy) {
                keeper.step().unwrap();
            }
        }
        if merges {
            // Its files are what is copied.
            assert!(!keeper.take_back(1).unwrap());
        }
        assert_eq!(keeper.take_back(2).unwrap(), !merges);
        assert_eq!(keeper.record().layer(2).is_some(), merges);
        keeper.finish().unwrap();
        assert_eq!(keeper.record().chain().len(), 1);
    }
}

/// What the guest writes afterwards is in no file that the next process removes.
#[test]
fn requests_go_below_a_layer_that_was_taken_back_also_if_the_record_is_not_flushed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let image = Image::open(file.path(), OpenOptions::default()).unwrap();
    for broken in [true, false] {
        let World { mut keeper, store, current, .. } = World::new(1, &image).unwrap();
        for _ in 0..2 {
            keeper.begin(Aim::Snapshot, SIZE, false).unwrap();
            keeper.finish().unwrap();
        }
        let record = Arc::clone(&store.state().names[&Part::Record]);
        record.content().broken = broken;
        assert_eq!(keeper.take_back(2).is_err(), broken);
        let served = current.get().unwrap();
        let served: Vec<_> = served.levels.iter().map(|level| level.key.id).collect();
        let on_record: Vec<_> = keeper.record().chain().iter().map(|layer| layer.id).collect();
        assert_eq!((served, on_record), (vec![1], vec![1]));
    }
}

/// A snapshot is kept while the disk goes from host to host: its chain has two layers each time, and a block
/// that the guest is writing to is left to the guest.
#[test]
fn a_chain_does_not_grow_while_a_snapshot_is_kept() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let image = Image::open(file.path(), OpenOptions::default()).unwrap();
    let mut world = World::new(3, &image).unwrap();
    world.finish(Aim::Snapshot).unwrap();
    for round in 0..20 {
        for _ in 0..8 {
            world.ask().unwrap();
        }
        world.hand_over().unwrap();
        let lifts = world.keeper.left_over() == Some(Aim::Lift);
        assert_eq!(lifts, round > 0, "{round}: {:?}", world.keeper.record());
        if lifts {
            world.keeper.begin(Aim::Lift, SIZE, false).unwrap();
            world.store.state().busy.insert(0);
            for _ in 0..100 {
                if matches!(world.keeper.doing(), Some((_, Act::CopyUp, ..))) {
                    world.keeper.step().unwrap();
                }
            }
            world.store.state().busy.clear();
            world.keeper.finish().unwrap();
            world.check_now("a lift").unwrap();
        }
        assert!(world.keeper.record().chain().len() <= 2);
        assert_eq!(world.keeper.left_over(), None);
    }
}

/// So many histories find nothing; `make layers` has 100,000.
#[test]
fn no_history_finds_anything_wrong() {
    let count = std::env::var("SEMPERVIRT_HISTORIES").ok().and_then(|n| n.parse().ok());
    let count: u64 = count.unwrap_or(4_000);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    std::thread::scope(|scope| {
        let share = |n: u64| count * n / threads..count * (n + 1) / threads;
        let work: Vec<_> =
            (0..threads).map(|n| scope.spawn(move || find(None, share(n)))).collect();
        for thread in work {
            assert_eq!(thread.join().unwrap(), None);
        }
    });
}

#[test]
fn each_of_the_ten_mistakes_is_found() {
    for mistake in Mistake::ALL {
        let (start, found) = (std::time::Instant::now(), find(Some(mistake), 0..100_000));
        let took = start.elapsed();
        let (seed, fault) = found.unwrap_or_else(|| panic!("{mistake:?} is not found"));
        println!("{mistake:?}: history {seed}, {took:.1?}: {fault}");
        assert!(took.as_secs() < 60, "{mistake:?} took {took:?}");
    }
}
