//! One mediator, and who plays QEMU to it: memory, messages, a driver of NVMe.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use semper_ring::{GuestMemory, RegionSpec};
use semper_vfiod::message::{Command, Message, receive, send};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const MEMORY: u64 = 4 << 20;
pub const BAR: u64 = 0xfebf_0000;
const ENTRIES: u32 = 16;
const DEADLINE: Duration = Duration::from_secs(90);
const ASQ: u64 = 0x1000;
const ACQ: u64 = 0x2000;
const SQ: u64 = 0x3000;
const CQ: u64 = 0x4000;
pub const DATA: u64 = 0x1_0000;

/// A directory with an image.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        let place = Self(tempfile::Builder::new().prefix("sv-").tempdir_in("/tmp").unwrap());
        File::create(place.path("image")).unwrap().set_len(1 << 20).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// The program.
pub struct Mediator {
    pub child: Child,
    folder: PathBuf,
    name: String,
}

impl Mediator {
    pub fn start(place: &Place, name: &str, options: &[&str]) -> Self {
        let at = |ending: &str| place.path(&format!("{name}.{ending}"));
        let child = Process::new(env!("CARGO_BIN_EXE_semper-vfiod"))
            .arg("--socket-path")
            .arg(at("sock"))
            .arg("--shim-socket-path")
            .arg(at("shim"))
            .arg("--control-socket")
            .arg(at("ctl"))
            .args(["--queues=2", "--serial=serial-1"])
            .args(options)
            .stderr(File::create(at("log")).unwrap())
            .spawn()
            .unwrap();
        Self { child, folder: place.path(""), name: name.to_owned() }
    }

    /// A spare of the mediator of that name.
    pub fn spare(place: &Place, name: &str, log: &str, options: &[&str]) -> Self {
        let at = |ending: &str| place.path(&format!("{name}.{ending}"));
        let child = Process::new(env!("CARGO_BIN_EXE_semper-vfiod"))
            .arg("--spare")
            .arg("--session-socket")
            .arg(at("session"))
            .arg("--control-socket")
            .arg(at("ctl"))
            .args(["--queues=2", "--serial=serial-1"])
            .args(options)
            .stderr(File::create(place.path(&format!("{log}.log"))).unwrap())
            .spawn()
            .unwrap();
        Self { child, folder: place.path(""), name: log.to_owned() }
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn on(place: &Place, name: &str, options: &[&str]) -> Self {
        let image = format!("--blk-file={}", place.path("image").display());
        Self::start(place, name, &[&[&*image], options].concat())
    }

    pub fn socket(&self, ending: &str) -> UnixStream {
        let path = self.folder.join(format!("{}.{ending}", self.name));
        let end = Instant::now() + DEADLINE;
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => return stream,
                Err(error) if Instant::now() > end => {
                    panic!("{}: {error}\n{}", path.display(), self.log())
                }
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join(format!("{}.log", self.name))).unwrap_or_default()
    }

    /// The end of the program by itself: its status.
    pub fn wait(&mut self) -> i32 {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < end, "it does not end\n{}", self.log());
            std::thread::yield_now();
        }
    }
}

impl Drop for Mediator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a player of QEMU has of its VM: it can outlive one QEMU.
#[derive(Clone)]
pub struct Ram {
    pub file: Arc<File>,
    pub memory: Arc<GuestMemory>,
}

impl Ram {
    pub fn new() -> Self {
        // SAFETY: a new descriptor, which the file then owns.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ram".as_ptr(), 0)) };
        file.set_len(MEMORY).unwrap();
        let spec = RegionSpec { guest_addr: 0, size: MEMORY, user_addr: 0, file_offset: 0 };
        let memory = GuestMemory::empty().with_region(spec, &file).unwrap();
        Self { file: Arc::new(file), memory: Arc::new(memory) }
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        let to = self.memory.translate(address, bytes.len() as u64).expect("memory");
        // SAFETY: `translate` checked the range.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let from = self.memory.translate(address, len as u64).expect("memory");
        let mut bytes = vec![0; len];
        // SAFETY: `translate` checked the range.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len) };
        bytes
    }
}

/// What a driver knows, which moves along with its VM.
#[derive(Clone, Copy, Default)]
pub struct Driver {
    tails: [u32; 2],
    heads: [u32; 2],
    phases: [bool; 2],
    next_id: u16,
}

impl Driver {
    pub fn new() -> Self {
        Self { phases: [true; 2], next_id: 1, ..Self::default() }
    }
}

/// QEMU with a guest.
pub struct Machine {
    pub stream: UnixStream,
    pub ram: Ram,
    pub driver: Driver,
    pub page: Option<File>,
    pub vectors: Vec<File>,
    /// The table of vectors, which QEMU keeps.
    pub table: Vec<u8>,
    next_id: u16,
    /// Bytes that came by DMA_WRITE, for memory.
    pub mediated: u64,
    pub barriers: u64,
    control: BufReader<UnixStream>,
}

impl Machine {
    /// Connects as QEMU does, with all that it asks for, and maps memory.
    pub fn connect(mediator: &Mediator, ram: &Ram) -> Self {
        let stream = mediator.socket("sock");
        let mut machine = Self {
            stream,
            ram: ram.clone(),
            driver: Driver::new(),
            page: None,
            vectors: Vec::new(),
            table: vec![0; 48],
            next_id: 0,
            mediated: 0,
            barriers: 0,
            control: BufReader::new(mediator.socket("ctl")),
        };
        machine.greet();
        machine
    }

    fn greet(&mut self) {
        let mut hello = vec![0; 4];
        hello.extend(b"{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576}}\0");
        let told = self.ask(Command::Version, &hello, None).unwrap();
        assert!(String::from_utf8_lossy(&told.body[4..]).contains("max_data_xfer_size"));
        let info = self.ask(Command::GetInfo, &words(&[16, 0, 0, 0]), None).unwrap();
        assert_eq!(info.body, words(&[16, 3, 9, 5]));
        self.map(0, MEMORY);
        // A first look has room for no capability, and gets the file nevertheless.
        for room in [32, 64] {
            let mut body = words(&[room, 0, 0, 0]);
            body.extend([0; 16]);
            let told = self.ask(Command::GetRegionInfo, &body, None).unwrap();
            if let Some(file) = told.files.into_iter().next() {
                assert_eq!(u32::from_le_bytes(told.body[..4].try_into().unwrap()), 64);
                assert_eq!(told.body.len(), room as usize);
                self.page = Some(file.into());
            }
        }
    }

    pub fn map(&mut self, address: u64, size: u64) {
        let mut body = words(&[32, 3]);
        for long in [0, address, size] {
            body.extend(u64::to_le_bytes(long));
        }
        let file = self.ram.file.try_clone().unwrap();
        self.ask(Command::DmaMap, &body, Some(file.into())).unwrap();
    }

    /// Asks, and serves what the other end asks for meanwhile; an errno where it refuses.
    pub fn ask(
        &mut self,
        command: Command,
        body: &[u8],
        file: Option<OwnedFd>,
    ) -> Result<Message, u32> {
        self.next_id = self.next_id.wrapping_add(1) & 0x7fff;
        let message = Message::request(self.next_id, command, body.to_vec(), true);
        send(&self.stream, &message, file.as_ref().map(AsFd::as_fd)).unwrap();
        loop {
            let message = receive(&self.stream).unwrap().expect("a connection");
            if message.is_reply() && message.id == self.next_id {
                return if message.is_error() { Err(message.error) } else { Ok(message) };
            }
            self.serve(message);
        }
    }

    /// A request of the other end: DMA.
    fn serve(&mut self, message: Message) {
        assert!(!message.is_reply());
        let long = |at: usize| u64::from_le_bytes(message.body[at..at + 8].try_into().unwrap());
        let (address, len) = (long(0), long(8));
        let table = BAR + 0x2000;
        let answer = match Command::of(message.command).unwrap() {
            Command::DmaRead if address == table => {
                [&message.body[..16], &self.table[..len as usize]].concat()
            }
            Command::DmaRead => {
                self.barriers += 1;
                [&message.body[..16], &*self.ram.get(address, len as usize)].concat()
            }
            Command::DmaWrite => {
                let data = &message.body[16..];
                assert_eq!(data.len() as u64, len);
                if address == table {
                    self.table.copy_from_slice(data);
                } else {
                    self.ram.put(address, data);
                    self.mediated += len;
                }
                message.body[..16].to_vec()
            }
            other => panic!("a server asks for {other:?}"),
        };
        if message.wants_reply() {
            send(&self.stream, &message.answer(Ok(answer)), None).unwrap();
        }
    }

    /// Serves what has come until now.
    pub fn serve_all(&mut self) {
        let now = Timespec { tv_sec: 0, tv_nsec: 200_000 };
        while poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&now)).unwrap() > 0 {
            let message = receive(&self.stream).unwrap().expect("a connection");
            self.serve(message);
        }
    }

    pub fn write(&mut self, region: u32, offset: u64, bytes: &[u8]) {
        let mut body = offset.to_le_bytes().to_vec();
        body.extend(words(&[region, bytes.len() as u32]));
        body.extend(bytes);
        self.ask(Command::RegionWrite, &body, None).unwrap();
    }

    pub fn read(&mut self, region: u32, offset: u64, len: u32) -> Vec<u8> {
        let mut body = offset.to_le_bytes().to_vec();
        body.extend(words(&[region, len]));
        self.ask(Command::RegionRead, &body, None).unwrap().body[16..].to_vec()
    }

    /// What firmware does: the BAR, bus master; what QEMU does: eventfds.
    pub fn configure(&mut self) {
        self.write(7, 0x10, &(BAR as u32).to_le_bytes());
        self.write(7, 4, &[6, 0]);
        self.write(7, 0x42, &[2, 0x80]);
        self.connect_vectors();
    }

    /// The same for a device with one vector.
    pub fn configure_small(&mut self) {
        self.write(7, 0x10, &(BAR as u32).to_le_bytes());
        self.write(7, 4, &[6, 0]);
    }

    /// Has an edu device copy, and waits for the end.
    pub fn copy(&mut self, from: u64, to: u64, len: u64, command: u64) {
        for (offset, value) in [(0x80, from), (0x88, to), (0x90, len), (0x98, command)] {
            self.write(0, offset, &u64::to_le_bytes(value));
        }
        let end = Instant::now() + DEADLINE;
        while self.read(0, 0x98, 8) != [0; 8] {
            assert!(Instant::now() < end, "the copy does not end");
        }
        self.serve_all();
    }

    pub fn connect_vectors(&mut self) {
        self.vectors.clear();
        for vector in 0..3 {
            // SAFETY: a new descriptor, which the file then owns.
            let file = unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) };
            let body = words(&[20, 4 | 32, 2, vector, 1]);
            let copy = file.try_clone().unwrap();
            self.ask(Command::SetIrqs, &body, Some(copy.into())).unwrap();
            self.vectors.push(file);
        }
    }

    pub fn interrupts(&self, vector: usize) -> u64 {
        let mut bytes = [0; 8];
        (&self.vectors[vector]).read(&mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    }

    /// What a driver does until it has a pair of queues.
    pub fn enable(&mut self) {
        let sizes = (ENTRIES - 1) << 16 | (ENTRIES - 1);
        self.write(0, 0x24, &sizes.to_le_bytes());
        self.write(0, 0x28, &ASQ.to_le_bytes());
        self.write(0, 0x30, &ACQ.to_le_bytes());
        self.write(0, 0x14, &0x0046_0001u32.to_le_bytes());
        let end = Instant::now() + DEADLINE;
        while self.read(0, 0x1c, 4) != [1, 0, 0, 0] {
            assert!(Instant::now() < end, "it does not become ready");
        }
        let queue = (ENTRIES - 1) << 16 | 1;
        assert_eq!(self.command(0, 5, CQ, &[(10, queue), (11, 1 << 16 | 3)]), 0);
        assert_eq!(self.command(0, 1, SQ, &[(10, queue), (11, 1 << 16 | 1)]), 0);
    }

    /// Puts a command into a queue and rings, in the page that is mapped or by a message.
    pub fn submit(&mut self, queue: usize, opcode: u8, prp: u64, dwords: &[(usize, u32)]) -> u16 {
        let id = self.submit_silently(queue, opcode, prp, dwords);
        let tail = self.tail(queue);
        self.ring(8 * queue as u64, tail);
        id
    }

    pub fn tail(&self, queue: usize) -> u32 {
        self.driver.tails[queue]
    }

    pub fn head(&self, queue: usize) -> u32 {
        self.driver.heads[queue]
    }

    /// Puts a command into a queue, and does not ring.
    pub fn submit_silently(
        &mut self,
        queue: usize,
        opcode: u8,
        prp: u64,
        dwords: &[(usize, u32)],
    ) -> u16 {
        let driver = &mut self.driver;
        let id = driver.next_id;
        driver.next_id += 1;
        let mut entry = [0; 64];
        entry[0] = opcode;
        entry[2..4].copy_from_slice(&id.to_le_bytes());
        entry[24..32].copy_from_slice(&prp.to_le_bytes());
        for (number, value) in dwords {
            entry[number * 4..number * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
        let tail = driver.tails[queue];
        driver.tails[queue] = (tail + 1) % ENTRIES;
        self.ram.put([ASQ, SQ][queue] + u64::from(tail) * 64, &entry);
        id
    }

    pub fn ring(&mut self, offset: u64, value: u32) {
        match &self.page {
            Some(page) => {
                std::os::unix::fs::FileExt::write_all_at(
                    page,
                    &value.to_le_bytes(),
                    0x1000 + offset,
                )
                .unwrap();
            }
            None => self.write(0, 0x1000 + offset, &value.to_le_bytes()),
        }
    }

    /// The next completion, if it is there: number and status.
    fn completion_silently(&mut self, queue: usize) -> Option<(u16, u16)> {
        let at = [ACQ, CQ][queue] + u64::from(self.driver.heads[queue]) * 16;
        let entry = self.ram.get(at, 16);
        let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        let driver = &mut self.driver;
        if (half(14) & 1 == 1) != driver.phases[queue] {
            return None;
        }
        driver.heads[queue] = (driver.heads[queue] + 1) % ENTRIES;
        driver.phases[queue] ^= driver.heads[queue] == 0;
        Some((half(12), half(14) >> 1))
    }

    /// Waits for the completion of a command: its status.
    pub fn wait(&mut self, queue: usize, id: u16) -> u16 {
        let status = self.wait_silently(queue, id);
        let head = self.head(queue);
        self.ring(8 * queue as u64 + 4, head);
        status
    }

    /// Waits for the next completion, of whichever command: number and status.
    pub fn next(&mut self, queue: usize) -> (u16, u16) {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(told) = self.completion_silently(queue) {
                let head = self.head(queue);
                self.ring(8 * queue as u64 + 4, head);
                return told;
            }
            assert!(Instant::now() < end, "no command ends");
            self.serve_all();
        }
    }

    /// The same, without ringing that it was seen.
    pub fn wait_silently(&mut self, queue: usize, id: u16) -> u16 {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some((told, status)) = self.completion_silently(queue) {
                assert_eq!(told, id);
                return status;
            }
            assert!(Instant::now() < end, "command {id} does not end");
            self.serve_all();
        }
    }

    pub fn command(&mut self, queue: usize, opcode: u8, prp: u64, dwords: &[(usize, u32)]) -> u16 {
        let id = self.submit(queue, opcode, prp, dwords);
        self.wait(queue, id)
    }

    /// Reads or writes blocks of 512 bytes, at most 4096 bytes.
    pub fn transfer(&mut self, opcode: u8, first: u32, blocks: u32, prp: u64) -> u16 {
        self.command(1, opcode, prp, &[(1, 1), (10, first), (12, blocks - 1)])
    }

    /// Speaks with whoever answers at the control socket now.
    pub fn ask_anew(&mut self, place: &Place, name: &str) {
        let path = place.path(&format!("{name}.ctl"));
        let end = Instant::now() + DEADLINE;
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break self.control = BufReader::new(stream),
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            self.serve_all();
        }
    }

    /// A command of the control socket, while its guest and QEMU go on.
    pub fn control(&mut self, request: Value) -> Value {
        let line = format!("{request}\n");
        self.control.get_mut().write_all(line.as_bytes()).unwrap();
        let end = Instant::now() + DEADLINE;
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut answer = String::new();
        loop {
            self.serve_all();
            let there = poll(&mut [PollFd::new(self.control.get_ref(), PollFlags::IN)], Some(&now));
            if there.unwrap() > 0 {
                self.control.read_line(&mut answer).unwrap();
                return serde_json::from_str(&answer).unwrap();
            }
            assert!(Instant::now() < end, "no answer to {request}");
        }
    }

    /// The same, which has to be carried out.
    pub fn ok(&mut self, request: Value) -> Value {
        let answer = self.control(request.clone());
        assert!(answer["ok"].is_object(), "{request}: {answer}");
        answer["ok"].clone()
    }

    /// The kind of a refusal.
    pub fn refused(&mut self, request: Value) -> String {
        let answer = self.control(request.clone());
        answer["error"]["kind"].as_str().unwrap_or_else(|| panic!("{request}: {answer}")).to_owned()
    }

    pub fn counters(&mut self) -> Value {
        self.ok(json!({"cmd": "status"}))["counters"].clone()
    }
}

/// One process of `path`, with nothing on its command line but this.
pub fn run(options: &[&str]) -> (i32, String) {
    let output = Process::new(env!("CARGO_BIN_EXE_semper-vfiod"))
        .args(options)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let told =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    (output.status.code().unwrap_or(-1), told.concat())
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed).collect()
}

pub fn on_image(place: &Path, offset: usize, len: usize) -> Vec<u8> {
    std::fs::read(place).unwrap()[offset..offset + len].to_vec()
}
