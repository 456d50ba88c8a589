//! The layers of the image that this process serves: taken with the image, changed by commands, and
//! merged by a thread beside those that serve.
//!
//! The device's lock comes before the keeper's. What flushes or copies holds the keeper's alone, so that
//! the front end waits for none of it; only the switch is made under both, with all queues at rest.

use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use semper_block::Image;
use semper_epoch::{Claim, Holder, new_id};
use semper_layers::BLOCK;
use semper_layers::chain::Current;
use semper_layers::disk::Disk;
use semper_layers::keeper::{Keeper, LayersError, Progress, set_pin};
use semper_layers::plan::{Act, Aim};
use semper_layers::reader;
use semper_layers::record::{CHAIN_MAX, Layer, LayerId, NOBODY, Pin, Record, Refused, State};

use crate::args::{Args, EngineKind};
use crate::crash;
use crate::device::{Device, Unrest};
use crate::layer_answers as answers;
use crate::state::Shared;

/// Bytes that a merge copies in a second, unless it is told otherwise.
const RATE: u64 = 64 << 20;
/// How long all queues may stand still for the snapshots of several disks, and how long one snapshot may
/// wait for the requests in flight.
pub(crate) const LONGEST_QUIET: Duration = Duration::from_secs(2);
/// How often to look whether a reader elsewhere has ended that a merge waits for.
const LOOK_FOR_READERS: Duration = Duration::from_secs(5);
/// How much longer than a copy took the next one waits while the guest has requests.
const COURTESY: u32 = 4;
/// When to look again for a block that the guest is writing to.
const SOON: Duration = Duration::from_micros(100);

/// Why a command is not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotDone {
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Busy(String),
    #[error(
        "{0}: the storage of the image is slow, or does not answer; nothing has changed, and requests go \
         on; see to the storage, and try again"
    )]
    Slow(#[from] Unrest),
    #[error(transparent)]
    Layers(#[from] LayersError),
}

impl From<Refused> for NotDone {
    fn from(refused: Refused) -> Self {
        Self::Layers(refused.into())
    }
}

impl NotDone {
    /// For programs.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Busy(_) => "busy",
            Self::Slow(_) => "slow",
            Self::Layers(LayersError::Refused(refused)) => match refused {
                Refused::Full(_) | Refused::Kept(_) | Refused::Pins(_) => "full",
                Refused::Pinned { .. } => "pinned",
                Refused::Missing(_) | Refused::Nothing => "invalid",
                Refused::Busy => "busy",
                Refused::Torn => "failed",
            },
            Self::Layers(_) => "failed",
        }
    }
}

/// Whether the layers can be opened.
#[derive(Default)]
enum Early {
    /// Not yet.
    #[default]
    Before,
    /// Not yet, and the image was taken by this claim.
    Taken(Option<Claim>),
    /// From now on.
    Over,
}

/// What is known without waiting for what goes on.
#[derive(Default)]
struct View {
    record: Option<Record>,
    doing: Option<(Aim, Act, LayerId, u64)>,
    map_bytes: u64,
    held: Vec<(LayerId, u64)>,
    last_error: Option<String>,
    /// Grows with each thing that somebody may wait for.
    changes: u64,
}

impl View {
    /// A merge is due, and a pin stands against it.
    fn waits_for_readers(&self) -> bool {
        self.record.as_ref().is_some_and(|record| {
            let due = |layer: &Layer| matches!(layer.state, State::Lapsed | State::Merging);
            record.chain().first().is_some_and(due)
                && matches!(record.mergeable(), Err(Refused::Pinned { .. }))
        })
    }
}

/// The image's layers.
pub(crate) struct Snapshots {
    image: Arc<Image>,
    shared: Arc<Shared>,
    /// What engines serve.
    pub current: Arc<Current>,
    mapped: bool,
    memory: Option<PathBuf>,
    epoch: Option<PathBuf>,
    /// The snapshot that is served, and by whom it is read.
    only: Option<(LayerId, Holder)>,
    /// The image was taken by this claim before the walls were there, behind which threads begin.
    early: Mutex<Early>,
    keeper: Mutex<Option<Keeper>>,
    view: Mutex<View>,
    /// Something is to be done, or was.
    news: Condvar,
    /// Bytes a second.
    rate: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Snapshots {
    pub(crate) fn new(image: &Arc<Image>, shared: &Arc<Shared>, args: &Args) -> Self {
        let mut new = Self::none(image, shared);
        #[cfg(target_arch = "x86_64")]
        {
            let copies = args.engine == EngineKind::Auto && (!args.direct || image.on_tmpfs());
            new.mapped = copies || args.engine == EngineKind::Mmap;
        }
        if !cfg!(feature = "undecorated") {
            new.memory.clone_from(&args.layer_map);
        }
        new.epoch.clone_from(&args.epoch_file);
        new.only = args.snapshot.zip(args.reader.clone());
        new
    }

    /// Without a place for maps: no layer can be written.
    pub(crate) fn none(image: &Arc<Image>, shared: &Arc<Shared>) -> Self {
        Self {
            image: Arc::clone(image),
            shared: Arc::clone(shared),
            current: Arc::default(),
            mapped: false,
            memory: None,
            epoch: None,
            only: None,
            early: Mutex::default(),
            keeper: Mutex::default(),
            view: Mutex::default(),
            news: Condvar::new(),
            rate: AtomicU64::new(RATE),
        }
    }

    /// Whether it is a snapshot that is served, which needs no lock of the image.
    pub(crate) fn is_snapshot(&self) -> bool {
        self.only.is_some()
    }

    fn files(&self) -> Result<Arc<Disk>, LayersError> {
        let (memory, epoch) = (self.memory.clone(), self.epoch.clone());
        Disk::new(&self.image, self.mapped, memory, epoch).map(Arc::new).map_err(|source| {
            let name = self.image.path().display().to_string();
            LayersError::Io { what: "look for the layers of", name, source }
        })
    }

    /// The image was taken: serves its layers, if it has some. No queue runs.
    ///
    /// # Errors
    /// [`LayersError`]: the disk must not be served.
    pub(crate) fn take(&self, claim: Option<Claim>) -> Result<(), LayersError> {
        let mut early = locked(&self.early);
        if !matches!(*early, Early::Over) {
            *early = Early::Taken(claim);
            return Ok(());
        }
        drop(early);
        if let Some((snapshot, reader)) = &self.only {
            return self.take_snapshot(*snapshot, reader);
        }
        if !self.can_have_layers() {
            return Ok(());
        }
        let files = self.files()?;
        if self.image.read_only() {
            return match reader::open(&*files, None, self.image.capacity())? {
                None => Ok(()),
                Some(_) => Err(LayersError::ReadOnly(self.image.path().display().to_string())),
            };
        }
        let (claim, size) = (claim.unwrap_or(NOBODY), self.image.capacity());
        let current = Arc::clone(&self.current);
        // Two chains of one image never meet.
        let id = new_id().map_err(|source| {
            let name = self.image.path().display().to_string();
            LayersError::Io { what: "draw an id for the layers of", name, source }
        })?;
        let mut keeper = Keeper::open(files, claim, current, (size, id))?;
        if keeper.needs_layer() {
            if keeper.left_over() == Some(Aim::Seal) {
                keeper.begin(Aim::Seal, size, false)?;
                keeper.finish()?;
            }
            keeper.begin(Aim::Extend, size, false)?;
            while let Some((_, act, ..)) = keeper.doing() {
                keeper.step()?;
                // What lies below comes to the medium while the guest runs.
                if act == Act::Switch {
                    break;
                }
            }
        }
        let layered = self.current.get().is_some();
        if layered {
            self.know_layers()?;
        }
        self.image.set_layered(layered);
        if layered {
            log::info!("the image has layers count={}", keeper.record().chain().len());
        }
        self.note(&keeper);
        *locked(&self.keeper) = Some(keeper);
        self.announce(|_| {});
        Ok(())
    }

    /// A build whose engines serve the image alone does not serve one that has layers.
    fn know_layers(&self) -> Result<(), LayersError> {
        if !cfg!(feature = "undecorated") {
            return Ok(());
        }
        let source = std::io::Error::other("this build, for measurements, knows none");
        let name = self.image.path().display().to_string();
        Err(LayersError::Io { what: "serve the layers of", name, source })
    }

    fn take_snapshot(&self, snapshot: LayerId, reader: &Holder) -> Result<(), LayersError> {
        self.know_layers()?;
        let files = self.files()?;
        // Before anything is read of it.
        set_pin(&*files, Pin { snapshot, reader: reader.clone() }, true)?;
        let chain = reader::open(&*files, Some(snapshot), self.image.capacity())?;
        log::info!("serving a snapshot id={snapshot} reader={reader}");
        self.current.set(chain);
        Ok(())
    }

    fn can_have_layers(&self) -> bool {
        let kind = self.image.file().metadata().map(|metadata| metadata.file_type());
        // What has no name has nothing beside it.
        kind.is_ok_and(|kind| !kind.is_block_device()) && self.image.path().exists()
    }

    /// The image is about to be given away, or its process to end: what layers say of completed requests
    /// comes to the medium. No queue runs.
    pub(crate) fn settle(&self) {
        let Some(chain) = self.current.get() else { return };
        if self.is_snapshot() || !chain.levels.iter().any(|level| level.needs_map()) {
            return;
        }
        if let Err(error) = chain.sync() {
            let message = format!(
                "the layers of image {} cannot be flushed: {error}; another host would not see what \
                 the guest has written since its last flush",
                self.image.path().display()
            );
            self.shared.report_image_error("flush", (0, 0), libc::EIO, message);
        }
    }

    /// The image is another's from now on.
    pub(crate) fn let_go(&self) {
        *locked(&self.keeper) = None;
        self.current.set(None);
        self.image.set_layered(false);
        self.announce(|view| *view = View { changes: view.changes, ..View::default() });
    }

    fn announce(&self, change: impl FnOnce(&mut View)) {
        let mut view = locked(&self.view);
        change(&mut view);
        view.changes += 1;
        self.news.notify_all();
    }

    /// An orderly end.
    pub(crate) fn end(&self) {
        self.settle();
        let Some((snapshot, reader)) = &self.only else { return };
        let pin = Pin { snapshot: *snapshot, reader: reader.clone() };
        if let Err(error) = self.files().and_then(|files| set_pin(&*files, pin, false)) {
            log::warn!("the pin stays: remove it with unpin error=\"{error}\"");
        }
    }

    fn note(&self, keeper: &Keeper) {
        let (map_bytes, held) = keeper.sizes();
        self.announce(|view| {
            view.record = Some(keeper.record().clone());
            view.doing = keeper.doing();
            (view.map_bytes, view.held) = (map_bytes, held);
        });
    }

    /// Does something with the keeper, and notes what has become of it.
    fn with<T>(&self, act: impl FnOnce(&mut Keeper) -> Result<T, NotDone>) -> Result<T, NotDone> {
        let mut keeper = locked(&self.keeper);
        let Some(keeper) = keeper.as_mut() else { return Err(self.why_not()) };
        let done = act(keeper);
        self.note(keeper);
        done
    }

    fn why_not(&self) -> NotDone {
        if self.is_snapshot() || self.image.read_only() {
            return NotDone::Invalid(
                "this process only reads; ask the one that serves the disk for writing".to_owned(),
            );
        }
        if !self.can_have_layers() {
            return NotDone::Invalid(
                "the image is a block device, or has no name: layers are files beside an image; use \
                 what the storage offers (LVM, ZFS, RBD)"
                    .to_owned(),
            );
        }
        NotDone::Busy(
            "this process does not have the image now; ask the one that serves the disk".to_owned(),
        )
    }

    /// Takes a snapshot; gives its number and how long requests stood still. It is there when it is
    /// sealed, which [`Snapshots::wait_sealed`] waits for. `patience`: for the requests in flight.
    ///
    /// # Errors
    /// [`NotDone`]: there is none, and requests go where they went before.
    pub(crate) fn snapshot(
        &self,
        device: &Mutex<Device>,
        frozen: bool,
        patience: Duration,
    ) -> Result<(LayerId, Duration), NotDone> {
        if self.memory.is_none() {
            return Err(NotDone::Invalid(
                "there is no place for the map of a layer; start the backend with --layer-map, on \
                 tmpfs"
                    .to_owned(),
            ));
        }
        let size = self.image.capacity();
        let id = self.with(|keeper| {
            keeper.begin(Aim::Snapshot, size, frozen)?;
            self.announce(|view| view.last_error = None);
            while let Some((_, act, id, _)) = keeper.doing() {
                if act == Act::Switch {
                    return Ok(id);
                }
                keeper.step()?;
                crash::after(act.name());
            }
            Err(NotDone::Busy("the snapshot has ended before it began".to_owned()))
        })?;
        let mut device = locked(device);
        let began = Instant::now();
        let switched = device.at_rest_by(began + patience, || self.switch(id));
        let pause = began.elapsed();
        drop(device);
        let switched = switched.map_err(NotDone::from).and_then(|switched| switched);
        if let Err(not) = switched {
            log::warn!("no snapshot id={id} error=\"{not}\"");
            // If that fails too, the layer is left as by a death: the next process serves it.
            return Err(self.with(|keeper| Ok(keeper.take_back(id)?)).err().unwrap_or(not));
        }
        log::info!("a snapshot was opened id={id} pause_us={}", pause.as_micros());
        Ok((id, pause))
    }

    /// No request is in flight.
    fn switch(&self, id: LayerId) -> Result<(), NotDone> {
        self.with(|keeper| match keeper.doing() {
            Some((_, Act::Switch, layer, _)) if layer == id => {
                keeper.step()?;
                self.image.set_layered(true);
                crash::after(Act::Switch.name());
                Ok(())
            }
            _ => Err(NotDone::Busy("the image was given away meanwhile".to_owned())),
        })
    }

    /// Gives a snapshot up that was just taken. True: it is as if it had never been. False: the layer
    /// has blocks already, and stays until it is merged; nobody wants its snapshot.
    ///
    /// # Errors
    /// [`NotDone`].
    pub(crate) fn undo(&self, device: &Mutex<Device>, id: LayerId) -> Result<bool, NotDone> {
        let mut device = locked(device);
        let end = Instant::now() + LONGEST_QUIET;
        let taken_back = device.at_rest_by(end, || {
            self.with(|keeper| {
                let taken_back = keeper.take_back(id);
                self.image.set_layered(self.current.get().is_some());
                Ok(taken_back?)
            })
        });
        drop(device);
        let failed = match taken_back {
            Ok(Ok(true)) => {
                self.announce(|_| {});
                return Ok(true);
            }
            Ok(Ok(false)) | Err(_) => None,
            Ok(Err(error)) => Some(error),
        };
        self.with(|keeper| Ok(keeper.give_up(id)?)).map_err(|error| failed.unwrap_or(error))?;
        self.announce(|_| {});
        Ok(false)
    }

    /// Waits until a snapshot that was opened can be read, or cannot be had.
    ///
    /// # Errors
    /// [`NotDone`]: there is no such snapshot.
    pub(crate) fn wait_sealed(&self, id: LayerId) -> Result<(), NotDone> {
        let mut view = locked(&self.view);
        loop {
            match view.record.as_ref().and_then(|record| record.layer(id)).map(|layer| layer.state)
            {
                // Entered, and on the medium when nothing goes on any more.
                Some(State::Sealed) if view.doing.is_none_or(|(.., layer, _)| layer != id) => {
                    return Ok(());
                }
                Some(State::Opened | State::Sealed) if view.last_error.is_none() => {}
                _ => {
                    let cause = view.last_error.clone();
                    let cause = cause.unwrap_or_else(|| "the image was given away".to_owned());
                    return Err(NotDone::Busy(format!("snapshot {id} is not there: {cause}")));
                }
            }
            view = self.news.wait(view).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives up the snapshots up to `through`; gives the layers that are merged for it.
    ///
    /// # Errors
    /// [`NotDone`].
    pub(crate) fn merge(
        &self,
        through: Option<LayerId>,
        rate: Option<u64>,
    ) -> Result<Vec<LayerId>, NotDone> {
        self.rate.store(rate.unwrap_or(RATE).max(BLOCK), Ordering::Relaxed);
        let merging = self.with(|keeper| {
            keeper.refresh()?;
            if let Some(through) = through {
                keeper.give_up_through(through)?;
            }
            let chain = keeper.record().chain();
            let below = &chain[..chain.len().saturating_sub(1)];
            let merged = below
                .iter()
                .take_while(|layer| matches!(layer.state, State::Lapsed | State::Merging))
                .map(|layer| layer.id);
            Ok(merged.collect())
        })?;
        self.announce(|view| view.last_error = None);
        Ok(merging)
    }

    /// Notes, or takes out, a pin; gives those that there are.
    ///
    /// # Errors
    /// [`NotDone`].
    pub(crate) fn set_pin(&self, pin: Pin, there: bool) -> Result<Vec<answers::Pin>, NotDone> {
        let pins = self.with(|keeper| {
            keeper.change(|record| {
                if there {
                    return record.pin(pin);
                }
                record.unpin(&pin);
                Ok(())
            })?;
            keeper.tidy()?;
            Ok(pins(keeper.record()))
        })?;
        self.announce(|_| {});
        Ok(pins)
    }

    /// Whether the disk has layers.
    pub(crate) fn is_layered(&self) -> bool {
        self.current.get().is_some()
    }

    /// For `layers`.
    pub(crate) fn status(&self) -> answers::Layers {
        // What readers have written since. Nobody waits here for what goes on.
        if let Ok(mut keeper) = self.keeper.try_lock()
            && let Some(keeper) = keeper.as_mut()
            && keeper.doing().is_none()
            && keeper.refresh().is_ok()
        {
            self.note(keeper);
        }
        let view = locked(&self.view);
        let record = view.record.as_ref();
        let chain = record.map(Record::chain).unwrap_or_default();
        let held = |id| view.held.iter().find(|(layer, _)| *layer == id).map_or(0, |(_, n)| *n);
        let layer = |layer: &Layer| answers::Layer {
            id: layer.id,
            state: layer.state.name(),
            epoch: layer.writer.epoch,
            time: layer.time,
            frozen: layer.frozen,
            size_bytes: layer.size,
            data_bytes: held(layer.id),
            writes: chain.last().is_some_and(|top| top.id == layer.id),
        };
        let task = view.doing.map(|(aim, act, id, at)| answers::LayerTask {
            kind: if copies(aim) { "merge" } else { "snapshot" },
            layer: id,
            step: act.name(),
            done_bytes: if matches!(act, Act::Copy | Act::CopyUp) { at * BLOCK } else { 0 },
            total_bytes: self.image.capacity(),
        });
        answers::Layers {
            layers: chain.iter().map(layer).collect(),
            kept: record.map_or(0, |record| record.dropped().len()),
            limit: CHAIN_MAX,
            map_bytes: view.map_bytes,
            pins: record.map(pins).unwrap_or_default(),
            task,
            last_error: view.last_error.clone(),
        }
    }

    /// The walls are there: opens the layers, if the image was taken already.
    ///
    /// # Errors
    /// As [`Snapshots::take`].
    pub(crate) fn begin(&self) -> Result<(), LayersError> {
        let before = std::mem::replace(&mut *locked(&self.early), Early::Over);
        match before {
            Early::Taken(claim) => self.take(claim),
            Early::Before | Early::Over => Ok(()),
        }
    }

    /// Starts the thread that flushes and merges.
    ///
    /// # Errors
    /// The system's, when it has no thread left.
    pub(crate) fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let this = Arc::clone(self);
        thread::Builder::new().name("layers".into()).spawn(move || this.work()).map(drop)
    }

    fn work(&self) {
        // Not of a low priority: the image of a dead process is free when its last thread has ended.
        loop {
            let began = Instant::now();
            let seen = locked(&self.view).changes;
            match self.work_a_step() {
                None => {
                    let nothing_new = |view: &mut View| view.changes == seen;
                    let view = locked(&self.view);
                    if view.waits_for_readers() {
                        drop(self.news.wait_timeout_while(view, LOOK_FOR_READERS, nothing_new));
                        self.look_for_readers();
                    } else {
                        drop(self.news.wait_while(view, nothing_new));
                    }
                }
                Some(0) => {}
                Some(copied) => self.step_back(copied, began),
            }
        }
    }

    /// Readers elsewhere tell nobody that they have ended.
    fn look_for_readers(&self) {
        if let Some(keeper) = locked(&self.keeper).as_mut()
            && keeper.refresh().is_ok()
        {
            self.note(keeper);
        }
    }

    /// A step of what goes on, or of what is left to do; the bytes that were copied. `None`: there is
    /// nothing to do for this thread.
    fn work_a_step(&self) -> Option<u64> {
        let mut guard = locked(&self.keeper);
        let keeper = guard.as_mut()?;
        if keeper.doing().is_none() {
            // What has failed waits for the next command.
            let waits = locked(&self.view).last_error.is_some();
            let aim = keeper.left_over().filter(|_| !waits)?;
            keeper.begin(aim, self.image.capacity(), false).ok()?;
        }
        let (aim, act, _, at) = keeper.doing()?;
        let before = keeper.copied();
        if act == Act::Switch {
            // The command that has begun it makes the switch.
            return None;
        }
        let done = keeper.step();
        crash::after(act.name());
        if let Err(error) = &done {
            let what = if copies(aim) { "a merge" } else { "a snapshot" };
            log::error!("{what} has failed act={} error=\"{error}\"", act.name());
            self.announce(|view| view.last_error = Some(error.to_string()));
        }
        if matches!(done, Ok(Progress::Over)) {
            log::info!("{aim:?} done layers={}", keeper.record().chain().len());
        }
        let mut held_up = false;
        match keeper.doing() {
            // To count what layers hold takes as long as many such steps.
            Some(doing) if doing.1 == act && done.is_ok() => {
                held_up = doing.3 == at && act == Act::CopyUp;
                locked(&self.view).doing = Some(doing);
            }
            _ => self.note(keeper),
        }
        let copied = keeper.copied().saturating_sub(before) * BLOCK;
        drop(guard);
        if held_up {
            // The guest writes to the block; it will be the guest's. Commands go on meanwhile.
            thread::sleep(SOON);
        }
        Some(copied)
    }

    /// Leaves the storage to the guest.
    fn step_back(&self, copied: u64, began: Instant) {
        let rate = self.rate.load(Ordering::Relaxed).max(1);
        let due = Duration::from_secs_f64(copied as f64 / rate as f64);
        let took = began.elapsed();
        let in_flight =
            |queue: &crate::state::QueueCounters| queue.in_flight.load(Ordering::Relaxed) > 0;
        let busy = self.shared.queues.iter().any(in_flight);
        let pause = if busy { took * COURTESY } else { Duration::ZERO };
        thread::sleep(pause.max(due.saturating_sub(took)).min(Duration::from_secs(1)));
    }
}

/// Whether it makes a chain shorter.
fn copies(aim: Aim) -> bool {
    match aim {
        Aim::Merge | Aim::Fold | Aim::Lift => true,
        Aim::Snapshot | Aim::Extend | Aim::Seal => false,
    }
}

fn pins(record: &Record) -> Vec<answers::Pin> {
    let pin = |pin: &Pin| answers::Pin { snapshot: pin.snapshot, reader: pin.reader.to_string() };
    record.pins.iter().map(pin).collect()
}
