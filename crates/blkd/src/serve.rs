//! From the command line to a served disk.

use std::io;
use std::net::Shutdown;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use semper_block::{
    FileEngine, Image, NowaitEngine, NullEngine, OpenOptions, Rings, SyncEngine, UringEngine,
};
#[cfg(target_arch = "x86_64")]
use semper_block::{MappedEngine, Mapping};
use semper_control::bind;
use semper_epoch::Claim;
#[cfg(not(feature = "undecorated"))]
use semper_layers::engine::LayeredEngine;
use semper_title::Title;
use vhost::vhost_user::Error as VhostError;

use crate::args::{Args, EngineKind};
use crate::block_map::{DiskMap, Keeping};
use crate::connects::Connects;
use crate::control::Control;
use crate::descriptors;
use crate::device::{Device, Offer};
use crate::door::Door;
use crate::failure::{Failure, system};
use crate::faults::Faults;
use crate::memory_reaper;
use crate::peers::Peers;
use crate::postcopy::{PageFaults, Stage};
use crate::queue::Disk;
use crate::request::ID_SIZE;
use crate::service::{self, Manager};
use crate::session::follower::Follower;
use crate::session::mirror::Mirror;
use crate::session::{Line, Session};
use crate::snapshots::Snapshots;
use crate::state::{Phase, Shared, mark};
use crate::tenure::{Patience, Standing, Tenure};
use crate::threads::{Spawn, ThreadMap, Threads};
use crate::urgency::{self, Urgency};
use crate::walls;
use crate::worker::Worker;

/// Serves the disk until a signal ends the process.
pub(crate) fn run(args: Args, shared: Shared) -> Result<(), Failure> {
    block_signals();
    if let Err(error) = descriptors::allow_all() {
        log::warn!("hundreds of queues may be too many error=\"{error}\"");
    }
    urgency::ask_for_short_turns();
    // Before anything is opened.
    let connects =
        Connects::start(&args).map_err(system("start the process that makes connections"))?;
    if let Err(error) = memory_reaper::engage() {
        log::warn!("memory will be taken apart before the image is free error=\"{error}\"");
    }
    let blk_file = args.blk_file.as_deref().ok_or_else(|| {
        Failure::Usage("no image was given; name one with --blk-file=IMAGE".to_owned())
    })?;
    let serial = serial_number(&args.serial)?;
    let read_only = args.read_only || args.snapshot.is_some();
    let options = OpenOptions { read_only, direct: args.direct, block_size: args.block_size };
    let image = Image::open(blk_file, options).map_err(Failure::Image)?;
    // A spare has no business with the socket's name; it inherits the socket itself.
    let listener = listen(&args)?;
    let control_listener =
        args.control_socket.as_deref().map(bind).transpose().map_err(Failure::Listen)?;
    let (image, shared) = (Arc::new(image), Arc::new(shared));
    let standing = match (args.spare, args.incoming) {
        (true, _) => Standing::Waiting,
        (_, true) => Standing::Incoming,
        _ => Standing::Opened,
    };
    let snapshots = Arc::new(Snapshots::new(&image, &shared, &args));
    let (title, layers) = (title_of(&args), Arc::clone(&snapshots));
    let tenure = Tenure::new(Arc::clone(&image), Arc::clone(&shared), title, layers, standing);
    match standing {
        Standing::Waiting => shared.set_phase(Phase::Spare),
        Standing::Opened => tenure.take(Patience::None, None)?,
        _ => {}
    }
    let track = !args.no_inflight;
    // Without the in-flight region the next process could not know that memory is missing.
    let prepared = PageFaults::prepare()
        .inspect_err(|error| {
            log::info!("postcopy is not offered: page faults cannot be told error=\"{error}\"");
        })
        .ok()
        .filter(|_| track);
    let offer = Offer {
        track,
        page_faults: prepared.is_some(),
        // No other process is there when a postcopy begins.
        prepared: prepared.filter(|_| args.incoming),
    };
    let rings = rings(&args, &image)?;
    let manager = Manager::connect();
    // Before the walls, which leave no right to it.
    let mut urgency = if args.spare { Urgency::raise() } else { Urgency::default() };
    // No thread before: each would be without walls. No file, socket or ring by itself behind.
    let walls = walls::raise(&args, &image);

    let poll = Duration::from_micros(args.poll_us.into());
    let map = disk_map(&args, &image, &snapshots);
    let disk = Arc::new(Disk { image, serial, shared, map, poll, tenure, snapshots });
    disk.snapshots.begin().map_err(Failure::Layers)?;
    let faults = Faults::default();
    let (threads, engine) = start_threads(&args, &disk, &faults, &rings)?;
    let device = Arc::new(Mutex::new(Device::new(Arc::clone(&disk), threads, offer)));
    let session = urgency.without(|| {
        let session = session(&args, &disk.shared, &connects);
        let session = Arc::new(session.map_err(system("start the session thread"))?);
        if let Some(listener) = control_listener {
            let (device, session) = (Arc::clone(&device), Arc::clone(&session));
            let disk = Arc::clone(&disk);
            let control = Control {
                disk,
                device,
                #[cfg(feature = "faults")]
                faults,
                engine,
                session,
                walls,
            };
            semper_control::serve(listener, move |line| control.answer(line))
                .map_err(system("start the control thread"))?;
        }
        disk.snapshots.start().map_err(system("start the thread of the layers"))?;
        watch_signals(&disk, &device).map_err(system("start the signal thread"))?;
        Ok(session)
    })?;
    #[cfg(feature = "breakout")]
    semper_walls::breakout::try_if_told();
    let mirror = Mirror::new().map_err(system("make the session"))?;
    if args.spare {
        if !session.is_on() {
            mark(&disk.shared.timeline.spare_ready);
        }
        manager.ready("waits for the image's lock");
        disk.tenure.take(Patience::Unlimited, disk.map.as_deref())?;
        disk.shared.set_phase(Phase::Listening);
    }
    let mirror = session.serve(mirror);
    let line = session.go_on(&disk.shared, &device, &mirror);
    // Whatever is not needed for it comes behind what a guest waits for.
    urgency.lower();
    log::info!(
        "serving image={} size_bytes={} engine={engine} direct={} read_only={} queues={}",
        disk.image.path().display(),
        disk.image.capacity(),
        args.direct,
        disk.image.read_only(),
        args.num_queues
    );
    let door = Door::new(listener, || connects.take_the_room());
    manager.serves();
    session.listen(&mirror);
    if let Some(line) = line {
        door.shut();
        converse(line, &disk, &device, &mirror);
    }
    accept_forever(&door, Peers::new(args.peer_file), &disk, &device, &mirror)
}

/// A spare follows whoever serves, and whoever serves lets itself be followed.
fn session(args: &Args, shared: &Arc<Shared>, connects: &Connects) -> io::Result<Session> {
    let Some(socket) = args.session_socket.clone() else { return Ok(Session::default()) };
    let connects = connects.clone();
    let follow = || Follower::start(move || connects.to_session(), shared);
    let follower = args.spare.then(follow).transpose()?;
    Ok(Session::new(socket, follower))
}

/// By what right this process writes the image.
pub(crate) fn title_of(args: &Args) -> Title {
    let record = args.epoch_file.clone().zip(args.holder.clone());
    let claim = args.epoch.zip(args.claim).map(|(epoch, id)| Claim { epoch, id });
    Title::new(record, claim)
}

fn serial_number(text: &str) -> Result<[u8; ID_SIZE], Failure> {
    let mut serial = [0u8; ID_SIZE];
    let Some(room) = serial.get_mut(..text.len()) else {
        return Err(Failure::Usage(format!(
            "the serial number has {} bytes, and virtio allows {ID_SIZE}; shorten it",
            text.len()
        )));
    };
    room.copy_from_slice(text.as_bytes());
    Ok(serial)
}

fn listen(args: &Args) -> Result<UnixListener, Failure> {
    match (args.fd, &args.socket_path) {
        (Some(fd), _) => inherited(fd),
        (None, Some(path)) => bind(path).map_err(Failure::Listen),
        (None, None) => match service::socket().map_err(Failure::Usage)? {
            Some(fd) => inherited(fd),
            None => Err(Failure::Usage(
                "no socket was given; name one with --socket-path=PATH or --fd=N, or have a service \
                 manager pass one (LISTEN_FDS)"
                    .to_owned(),
            )),
        },
    }
}

fn inherited(fd: i32) -> Result<UnixListener, Failure> {
    let mut listening: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes one int; on anything but a socket it fails.
    let status = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut listening).cast(),
            &mut len,
        )
    };
    if fd < 0 || status != 0 || listening == 0 {
        return Err(Failure::Usage(format!(
            "file descriptor {fd} is not a listening socket; pass one that is, or --socket-path"
        )));
    }
    // SAFETY: the descriptor is open (getsockopt worked), was given to us by our parent for this,
    // and nothing else in the process uses it.
    let listener = unsafe { UnixListener::from_raw_fd(fd) };
    // SAFETY: no memory is passed.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    // A parent that runs an event loop hands over a non-blocking one.
    listener.set_nonblocking(false).map_err(system("use the inherited socket"))?;
    Ok(listener)
}

fn disk_map(args: &Args, image: &Arc<Image>, layers: &Snapshots) -> Option<Arc<DiskMap>> {
    if args.no_map {
        return None;
    }
    // The file of a spare is still another's.
    let keeping = if args.spare { Keeping::Shared } else { Keeping::Own };
    match DiskMap::new(image, args.num_queues.into(), args.map_file.as_deref(), keeping) {
        Ok(map) => Some(Arc::new(map.above(&layers.current))),
        Err(error) => {
            log::warn!(
                "the disk has no page/block map, so a move sends all of the guest's memory: it is too \
                 large for one, or memory is short size_bytes={} error=\"{error}\"",
                image.capacity()
            );
            None
        }
    }
}

fn thread_map(args: &Args) -> Result<ThreadMap, Failure> {
    if args.thread_map.is_empty() {
        return Ok(ThreadMap::round_robin(args.num_queues, args.threads));
    }
    let map = ThreadMap::new(args.thread_map.clone(), usize::from(args.num_queues));
    map.map_err(|cause| Failure::Usage(format!("--thread-map: {cause}")))
}

/// The engines that do, best first.
fn candidates(args: &Args, image: &Image) -> Result<Vec<EngineKind>, Failure> {
    Ok(match args.engine {
        // io_uring on tmpfs sends every request to a worker thread of the kernel.
        #[cfg(target_arch = "x86_64")]
        EngineKind::Auto if image.on_tmpfs() => vec![EngineKind::Mmap, EngineKind::Sync],
        EngineKind::Auto if image.on_tmpfs() => vec![EngineKind::Sync],
        EngineKind::Auto if args.direct => vec![EngineKind::Uring, EngineKind::Sync],
        #[cfg(target_arch = "x86_64")]
        EngineKind::Auto => vec![EngineKind::Mmap, EngineKind::Nowait, EngineKind::Sync],
        #[cfg(not(target_arch = "x86_64"))]
        EngineKind::Auto => vec![EngineKind::Nowait, EngineKind::Sync],
        #[cfg(target_arch = "x86_64")]
        EngineKind::Mmap if args.direct && !image.on_tmpfs() => {
            return Err(Failure::Usage(
                "the engine mmap goes through the page cache, and --direct around it; leave one \
                 of the two out"
                    .to_owned(),
            ));
        }
        chosen => vec![chosen],
    })
}

/// Rings for as many threads as there may be: later none can be made.
fn rings(args: &Args, image: &Image) -> Result<Rings, Failure> {
    /// More threads than this, and than there are processors, are of no use.
    const THREADS: usize = 8;
    let uses = |kind: &EngineKind| match kind {
        EngineKind::Uring | EngineKind::Nowait => true,
        #[cfg(target_arch = "x86_64")]
        EngineKind::Mmap => !image.on_tmpfs(),
        EngineKind::Sync | EngineKind::Null | EngineKind::Auto => false,
    };
    if !candidates(args, image)?.iter().any(uses) {
        return Ok(Rings::none());
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let most = processors.max(THREADS).min(args.num_queues.into());
    Ok(Rings::prepare(thread_map(args)?.threads().max(most)).unwrap_or_else(|error| {
        log::info!("io_uring is not to be had error=\"{error}\"");
        Rings::none()
    }))
}

fn start_threads(
    args: &Args,
    disk: &Arc<Disk>,
    faults: &Faults,
    rings: &Rings,
) -> Result<(Threads, &'static str), Failure> {
    let map = thread_map(args)?;
    let mut failure = None;
    for kind in candidates(args, &disk.image)? {
        let shared = Arc::clone(&disk.shared);
        let threads = spawner(kind, disk, faults, rings)
            .and_then(|(spawn, name)| Ok((Threads::new(shared, map.clone(), spawn)?, name)));
        match threads {
            Ok(threads) => return Ok(threads),
            Err(error) => {
                log::warn!("an I/O engine is not to be had engine={kind:?} error=\"{error}\"");
                failure = Some(error);
            }
        }
    }
    let error = failure.unwrap_or_else(|| io::ErrorKind::Unsupported.into());
    Err(Failure::System { what: "start the I/O engine", error })
}

fn spawner(
    kind: EngineKind,
    disk: &Arc<Disk>,
    faults: &Faults,
    rings: &Rings,
) -> io::Result<(Spawn, &'static str)> {
    let (fd, rings) = (disk.image.fd(), rings.clone());
    Ok(match kind {
        EngineKind::Null => (spawn_with(disk, faults, NullEngine::new), "null"),
        EngineKind::Sync => (spawn_with(disk, faults, move || SyncEngine::new(fd)), "sync"),
        EngineKind::Nowait => {
            (spawn_with(disk, faults, move || NowaitEngine::with(fd, &rings)), "nowait")
        }
        EngineKind::Uring => {
            (spawn_with(disk, faults, move || UringEngine::with(fd, &rings)), "uring")
        }
        #[cfg(target_arch = "x86_64")]
        EngineKind::Mmap => {
            let mapping = Mapping::new(&disk.image)?;
            let spawn = if disk.image.on_tmpfs() {
                let rest = move || SyncEngine::new(fd);
                spawn_with(disk, faults, move || Ok(MappedEngine::new(mapping.clone(), rest()?)))
            } else {
                let rest = move || NowaitEngine::with(fd, &rings);
                spawn_with(disk, faults, move || Ok(MappedEngine::new(mapping.clone(), rest()?)))
            };
            (spawn, "mmap")
        }
        EngineKind::Auto => return Err(io::ErrorKind::Unsupported.into()),
    })
}

fn spawn_with<E: FileEngine + 'static>(
    disk: &Arc<Disk>,
    faults: &Faults,
    make: impl Fn() -> io::Result<E> + Clone + Send + 'static,
) -> Spawn {
    let (disk, faults) = (Arc::clone(disk), faults.clone());
    Box::new(move |name| {
        let (make, faults) = (make.clone(), faults.clone());
        #[cfg(not(feature = "undecorated"))]
        let make = {
            let current = Arc::clone(&disk.snapshots.current);
            move || Ok::<_, io::Error>(LayeredEngine::new(make()?, current))
        };
        Worker::spawn(name, Arc::clone(&disk), move || Ok(faults.around(make()?)))
    })
}

fn accept_forever(
    door: &Door<impl Fn() -> io::Result<()>>,
    mut peers: Peers,
    disk: &Arc<Disk>,
    device: &Arc<Mutex<Device>>,
    mirror: &Mirror,
) -> Result<(), Failure> {
    let mut pause = Duration::ZERO;
    loop {
        let stream = door.accept().map_err(system("accept a front end"))?;
        if let Err(stranger) = peers.admit(&stream) {
            disk.shared.report_protocol_error(&stranger);
            continue;
        }
        mark(&disk.shared.timeline.accepted);
        disk.shared.connections.fetch_add(1, Ordering::Relaxed);
        disk.shared.set_phase(Phase::Connected);
        let line = Line::new(stream, device, mirror)
            .and_then(|line| mirror.connected(line.stream()).map(|()| line))
            .map_err(system("serve a front end"))?;
        if converse(line, disk, device, mirror) {
            pause = Duration::ZERO;
        } else {
            // QEMU comes back at once, with the same message as likely as not.
            pause = (pause * 2).clamp(Duration::from_millis(10), Duration::from_secs(1));
            std::thread::sleep(pause);
        }
    }
}

/// Until the end of the connection; says whether that was an orderly one.
fn converse(mut line: Line<'_>, disk: &Disk, device: &Arc<Mutex<Device>>, mirror: &Mirror) -> bool {
    let shared = &disk.shared;
    let ended = speak(&mut line, disk);
    if shared.arrival() == Stage::Listening {
        // What waits for a page waits for ever; and if it were let go, it would find zeros.
        log::error!(
            "the front end is gone while the guest's memory arrives, ending without finishing \
             what is in flight error=\"{ended}\""
        );
        std::process::exit(1);
    }
    device.lock().unwrap_or_else(PoisonError::into_inner).disconnect();
    mirror.disconnected();
    // To close it is not enough: the spares have it as well.
    let _ = line.stream().shutdown(Shutdown::Both);
    shared.set_phase(Phase::Listening);
    if matches!(ended, VhostError::Disconnected) {
        log::info!("the front end disconnected");
        return true;
    }
    shared.report_protocol_error(&ended);
    false
}

fn speak(line: &mut Line<'_>, disk: &Disk) -> VhostError {
    let mut inherited = false;
    loop {
        inherited |= disk.shared.arrival() == Stage::Inherited;
        let handled = if inherited { line.serve_inherited() } else { line.serve() };
        if let Err(error) = handled {
            return error;
        }
    }
}

fn signal_set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data, and sigemptyset initialises it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        set
    }
}

/// Before any thread starts, so that all inherit it.
fn block_signals() {
    // SAFETY: the set is initialised and lives across the call.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &signal_set(), std::ptr::null_mut()) };
}

fn watch_signals(disk: &Arc<Disk>, device: &Arc<Mutex<Device>>) -> io::Result<()> {
    let (disk, device) = (Arc::clone(disk), Arc::clone(device));
    let watch = move || {
        let mut signal = 0;
        // SAFETY: both live across the call; the signals are blocked in all threads.
        unsafe { libc::sigwait(&signal_set(), &mut signal) };
        if disk.shared.phase() == Phase::Spare {
            semper_control::remove_sockets();
            std::process::exit(0);
        }
        log::info!("ending signal={signal}");
        disk.shared.set_phase(Phase::Draining);
        // Held until the end: no further message can start a queue.
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.stop_all();
        disk.tenure.end();
        semper_control::remove_sockets();
        log::info!("ended; everything in flight was finished");
        std::process::exit(0);
    };
    std::thread::Builder::new().name("signals".into()).spawn(watch).map(drop)
}
