//! The device's thread: messages, registers, the device, DMA, control commands.
//!
//! ```text
//!   waiting ──QEMU connects──► running ──"quiesce"──► quiesced ──"resume"──► running
//!                                ▲                        └──"release": the image is another's
//!   incoming ──"import"──────────┴──"resume"
//! ```
//!
//! One turn takes what the others have told, has the device make a step, and sends what waits for that.
//! Registers can be accessed at any time, for an access changes values alone (`semper_device::Device`);
//! so this thread is never in a place where it could not answer QEMU, also while it waits for QEMU
//! itself: QEMU, which carries out our write of its address space, may ask us about a register before
//! it answers.

mod commands;
mod succession;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use semper_control::Answer;
use semper_device::capture::Capture;
use semper_device::page::{Page, WORDS};
use semper_device::{Activity, Bus, Device, PAGE, Window};
use semper_walls::Standing;

use crate::args::Doorbells;
use crate::config::{Config, Effect};
use crate::control::{Dirty, Request};
use crate::dma::Dma;
use crate::inbox::{Event, Inbox, Port};
use crate::interrupts::Interrupts;
use crate::message::{Command, DATA_MOST, Fields, HEADER, Message};
use crate::pace::{Next, Pace};
use crate::server::succession::Succession;
use crate::shim::{self, Shim};
use crate::tenure::Tenure;
use crate::vfio::{self, device, irq, region};

/// How long requests in flight, and QEMU, may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a reset may take that QEMU waits for.
const RESET: Duration = Duration::from_secs(5);
/// Events of one turn.
const EVENTS: usize = 64;
/// Between two looks whether something has become so.
const LOOK: Duration = Duration::from_micros(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Running,
    Quiesced,
    Incoming { imported: bool },
}

/// Why the thread ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// QEMU has gone.
    Gone,
    /// It was asked for.
    Signal,
}

/// What does not change.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub engine: &'static str,
    pub serial: String,
    pub doorbells: Doorbells,
    pub line: bool,
    pub walls: Standing,
}

/// The thread's things.
pub(crate) struct Server {
    device: Box<dyn Device>,
    window: Window,
    page: Page,
    dma: Dma,
    config: Config,
    shim: Shim,
    capture: Capture,
    captured: Option<Dirty>,
    phase: Phase,
    tenure: Option<Tenure>,
    inbox: Inbox,
    streams: [Option<Arc<UnixStream>>; 2],
    queued: VecDeque<(Request, Sender<Answer>)>,
    wanted: Option<u16>,
    reply: Option<Result<Vec<u8>, u32>>,
    end: Option<End>,
    facts: Facts,
    /// Who reads a connection waits here to go on.
    readers: [Option<Sender<()>>; 2],
    /// None for a device that dies with its process, or is to.
    succession: Option<Succession>,
    /// Another process has died, and this one went on.
    resumed: bool,
    pace: Pace,
    doorbells_captured: u64,
    doorbells_trapped: u64,
    protocol_errors: u64,
    last_error: Option<String>,
    pub(crate) patience: Duration,
}

/// A body, and a file that goes with it.
type Reply<'a> = Result<(Vec<u8>, Option<BorrowedFd<'a>>), i32>;

impl Server {
    /// For a device.
    ///
    /// # Errors
    /// The system's, when there is no memory for its page.
    pub(crate) fn new(
        mut device: Box<dyn Device>,
        tenure: Option<Tenure>,
        incoming: bool,
        inbox: Inbox,
        facts: Facts,
    ) -> std::io::Result<Self> {
        let window = device.window();
        let page = Page::new(window.size, window.direct.unwrap_or(0))?;
        let mut dma = Dma::new(Interrupts::new(window.vectors));
        device.hold(incoming);
        dma.quiet = incoming;
        let phase = if incoming { Phase::Incoming { imported: false } } else { Phase::Waiting };
        Ok(Self {
            config: Config::device(device.identity(), window, facts.line),
            capture: Capture::new(device.registers()),
            device,
            window,
            page,
            dma,
            shim: Shim::new(),
            captured: None,
            phase,
            tenure,
            inbox,
            streams: [None, None],
            queued: VecDeque::new(),
            wanted: None,
            reply: None,
            end: None,
            facts,
            readers: [None, None],
            succession: None,
            resumed: false,
            pace: Pace::new(Instant::now()),
            doorbells_captured: 0,
            doorbells_trapped: 0,
            protocol_errors: 0,
            last_error: None,
            patience: PATIENCE,
        })
    }

    /// Serves until QEMU has gone or a signal came. Nothing is in flight then.
    pub(crate) fn run(&mut self) -> End {
        loop {
            let activity = self.turn();
            while let Some((request, sender)) = self.queued.pop_front() {
                let answer = self.answer(&request);
                self.keep();
                // Who asked may have gone.
                let _ = sender.send(answer);
            }
            if let Some(end) = self.end {
                self.let_spare_end();
                self.device.hold(true);
                self.dma.quiet = true;
                let finished = self.finish_in_flight(self.patience);
                match finished {
                    true => log::info!("everything in flight was finished"),
                    false => log::error!(
                        "requests did not end within {} s, and may still reach the image; its claim stays",
                        self.patience.as_secs()
                    ),
                }
                if let Some(tenure) =
                    self.tenure.as_ref().filter(|_| end == End::Signal && finished)
                {
                    tenure.end();
                }
                return end;
            }
            let watches = self.device.hardware().is_none()
                && self.facts.doorbells == Doorbells::Direct
                && self.window.direct.is_some()
                && matches!(self.phase, Phase::Running)
                && self.config.is_master();
            if let Next::Sleep(time) = self.pace.after(activity, watches, Instant::now()) {
                self.sleep(time);
            }
        }
    }

    fn sleep(&self, most: Option<Duration>) {
        self.inbox.sleep(most, self.device.hardware().map(|hardware| hardware.wake()));
    }

    /// Requests of a device that is on hold end, whether QEMU is there or not. False if some have not.
    fn finish_in_flight(&mut self, patience: Duration) -> bool {
        let begun = Instant::now();
        while self.device.in_flight() > 0 && begun.elapsed() < patience {
            if self.device.step(&self.page, &mut self.dma) != Activity::Busy {
                std::thread::yield_now();
            }
        }
        self.device.in_flight() == 0
    }

    pub(crate) fn turn(&mut self) -> Activity {
        for _ in 0..EVENTS {
            let Some(event) = self.inbox.next() else { break };
            self.hear(event);
        }
        let activity = self.device.step(&self.page, &mut self.dma);
        self.dma.settle();
        if self.facts.line && !self.dma.quiet {
            self.dma.interrupts.follow_line(self.device.asserts_line());
        }
        activity
    }

    /// Turns until something is so; false when it does not become so in time, or QEMU goes.
    fn turn_until(&mut self, is_so: impl Fn(&Self) -> bool) -> bool {
        let begun = Instant::now();
        while self.end.is_none() && begun.elapsed() < self.patience {
            let activity = self.turn();
            if is_so(self) {
                return true;
            }
            if activity != Activity::Busy {
                self.sleep(Some(LOOK));
            }
        }
        false
    }

    fn stream(&self, port: Port) -> Option<&Arc<UnixStream>> {
        self.streams[port as usize].as_ref()
    }

    pub(crate) fn hear(&mut self, event: Event) {
        match event {
            Event::Connected(port, stream, go) => {
                self.readers[port as usize] = Some(go);
                if port == Port::Device {
                    self.dma.connect(Arc::clone(&stream));
                    if self.phase == Phase::Waiting {
                        self.phase = Phase::Running;
                    }
                }
                log::info!("a client has connected port={port:?}");
                self.tell_of_stream(port, &stream);
                self.streams[port as usize] = Some(stream);
                self.keep();
            }
            Event::Message(port, message) => {
                self.take(port, message);
                if let Some(reader) = &self.readers[port as usize] {
                    // It may have ended.
                    let _ = reader.send(());
                }
            }
            Event::Gone(port) => {
                log::info!("the client has gone port={port:?}");
                self.streams[port as usize] = None;
                if port == Port::Device {
                    self.end = Some(End::Gone);
                }
            }
            Event::Control(request, sender) => self.queued.push_back((request, sender)),
            Event::Spare(link) => self.admit(link),
            Event::SpareReady => self.spare_is_ready(),
            Event::SpareGone => self.forget_spare(),
            Event::End => self.end = self.end.or(Some(End::Signal)),
        }
    }

    fn take(&mut self, port: Port, message: Message) {
        let len = HEADER + message.body.len();
        let stream = self.stream(port).map(Arc::clone);
        if message.is_reply() {
            self.consume(stream.as_deref(), len);
            let fits = port == Port::Device && !self.dma.take_reply(message.id);
            if fits && self.wanted == Some(message.id) {
                self.wanted = None;
                let error = message.is_error().then_some(message.error);
                self.reply = Some(error.map_or(Ok(message.body), Err));
            }
            return;
        }
        let mut message = message;
        let files = std::mem::take(&mut message.files);
        let command = Command::of(message.command);
        let files_told = self.copies_for_spare(port, command, &files);
        let reply = match command {
            Some(command) => self.serve(port, command, &message.body, files),
            None => Err(libc::EOPNOTSUPP),
        };
        let (reply, file) = match reply {
            Ok((body, None)) => (message.answer(Ok(body)), None),
            // The page, and so its file, lives as long as the server.
            Ok((body, Some(file))) => (message.answer(Ok(body)), Some(file.as_raw_fd())),
            Err(errno) => (message.answer(Err(errno)), None),
        };
        if let (Some(command), false) = (command, reply.is_error()) {
            self.tell_of_message(port, command, &message.body, files_told);
        }
        let wants = message.wants_reply();
        let sent = match &stream {
            Some(stream) if wants => self.give_answer(port, stream, &reply, file, len),
            stream => {
                self.consume(stream.as_deref(), len);
                Ok(())
            }
        };
        if reply.is_error() {
            self.protocol_errors += 1;
            let told = format!("command {} was refused, errno {}", message.command, reply.error);
            // A client can do it as often as it likes.
            if self.protocol_errors.is_power_of_two() {
                log::info!("{told} port={port:?} times={}", self.protocol_errors);
            }
            self.last_error = Some(told);
        }
        if let Err(error) = sent {
            log::warn!("QEMU takes no answer port={port:?} error=\"{error}\"");
        }
    }

    fn serve(
        &mut self,
        port: Port,
        command: Command,
        body: &[u8],
        files: Vec<std::os::fd::OwnedFd>,
    ) -> Reply<'_> {
        let body = match command {
            Command::Version => self.version(port, body)?,
            // The shim reaches no memory.
            Command::DmaMap if port == Port::Shim => Vec::new(),
            Command::DmaUnmap if port == Port::Shim => body[..24.min(body.len())].to_vec(),
            Command::DmaMap => {
                self.dma.map(body, files)?;
                self.tell_memory()?;
                Vec::new()
            }
            Command::DmaUnmap => {
                let answer = self.dma.unmap(body)?;
                self.tell_memory()?;
                answer
            }
            Command::GetInfo => {
                words(&[16, device::PCI | device::RESET, vfio::REGIONS, vfio::IRQS])
            }
            Command::GetRegionInfo => return self.region_info(port, body),
            Command::GetIrqInfo => self.irq_info(port, body)?,
            Command::SetIrqs => {
                let mut fields = Fields(body);
                let (_, flags, index) = (fields.word()?, fields.word()?, fields.word()?);
                let range = (fields.word()?, fields.word()?);
                if port == Port::Device {
                    self.dma.interrupts.set((index, flags), range, files)?;
                    if let Some(hardware) =
                        self.device.hardware_mut().filter(|_| index == vfio::MSIX)
                    {
                        hardware.set_vectors(self.dma.interrupts.vectors())?;
                    }
                }
                Vec::new()
            }
            Command::RegionRead => self.region_read(port, body)?,
            Command::RegionWrite => self.region_write(port, body)?,
            Command::Reset => {
                if port == Port::Device {
                    self.reset()?;
                }
                Vec::new()
            }
            // Only a server asks for these.
            Command::DmaRead | Command::DmaWrite => return Err(libc::EOPNOTSUPP),
        };
        Ok((body, None))
    }

    /// A device in hardware reaches the guest's memory by itself.
    fn tell_memory(&mut self) -> Result<(), i32> {
        let hardware = self.device.hardware_mut();
        hardware.map_or(Ok(()), |hardware| hardware.set_memory(self.dma.memory()))
    }

    fn version(&mut self, port: Port, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut fields = Fields(body);
        let version = fields.word()?;
        if version & 0xffff != 0 {
            // Another major version is another protocol.
            return Err(libc::EINVAL);
        }
        let text = fields.0.split(|byte| *byte == 0).next().unwrap_or_default();
        let told: serde_json::Value = serde_json::from_slice(text).unwrap_or_default();
        let most = told["capabilities"]["max_data_xfer_size"].as_u64();
        if let Some(most) = most.filter(|_| port == Port::Device) {
            self.dma.limit_data(most);
        }
        let ours = serde_json::json!({"capabilities": {
            "max_msg_fds": 8, "max_data_xfer_size": DATA_MOST, "pgsizes": PAGE, "max_dma_maps": 4096,
        }});
        let mut body = vec![0; 4];
        body.extend(ours.to_string().bytes());
        body.push(0);
        Ok(body)
    }

    fn region_info(&self, port: Port, body: &[u8]) -> Reply<'_> {
        let mut fields = Fields(body);
        let (room, _, index) = (fields.word()?, fields.word()?, fields.word()?);
        if index >= vfio::REGIONS {
            return Err(libc::EINVAL);
        }
        let size = match (port, index) {
            (Port::Device, vfio::BAR0) => self.window.size,
            (Port::Shim, vfio::BAR0) => shim::BAR_LEN,
            (Port::Device, vfio::CONFIG) => crate::config::LEN as u64,
            (Port::Shim, vfio::CONFIG) => crate::config::USED as u64,
            _ => 0,
        };
        let flags = if size > 0 { region::READ | region::WRITE } else { 0 };
        let direct = self.window.direct.filter(|_| {
            (port, index) == (Port::Device, vfio::BAR0) && self.facts.doorbells == Doorbells::Direct
        });
        let hardware = self.device.hardware().map(|hardware| hardware.registers_file());
        let told = |len: u32, flags: u32, capabilities: u32| {
            let mut told = words(&[len, flags, index, capabilities]);
            told.extend(size.to_le_bytes());
            // Where in the file the BAR begins.
            told.extend(direct.and(hardware).map_or(0, |(_, start)| start).to_le_bytes());
            told
        };
        let Some(direct) = direct else { return Ok((told(region::INFO, flags, 0), None)) };
        // The one area that can be mapped.
        let mut sparse = words(&[u32::from(region::SPARSE) | 1 << 16, 0, 1, 0]);
        sparse.extend(direct.to_le_bytes());
        sparse.extend(PAGE.to_le_bytes());
        let len = region::INFO + sparse.len() as u32;
        let mut body = told(len, flags | region::MMAP | region::CAPS, region::INFO);
        if room >= len {
            body.extend(sparse);
        }
        // SAFETY: the page, and so its file, lives as long as the server.
        let page = unsafe { BorrowedFd::borrow_raw(self.page.fd()) };
        Ok((body, Some(hardware.map_or(page, |(file, _)| file))))
    }

    fn irq_info(&self, port: Port, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut fields = Fields(body);
        let (_, _, index) = (fields.word()?, fields.word()?, fields.word()?);
        if index >= vfio::IRQS {
            return Err(libc::EINVAL);
        }
        let (flags, count) = match (port, index) {
            (Port::Device, vfio::INTX) => {
                let flags = irq::EVENTFD | irq::MASKABLE | irq::AUTOMASKED;
                (flags, self.facts.line.into())
            }
            (Port::Device, vfio::MSIX) => (irq::EVENTFD, self.window.vectors.into()),
            _ => (irq::EVENTFD, 0),
        };
        Ok(words(&[16, flags, index, count]))
    }

    /// Offset, region and length of an access, and what follows them.
    fn access(body: &[u8]) -> Result<(u64, u32, usize, &[u8]), i32> {
        let mut fields = Fields(body);
        let (offset, region, count) = (fields.long()?, fields.word()?, fields.word()?);
        let count = usize::try_from(count).ok().filter(|count| *count <= PAGE as usize);
        Ok((offset, region, count.ok_or(libc::EINVAL)?, fields.0))
    }

    fn region_read(&mut self, port: Port, body: &[u8]) -> Result<Vec<u8>, i32> {
        let (offset, region, count, _) = Self::access(body)?;
        let mut told = body[..16].to_vec();
        let mut bytes = vec![0; count];
        match (port, region) {
            (Port::Device, vfio::CONFIG) => {
                bytes.copy_from_slice(self.config.read(offset, count).ok_or(libc::EINVAL)?);
            }
            (Port::Shim, vfio::CONFIG) => {
                let read = self.shim.config.read(offset, count);
                bytes.copy_from_slice(read.ok_or(libc::EINVAL)?);
            }
            (Port::Device, vfio::BAR0) => {
                let end = offset.checked_add(count as u64);
                end.filter(|end| *end <= self.window.size).ok_or(libc::EINVAL)?;
                self.read_bar(offset, &mut bytes);
            }
            (Port::Shim, vfio::BAR0) => self.read_page(offset, &mut bytes),
            _ => return Err(libc::EINVAL),
        }
        told.extend(bytes);
        Ok(told)
    }

    fn read_page(&self, offset: u64, into: &mut [u8]) {
        for (at, byte) in into.iter_mut().enumerate() {
            let at = offset.saturating_add(at as u64);
            let word = usize::try_from(at / 4).ok().filter(|word| *word < WORDS);
            *byte = word.map_or(0, |word| self.page.load(word).to_le_bytes()[(at % 4) as usize]);
        }
    }

    fn read_bar(&mut self, offset: u64, into: &mut [u8]) {
        let within = |start: u64| (start..start + PAGE).contains(&offset);
        match self.window.direct.filter(|start| within(*start)) {
            Some(start) => self.read_page(offset - start, into),
            None if within(self.window.pending) => {
                self.dma.interrupts.pending(offset - self.window.pending, into);
            }
            None if within(self.window.table) => {}
            None => self.device.read(offset, into),
        }
    }

    fn region_write(&mut self, port: Port, body: &[u8]) -> Result<Vec<u8>, i32> {
        let (offset, region, count, data) = Self::access(body)?;
        let data = data.get(..count).ok_or(libc::EINVAL)?;
        match (port, region) {
            (Port::Device, vfio::CONFIG) => {
                let effect = self.config.write(offset, data).ok_or(libc::EINVAL)?;
                self.dma.master = self.config.is_master();
                if let Some(hardware) = self.device.hardware_mut() {
                    hardware.set_master(self.dma.master);
                }
                if effect == Effect::Reset {
                    self.device.reset();
                }
            }
            (Port::Shim, vfio::CONFIG) => {
                self.shim.config.write(offset, data).ok_or(libc::EINVAL)?;
            }
            (Port::Device, vfio::BAR0) => {
                let end = offset.checked_add(count as u64);
                end.filter(|end| *end <= self.window.size).ok_or(libc::EINVAL)?;
                self.write_bar(offset, data);
            }
            (Port::Shim, vfio::BAR0) => {
                self.doorbells_captured += u64::from(self.ring(offset, data));
            }
            _ => return Err(libc::EINVAL),
        }
        Ok(body[..16].to_vec())
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let within = |start: u64| (start..start + PAGE).contains(&offset);
        match self.window.direct.filter(|start| within(*start)) {
            Some(start) => self.doorbells_trapped += u64::from(self.ring(offset - start, data)),
            None if within(self.window.pending) || within(self.window.table) => {}
            None => {
                self.device.write(offset, data);
                self.capture.note(offset, data);
            }
        }
    }

    /// A doorbell that somebody has told us of, at an offset of the page: as if the guest had written
    /// it there. Whether there is one.
    fn ring(&mut self, offset: u64, data: &[u8]) -> bool {
        let Some(start) = self.window.direct else { return false };
        let word = usize::try_from(offset / 4).ok().filter(|word| *word < WORDS);
        let (Some(word), Ok(bytes), 0) = (word, <[u8; 4]>::try_from(data), offset % 4) else {
            return false;
        };
        self.page.tell(word, u32::from_le_bytes(bytes));
        self.capture.note(start + offset, data);
        true
    }

    /// QEMU waits for its end, so nothing else is heard meanwhile.
    fn reset(&mut self) -> Result<(), i32> {
        self.device.reset();
        let begun = Instant::now();
        while self.device.is_resetting() {
            if begun.elapsed() > RESET {
                return Err(libc::ETIMEDOUT);
            }
            self.device.step(&self.page, &mut self.dma);
        }
        self.dma.interrupts.forget_pending();
        Ok(())
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use semper_device::Bus;
    use semper_nvme::storage::{Ended, Job};
    use semper_nvme::{Controller, Settings, Storage};

    use std::os::fd::{AsFd, FromRawFd, OwnedFd};

    use semper_ring::{GuestMemory, RegionSpec};

    use super::*;
    use crate::inbox::{Teller, Way, inbox};
    use crate::link;
    use crate::message::send;

    /// Requests in flight that do not end, and whether something was lost.
    struct Still {
        in_flight: usize,
        lost: bool,
    }

    impl Storage for Still {
        fn block_size(&self) -> u32 {
            512
        }

        fn capacity(&self) -> u64 {
            1 << 20
        }

        fn is_read_only(&self) -> bool {
            false
        }

        fn begin(&mut self, _: Job, _: &mut dyn Bus) {}

        fn advance(&mut self, _: &mut dyn Bus, _: &mut Vec<Ended>) {}

        fn in_flight(&self) -> usize {
            self.in_flight
        }

        fn is_busy_for(&self, _: u16) -> bool {
            false
        }

        fn settle(&mut self) {}

        fn has_lost(&self) -> bool {
            self.lost
        }

        fn lose(&mut self) {
            self.lost = true;
        }
    }

    fn server(storage: Still) -> Server {
        served(storage).1
    }

    fn served(storage: Still) -> (Teller, Server) {
        let settings = Settings { serial: "s".to_owned(), queues: 1 };
        let device = Box::new(Controller::new(settings, Box::new(storage)));
        let facts = Facts {
            engine: "none",
            serial: "s".to_owned(),
            doorbells: Doorbells::Direct,
            line: false,
            walls: Standing::default(),
        };
        let (teller, inbox) = inbox().unwrap();
        (teller, Server::new(device, None, false, inbox, facts).unwrap())
    }

    fn ask(server: &mut Server, line: &str) -> serde_json::Value {
        server.answer(&serde_json::from_str(line).unwrap()).line
    }

    /// Both ends of a link.
    fn link() -> (OwnedFd, OwnedFd) {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        socketpair(AddressFamily::UNIX, kind, flags, None).unwrap()
    }

    fn has_ended(far: &OwnedFd) -> bool {
        loop {
            match link::receive(far) {
                Ok(Some(_)) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    #[test]
    fn a_doorbell_that_was_rung_before_is_heard_before_doorbells_are_direct_again() {
        let (teller, mut server) = served(Still { in_flight: 0, lost: false });
        (server.phase, server.captured) = (Phase::Running, Some(Dirty::None));
        let (near, far) = UnixStream::pair().unwrap();
        let near = Arc::new(near);
        server.streams[Port::Shim as usize] = Some(Arc::clone(&near));
        // Offset, region, bytes; QEMU waits for no answer.
        let body = [&8u64.to_le_bytes()[..], &words(&[vfio::BAR0, 4, 3])].concat();
        send(&far, &Message::request(1, Command::RegionWrite, body, false), None).unwrap();
        let reader = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50)); // a thread that comes late
            teller.read(Port::Shim, Way::Stream(near)).unwrap();
        });
        let answer = ask(&mut server, r#"{"cmd":"capture","on":false}"#);
        assert!(answer["ok"].is_object(), "{answer}");
        assert_eq!((server.doorbells_captured, server.page.load(2)), (1, 3));
        reader.join().unwrap();
    }

    #[test]
    fn a_spare_that_is_not_told_everything_is_let_go_of() {
        let mut server = server(Still { in_flight: 0, lost: false });
        // Before there is anything to tell.
        let (near, far) = link();
        let kept = near.as_fd().try_clone_to_owned().unwrap();
        server.admit(near);
        assert!(has_ended(&far));
        drop(kept);
        server.be_followed([None, None]).unwrap();
        let (near, far) = link();
        let kept = near.as_fd().try_clone_to_owned().unwrap();
        server.admit(near);
        assert_eq!((server.spare(), has_ended(&far)), ("following", false));
        // SAFETY: no such descriptor is open, and it is forgotten below: to copy it fails.
        let files = vec![unsafe { OwnedFd::from_raw_fd(1 << 20) }];
        let copies = server.copies_for_spare(Port::Device, Some(Command::DmaMap), &files);
        std::mem::forget(files);
        assert!(copies.is_empty());
        assert_eq!((server.spare(), has_ended(&far)), ("alone", true));
        drop(kept);
    }

    #[test]
    fn pages_that_a_dead_process_has_noted_are_all_pages_for_the_next() {
        let mut first = server(Still { in_flight: 0, lost: false });
        first.be_followed([None, None]).unwrap();
        let spec = RegionSpec { guest_addr: 0, size: 0x8000, user_addr: 0, file_offset: 0 };
        // SAFETY: a new descriptor, which is owned from here.
        let memory = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        std::fs::File::from(memory.try_clone().unwrap()).set_len(spec.size).unwrap();
        let mut body = words(&[32, 3]);
        for long in [0, spec.guest_addr, spec.size] {
            body.extend(long.to_le_bytes());
        }
        first.serve(Port::Device, Command::DmaMap, &body, vec![memory]).unwrap();
        (first.phase, first.captured) = (Phase::Running, Some(Dirty::Touch));
        first.keep();
        let (near, far) = link();
        first.admit(near);
        let mut next = server(Still { in_flight: 0, lost: false });
        while !next.follow(link::receive(&far).unwrap().unwrap()).unwrap() {}
        drop(first);
        next.take_over().map(drop).map_err(|failure| failure.to_string()).unwrap();
        assert_eq!(next.dma.dirty_pages(), spec.size / PAGE);
        assert!(GuestMemory::clone(next.dma.memory()).translate(0, spec.size).is_some());
    }

    #[test]
    fn requests_that_do_not_end_are_told_of() {
        for in_flight in [0, 1] {
            let mut server = server(Still { in_flight, lost: false });
            assert_eq!(server.finish_in_flight(Duration::from_millis(1)), in_flight == 0);
        }
    }

    #[test]
    fn a_device_that_has_lost_something_goes_nowhere() {
        for (lost, kind) in [(true, "failed"), (false, "busy")] {
            let mut server = server(Still { in_flight: 0, lost });
            // Without QEMU there is nothing to capture or to release.
            for line in [r#"{"cmd":"capture","on":true}"#, r#"{"cmd":"release"}"#] {
                let request = serde_json::from_str(line).unwrap();
                assert_eq!(server.answer(&request).line["error"]["kind"], kind, "{line}");
            }
            let request = serde_json::from_str(r#"{"cmd":"capture","on":false}"#).unwrap();
            assert!(server.answer(&request).line["ok"].is_object(), "the way back is open");
        }
    }
}
