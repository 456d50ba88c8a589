//! The source's end: finding the destination, agreeing with it, and the index; then it carries.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use semper_wire::format::{FEATURE_REFERENCES, FEATURE_ZSTD, Hello, Kind, Role};
use semper_wire::{ContentIndex, Encoder, EncoderOptions, OfferedDisk, Ready, Start, agree};

use crate::args::SourceArgs;
use crate::carrier::Carrier;
use crate::channel::{Channel, Inbox, expect};
use crate::connects::Connects;
use crate::control;
use crate::disks::Disk;
use crate::failure::Failure;
use crate::indexing::{self, News};
use crate::progress::{Phase, Progress};
use crate::tls::Identity;
use crate::walls;

/// Threads that pack, unless more are asked for.
const PACKERS: usize = 4;

fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    let got = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    let got = got.map_err(|error| Failure::system("get random bytes")(error.into()))?;
    // The kernel gives up to 256 bytes at once.
    match got == N {
        true => Ok(bytes),
        false => Err(Failure::system("get random bytes")(ErrorKind::UnexpectedEof.into())),
    }
}

/// Carries one migration.
pub(crate) fn run(args: &SourceArgs, progress: &Arc<Progress>) -> Result<(), Failure> {
    // Which processors there are cannot be read behind walls.
    let packers = packers(args);
    let connects = Connects::start(&args.end, None, Some(args.connect))?;
    let control = args.end.control_socket.as_deref().map(semper_control::bind).transpose()?;
    let listener = semper_control::bind(&args.qemu_socket)?;
    progress.walls(walls::raise(&args.end, Some(&args.qemu_socket)));
    #[cfg(feature = "breakout")]
    semper_walls::breakout::try_if_told();
    if let Some(listener) = control {
        control::spawn(listener, progress)?;
    }
    let identity = Identity::load(&args.end)?;
    let disks = args.end.disks.iter().map(Disk::open).collect::<Result<Vec<_>, _>>()?;
    let socket = connects.to_other_end().map_err(Failure::Lost)?;
    let channel = Channel::new(socket, identity.client()?)?;
    let mut inbox = Inbox::new();
    let prepared =
        greet(args, &channel, &mut inbox, &disks, progress).and_then(|(options, window)| {
            Ok((index(args, disks, connects, &options, progress)?, options, window))
        });
    let ((index, news), options, window) = prepared.inspect_err(|why| channel.close(Some(why)))?;
    progress.phase(Phase::Ready);
    let (qemu, _) = listener.accept().map_err(Failure::Qemu)?;
    // One migration, one connection: multifd's further channels are refused.
    drop(listener);
    let _ = std::fs::remove_file(&args.qemu_socket);
    progress.phase(Phase::Streaming);
    let carrier = Carrier::new(channel, qemu, window, progress);
    let packers = (0..packers).map(|_| options.packer()).collect::<Result<Vec<_>, _>>();
    let packers = packers.map_err(Failure::system("get memory for zstd"));
    let result = packers
        .and_then(|packers| carrier.carry(inbox, Encoder::new(index, options), news, packers));
    progress.wire(carrier.channel.bytes());
    match &result {
        Ok(()) => progress.phase(Phase::Done),
        Err(failure) => progress.failed(&failure.to_string()),
    }
    log::info!("migration status={}", progress.status());
    let _ = carrier.qemu.shutdown(Shutdown::Both);
    carrier.channel.close(result.as_ref().err());
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

fn packers(args: &SourceArgs) -> usize {
    match args.pack_threads {
        0 => thread::available_parallelism().map_or(1, usize::from).min(PACKERS),
        threads => usize::from(threads),
    }
}

/// Waits for the index to be complete, but not for ever; what comes later is news.
fn index(
    args: &SourceArgs,
    disks: Vec<Disk>,
    connects: Connects,
    options: &EncoderOptions,
    progress: &Progress,
) -> Result<(ContentIndex, Receiver<News>), Failure> {
    progress.phase(Phase::Indexing);
    let limit = usize::try_from(args.index_mib << 20).unwrap_or(usize::MAX);
    let mut index = ContentIndex::new(u64::from_ne_bytes(random()?), limit);
    let readable = disks.into_iter().zip(&options.readable);
    let disks = readable.map(|(disk, &readable)| readable.then_some(disk)).collect();
    let news = indexing::spawn(disks, connects, &index)?;
    let deadline = Instant::now() + Duration::from_secs(args.index_wait_s);
    loop {
        match news.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(some) => {
                let complete = some.apply(&mut index)?;
                progress.indexed(index.len() as u64);
                if complete {
                    break;
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                log::info!("the index goes on growing blocks={}", index.len());
                break;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok((index, news))
}
