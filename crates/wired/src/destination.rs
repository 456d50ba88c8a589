//! The destination's end: from the wire to QEMU's socket.
//!
//! ```text
//!   receiving   wire ─► Decoder: blocks are read and judged at once ─► pieces, verdicts
//!   writing     pieces ─► QEMU, which may be slow
//!   answering   verdicts and credit ─► wire
//!   returning   QEMU's return path ─► wire
//! ```
//!
//! Nothing that receives ever waits for something that sends: were both ends to do so, they would
//! wait for each other. What is under way is bounded by the window instead.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use semper_wire::format::{self, Hello, Kind, MAX_RETURN, Role};
use semper_wire::{Decoded, Decoder, Ready, Start, agree};

use crate::admission::Admission;
use crate::args::DestinationArgs;
use crate::channel::{Channel, Inbox, expect};
use crate::connects::Connects;
use crate::control;
use crate::disks::Disk;
use crate::failure::Failure;
use crate::progress::{Phase, Progress};
use crate::reader::DiskReader;
use crate::tls::Identity;
use crate::touched::Touched;
use crate::walls;

/// What is to be told to the source.
#[derive(Default)]
struct Outbox {
    verdicts: VecDeque<Vec<u8>>,
    /// Charge of all that QEMU has taken.
    taken: u64,
    /// Length of the stream, once QEMU has taken it all.
    done: Option<u64>,
}

struct Shared {
    channel: Channel,
    qemu: UnixStream,
    outbox: Mutex<Outbox>,
    changed: Condvar,
    /// Charge for which credit was given.
    granted: AtomicU64,
}

/// How a thread ended.
enum Ended {
    /// QEMU has been given all that came.
    Written,
    /// The source was told so.
    Done,
    /// QEMU has closed the return path.
    Returned,
    /// The source has closed the connection.
    Closed,
}

/// Carries one migration.
pub(crate) fn run(args: &DestinationArgs, progress: &Arc<Progress>) -> Result<(), Failure> {
    let connects = Connects::start(&args.end, Some(&args.qemu_socket), None)?;
    let listener = TcpListener::bind(args.listen).map_err(Failure::system("listen"))?;
    let control = args.end.control_socket.as_deref().map(semper_control::bind).transpose()?;
    progress.walls(walls::raise(&args.end, None));
    #[cfg(feature = "breakout")]
    semper_walls::breakout::try_if_told();
    if let Some(listener) = control {
        control::spawn(listener, progress)?;
    }
    let identity = Identity::load(&args.end)?;
    let config = identity.server()?;
    // What cannot be opened shall be known now, not when the VM has left.
    args.end.disks.iter().try_for_each(|disk| Disk::open(disk).map(drop))?;
    let address = listener.local_addr().map_err(Failure::system("listen"))?;
    progress.listening(address);
    log::info!("destination listens address={address}");
    let admission = Admission::start(listener, identity, config)?;
    let (channel, inbox, Guest { decoder, qemu, touched }) = loop {
        let (channel, from) = admission.next()?;
        let mut inbox = Inbox::new();
        match greet(args, &connects, &channel, &mut inbox, progress) {
            Ok(guest) => break (channel, inbox, guest),
            // Of another migration, perhaps: the right source may still come.
            Err(error) => {
                log::warn!("refused a source from={from} error=\"{error}\"");
                channel.close(Some(&error));
            }
        }
    };
    drop(admission);
    progress.phase(Phase::Streaming);
    let shared = Arc::new(Shared {
        channel,
        qemu,
        outbox: Mutex::default(),
        changed: Condvar::new(),
        granted: AtomicU64::new(0),
    });
    let result = carry(&shared, inbox, decoder, progress);
    progress.wire(shared.channel.bytes());
    match &result {
        Ok(()) => progress.phase(Phase::Done),
        Err(failure) => progress.failed(&failure.to_string()),
    }
    log::info!("migration status={}", progress.status());
    let _ = shared.qemu.shutdown(Shutdown::Both);
    shared.channel.close(result.as_ref().err());
    if result.is_ok() {
        touched.tell(|socket| connects.to(socket));
    }
    result
}

/// What a source is admitted to.
struct Guest {
    decoder: Decoder<DiskReader>,
    qemu: UnixStream,
    touched: Arc<Touched>,
}

/// Finds out whether this is the source that was meant.
fn greet(
    args: &DestinationArgs,
    connects: &Connects,
    channel: &Channel,
    inbox: &mut Inbox,
    progress: &Progress,
) -> Result<Guest, Failure> {
    let ours = Hello::new(Role::Destination, args.end.window_mib << 20, &args.end.migration);
    channel.send(&ours.to_frame())?;
    let gone = || Failure::Lost(ErrorKind::UnexpectedEof.into());
    let hello = channel.receive(inbox, |frame| Ok(Hello::of_frame(frame)?))?;
    let theirs = hello.ok_or_else(gone)?;
    let agreed = agree(&ours, &theirs)?;
    let start = channel.receive(inbox, |frame| expect(frame, Kind::Start))?.ok_or_else(gone)?;
    let start = Start::parse(&start, &agreed)?;
    let mut disks = Vec::new();
    for offered in &start.disks {
        let arg = args.end.disks.iter().find(|disk| disk.name == offered.name);
        let disk = arg.map(Disk::open).transpose()?.filter(|disk| disk.size == offered.size);
        if disk.is_none() {
            log::warn!(
                "no such disk here, its pages come as they are disk={:?} size_bytes={}",
                offered.name,
                offered.size
            );
        }
        disks.push(disk);
    }
    let qemu = connects
        .to(&args.qemu_socket)
        .map_err(Failure::file("connect to QEMU at", &args.qemu_socket))?;
    let sizes: Vec<u64> = disks.iter().map(|disk| disk.as_ref().map_or(0, Disk::blocks)).collect();
    channel
        .send(&Ready { readable: sizes.iter().map(|&blocks| blocks > 0).collect() }.to_frame())?;
    channel.established()?;
    progress.peer(&theirs.program);
    let touched = Arc::new(Touched::new(&disks));
    let reader = DiskReader::new(disks, Arc::clone(&touched));
    let decoder = Decoder::new(reader, sizes, start.key, agreed.window)
        .map_err(Failure::system("get memory for zstd"))?;
    #[cfg(feature = "unsafe-no-verify")]
    let decoder = match crate::trial::verifies() {
        true => decoder,
        false => decoder.without_verification(),
    };
    Ok(Guest { decoder, qemu, touched })
}

fn carry(
    shared: &Arc<Shared>,
    inbox: Inbox,
    decoder: Decoder<DiskReader>,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let (pieces, from_decoder) = channel();
    let (ended, endings) = channel();
    let told = Arc::clone(progress);
    let receive = move |shared: &Shared| shared.receive(inbox, decoder, &pieces, &told);
    start("receive", shared, &ended, receive)?;
    start("write", shared, &ended, move |shared| shared.write(&from_decoder))?;
    start("answer", shared, &ended, Shared::answer)?;
    start("return", shared, &ended, Shared::give_back)?;
    let (mut done, mut over) = (false, false);
    for ending in &endings {
        match ending {
            Ok(Ended::Written) => {}
            Ok(Ended::Done) => done = true,
            Ok(Ended::Returned | Ended::Closed) => over = true,
            // Once all is delivered the source may close; sending it more fails then.
            Err(failure) if !done => return Err(failure),
            Err(_) => over = true,
        }
        if done && over {
            break;
        }
    }
    Ok(())
}

fn start(
    name: &str,
    shared: &Arc<Shared>,
    ended: &Sender<Result<Ended, Failure>>,
    work: impl FnOnce(&Shared) -> Result<Ended, Failure> + Send + 'static,
) -> Result<(), Failure> {
    let (shared, ended) = (Arc::clone(shared), ended.clone());
    let work = move || drop(ended.send(work(&shared)));
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(work);
    spawned.map(drop).map_err(Failure::system("start a thread"))
}

impl Shared {
    fn receive(
        &self,
        mut inbox: Inbox,
        mut decoder: Decoder<DiskReader>,
        pieces: &Sender<Option<Decoded>>,
        progress: &Progress,
    ) -> Result<Ended, Failure> {
        let mut complete = false;
        loop {
            decoder.grant(self.granted.load(Ordering::Acquire));
            let verdict = self.channel.receive(&mut inbox, |frame| Ok(decoder.frame(frame)?))?;
            let Some(verdict) = verdict else {
                return match complete {
                    true => Ok(Ended::Closed),
                    false => Err(Failure::Lost(ErrorKind::UnexpectedEof.into())),
                };
            };
            if let Some(verdict) = verdict {
                self.outbox(|outbox| outbox.verdicts.push_back(verdict));
            }
            // A writer that is gone has said why.
            while let Some(piece) = decoder.pop() {
                let _ = pieces.send(Some(piece));
            }
            if decoder.is_complete() && !complete {
                complete = true;
                let _ = pieces.send(None);
            }
            progress.decoded(decoder.judged());
            progress.wire(self.channel.bytes());
        }
    }

    fn outbox(&self, change: impl FnOnce(&mut Outbox)) {
        change(&mut self.outbox.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn write(&self, pieces: &Receiver<Option<Decoded>>) -> Result<Ended, Failure> {
        let mut length = 0;
        for piece in pieces {
            let Some(piece) = piece else {
                // As if the other QEMU had closed its socket.
                let _ = self.qemu.shutdown(Shutdown::Write);
                self.outbox(|outbox| outbox.done = Some(length));
                break;
            };
            (&self.qemu).write_all(&piece.bytes).map_err(Failure::Qemu)?;
            length += piece.bytes.len() as u64;
            self.outbox(|outbox| outbox.taken += piece.charge);
        }
        Ok(Ended::Written)
    }

    fn answer(&self) -> Result<Ended, Failure> {
        loop {
            let mut outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
            let granted = self.granted.load(Ordering::Relaxed);
            while outbox.verdicts.is_empty() && outbox.taken == granted && outbox.done.is_none() {
                outbox = self.changed.wait(outbox).unwrap_or_else(PoisonError::into_inner);
            }
            let verdicts = std::mem::take(&mut outbox.verdicts);
            let (taken, done) = (outbox.taken, outbox.done);
            drop(outbox);
            for verdict in verdicts {
                self.channel.send(&verdict)?;
            }
            if taken != granted {
                // First: the source may use it before this thread runs again.
                self.granted.store(taken, Ordering::Release);
                self.channel.send(&format::credit(taken))?;
            }
            if let Some(length) = done {
                self.channel.send(&format::done(length))?;
                return Ok(Ended::Done);
            }
        }
    }

    fn give_back(&self) -> Result<Ended, Failure> {
        let mut buffer = [0; MAX_RETURN];
        loop {
            let got = match (&self.qemu).read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                got => got.map_err(Failure::Qemu)?,
            };
            if got == 0 {
                self.channel.send(&format::return_end())?;
                return Ok(Ended::Returned);
            }
            self.channel.send(&format::return_path(&buffer[..got]))?;
        }
    }
}
