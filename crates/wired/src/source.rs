//! The source's end: from QEMU's socket to the wire.
//!
//! ```text
//!   this thread        QEMU ─► Encoder ─► waits for room in the window ─► wire
//!   receiving thread   wire ─► verdicts (repairs go out at once), credit, return path ─► QEMU
//! ```
//!
//! What QEMU has written goes out when a batch is full, or when QEMU has written nothing for
//! [`DRY`]: so the end of the stream, during which the guest stands still, never waits for more.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use semper_wire::format::{self, FEATURE_REFERENCES, FEATURE_ZSTD, Hello, Kind, Role};
use semper_wire::{
    BlockRef, ContentIndex, Encoder, EncoderOptions, Frame, Ledger, MAX_ITEM, OfferedDisk, Page,
    Ready, Start, Window, WireError, agree,
};

use crate::args::SourceArgs;
use crate::channel::{Channel, Inbox, expect};
use crate::control;
use crate::disks::Disk;
use crate::failure::Failure;
use crate::indexing;
use crate::progress::{Phase, Progress};
use crate::tls::Identity;

/// Most bytes of one read.
const INPUT: usize = 256 << 10;
const DRY: Duration = Duration::from_millis(1);
const CONNECT: Duration = Duration::from_secs(10);

/// What the two threads share.
struct Shared {
    channel: Channel,
    qemu: UnixStream,
    ledger: Mutex<Ledger>,
    flow: Mutex<Flow>,
    changed: Condvar,
    began: Instant,
}

struct Flow {
    window: Window,
    mismatched: Vec<(BlockRef, Page)>,
    failure: Option<Failure>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    let got = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    let got = got.map_err(|error| Failure::system("get random bytes")(error.into()))?;
    assert_eq!(got, N, "the kernel gives up to 256 random bytes at once");
    Ok(bytes)
}

/// Carries one migration.
pub(crate) fn run(args: &SourceArgs, progress: &Arc<Progress>) -> Result<(), Failure> {
    if let Some(path) = &args.end.control_socket {
        control::spawn(path, progress)?;
    }
    let identity = Identity::load(&args.end)?;
    let disks = args.end.disks.iter().map(Disk::open).collect::<Result<Vec<_>, _>>()?;
    let listener = semper_control::bind(&args.qemu_socket)?;
    let socket = TcpStream::connect_timeout(&args.connect, CONNECT).map_err(Failure::Lost)?;
    let channel = Channel::new(socket, identity.client()?)?;
    let mut inbox = Inbox::new();
    let prepared = greet(args, &channel, &mut inbox, &disks, progress)
        .and_then(|(options, window)| Ok((options, window, index(args, &disks, progress)?)));
    let (options, window, index) = prepared.inspect_err(|why| channel.close(Some(why)))?;
    progress.phase(Phase::Ready);
    let (qemu, _) = listener.accept().map_err(Failure::Qemu)?;
    // One migration, one connection: multifd's further channels are refused.
    drop(listener);
    let _ = std::fs::remove_file(&args.qemu_socket);
    progress.phase(Phase::Streaming);
    let flow = Flow { window: Window::new(window), mismatched: Vec::new(), failure: None };
    let shared = Arc::new(Shared {
        channel,
        qemu,
        ledger: Mutex::default(),
        flow: Mutex::new(flow),
        changed: Condvar::new(),
        began: Instant::now(),
    });
    let result = carry(&shared, inbox, Encoder::new(index, options), progress);
    progress.wire(shared.channel.bytes());
    match &result {
        Ok(()) => progress.phase(Phase::Done),
        Err(failure) => progress.failed(&failure.to_string()),
    }
    log::info!("migration status={}", progress.status());
    let _ = shared.qemu.shutdown(Shutdown::Both);
    shared.channel.close(result.as_ref().err());
    result
}

/// Agrees with the destination about everything.
fn greet(
    args: &SourceArgs,
    channel: &Channel,
    inbox: &mut Inbox,
    disks: &[Disk],
    progress: &Progress,
) -> Result<(EncoderOptions, u64), Failure> {
    let ours = Hello::new(Role::Source, args.end.window_mib << 20, &args.end.migration);
    channel.send(&ours.to_frame())?;
    let gone = || Failure::Lost(ErrorKind::UnexpectedEof.into());
    let hello = channel.receive(inbox, |frame| Ok(Hello::of_frame(frame)?))?;
    let theirs = hello.ok_or_else(gone)?;
    let agreed = agree(&ours, &theirs)?;
    progress.peer(&theirs.program);
    let key = random()?;
    let offered = disks.iter().map(|disk| OfferedDisk { name: disk.name.clone(), size: disk.size });
    let disks = offered.collect::<Vec<_>>();
    let (version, features) = (agreed.version, agreed.features);
    channel.send(&Start { version, features, key, disks }.to_frame())?;
    let ready = channel.receive(inbox, |frame| expect(frame, Kind::Ready))?.ok_or_else(gone)?;
    let mut readable = Ready::parse(&ready, args.end.disks.len())?.readable;
    if features & FEATURE_REFERENCES == 0 {
        readable.fill(false);
    }
    for (disk, _) in args.end.disks.iter().zip(&readable).filter(|(_, readable)| !**readable) {
        log::warn!("the destination cannot read a disk disk={}", disk.name);
    }
    channel.established()?;
    let level = (features & FEATURE_ZSTD != 0).then_some(args.level);
    Ok((EncoderOptions { level, ..EncoderOptions::new(key, readable) }, agreed.window))
}

fn index(args: &SourceArgs, disks: &[Disk], progress: &Progress) -> Result<ContentIndex, Failure> {
    progress.phase(Phase::Indexing);
    let limit = usize::try_from(args.index_mib << 20).unwrap_or(usize::MAX);
    let mut index = ContentIndex::new(u64::from_ne_bytes(random()?), limit);
    indexing::build(&mut index, disks, progress)?;
    Ok(index)
}

fn carry(
    shared: &Arc<Shared>,
    inbox: Inbox,
    encoder: Encoder<ContentIndex>,
    progress: &Progress,
) -> Result<(), Failure> {
    let receiving = Arc::clone(shared);
    let receiver = thread::Builder::new().name("receive".into()).spawn(move || {
        let result = receiving.receive(inbox);
        if let Err(failure) = result {
            receiving.fail(failure);
        }
    });
    let receiver = receiver.map_err(Failure::system("start a thread"))?;
    let sent = shared.stream(encoder, progress);
    if sent.is_err() {
        shared.channel.close(sent.as_ref().err());
    }
    // It ends with DONE, or with the connection.
    let joined = receiver.join();
    // What the receiver says is the cause; a write that failed is the consequence.
    match locked(&shared.flow).failure.take() {
        Some(failure) if sent.is_ok() || !matches!(failure, Failure::Lost(_)) => Err(failure),
        _ => sent.and(joined.map_err(|_| Failure::Usage("the receiving thread died".into()))),
    }
}

impl Shared {
    fn fail(&self, failure: Failure) {
        locked(&self.flow).failure.get_or_insert(failure);
        self.changed.notify_all();
        let _ = self.qemu.shutdown(Shutdown::Both);
    }

    /// From QEMU to the wire, until QEMU closes its socket.
    fn stream(
        &self,
        mut encoder: Encoder<ContentIndex>,
        progress: &Progress,
    ) -> Result<(), Failure> {
        let mut input = vec![0; INPUT + MAX_ITEM];
        let (mut filled, mut waits) = (0, false);
        loop {
            if waits && self.is_dry()? {
                encoder.flush();
                waits = false;
            } else {
                let got = match (&self.qemu).read(&mut input[filled..]) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    got => got.map_err(Failure::Qemu)?,
                };
                if got == 0 {
                    break;
                }
                filled += got;
                let mismatched = std::mem::take(&mut locked(&self.flow).mismatched);
                encoder.mismatched(&mismatched);
                let taken = encoder.feed(&input[..filled]);
                input.copy_within(taken..filled, 0);
                filled -= taken;
                waits = true;
            }
            self.send(&mut encoder)?;
            progress.encoded(encoder.counters(), encoder.lost());
            progress.wire(self.channel.bytes());
        }
        progress.phase(Phase::Draining);
        encoder.finish(&input[..filled]);
        self.send(&mut encoder)?;
        progress.encoded(encoder.counters(), encoder.lost());
        self.channel.send(&format::end(encoder.counters().stream_bytes))
    }

    /// Whether QEMU writes nothing for a moment.
    fn is_dry(&self) -> Result<bool, Failure> {
        let mut fds = [PollFd::new(&self.qemu, PollFlags::IN)];
        let patience = Timespec { tv_sec: 0, tv_nsec: i64::from(DRY.subsec_nanos()) };
        match poll(&mut fds, Some(&patience)) {
            Ok(ready) => Ok(ready == 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(Failure::Qemu(error.into())),
        }
    }

    fn send(&self, encoder: &mut Encoder<ContentIndex>) -> Result<(), Failure> {
        while let Some(batch) = encoder.pop() {
            let mut flow = locked(&self.flow);
            while flow.failure.is_none() && !flow.window.has_room(batch.charge) {
                flow = self.changed.wait(flow).unwrap_or_else(PoisonError::into_inner);
            }
            if flow.failure.is_some() {
                return Err(Failure::Lost(ErrorKind::ConnectionAborted.into()));
            }
            flow.window.send(batch.charge, self.began.elapsed());
            drop(flow);
            if let Some(held) = batch.held {
                locked(&self.ledger).hold(held);
            }
            self.channel.send(&batch.frame)?;
        }
        Ok(())
    }

    /// From the wire, until everything was delivered.
    fn receive(&self, mut inbox: Inbox) -> Result<(), Failure> {
        loop {
            match self.channel.receive(&mut inbox, |frame| self.take(frame))? {
                Some(true) => return Ok(()),
                Some(false) => {}
                None => return Err(Failure::Lost(ErrorKind::UnexpectedEof.into())),
            }
        }
    }

    /// Takes one frame; true if it was the last.
    fn take(&self, frame: &Frame<'_>) -> Result<bool, Failure> {
        match frame.kind {
            Some(Kind::Verdict) => {
                let repairs = locked(&self.ledger).verdict(frame.payload)?;
                for repair in &repairs.frames {
                    self.channel.send(repair)?;
                }
                locked(&self.flow).mismatched.extend(repairs.mismatched);
            }
            Some(Kind::Credit) => {
                let total = format::parse_number(frame.payload)?;
                locked(&self.flow).window.credit(total, self.began.elapsed())?;
                self.changed.notify_all();
            }
            // A QEMU that has closed its socket does not care for what still comes.
            Some(Kind::Return) => drop((&self.qemu).write_all(frame.payload)),
            Some(Kind::ReturnEnd) => drop(self.qemu.shutdown(Shutdown::Write)),
            Some(Kind::Done) => return Ok(true),
            Some(Kind::Abort) => return Err(format::parse_abort(frame.payload).into()),
            None => {}
            Some(_) => return Err(WireError::Protocol("a frame out of turn").into()),
        }
        Ok(false)
    }
}
