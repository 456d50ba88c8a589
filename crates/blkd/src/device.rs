//! The vhost-user side: what the front end negotiates, and the life of its queues.
//!
//! ```text
//!   SET_MEM_TABLE, SET_VRING_{NUM,ADDR,BASE,KICK,CALL}, SET_VRING_ENABLE
//!        └── all there ──► recover the in-flight region ──► the worker serves the queue
//!   GET_VRING_BASE, disconnection, reset ──► the worker drains, publishes, notifies ──► stopped
//! ```
//!
//! Specification: QEMU `docs/interop/vhost-user.rst`. Parsing is the crate `vhost`'s.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use semper_inflight::TrackedQueue;
use semper_ring::{GuestMemory, RegionSpec, RingAddresses, SplitQueue};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::channel::Channel;
use crate::config;
use crate::crash::CrashHook;
use crate::dirty_log::{DirtyBitmap, DirtyLog};
use crate::eventfd::EventFd;
use crate::failure::Failure;
use crate::inflight_map::{self, InflightMap, Shape};
use crate::postcopy::{Arrival, PageFaults};
use crate::queue::{Disk, QueueSetup, StopRequest};
use crate::state::Phase;
use crate::tenure::{Patience, Standing};
use crate::threads::{ThreadMap, Threads};
use crate::worker::{Order, Worker};

/// Entries that each queue's part of the in-flight region has at least: QEMU's VIRTQUEUE_MAX_SIZE.
const LARGEST_USUAL_RING: u16 = 1024;
/// How long a queue may wait for the image, which another backend is giving away.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// Regions that a memory table may have.
const MAX_MEM_SLOTS: u64 = 32;

/// What is known of one queue.
#[derive(Default)]
struct Vring {
    size: u32,
    addresses: Option<RingAddresses>,
    /// Guest-physical address of the used ring, where writes to it are to be logged.
    used_log: Option<u64>,
    base: u16,
    kick: Option<File>,
    call: Option<File>,
    err: Option<File>,
    enabled: bool,
    running: bool,
}

/// What not every backend offers.
#[derive(Default)]
pub(crate) struct Offer {
    /// In-flight tracking; off only to show what happens without it.
    pub track: bool,
    /// To be there before the guest's memory is (postcopy).
    pub page_faults: bool,
    /// For the process at which it begins; others see its end.
    pub prepared: Option<PageFaults>,
}

/// The device, for one front end at a time.
pub(crate) struct Device {
    disk: Arc<Disk>,
    threads: Threads,
    offer: Offer,
    /// Give the image away as soon as no queue runs.
    hand_over: bool,
    features: u64,
    memory: Arc<GuestMemory>,
    inflight: Option<Arc<InflightMap>>,
    dirty: Option<Arc<DirtyBitmap>>,
    arrival: Arrival,
    vrings: Vec<Vring>,
    channel: Option<Channel>,
    /// The capacity that this front end has read or been told to read, in bytes.
    capacity_told: Option<u64>,
    /// All queues stand still until then, for the snapshots of several disks.
    quiet: Option<Instant>,
}

/// A queue was asked to stop.
struct Stop {
    request: StopRequest,
    answer: mpsc::Receiver<u16>,
}

/// Requests of these queues did not end in time; all queues go on.
#[derive(Debug, thiserror::Error)]
#[error("the requests in flight of {} did not end in time", queue_names(.queues))]
pub(crate) struct Unrest {
    queues: Vec<usize>,
}

fn queue_names(queues: &[usize]) -> String {
    let names: Vec<_> = queues.iter().map(usize::to_string).collect();
    format!("queue{} {}", if names.len() == 1 { "" } else { "s" }, names.join(", "))
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::ReqHandlerError(io::Error::other(error.to_string()))
}

impl Device {
    pub(crate) fn new(disk: Arc<Disk>, threads: Threads, offer: Offer) -> Self {
        let vrings = disk.shared.queues.iter().map(|_| Vring::default()).collect();
        if let Some(map) = &disk.map {
            map.set_shared(threads.count() > 1);
        }
        Self {
            disk,
            threads,
            offer,
            hand_over: false,
            features: 0,
            memory: Arc::new(GuestMemory::empty()),
            inflight: None,
            dirty: None,
            arrival: Arrival::Complete,
            vrings,
            channel: None,
            capacity_told: None,
            quiet: None,
        }
    }

    pub(crate) fn disk(&self) -> Arc<Disk> {
        Arc::clone(&self.disk)
    }

    /// The way to speak first, if the front end has given one.
    pub(crate) fn channel(&self) -> Option<&Channel> {
        self.channel.as_ref()
    }

    pub(crate) fn set_channel(&mut self, channel: Channel) {
        self.channel = Some(channel);
    }

    pub(crate) fn capacity_told(&mut self) -> &mut Option<u64> {
        &mut self.capacity_told
    }

    fn running(&self) -> Vec<usize> {
        (0..self.vrings.len()).filter(|&index| self.vrings[index].running).collect()
    }

    /// Does something while no queue runs; those that did go on afterwards.
    pub(crate) fn at_rest<T>(&mut self, act: impl FnOnce() -> T) -> T {
        let running = self.running();
        self.stop_all();
        let done = act();
        running.into_iter().for_each(|index| self.start_or_end(index));
        done
    }

    /// As [`Device::at_rest`], if the queues stand still by then.
    ///
    /// # Errors
    /// [`Unrest`]: they do not, and go on; nothing was done.
    pub(crate) fn at_rest_by<T>(
        &mut self,
        end: Instant,
        act: impl FnOnce() -> T,
    ) -> std::result::Result<T, Unrest> {
        let running = self.running();
        self.stop_all_by(end)?;
        let done = act();
        running.into_iter().for_each(|index| self.start_or_end(index));
        Ok(done)
    }

    /// Has all queues stand still until `end`, or [`Device::resume`].
    ///
    /// # Errors
    /// [`Unrest`]: they do not stand still by then, and go on.
    pub(crate) fn quiesce(&mut self, end: Instant) -> std::result::Result<(), Unrest> {
        self.stop_all_by(end)?;
        self.quiet = Some(end);
        Ok(())
    }

    /// Lets queues run again that [`Device::quiesce`] has stopped; `only` if it was until that instant.
    /// False if they run already.
    pub(crate) fn resume(&mut self, only: Option<Instant>) -> bool {
        let held = self.quiet.is_some() && (only.is_none() || only == self.quiet);
        if held {
            self.quiet = None;
            let due: Vec<usize> =
                (0..self.vrings.len()).filter(|&index| self.is_due(index)).collect();
            due.into_iter().for_each(|index| self.start_or_end(index));
        }
        held
    }

    /// What layers say of completed requests comes to the medium, once no queue runs: whoever stops the
    /// last one may go on with the disk elsewhere.
    fn settle(&self) {
        if self.vrings.iter().all(|vring| !vring.running) {
            self.disk.snapshots.settle();
        }
    }

    /// The front end is gone: finishes what is in flight, and forgets it.
    pub(crate) fn disconnect(&mut self) {
        self.stop_all();
        self.settle();
        self.forget();
        self.give_away();
    }

    /// Has the device give the image away as soon as no queue runs, so that the VM can go on with
    /// another backend. From then on a queue that starts waits: the front end of a migration that
    /// has failed lets its guest run on by itself, when the image may be another host's already.
    /// Or not: then the device takes back what it gave away, and starts what waits.
    ///
    /// # Errors
    /// Another process has the image; this can be called again.
    pub(crate) fn set_hand_over(&mut self, on: bool) -> Result<()> {
        self.hand_over = on;
        self.give_away();
        if on || self.disk.tenure.standing() != Standing::HandedOver {
            return Ok(());
        }
        self.own_image()?;
        self.start_waiting()
    }

    fn give_away(&self) {
        let idle = self.vrings.iter().all(|vring| !vring.running);
        if self.hand_over && idle {
            let layered = self.disk.snapshots.is_layered();
            self.disk.tenure.give_away();
            if layered {
                // Each thread lets go of the layers' files, for which the next owner waits.
                self.await_report();
            }
        }
    }

    /// Takes the image unless this process has it. If it is not for this process any more, the
    /// process ends: it has nothing to serve.
    fn own_image(&self) -> Result<()> {
        let Disk { tenure, image, map, .. } = &*self.disk;
        if tenure.is_held() {
            return Ok(());
        }
        match tenure.take(Patience::For(LOCK_PATIENCE), map.as_deref()) {
            Ok(()) => {}
            Err(Failure::Lock(error)) => return Err(failed(error)),
            Err(refused) => crate::PROGRAM.exit(&refused),
        }
        log::info!("took the image image={}", image.path().display());
        Ok(())
    }

    /// What queues waited for may be there: takes the image if there are such, and starts them.
    /// When one cannot be started the process ends, for the next one to serve it.
    ///
    /// # Errors
    /// Another process has the image; the queues wait on, and this can be called again.
    pub(crate) fn start_waiting(&mut self) -> Result<()> {
        let any = (0..self.vrings.len()).any(|index| self.is_due(index));
        if !any || self.obstacle().is_some() {
            return Ok(());
        }
        self.own_image()?;
        for index in 0..self.vrings.len() {
            self.start_or_end(index);
        }
        Ok(())
    }

    fn start_or_end(&mut self, queue: usize) {
        if let Err(error) = self.try_start(queue) {
            log::error!(
                "a queue cannot go on, ending for the next process to take over queue={queue} \
                 error=\"{error}\""
            );
            std::process::exit(1);
        }
    }

    /// Finishes what is in flight in all queues and shows it to the driver.
    pub(crate) fn stop_all(&mut self) {
        // All are asked first, so that they drain side by side.
        let replies: Vec<_> = (0..self.vrings.len()).map(|i| (i, self.ask_to_stop(i))).collect();
        for (index, reply) in replies {
            self.await_stop(index, reply);
        }
    }

    /// As [`Device::stop_all`], unless that takes longer: then all queues go on.
    fn stop_all_by(&mut self, end: Instant) -> std::result::Result<(), Unrest> {
        let asked: Vec<_> =
            (0..self.vrings.len()).filter_map(|i| Some((i, self.ask_to_stop(i)?))).collect();
        let (mut stopped, mut late) = (Vec::new(), Vec::new());
        for (index, stop) in asked {
            match stop.answer.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(last_avail) => {
                    self.vrings[index].base = last_avail;
                    stopped.push(index);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {}
                Err(mpsc::RecvTimeoutError::Timeout) => late.push((index, stop)),
            }
        }
        if late.is_empty() {
            return Ok(());
        }
        let queues = late.iter().map(|(index, _)| *index).collect();
        for (index, Stop { request, answer }) in late {
            let given_up = request.lock().unwrap_or_else(PoisonError::into_inner).take();
            if given_up.is_some() {
                // Its thread may be in a system call that does not end: nobody waits for it.
                self.vrings[index].running = true;
                self.worker(index).order(Order::GoOn { index: index as u16 });
            } else if let Ok(last_avail) = answer.recv() {
                self.vrings[index].base = last_avail;
                stopped.push(index);
            }
        }
        stopped.into_iter().for_each(|index| self.start_or_end(index));
        Err(Unrest { queues })
    }

    fn forget(&mut self) {
        self.features = 0;
        self.channel = None;
        self.capacity_told = None;
        self.memory = Arc::new(GuestMemory::empty());
        if let Some(map) = &self.disk.map {
            map.detach();
        }
        self.inflight = None;
        self.dirty = None;
        self.set_arrival(Arrival::Complete);
        self.vrings.iter_mut().for_each(|vring| *vring = Vring::default());
        self.update_cache_mode(None);
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn worker(&self, index: usize) -> &Worker {
        self.threads.of(index)
    }

    fn ask_to_stop(&mut self, index: usize) -> Option<Stop> {
        if !std::mem::take(&mut self.vrings[index].running) {
            return None;
        }
        let (reply, answer) = mpsc::channel();
        let request = Arc::new(Mutex::new(Some(reply)));
        let asked = Arc::clone(&request);
        self.worker(index).order(Order::Stop { index: index as u16, request: asked });
        Some(Stop { request, answer })
    }

    fn await_stop(&mut self, index: usize, stop: Option<Stop>) {
        let Some(stop) = stop else { return };
        // However long the storage takes: to answer earlier would lose requests.
        if let Ok(last_avail) = stop.answer.recv() {
            self.vrings[index].base = last_avail;
        }
    }

    fn stop(&mut self, index: usize) {
        let stop = self.ask_to_stop(index);
        self.await_stop(index, stop);
    }

    /// Gives the queues to other threads while they run. A queue that moves is drained in its old
    /// thread and goes on in the new one; the others do not notice.
    ///
    /// # Errors
    /// When a thread cannot be made; nothing has changed then. When a queue that was stopped cannot
    /// go on in its new thread, the process ends, for the next one to serve it.
    pub(crate) fn rebind(&mut self, map: &ThreadMap) -> Result<()> {
        self.threads.grow(map).map_err(Error::ReqHandlerError)?;
        if map.threads() > 1 {
            self.share_map();
        }
        let moving = self.threads.moving(map);
        let replies: Vec<_> = moving
            .iter()
            .map(|&(queue, thread)| (queue, thread, self.ask_to_stop(queue)))
            .collect();
        for (queue, thread, reply) in replies {
            let ran = reply.is_some();
            self.await_stop(queue, reply);
            self.threads.assign(queue, thread);
            if ran {
                self.start_or_end(queue);
            }
        }
        self.threads.shrink();
        if let Some(map) = &self.disk.map {
            map.set_shared(self.threads.count() > 1);
        }
        Ok(())
    }

    /// Makes recording safe for several threads; each has seen it when this returns.
    fn share_map(&self) {
        let Some(map) = &self.disk.map else { return };
        map.set_shared(true);
        self.await_report();
    }

    fn await_report(&self) {
        let (reply, seen) = mpsc::channel();
        self.threads.all(|| Order::Report { reply: reply.clone() });
        drop(reply);
        // Until all senders are gone: each thread has reported, or has ended.
        while seen.recv().is_ok() {}
    }

    /// Starts the queue if everything is there and it does not run yet.
    fn try_start(&mut self, index: usize) -> Result<()> {
        let Some((setup, replay)) = self.prepare(index)? else { return Ok(()) };
        if replay > 0 {
            log::info!("replaying requests of an earlier process queue={index} requests={replay}");
        }
        self.vrings[index].running = true;
        self.disk.shared.set_phase(Phase::Running);
        self.worker(index).order(Order::Start(Box::new(setup)));
        // A front end that goes on with another process does not ask for the size again.
        self.tell_capacity();
        Ok(())
    }

    /// Whether the front end has said everything that it takes to run a queue that does not run.
    fn is_due(&self, index: usize) -> bool {
        let vring = &self.vrings[index];
        let negotiated = self.features & config::F_PROTOCOL_FEATURES != 0;
        let enabled = vring.enabled || !negotiated;
        let complete = vring.addresses.is_some() && vring.kick.is_some() && vring.size > 0;
        complete && enabled && !vring.running
    }

    /// What queues have to wait for.
    fn obstacle(&self) -> Option<&'static str> {
        match self.disk.tenure.standing() {
            Standing::AwaitingClaim => return Some("the claim on the image"),
            Standing::HandedOver if self.hand_over => {
                return Some("the image, which was given away");
            }
            _ => {}
        }
        if self.quiet.is_some() {
            return Some("the snapshots of other disks");
        }
        match self.arrival {
            Arrival::Listening { known: false, .. } => Some("a front end that serves page faults"),
            Arrival::Inherited => Some("the end of the postcopy"),
            _ => None,
        }
    }

    fn prepare(&self, index: usize) -> Result<Option<(QueueSetup, usize)>> {
        let vring = &self.vrings[index];
        let (Some(addresses), Some(kick)) = (vring.addresses, &vring.kick) else { return Ok(None) };
        if !self.is_due(index) {
            return Ok(None);
        }
        // The front end goes on: QEMU waits for most answers with its monitor and all its devices.
        // What the driver puts into the ring waits there.
        if let Some(what) = self.obstacle() {
            log::info!("a queue waits queue={index} for=\"{what}\"");
            return Ok(None);
        }
        self.own_image()?;
        if let Some(map) = &self.inflight {
            self.disk.shared.follow_flushes(map);
        }
        let clone = |file: &Option<File>| -> io::Result<Option<EventFd>> {
            file.as_ref().map(|f| f.try_clone().map(EventFd::from)).transpose()
        };
        let event_idx = self.features & config::F_EVENT_IDX != 0;
        let ring = SplitQueue::new(Arc::clone(&self.memory), addresses, vring.size, event_idx)
            .map_err(failed)?;
        let region = self.inflight.as_ref().and_then(|map| map.queue(index as u16));
        let tracked = region.is_some();
        let (tracked_queue, replay) =
            TrackedQueue::recover(ring, region, vring.base, CrashHook::default()).map_err(|e| {
                failed(format!("queue {index}: {e}; reset the device (reboot the guest)"))
            })?;
        self.disk.shared.tracked.store(tracked, Ordering::Relaxed);
        let count = replay.len();
        let setup = QueueSetup {
            index: index as u16,
            tracked: tracked_queue,
            replay,
            kick: kick.try_clone().map_err(failed)?.into(),
            call: clone(&vring.call).map_err(failed)?,
            err: clone(&vring.err).map_err(failed)?,
            log: self.log_of(index),
            region: self.inflight.clone().map(|map| map as Arc<dyn Send + Sync>),
        };
        Ok(Some((setup, count)))
    }

    /// What a queue is to log now.
    fn log_of(&self, index: usize) -> Option<DirtyLog> {
        let bitmap = self.dirty.as_ref().filter(|_| self.features & config::F_LOG_ALL != 0)?;
        Some(DirtyLog {
            bitmap: Arc::clone(bitmap),
            memory: Arc::clone(&self.memory),
            used: self.vrings[index].used_log,
        })
    }

    /// Brings the logging of these queues up to date, and waits until it is in force: the front
    /// end counts on it from our answer on.
    fn update_logs(&self, queues: impl Iterator<Item = usize>) {
        let orders = queues.filter(|&index| self.vrings[index].running).map(|index| {
            let (reply, done) = mpsc::channel();
            let log = self.log_of(index);
            self.worker(index).order(Order::Log { index: index as u16, log, reply });
            done
        });
        for done in orders.collect::<Vec<_>>() {
            // A thread that is gone logs nothing and writes nothing.
            let _ = done.recv();
        }
    }

    /// Puts a new memory table into force; running queues are drained and started again on it.
    fn replace_memory(&mut self, memory: GuestMemory) -> Result<()> {
        let running: Vec<usize> =
            (0..self.vrings.len()).filter(|&i| self.vrings[i].running).collect();
        self.stop_all();
        self.memory = Arc::new(memory);
        if let Some(map) = &self.disk.map {
            map.attach(&self.memory);
        }
        match &mut self.arrival {
            Arrival::Listening { known, .. } => {
                *known = false;
                return Ok(());
            }
            // All of it came before the guest runs, and nobody says that no postcopy follows.
            Arrival::Advised(_) => self.set_arrival(Arrival::Complete),
            Arrival::Complete | Arrival::Inherited => {}
        }
        running.into_iter().try_for_each(|index| self.try_start(index))
    }

    fn set_arrival(&mut self, arrival: Arrival) {
        self.arrival = arrival;
        self.disk.shared.set_arrival(self.arrival.stage());
    }

    /// All of the guest's memory is there.
    pub(crate) fn end_postcopy(&mut self) -> Result<()> {
        if let Arrival::Listening { faults, .. } = &self.arrival {
            faults.unregister(&self.memory);
        }
        self.set_arrival(Arrival::Complete);
        if let Some(map) = &self.inflight {
            map.device().set_postcopy(false);
        }
        log::info!("the guest's memory has arrived");
        (0..self.vrings.len()).try_for_each(|index| self.try_start(index))
    }

    /// Ends a postcopy that was inherited, if all memory is there: the end may have been told to
    /// nobody.
    pub(crate) fn look_for_end(&mut self) -> Result<()> {
        let inherited = matches!(self.arrival, Arrival::Inherited);
        let known = self.memory.specs().next().is_some();
        // Files that cannot tell leave it to the front end.
        if inherited && known && self.memory.is_present().unwrap_or(false) {
            self.end_postcopy()?;
        }
        Ok(())
    }

    /// Where the front end finds this region in our faults, while there are any.
    fn base_of(&self, guest_addr: u64) -> Option<u64> {
        let listening = matches!(self.arrival, Arrival::Listening { .. });
        let mut regions = self.memory.mapped().filter(|_| listening);
        let found = regions.find(|(spec, ..)| spec.guest_addr == guest_addr);
        found.map(|(_, host, _)| host.expose_provenance() as u64)
    }

    fn update_cache_mode(&self, chosen: Option<bool>) {
        // A driver that can neither flush nor switch the cache expects a write-through disk
        // (VIRTIO 1.2, 5.2.6.2).
        let can_flush = self.features & (config::BLK_F_FLUSH | config::BLK_F_CONFIG_WCE) != 0;
        let write_through = chosen.unwrap_or(self.features != 0 && !can_flush);
        self.disk.shared.write_through.store(write_through, Ordering::Relaxed);
    }

    fn inflight_shape(&self, asked: &VhostUserInflight) -> Result<Shape> {
        let queues = usize::from(asked.num_queues);
        if queues == 0 || queues > self.vrings.len() || asked.queue_size == 0 {
            return Err(Error::InvalidParam);
        }
        // Not what was asked for: some QEMU (10.0.13) ask with the `queue-size` property and then
        // let the driver choose rings of up to 1024 entries. Both ends of the region's life are
        // ours, so the same rule gives the same layout to the next process.
        let queue_size = asked.queue_size.max(LARGEST_USUAL_RING);
        Ok(Shape { num_queues: asked.num_queues, queue_size })
    }
}

fn region_spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_phys_addr,
        size: region.memory_size,
        user_addr: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.disconnect();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all();
        // The rings are gone, and with them whatever the region said of them.
        self.inflight = None;
        self.vrings.iter_mut().for_each(|vring| *vring = Vring::default());
        self.update_cache_mode(None);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(&self.disk.image))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !config::features(&self.disk.image) != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        let recorded = self.inflight.as_ref().and_then(|map| map.device().write_through());
        self.update_cache_mode(recorded);
        self.update_logs(0..self.vrings.len());
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mut memory = GuestMemory::empty();
        for (region, file) in regions.iter().zip(&files) {
            memory = memory.with_region(region_spec(region), file).map_err(failed)?;
        }
        self.replace_memory(memory)?;
        Ok(regions.iter().map(|region| self.base_of(region.guest_phys_addr)).collect())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        if !num.is_power_of_two() || num > 32768 {
            return Err(Error::InvalidParam);
        }
        self.vring(index)?.size = num;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let vring = self.vring(index)?;
        vring.addresses = Some(RingAddresses { desc: descriptor, avail: available, used });
        vring.used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        self.update_logs(std::iter::once(index as usize));
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // Bits above the 16 of an index belong to packed rings, which are not offered.
        self.vring(index)?.base = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.stop(index as usize);
        let vring = self.vring(index)?;
        vring.kick = None;
        vring.call = None;
        let base = u32::from(vring.base);
        if self.vrings.iter().all(|vring| !vring.running) {
            self.disk.shared.set_phase(Phase::Connected);
        }
        self.settle();
        self.give_away();
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        if fd.is_none() {
            return Err(Error::InvalidOperation("a queue without kicks is not supported"));
        }
        self.vring(u32::from(index))?;
        // A queue that runs sleeps on the old one: it goes on, on the new one.
        self.stop(usize::from(index));
        self.vring(u32::from(index))?.kick = fd;
        self.try_start(usize::from(index))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = fd.as_ref().map(File::try_clone).transpose().map_err(failed)?;
        let vring = self.vring(u32::from(index))?;
        vring.call = fd;
        if vring.running {
            let order = Order::Call { index: u16::from(index), call: call.map(EventFd::from) };
            self.worker(usize::from(index)).order(order);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(u32::from(index))?.err = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE;
        if self.offer.track {
            features |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        if self.offer.page_faults {
            features |= VhostUserProtocolFeatures::PAGEFAULT;
        }
        Ok(features)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        if enable {
            self.try_start(index as usize)
        } else {
            self.stop(index as usize);
            Ok(())
        }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        if config::covers_capacity(offset, size) {
            self.capacity_told = Some(self.disk.image.capacity());
        }
        let write_back = !self.disk.shared.write_through.load(Ordering::Relaxed);
        let mut space = vec![0; 256];
        space[..config::SIZE].copy_from_slice(&config::space(
            &self.disk.image,
            self.vrings.len() as u16,
            write_back,
        ));
        let (start, end) = (offset as usize, offset.saturating_add(size) as usize);
        space.get(start..end).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let &[write_back] = buf else { return Err(Error::InvalidParam) };
        if offset != config::OFFSET_WCE {
            return Err(Error::InvalidParam);
        }
        let write_through = write_back == 0;
        // The next process must know it before the guest may rely on it.
        if let Some(map) = &self.inflight {
            map.device().set_write_through(write_through);
        }
        self.update_cache_mode(Some(write_through));
        Ok(())
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let shape = self.inflight_shape(asked)?;
        let file = inflight_map::create(shape).map_err(Error::ReqHandlerError)?;
        let size = shape.size() as u64;
        if self.arrival.stage().is_going_on() {
            let map = inflight_map::map(&file, 0, size, shape).map_err(Error::ReqHandlerError)?;
            map.device().set_postcopy(true);
        }
        let reply = VhostUserInflight::new(size, 0, asked.num_queues, asked.queue_size);
        Ok((reply, file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let shape = self.inflight_shape(given)?;
        let map = inflight_map::map(&file, given.mmap_offset, given.mmap_size, shape)
            .map_err(Error::ReqHandlerError)?;
        match map.device().write_through() {
            Some(write_through) => self.update_cache_mode(Some(write_through)),
            // A choice made before there was a region to record it in.
            None => {
                let chosen = self.disk.shared.write_through.load(Ordering::Relaxed);
                map.device().set_write_through(chosen);
            }
        }
        if self.arrival.stage().is_going_on() {
            map.device().set_postcopy(true);
        } else if map.device().postcopy() {
            log::warn!("the guest's memory is still arriving: nothing is served until it is there");
            self.set_arrival(Arrival::Inherited);
        }
        self.inflight = Some(map);
        Ok(())
    }

    fn postcopy_advice(&mut self) -> Result<File> {
        let Some(faults) = &self.offer.prepared else { return Err(unsupported()) };
        let opened = faults.open().and_then(|faults| Ok((faults.share()?, faults)));
        let (theirs, faults) = opened
            .inspect_err(|error| log::error!("no postcopy error=\"{error}\""))
            .map_err(Error::ReqHandlerError)?;
        self.set_arrival(Arrival::Advised(faults));
        Ok(theirs)
    }

    fn postcopy_listen(&mut self) -> Result<()> {
        // What was touched before cannot be told from what has arrived.
        if self.memory.specs().next().is_some() {
            return Err(Error::InvalidOperation("the guest's memory is in use already"));
        }
        let Arrival::Advised(faults) = std::mem::take(&mut self.arrival) else {
            return Err(Error::InvalidOperation("postcopy was not advised"));
        };
        self.set_arrival(Arrival::Listening { faults, known: false });
        if let Some(map) = &self.inflight {
            map.device().set_postcopy(true);
        }
        Ok(())
    }

    fn postcopy_ack_mem_regions(&mut self) -> Result<()> {
        if let Arrival::Listening { faults, known } = &mut self.arrival {
            faults.register(&self.memory).map_err(Error::ReqHandlerError)?;
            *known = true;
        }
        (0..self.vrings.len()).try_for_each(|index| self.try_start(index))
    }

    fn postcopy_end(&mut self) -> Result<()> {
        self.end_postcopy()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEM_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        if self.memory.specs().count() as u64 >= MAX_MEM_SLOTS {
            return Err(failed(format!(
                "the front end adds a memory region beyond the {MAX_MEM_SLOTS} that it was told of"
            )));
        }
        // Nothing moves: queues in service go on with the table that they have until they are
        // started again, unless a request could name the new memory; so they are.
        let memory = self.memory.with_region(region_spec(region), &file).map_err(failed)?;
        self.replace_memory(memory)?;
        Ok(self.base_of(region.guest_phys_addr))
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.without_region(region_spec(region)).map_err(failed)?;
        self.replace_memory(memory)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(unsupported())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(unsupported())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(unsupported())
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(unsupported())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(unsupported())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let bitmap = DirtyBitmap::map(&file, log.mmap_offset, log.mmap_size);
        self.dirty = Some(Arc::new(bitmap.map_err(failed)?));
        self.update_logs(0..self.vrings.len());
        Ok(())
    }
}

fn unsupported() -> Error {
    Error::InvalidOperation("not offered by this backend")
}
