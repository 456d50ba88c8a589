//! From the command line to a served device.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use semper_block::{Image, NowaitEngine, OpenOptions, Rings, SyncEngine, UringEngine};
#[cfg(target_arch = "x86_64")]
use semper_block::{MappedEngine, Mapping};
use semper_control::bind;
use semper_device::Device;
use semper_epoch::Claim;
use semper_nvme::{Controller, Settings, Storage, Store};
use semper_spare::socket;
use semper_title::Title;

use crate::args::{Args, EngineKind, Kind};
use crate::control;
use crate::edu::Edu;
use crate::failure::{Failure, system};
use crate::hardware;
use crate::inbox::{Event, Port, Teller, Way, inbox};
use crate::link::{Following, Heard, Kind as Told, Packet};
use crate::server::{End, Facts, Server};
use crate::tenure::Tenure;
use crate::walls;

/// How long a spare looks for whoever serves.
const FINDING: Duration = Duration::from_secs(5);

/// Serves the device until its QEMU has gone, or a signal ends the process.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    block_signals();
    // Sleeps are as short as they are meant to be.
    // SAFETY: no memory is passed.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    if args.serial.len() > 20 || !args.serial.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        let cause = "the serial number has to be at most 20 printable characters of ASCII";
        return Err(Failure::Usage(cause.to_owned()));
    }
    let image = match args.kind {
        Kind::Nvme => Some(Arc::new(open(args)?)),
        Kind::Edu | Kind::Pci => None,
    };
    let hardware = match args.kind {
        Kind::Pci => Some(hardware::open(args)?),
        Kind::Nvme | Kind::Edu => None,
    };
    let listeners = listeners(args)?;
    let mut tenure =
        image.as_ref().map(|image| Tenure::new(Arc::clone(image), title(args), args.incoming));
    match &mut tenure {
        Some(tenure) if args.spare => tenure.follow(),
        Some(tenure) if !args.incoming => tenure.take()?,
        _ => {}
    }
    let sockets = Sockets::open(args)?;
    let following = following(args)?;
    let rings = rings(args, image.as_deref());
    // No thread before: each would be without walls. No file, socket or ring by itself behind.
    let walls = walls::raise(args, image.as_deref());
    let (device, engine): (Box<dyn Device>, _) = match (&image, hardware) {
        (_, Some(hardware)) => (hardware, "none"),
        (Some(image), None) => {
            let (storage, engine) =
                storage(args, image, &rings).map_err(system("start the I/O engine"))?;
            let settings = Settings { serial: args.serial.clone(), queues: args.queues };
            (Box::new(Controller::new(settings, storage)), engine)
        }
        (None, None) => (Box::new(Edu::default()), "none"),
    };
    let (serial, doorbells) = (args.serial.clone(), args.doorbells);
    let facts = Facts { engine, serial, doorbells, line: args.interrupt_line, walls };
    let (teller, inbox) = inbox().map_err(system("make the queue of events"))?;
    let mut server = Server::new(device, tenure, args.incoming, inbox, facts)
        .map_err(system("make the page of registers"))?;
    let ways = match following {
        Some(following) => match follow(&mut server, &following)? {
            true => {
                let ways = server.take_over()?;
                Sockets::take_place(args);
                ways
            }
            false => return Ok(()),
        },
        None => {
            if args.session_socket.is_some() {
                let [device, shim] = &listeners;
                let followed = server.be_followed([device.as_ref(), shim.as_ref()]);
                followed.map_err(system("make what a spare needs"))?;
            }
            listeners.map(|listener| listener.map(Way::Listener))
        }
    };
    start(teller, ways, sockets).map_err(system("start a thread"))?;
    #[cfg(feature = "breakout")]
    semper_walls::breakout::try_if_told();
    log::info!(
        "serving kind={:?} image={} engine={engine} doorbells={:?} incoming={}",
        args.kind,
        args.blk_file
            .as_deref()
            .or(args.pci.as_deref().map(Path::new))
            .unwrap_or(Path::new("-"))
            .display(),
        args.doorbells,
        args.incoming
    );
    match server.run() {
        End::Gone => log::info!("ended: QEMU has gone"),
        End::Signal => log::info!("ended as asked"),
    }
    Ok(())
}

fn open(args: &Args) -> Result<Image, Failure> {
    let path = args.blk_file.as_deref().ok_or_else(|| {
        Failure::Usage("no image was given; name one with --blk-file=IMAGE".to_owned())
    })?;
    let options =
        OpenOptions { read_only: args.read_only, direct: args.direct, block_size: args.block_size };
    Image::open(path, options).map_err(Failure::Image)
}

fn title(args: &Args) -> Title {
    let record = args.epoch_file.clone().zip(args.holder.clone());
    let claim = args.epoch.zip(args.claim).map(|(epoch, id)| Claim { epoch, id });
    Title::new(record, claim)
}

/// A spare has none: it is given those of who serves.
fn listeners(args: &Args) -> Result<[Option<UnixListener>; 2], Failure> {
    if args.spare {
        return Ok([None, None]);
    }
    let listener = listen(args.fd, args.socket_path.as_deref())?.ok_or_else(|| {
        let cause = "no socket was given; name one with --socket-path=PATH or --fd=N";
        Failure::Usage(cause.to_owned())
    })?;
    Ok([Some(listener), listen(args.shim_fd, args.shim_socket_path.as_deref())?])
}

/// At which the process that serves is asked and followed. A spare makes them beside the places of the
/// present ones, for its walls leave no right to make any, and moves them there when it serves.
struct Sockets {
    control: Option<UnixListener>,
    session: Option<OwnedFd>,
}

impl Sockets {
    fn open(args: &Args) -> Result<Self, Failure> {
        let place = |path: &Path| if args.spare { Self::beside(path) } else { path.to_owned() };
        let control = args.control_socket.as_deref().map(|path| bind(&place(path))).transpose();
        let session =
            args.session_socket.as_deref().map(|path| socket::listen(&place(path), 1)).transpose();
        Ok(Self {
            control: control.map_err(Failure::Listen)?,
            session: session.map_err(system("listen for spares"))?,
        })
    }
}

impl Sockets {
    fn beside(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(".next");
        name.into()
    }

    /// The guest is served in any case; who cannot be asked is told of by the agent.
    fn take_place(args: &Args) {
        for path in [&args.control_socket, &args.session_socket].into_iter().flatten() {
            let moved = std::fs::rename(Self::beside(path), path)
                .and_then(|()| semper_control::remember(path));
            if let Err(error) = moved {
                log::error!("nobody can ask at {}: {error}", path.display());
            }
        }
    }
}

fn following(args: &Args) -> Result<Option<Following>, Failure> {
    let Some(socket) = args.session_socket.as_deref().filter(|_| args.spare) else {
        return Ok(None);
    };
    let following = Following::connect(socket, &signal_set(), FINDING);
    following.map(Some).map_err(system("follow the process that serves"))
}

/// Until who serves has died; false when this process is to end.
fn follow(server: &mut Server, following: &Following) -> Result<bool, Failure> {
    let mut complete = false;
    loop {
        match following.next() {
            Ok(Heard::Packet(Packet { kind: Told::End, .. }) | Heard::Signal) => {
                log::info!("ended: there is nothing to follow");
                return Ok(false);
            }
            Ok(Heard::Packet(packet)) => {
                if server.follow(packet).map_err(Failure::Succession)? {
                    complete = true;
                    following.tell_ready().map_err(system("tell that this spare is ready"))?;
                    log::info!("following, and ready");
                }
            }
            Ok(Heard::Death) if complete => {
                log::warn!("who served has died: going on in its place");
                return Ok(true);
            }
            Ok(Heard::Death) => {
                let what = "who served has died before it had told everything";
                return Err(Failure::Succession(what.to_owned()));
            }
            Err(error) => return Err(Failure::Succession(error.to_string())),
        }
    }
}

fn start(teller: Teller, ways: [Option<Way>; 2], sockets: Sockets) -> io::Result<()> {
    if let Some(control) = sockets.control {
        let teller = teller.clone();
        semper_control::serve(control, move |line| control::answer(&teller, line))?;
    }
    if let Some(session) = sockets.session {
        teller.clone().admit_spares(session)?;
    }
    for (port, way) in [Port::Device, Port::Shim].into_iter().zip(ways) {
        if let Some(way) = way {
            teller.clone().read(port, way)?;
        }
    }
    watch_signals(teller)
}

fn listen(fd: Option<i32>, path: Option<&Path>) -> Result<Option<UnixListener>, Failure> {
    match (fd, path) {
        (Some(fd), _) => inherited(fd).map(Some),
        (None, Some(path)) => bind(path).map(Some).map_err(Failure::Listen),
        (None, None) => Ok(None),
    }
}

fn inherited(fd: i32) -> Result<UnixListener, Failure> {
    let mut listening: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes one int; on anything but a socket it fails.
    let status = unsafe {
        let into = (&raw mut listening).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, into, &mut len)
    };
    if fd < 0 || status != 0 || listening == 0 {
        return Err(Failure::Usage(format!(
            "file descriptor {fd} is not a listening socket; pass one that is, or a path"
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

/// The engines that do, best first.
fn candidates(args: &Args, image: &Image) -> Vec<EngineKind> {
    match args.engine {
        // io_uring on tmpfs sends every request to a worker thread of the kernel.
        #[cfg(target_arch = "x86_64")]
        EngineKind::Auto if image.on_tmpfs() => vec![EngineKind::Mmap, EngineKind::Sync],
        EngineKind::Auto if image.on_tmpfs() => vec![EngineKind::Sync],
        EngineKind::Auto if args.direct => vec![EngineKind::Uring, EngineKind::Sync],
        #[cfg(target_arch = "x86_64")]
        EngineKind::Auto => vec![EngineKind::Mmap, EngineKind::Nowait, EngineKind::Sync],
        #[cfg(not(target_arch = "x86_64"))]
        EngineKind::Auto => vec![EngineKind::Nowait, EngineKind::Sync],
        chosen => vec![chosen],
    }
}

/// A ring: later none can be made.
fn rings(args: &Args, image: Option<&Image>) -> Rings {
    let uses = |kind: &EngineKind| match kind {
        EngineKind::Uring | EngineKind::Nowait => true,
        #[cfg(target_arch = "x86_64")]
        EngineKind::Mmap => image.is_some_and(|image| !image.on_tmpfs()),
        EngineKind::Sync | EngineKind::Auto => false,
    };
    if !image.is_some_and(|image| candidates(args, image).iter().any(uses)) {
        return Rings::none();
    }
    Rings::prepare(1).unwrap_or_else(|error| {
        log::info!("io_uring is not to be had error=\"{error}\"");
        Rings::none()
    })
}

fn storage(
    args: &Args,
    image: &Arc<Image>,
    rings: &Rings,
) -> io::Result<(Box<dyn Storage>, &'static str)> {
    let mut failure = io::Error::from(io::ErrorKind::Unsupported);
    for kind in candidates(args, image) {
        match engine(kind, image, rings) {
            Ok(made) => return Ok(made),
            Err(error) => {
                log::warn!("an I/O engine is not to be had engine={kind:?} error=\"{error}\"");
                failure = error;
            }
        }
    }
    Err(failure)
}

fn engine(
    kind: EngineKind,
    image: &Arc<Image>,
    rings: &Rings,
) -> io::Result<(Box<dyn Storage>, &'static str)> {
    let (fd, image) = (image.fd(), Arc::clone(image));
    Ok(match kind {
        EngineKind::Sync => (Box::new(Store::new(image, SyncEngine::new(fd)?)), "sync"),
        EngineKind::Nowait => {
            (Box::new(Store::new(image, NowaitEngine::with(fd, rings)?)), "nowait")
        }
        EngineKind::Uring => (Box::new(Store::new(image, UringEngine::with(fd, rings)?)), "uring"),
        #[cfg(target_arch = "x86_64")]
        EngineKind::Mmap => {
            let mapping = Mapping::new(&image)?;
            if image.on_tmpfs() {
                let engine = MappedEngine::new(mapping, SyncEngine::new(fd)?);
                (Box::new(Store::new(image, engine)), "mmap")
            } else {
                let engine = MappedEngine::new(mapping, NowaitEngine::with(fd, rings)?);
                (Box::new(Store::new(image, engine)), "mmap")
            }
        }
        EngineKind::Auto => return Err(io::ErrorKind::Unsupported.into()),
    })
}

fn signal_set() -> libc::sigset_t {
    // SAFETY: the set is plain data that sigemptyset initialises.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        set
    }
}

/// The signals that end the process are taken by one thread; others inherit the mask.
fn block_signals() {
    // SAFETY: the set is initialised and lives across the call.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &signal_set(), std::ptr::null_mut()) };
}

fn watch_signals(teller: Teller) -> io::Result<()> {
    let watch = move || {
        let mut signal = 0;
        // SAFETY: both live across the call; the signals are blocked in all threads.
        unsafe { libc::sigwait(&signal_set(), &mut signal) };
        log::info!("ending signal={signal}");
        teller.tell(Event::End);
    };
    std::thread::Builder::new().name("signals".into()).spawn(watch).map(drop)
}
