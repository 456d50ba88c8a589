//! A file system that loses what was not flushed: a power cut to order.
//!
//! FUSE, spoken without a library: it is in every kernel, where device mapper (dm-log-writes), NBD
//! and ublk often are not, and the real system calls go through it, io_uring and mappings included.
//! The page cache of the kernel is in front of it (write-back), and a loop device can stand on one
//! of its files. Needs root.
//!
//! One directory of files. What a program does is *volatile* at first:
//!
//! * `fsync` of a file makes its content and size durable,
//! * `fsync` of the directory makes names durable: new ones, renames, removals.
//!
//! Nothing else does, so this is the strictest file system that POSIX allows.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const ROOT: u64 = 1;
const MAX_WRITE: usize = 128 << 10;
/// What a medium writes as a whole.
const SECTOR: usize = 512;
const FOREVER_S: u64 = 1 << 30;

const OUT_HEADER: usize = 16;
const IN_HEADER: usize = 40;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
const FSYNCDIR: u32 = 30;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const RENAME2: u32 = 45;

const WRITEBACK_CACHE: u32 = 1 << 16;
const BIG_WRITES: u32 = 1 << 5;
const KEEP_CACHE: u32 = 1 << 1;
const SET_SIZE: u32 = 1 << 3;

type Names = BTreeMap<String, u64>;

/// What was done to a file since its last flush.
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Zero { offset: usize, len: usize },
    Size(usize),
}

impl Change {
    /// Applies those sectors of it that `keeps` says are on the medium.
    fn apply_some(&self, to: &mut Vec<u8>, keeps: &mut dyn FnMut() -> bool) {
        let (start, end) = match self {
            Self::Write { offset, bytes } => (*offset, offset + bytes.len()),
            Self::Zero { offset, len } => (*offset, offset + len),
            Self::Size(_) if keeps() => return self.apply(to),
            Self::Size(_) => return,
        };
        let mut at = start;
        while at < end {
            let next = (at / SECTOR + 1) * SECTOR;
            let len = next.min(end) - at;
            if keeps() {
                let part = match self {
                    Self::Write { offset, bytes } => {
                        let bytes = bytes[at - offset..at - offset + len].to_vec();
                        Self::Write { offset: at, bytes }
                    }
                    Self::Zero { .. } | Self::Size(_) => Self::Zero { offset: at, len },
                };
                part.apply(to);
            }
            at = next;
        }
    }

    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } => {
                to.resize(to.len().max(offset + bytes.len()), 0);
                to[*offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            Self::Zero { offset, len } => {
                let end = (offset + len).min(to.len());
                to[(*offset).min(end)..end].fill(0);
            }
            Self::Size(size) => to.resize(*size, 0),
        }
    }
}

/// A file by its number: what programs see, and what would be left.
#[derive(Default)]
struct Content {
    volatile: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

impl Content {
    fn change(&mut self, change: Change) {
        change.apply(&mut self.volatile);
        self.pending.push(change);
    }
}

#[derive(Default)]
struct State {
    names: Names,
    durable_names: Names,
    files: BTreeMap<u64, Content>,
    flushes: u64,
    failing: u64,
    /// Takes no data from the page cache.
    broken: bool,
    /// Cannot make zeros or holes.
    plain: bool,
}

impl State {
    fn make(&mut self, name: &str) -> u64 {
        let node = self.files.keys().last().map_or(ROOT, |last| *last) + 1;
        self.files.insert(node, Content::default());
        self.names.insert(name.to_owned(), node);
        node
    }
}

/// Mounted until the value goes.
pub struct Lossy {
    state: Arc<Mutex<State>>,
    place: PathBuf,
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path")
}

impl Lossy {
    /// Mounts one, empty, on an existing directory.
    ///
    /// # Panics
    /// Where this process may not mount: run the tests as root.
    pub fn mount(place: &Path) -> Self {
        let device = File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse");
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let (target, options) = (c_path(place), CString::new(options).expect("options"));
        // SAFETY: C strings that live across the call.
        let mounted = unsafe {
            let (kind, flags) = (c"fuse.lossy", libc::MS_NODEV | libc::MS_NOSUID);
            let data = options.as_ptr().cast();
            libc::mount(c"lossy".as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data)
        };
        let error = std::io::Error::last_os_error();
        assert_eq!(mounted, 0, "no FUSE file system mounted: run as root ({error})");
        let state = Arc::new(Mutex::new(State::default()));
        let theirs = Arc::clone(&state);
        std::thread::spawn(move || serve(&device, &theirs));
        Self { state, place: place.to_owned() }
    }

    /// A file of this content, on the medium.
    pub fn put(&self, name: &str, content: Vec<u8>) -> PathBuf {
        let mut state = locked(&self.state);
        let node = state.make(name);
        state.durable_names.insert(name.to_owned(), node);
        state.files.insert(
            node,
            Content { durable: content.clone(), volatile: content, pending: Vec::new() },
        );
        self.place.join(name)
    }

    /// The file as a power cut would leave it now; `None` if it would not be there.
    pub fn after_power_cut(&self, name: &str) -> Option<Vec<u8>> {
        let state = locked(&self.state);
        let node = state.durable_names.get(name)?;
        Some(state.files[node].durable.clone())
    }

    /// The file as a power cut could leave it now: of what was not flushed some sectors, in whatever order
    /// they were written. `keeps` is asked for each of them.
    pub fn after_any_power_cut(
        &self,
        name: &str,
        mut keeps: impl FnMut() -> bool,
    ) -> Option<Vec<u8>> {
        let state = locked(&self.state);
        let content = &state.files[state.durable_names.get(name)?];
        let mut left = content.durable.clone();
        content.pending.iter().for_each(|change| change.apply_some(&mut left, &mut keeps));
        Some(left)
    }

    /// As [`Lossy::after_power_cut`], on a file system that has written its names by itself.
    pub fn after_power_cut_with_names(&self, name: &str) -> Option<Vec<u8>> {
        let state = locked(&self.state);
        let node = state.names.get(name)?;
        Some(state.files[node].durable.clone())
    }

    /// How often files and the directory were flushed.
    pub fn flushes(&self) -> u64 {
        locked(&self.state).flushes
    }

    /// Has every write fail with EIO, or none: the kernel learns of it when it writes pages back.
    pub fn fail_writes(&self, on: bool) {
        locked(&self.state).broken = on;
    }

    /// From now on it makes neither zeros nor holes.
    pub fn refuse_fallocate(&self) {
        locked(&self.state).plain = true;
    }

    /// Has the next so many flushes fail with EIO; what they were for is lost, as it is when the
    /// kernel could not write pages back. Later ones succeed.
    pub fn fail_flushes(&self, count: u64) {
        locked(&self.state).failing = count;
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        let target = c_path(&self.place);
        // SAFETY: a C string that lives across the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Answers the kernel until the file system is unmounted.
fn serve(mut device: &File, state: &Mutex<State>) {
    let mut buffer = vec![0u8; MAX_WRITE + 4096];
    loop {
        let read = match device.read(&mut buffer) {
            Ok(read) => read,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
            // A request that was taken back.
            Err(_) => continue,
        };
        let request = &buffer[..read];
        let (opcode, unique) = (u32_at(request, 4), u64_at(request, 8));
        if matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT) {
            continue;
        }
        let answer = answer(opcode, u64_at(request, 16), &request[IN_HEADER..], state);
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = ((OUT_HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        reply.extend(error.to_ne_bytes());
        reply.extend(unique.to_ne_bytes());
        reply.extend(body);
        // Nobody may be waiting any more.
        let _ = device.write(&reply);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The strings, each with its zero, that end a request.
fn words(bytes: &[u8]) -> Vec<String> {
    let parts = bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty());
    parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}

fn answer(opcode: u32, node: u64, body: &[u8], state: &Mutex<State>) -> Result<Vec<u8>, i32> {
    let state = &mut *locked(state);
    match opcode {
        INIT => Ok(init()),
        LOOKUP => {
            let name = words(body).swap_remove(0);
            let node = *state.names.get(&name).ok_or(libc::ENOENT)?;
            entry(state, node)
        }
        GETATTR => attributes(state, node),
        SETATTR => {
            if u32_at(body, 0) & SET_SIZE != 0 {
                let size = u64_at(body, 16) as usize;
                file(state, node)?.change(Change::Size(size));
            }
            attributes(state, node)
        }
        CREATE => {
            let name = words(&body[16..]).swap_remove(0);
            let node = state.make(&name);
            let mut out = entry(state, node)?;
            out.extend(opened());
            Ok(out)
        }
        UNLINK => {
            state.names.remove(&words(body)[0]);
            Ok(Vec::new())
        }
        RENAME | RENAME2 => {
            let names = words(&body[if opcode == RENAME { 8 } else { 16 }..]);
            let node = state.names.remove(&names[0]).ok_or(libc::ENOENT)?;
            state.names.insert(names[1].clone(), node);
            Ok(Vec::new())
        }
        OPEN | OPENDIR => Ok(opened()),
        READ => {
            let (offset, size) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
            let content = &file(state, node)?.volatile;
            let start = offset.min(content.len());
            Ok(content[start..(start + size).min(content.len())].to_vec())
        }
        WRITE if state.broken => Err(libc::EIO),
        WRITE => {
            let (offset, size) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
            let bytes = body[40..40 + size].to_vec();
            file(state, node)?.change(Change::Write { offset, bytes });
            Ok([size as u32, 0].iter().flat_map(|word| word.to_ne_bytes()).collect())
        }
        FALLOCATE if state.plain => Err(libc::EOPNOTSUPP),
        FALLOCATE => {
            let (offset, len) = (u64_at(body, 8) as usize, u64_at(body, 16) as usize);
            file(state, node)?.change(Change::Zero { offset, len });
            Ok(Vec::new())
        }
        FSYNC | FSYNCDIR => {
            state.flushes += 1;
            let fails = state.failing > 0;
            state.failing -= u64::from(fails);
            if opcode == FSYNCDIR && !fails {
                state.durable_names = state.names.clone();
            }
            if opcode == FSYNC {
                let Content { durable, pending, .. } = file(state, node)?;
                let changes = std::mem::take(pending);
                changes.iter().filter(|_| !fails).for_each(|change| change.apply(durable));
            }
            if fails { Err(libc::EIO) } else { Ok(Vec::new()) }
        }
        STATFS => {
            let blocks = [1u64 << 20; 5].iter().flat_map(|n| n.to_ne_bytes());
            let sizes = [4096u32, 255, 4096, 0, 0, 0, 0, 0, 0, 0];
            Ok(blocks.chain(sizes.iter().flat_map(|n| n.to_ne_bytes())).collect())
        }
        RELEASE | RELEASEDIR => Ok(Vec::new()),
        _ => Err(libc::ENOSYS),
    }
}

fn file(state: &mut State, node: u64) -> Result<&mut Content, i32> {
    state.files.get_mut(&node).ok_or(libc::EISDIR)
}

fn init() -> Vec<u8> {
    let mut out: Vec<u8> =
        [7u32, 31, 0, WRITEBACK_CACHE | BIG_WRITES].iter().flat_map(|n| n.to_ne_bytes()).collect();
    // max_background, congestion_threshold
    out.extend([16u16, 12].iter().flat_map(|n| n.to_ne_bytes()));
    // max_write, time_gran
    out.extend([MAX_WRITE as u32, 1].iter().flat_map(|n| n.to_ne_bytes()));
    out.resize(64, 0);
    out
}

fn opened() -> Vec<u8> {
    let mut out = vec![0; 8];
    out.extend(KEEP_CACHE.to_ne_bytes());
    out.resize(16, 0);
    out
}

fn attr(state: &State, node: u64) -> Result<Vec<u8>, i32> {
    let (size, mode) = match state.files.get(&node) {
        Some(content) => (content.volatile.len() as u64, libc::S_IFREG | 0o600),
        None if node == ROOT => (0, libc::S_IFDIR | 0o700),
        None => return Err(libc::ENOENT),
    };
    let numbers = [node, size, size.div_ceil(512), 0, 0, 0];
    let rest = [0u32, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
    let out = numbers.iter().flat_map(|n| n.to_ne_bytes());
    Ok(out.chain(rest.iter().flat_map(|n| n.to_ne_bytes())).collect())
}

fn attributes(state: &State, node: u64) -> Result<Vec<u8>, i32> {
    let mut out = FOREVER_S.to_ne_bytes().to_vec();
    out.resize(16, 0);
    out.extend(attr(state, node)?);
    Ok(out)
}

fn entry(state: &State, node: u64) -> Result<Vec<u8>, i32> {
    let mut out: Vec<u8> =
        [node, 0, FOREVER_S, FOREVER_S, 0].iter().flat_map(|n| n.to_ne_bytes()).collect();
    out.extend(attr(state, node)?);
    Ok(out)
}
