//! Who plays QEMU and a guest's NVMe driver to a mediator with a real PCI device: verified I/O by doorbells
//! that go straight to the device, and moves from one device to another and back with everything going on.
//!
//! ```text
//!   vfio_guest MEDIATOR ADDRESS ADDRESS [--moves=N] [--control=unshipped]
//! ```
//!
//! Runs in a machine in which both devices are bound to vfio-pci and lead to the same namespace
//! (`tests/vfio`). A move takes a copy of memory when the capture begins, and then of those pages alone that
//! the driver has written or that were told by DMA_WRITE, as a QEMU would.
//! `--control=unshipped` has no page told: the verifier has to find that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command as Process, ExitCode};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use semper_vfiod::message::{Command, Message, receive, send};
use serde_json::{Value, json};

const MEMORY: u64 = 24 << 20;
const BAR: u64 = 0xe000_0000;
const TABLE: u64 = BAR + 0x2000;
const VECTORS: u32 = 4;
const QUEUES: usize = 3;
/// Entries of admin queues, and of others: none is a multiple of what the tests do with them.
const ENTRIES: [u32; QUEUES] = [32, 64, 16];
const DATA: u64 = 0x10_0000;
const BLOCK: usize = 4096;
const EVENT_ID: u16 = 30;
const DEADLINE: Duration = Duration::from_secs(60);

fn submissions(queue: usize) -> u64 {
    0x1_0000 + queue as u64 * 0x2_0000
}

fn completions(queue: usize) -> u64 {
    submissions(queue) + 0x1_0000
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// What a block holds that was written in this round.
fn pattern(block: u32, round: u32) -> Vec<u8> {
    let word = |at: u32| (block << 20 ^ round << 10 ^ at).wrapping_mul(0x9e37_79b1).to_le_bytes();
    (0..BLOCK as u32 / 4).flat_map(word).collect()
}

/// A process that serves a device; our end of its sockets.
struct Mediator {
    child: Child,
    device: UnixStream,
    shim: UnixStream,
    control: BufReader<UnixStream>,
}

fn connect(path: &PathBuf, child: &mut Child) -> UnixStream {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            return stream;
        }
        let ended = child.try_wait().expect("a child");
        assert!(ended.is_none() && Instant::now() < end, "the mediator has ended: {ended:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Mediator {
    /// As the agent does it: the group and the container are opened here.
    fn start(program: &str, address: &str, name: &str, options: &[&str]) -> Self {
        let group = std::fs::read_link(format!("/sys/bus/pci/devices/{address}/iommu_group"));
        let group = group.expect("a group").file_name().expect("a number").to_owned();
        let open = |path: PathBuf| {
            let file = File::options().read(true).write(true).open(&path);
            let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).expect("a descriptor");
            file
        };
        let group = open(PathBuf::from("/dev/vfio").join(group));
        let container = open("/dev/vfio/vfio".into());
        let [device, shim, control] =
            ["sock", "shim", "ctl"].map(|ending| PathBuf::from(format!("/tmp/{name}.{ending}")));
        let mut child = Process::new(program)
            .args(["--kind=pci", &format!("--pci={address}")])
            .arg(format!("--vfio-group-fd={}", group.as_raw_fd()))
            .arg(format!("--vfio-container-fd={}", container.as_raw_fd()))
            .arg(format!("--socket-path={}", device.display()))
            .arg(format!("--shim-socket-path={}", shim.display()))
            .arg(format!("--control-socket={}", control.display()))
            .args(options)
            .spawn()
            .expect("the mediator");
        drop((group, container));
        let control = BufReader::new(connect(&control, &mut child));
        let device = connect(&device, &mut child);
        let shim = connect(&shim, &mut child);
        Self { child, device, shim, control }
    }

    fn end(mut self) {
        drop((self.device, self.shim));
        let status = self.child.wait().expect("its end");
        assert!(status.success(), "{status}");
    }
}

/// The guest's memory, and which of its pages QEMU knows to be written.
struct Ram {
    file: File,
    known: BTreeSet<u64>,
}

impl Ram {
    fn new() -> Self {
        // SAFETY: a new descriptor, which the file then owns.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ram".as_ptr(), 0)) };
        file.set_len(MEMORY).expect("room");
        Self { file, known: BTreeSet::new() }
    }

    fn know(&mut self, address: u64, len: usize) {
        self.known.extend(address / 4096..=(address + len as u64 - 1) / 4096);
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, address).expect("memory");
        self.know(address, bytes.len());
    }

    fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, address).expect("memory");
        bytes
    }

    fn copy(&mut self) -> Self {
        let other = Self::new();
        let bytes = self.get(0, MEMORY as usize);
        other.file.write_all_at(&bytes, 0).expect("memory");
        self.known.clear();
        other
    }
}

/// The device's page of doorbells, mapped.
struct Page(*mut u32);

impl Page {
    fn map(file: &OwnedFd, offset: u64) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, at) = (file.as_raw_fd(), offset as libc::off_t);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page =
            unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, fd, at) };
        assert!(page != libc::MAP_FAILED, "the doorbells cannot be mapped");
        Self(page.cast())
    }

    fn ring(&self, word: usize, value: u32) {
        assert!(word < 1024);
        fence(Ordering::SeqCst);
        // SAFETY: inside the mapped page.
        unsafe { self.0.add(word).write_volatile(value) };
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nobody has a reference.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

/// What a driver knows, which moves along with its VM.
#[derive(Clone, Default)]
struct Driver {
    tails: [u32; QUEUES],
    heads: [u32; QUEUES],
    phases: [bool; QUEUES],
    next_id: u16,
    blocks: BTreeMap<u32, u32>,
    commands: u64,
}

struct Machine {
    mediator: Mediator,
    ram: Ram,
    driver: Driver,
    page: Page,
    /// Doorbells go by the shim.
    captured: bool,
    vectors: Vec<File>,
    table: Vec<u8>,
    next_id: u16,
    told: u64,
}

impl Machine {
    fn connect(mediator: Mediator, ram: Ram) -> Self {
        let mut machine = Self {
            mediator,
            ram,
            driver: Driver { phases: [true; QUEUES], next_id: 100, ..Driver::default() },
            page: Page(std::ptr::null_mut()),
            captured: false,
            vectors: Vec::new(),
            table: Vec::new(),
            next_id: 0,
            told: 0,
        };
        let mut hello = vec![0; 4];
        hello.extend(b"{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576}}\0");
        machine.ask(Command::Version, &hello, None);
        // As firmware does: ranges come and go before the memory stays.
        machine.map(0, MEMORY / 2);
        machine.unmap(0, MEMORY / 2);
        machine.map(0, MEMORY);
        let mut body = words(&[64, 0, 0, 0]);
        body.extend([0; 16]);
        let told = machine.ask(Command::GetRegionInfo, &body, None);
        let long = |at: usize| u64::from_le_bytes(told.body[at..at + 8].try_into().expect("8"));
        let (offset, direct, len) = (long(24), long(48), long(56));
        assert_eq!((direct, len), (0x1000, 4096), "the page that can be mapped");
        machine.page = Page::map(&told.files[0], offset + direct);
        let told = machine.ask(Command::GetIrqInfo, &words(&[16, 0, 2, 0]), None);
        let count = u32::from_le_bytes(told.body[12..16].try_into().expect("4"));
        assert!(count >= VECTORS);
        machine.table = vec![0; 16 * count as usize];
        machine
    }

    fn map(&mut self, address: u64, size: u64) {
        let mut body = words(&[32, 3]);
        body.extend([0, address, size].iter().flat_map(|long: &u64| long.to_le_bytes()));
        let file = self.ram.file.try_clone().expect("a descriptor");
        self.ask(Command::DmaMap, &body, Some(file.into()));
    }

    fn unmap(&mut self, address: u64, size: u64) {
        let mut body = words(&[24, 0]);
        body.extend([address, size].iter().flat_map(|long| long.to_le_bytes()));
        self.ask(Command::DmaUnmap, &body, None);
    }

    fn ask(&mut self, command: Command, body: &[u8], file: Option<OwnedFd>) -> Message {
        self.next_id = self.next_id.wrapping_add(1) & 0x7fff;
        let message = Message::request(self.next_id, command, body.to_vec(), true);
        send(&self.mediator.device, &message, file.as_ref().map(AsFd::as_fd)).expect("a client");
        loop {
            let message = receive(&self.mediator.device).expect("a message").expect("a connection");
            if message.is_reply() && message.id == self.next_id {
                assert!(!message.is_error(), "{command:?}: errno {}", message.error);
                return message;
            }
            self.serve(&message);
        }
    }

    /// What the mediator asks of QEMU.
    fn serve(&mut self, message: &Message) {
        let long = |at: usize| u64::from_le_bytes(message.body[at..at + 8].try_into().expect("8"));
        let (address, len) = (long(0), long(8) as usize);
        let answer = match Command::of(message.command) {
            Some(Command::DmaRead) if address == TABLE => self.table[..len].to_vec(),
            Some(Command::DmaRead) => self.ram.get(address, len),
            Some(Command::DmaWrite) if address == TABLE => {
                self.table[..len].copy_from_slice(&message.body[16..]);
                Vec::new()
            }
            Some(Command::DmaWrite) => {
                self.ram.put(address, &message.body[16..]);
                self.told += 1;
                Vec::new()
            }
            other => panic!("a mediator asks for {other:?}"),
        };
        if message.wants_reply() {
            let answer = [&message.body[..16], &answer].concat();
            send(&self.mediator.device, &message.answer(Ok(answer)), None).expect("a client");
        }
    }

    fn control(&mut self, request: Value) -> Result<Value, String> {
        let line = format!("{request}\n");
        self.mediator.control.get_mut().write_all(line.as_bytes()).expect("the control socket");
        let wait = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        let end = Instant::now() + DEADLINE;
        loop {
            let (device, control) = (&self.mediator.device, self.mediator.control.get_ref());
            let mut fds = [PollFd::new(device, PollFlags::IN), PollFd::new(control, PollFlags::IN)];
            poll(&mut fds, Some(&wait)).expect("a poll");
            let came = fds.map(|fd| !fd.revents().is_empty());
            if came[0] {
                let message = receive(&self.mediator.device).expect("a message");
                self.serve(&message.expect("a connection"));
            }
            if came[1] {
                let mut answer = String::new();
                self.mediator.control.read_line(&mut answer).expect("an answer");
                let answer: Value = serde_json::from_str(&answer).expect("JSON");
                return match answer["ok"].is_object() {
                    true => Ok(answer["ok"].clone()),
                    false => Err(answer["error"]["message"].to_string()),
                };
            }
            assert!(Instant::now() < end, "no answer to {request}");
        }
    }

    fn ok(&mut self, request: Value) -> Value {
        let told = request.to_string();
        self.control(request).unwrap_or_else(|why| panic!("{told:.80}: {why}"))
    }

    fn write(&mut self, region: u32, offset: u64, bytes: &[u8]) {
        let mut body = offset.to_le_bytes().to_vec();
        body.extend(words(&[region, bytes.len() as u32]));
        body.extend(bytes);
        self.ask(Command::RegionWrite, &body, None);
    }

    fn read(&mut self, region: u32, offset: u64, len: u32) -> Vec<u8> {
        let mut body = offset.to_le_bytes().to_vec();
        body.extend(words(&[region, len]));
        self.ask(Command::RegionRead, &body, None).body[16..].to_vec()
    }

    fn connect_vectors(&mut self) {
        self.vectors.clear();
        // As QEMU does: MSI-X is on, with no vector yet.
        self.ask(Command::SetIrqs, &words(&[20, 4 | 32, 2, 0, 1]), None);
        for vector in 0..VECTORS {
            // SAFETY: a new descriptor, which the file then owns.
            let file = unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) };
            let copy = file.try_clone().expect("a descriptor");
            self.ask(Command::SetIrqs, &words(&[20, 4 | 32, 2, vector, 1]), Some(copy.into()));
            self.vectors.push(file);
        }
    }

    /// What firmware and a driver do.
    fn set_up(&mut self) {
        assert_eq!(self.read(7, 9, 3), [2, 8, 1], "the class of an NVMe controller");
        self.write(7, 0x10, &(BAR as u32).to_le_bytes());
        self.write(7, 4, &[6, 0]);
        self.write(7, 0x42, &[3, 0x80]);
        self.connect_vectors();
        let sizes = (ENTRIES[0] - 1) << 16 | (ENTRIES[0] - 1);
        self.write(0, 0x24, &sizes.to_le_bytes());
        self.write(0, 0x28, &submissions(0).to_le_bytes());
        self.write(0, 0x30, &completions(0).to_le_bytes());
        self.write(0, 0x14, &0x0046_0001u32.to_le_bytes());
        let end = Instant::now() + DEADLINE;
        while self.read(0, 0x1c, 4)[0] & 1 == 0 {
            assert!(Instant::now() < end, "it does not become ready");
        }
        assert_eq!(self.command(0, 6, DATA, &[(10, 1)]).1, 0, "identify");
        let model = self.ram.get(DATA + 24, 40);
        println!("model: {}", String::from_utf8_lossy(&model).trim());
        assert_eq!(self.command(0, 9, 0, &[(10, 7), (11, 1 << 16 | 1)]).1, 0, "how many queues");
        // Tell of temperatures.
        assert_eq!(self.command(0, 9, 0, &[(10, 0xb), (11, 2)]).1, 0, "which events");
        for (queue, entries) in ENTRIES.iter().enumerate().skip(1) {
            let size = (entries - 1) << 16 | queue as u32;
            let vector = (queue as u32) << 16 | 3;
            let made = self.command(0, 5, completions(queue), &[(10, size), (11, vector)]);
            assert_eq!(made.1, 0, "a completion queue");
            let to = (queue as u32) << 16 | 1;
            let made = self.command(0, 1, submissions(queue), &[(10, size), (11, to)]);
            assert_eq!(made.1, 0, "a submission queue");
        }
        self.submit_as(EVENT_ID, 0, 0xc, 0, &[]);
    }

    fn ring(&mut self, word: usize, value: u32) {
        if !self.captured {
            return self.page.ring(word, value);
        }
        let mut body = (4 * word as u64).to_le_bytes().to_vec();
        body.extend(words(&[0, 4, value]));
        let message = Message::request(1, Command::RegionWrite, body, true);
        send(&self.mediator.shim, &message, None).expect("the shim");
        let answer = receive(&self.mediator.shim).expect("a message").expect("an answer");
        assert!(!answer.is_error());
    }

    fn submit_as(&mut self, id: u16, queue: usize, opcode: u8, prp: u64, dwords: &[(usize, u32)]) {
        let mut entry = [0u32; 16];
        entry[0] = u32::from(opcode) | u32::from(id) << 16;
        (entry[6], entry[7]) = (prp as u32, (prp >> 32) as u32);
        dwords.iter().for_each(|(at, value)| entry[*at] = *value);
        let tail = self.driver.tails[queue];
        self.ram.put(submissions(queue) + 64 * u64::from(tail), &words(&entry));
        self.driver.tails[queue] = (tail + 1) % ENTRIES[queue];
        self.driver.commands += 1;
        let tail = self.driver.tails[queue];
        self.ring(2 * queue, tail);
    }

    fn submit(&mut self, queue: usize, opcode: u8, prp: u64, dwords: &[(usize, u32)]) -> u16 {
        let id = self.driver.next_id;
        self.driver.next_id = 100 + (id - 99) % 20_000;
        self.submit_as(id, queue, opcode, prp, dwords);
        id
    }

    /// Waits for the next completion of a queue by its interrupt: command, status and result.
    fn completion(&mut self, queue: usize) -> (u16, u16, u32) {
        let end = Instant::now() + DEADLINE;
        let mut interrupted = false;
        loop {
            let head = self.driver.heads[queue];
            let entry = self.ram.get(completions(queue) + 16 * u64::from(head), 16);
            let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
            if (half(14) & 1 != 0) == self.driver.phases[queue] {
                self.driver.heads[queue] = (head + 1) % ENTRIES[queue];
                self.driver.phases[queue] ^= self.driver.heads[queue] == 0;
                let head = self.driver.heads[queue];
                self.ring(2 * queue + 1, head);
                let result = u32::from_le_bytes(entry[..4].try_into().expect("4"));
                return (half(12), half(14) >> 1 & 0x7ff, result);
            }
            let now = Instant::now();
            assert!(now < end, "queue {queue}: nothing ends, interrupted: {interrupted}");
            let wait = Timespec { tv_sec: 5, tv_nsec: 0 };
            let mut fds = [
                PollFd::new(&self.vectors[queue], PollFlags::IN),
                PollFd::new(&self.mediator.device, PollFlags::IN),
            ];
            poll(&mut fds, Some(&wait)).expect("a poll");
            let came = fds.map(|fd| !fd.revents().is_empty());
            if came[0] {
                let _ = (&self.vectors[queue]).read(&mut [0; 8]);
                interrupted = true;
            }
            if came[1] {
                let message = receive(&self.mediator.device).expect("a message");
                self.serve(&message.expect("a connection"));
            }
        }
    }

    fn command(
        &mut self,
        queue: usize,
        opcode: u8,
        prp: u64,
        dwords: &[(usize, u32)],
    ) -> (u32, u16) {
        let id = self.submit(queue, opcode, prp, dwords);
        let (told, status, result) = self.completion(queue);
        assert_eq!(told, id, "another command has ended");
        (result, status)
    }

    /// Blocks are written, read back to other memory, and compared; some in flight together.
    fn work(&mut self, rounds: u32) {
        for round in 0..rounds {
            let stamp = self.driver.commands as u32;
            let queue = 1 + (round % 2) as usize;
            let first = (stamp.wrapping_mul(7)) % 200;
            for (opcode, place) in [(1, DATA), (2, DATA + 0x40_0000)] {
                let mut ids = BTreeSet::new();
                for n in 0..8u32 {
                    let block = first + n;
                    let address = place + u64::from(n) * BLOCK as u64;
                    if opcode == 1 {
                        self.ram.put(address, &pattern(block, stamp));
                        self.driver.blocks.insert(block, stamp);
                    }
                    let sectors = (BLOCK / 512) as u32;
                    let dwords = [(1, 1), (10, block * sectors), (12, sectors - 1)];
                    ids.insert(self.submit(queue, opcode, address, &dwords));
                }
                while !ids.is_empty() {
                    let (id, status, _) = self.completion(queue);
                    assert_eq!(status, 0);
                    assert!(ids.remove(&id), "a command that nobody waits for");
                }
            }
            for n in 0..8 {
                let found = self.ram.get(DATA + 0x40_0000 + u64::from(n) * BLOCK as u64, BLOCK);
                assert!(found == pattern(first + n, stamp), "block {} is another", first + n);
            }
        }
    }

    /// What lies in memory since the last [`Machine::work`], read by the device before the move.
    fn leave_behind(&mut self) -> Vec<u8> {
        let blocks: Vec<_> = self.driver.blocks.keys().copied().take(8).collect();
        let sectors = (BLOCK / 512) as u32;
        for (n, block) in (0..).zip(&blocks) {
            let place = DATA + 0x80_0000 + n * BLOCK as u64;
            let dwords = [(1, 1), (10, block * sectors), (12, sectors - 1)];
            assert_eq!(self.command(1, 2, place, &dwords).1, 0);
        }
        let expected = blocks.iter().flat_map(|block| pattern(*block, self.driver.blocks[block]));
        expected.collect()
    }

    fn check_all(&mut self) {
        for (block, stamp) in self.driver.blocks.clone() {
            let sectors = (BLOCK / 512) as u32;
            let dwords = [(1, 1), (10, block * sectors), (12, sectors - 1)];
            assert_eq!(self.command(2, 2, DATA + 0xc0_0000, &dwords).1, 0);
            assert!(
                self.ram.get(DATA + 0xc0_0000, BLOCK) == pattern(block, stamp),
                "block {block}"
            );
        }
    }

    /// From this mediator to another, whose device nobody uses.
    fn move_to(mut self, mediator: Mediator, ships: bool) -> (Self, Value) {
        let dirty = if ships { "mediated" } else { "none" };
        let captured = self.ok(json!({"cmd": "capture", "on": true, "dirty": dirty}));
        assert_eq!(captured["page"], BAR + 0x1000);
        self.captured = true;
        let copy = self.ram.copy();
        let mut there = Self::connect(mediator, copy);
        let configuration = self.ok(json!({"cmd": "configuration"}));
        // The guest goes on, captured.
        self.work(6);
        let round = self.ok(json!({"cmd": "round"}));
        there.ok(json!({"cmd": "replay", "writes": round["writes"]}));
        there.configure(&configuration);
        self.work(4);
        let expected = self.leave_behind();
        // Some are on their way when the guest is stopped.
        let sectors = (BLOCK / 512) as u32;
        let block = *self.driver.blocks.keys().next().expect("a block");
        let late: Vec<_> = (0..6)
            .map(|n| {
                let dwords = [(1, 1), (10, block * sectors), (12, sectors - 1)];
                self.submit(1, 2, DATA + 0x90_0000 + n * BLOCK as u64, &dwords)
            })
            .collect();
        let stopped = Instant::now();
        self.ok(json!({"cmd": "quiesce"}));
        let quiesced = stopped.elapsed();
        let pages = self.ok(json!({"cmd": "touch"}))["pages"].clone();
        let last = self.ok(json!({"cmd": "round"}));
        let state = self.ok(json!({"cmd": "export"}));
        self.ok(json!({"cmd": "release"}));
        for page in std::mem::take(&mut self.ram.known) {
            there.ram.put(page * 4096, &self.ram.get(page * 4096, 4096));
        }
        let taken = Instant::now();
        there.ok(json!({"cmd": "replay", "writes": last["writes"]}));
        let imported = there.ok(json!({"cmd": "import", "state": state["state"]}));
        let resumed = there.ok(json!({"cmd": "resume"}));
        let (resumed_ms, stood) = (taken.elapsed(), stopped.elapsed());
        there.driver = self.driver.clone();
        let told = json!({
            "quiesced_ms": quiesced.as_secs_f64() * 1e3, "resumed_ms": resumed_ms.as_secs_f64() * 1e3,
            "stood_ms": stood.as_secs_f64() * 1e3, "pages": pages, "state_bytes": state["bytes"],
            "differing": imported["differing"], "kicked": resumed["kicked"],
        });
        // It ends with its QEMU.
        self.mediator.end();
        let found = there.ram.get(DATA + 0x80_0000, expected.len());
        assert!(found == expected, "pages are not what the device has written there");
        let mut ids: BTreeSet<_> = late.into_iter().collect();
        while !ids.is_empty() {
            let (id, status, _) = there.completion(1);
            assert!(status == 0 && ids.remove(&id), "command {id} has ended, status {status}");
        }
        let late = there.ram.get(DATA + 0x90_0000, BLOCK);
        assert!(
            late == pattern(block, there.driver.blocks[&block]),
            "the last read brought other data"
        );
        (there, told)
    }

    fn configure(&mut self, configuration: &Value) {
        let writes = |part: &Value| -> Vec<(u64, usize, u64)> {
            let number = |write: &Value, at: usize| write[at].as_u64().expect("a number");
            let writes = part.as_array().expect("writes").iter();
            writes.map(|w| (number(w, 0), number(w, 1) as usize, number(w, 2))).collect()
        };
        for (offset, size, value) in writes(&configuration["before"]) {
            self.write(7, offset, &value.to_le_bytes()[..size]);
        }
        let table = &configuration["msix_table"];
        self.ok(json!({"cmd": "msix", "address": table["address"], "table": table["table"]}));
        for (offset, size, value) in writes(&configuration["after"]) {
            self.write(7, offset, &value.to_le_bytes()[..size]);
        }
        self.connect_vectors();
    }

    /// A request of before the moves is answered by the device that is there now.
    fn expect_event(&mut self) {
        let id = self.submit(0, 9, 0, &[(10, 4), (11, 1)]);
        let mut told: Vec<_> = (0..2).map(|_| self.completion(0)).collect();
        told.sort_unstable_by_key(|(told, ..)| *told == id);
        assert_eq!((told[0].0, told[1].0), (EVENT_ID, id), "an event for the request of before");
        assert_eq!(told[0].2 & 7, 1, "an event of health, {:#x}", told[0].2);
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [program, first, second, options @ ..] = &*args else {
        eprintln!("vfio_guest MEDIATOR ADDRESS ADDRESS [--moves=N] [--control=unshipped]");
        return ExitCode::from(2);
    };
    let number = options.iter().find_map(|option| option.strip_prefix("--moves="));
    let moves: u32 = number.map_or(1, |number| number.parse().expect("a number"));
    let ships = !options.iter().any(|option| option == "--control=unshipped");
    let start = |address: &str, name: &str, options: &[&str]| {
        Mediator::start(program, address, name, options)
    };
    let begun = Instant::now();
    let mut machine = Machine::connect(start(first, "m0", &[]), Ram::new());
    println!("opened_ms: {:.0}", begun.elapsed().as_secs_f64() * 1e3);
    machine.set_up();
    machine.work(16);
    println!("status: {}", machine.ok(json!({"cmd": "status"})));
    for number in 0..moves {
        let address = if number % 2 == 0 { second } else { first };
        let mediator = start(address, &format!("m{}", number + 1), &["--incoming"]);
        let (there, told) = machine.move_to(mediator, ships);
        machine = there;
        println!("move {number}: {told}");
        machine.work(10);
    }
    machine.check_all();
    machine.expect_event();
    let counters = machine.ok(json!({"cmd": "status"}))["counters"].clone();
    assert_eq!(counters["refused"], 0, "{counters}");
    println!("commands: {}", machine.driver.commands);
    machine.mediator.end();
    println!("verified");
    ExitCode::SUCCESS
}
