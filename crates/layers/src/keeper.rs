//! The one who changes a chain: carries out the acts of [`crate::plan`] on files.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use semper_epoch::{Claim, Id};

use crate::BLOCK;
use crate::bits::{Bits, CHUNK_BYTES, HEADER_BYTES, Have, Identity, Kind, chunk_at};
use crate::chain::{Chain, Current, Level, Look};
use crate::files::{Access, Bytes, Files, Key, Part};
use crate::mistake::{Mistake, made};
use crate::plan::{Act, Aim, Event, Plan};
use crate::record::{
    CHAIN_MAX, FILE_BYTES, LAYERS_MAX, Layer, LayerId, Pin, Record, Refused, SLOT_BYTES, State,
    newest,
};

/// Blocks that are merged at once: 256 KiB.
const COPY_BLOCKS: u64 = 64;

/// Why a chain cannot be used, or not be changed. Each message names the cause and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// Neither empty nor a record.
    #[error(
        "{0} is damaged: it cannot tell what the disk consists of; restore it from a backup of the \
         same instant as the image and its layers"
    )]
    Damaged(String),
    /// Of a later release.
    #[error(
        "{name} has version {version}, which this program does not know; use the release that wrote it"
    )]
    Newer {
        /// The record.
        name: String,
        /// The version that it has.
        version: u32,
    },
    /// The image is not all of the disk, and nothing says what else belongs to it.
    #[error(
        "{0} is missing, and the image alone is not all of the disk, as its epoch record says; put the \
         record of its layers back beside the image, with their files"
    )]
    NoRecord(String),
    /// A layer's file is not there.
    #[error("{0} is missing: a part of the disk is in it; put it back beside the image")]
    Missing(String),
    /// A layer's file is not what the record says.
    #[error(
        "{0} is not the file that belongs to this image: it was cut off, or is another's; put the \
         right one back"
    )]
    Foreign(String),
    /// Somebody with a later claim has changed the chain.
    #[error(
        "{name} was written under epoch {found}, and this process has epoch {mine}: the disk was given \
         away; stop what still runs of it here"
    )]
    Stale {
        /// The record.
        name: String,
        /// The epoch on record.
        found: u64,
        /// The epoch of this process.
        mine: u64,
    },
    /// Only who has the image for writing knows all of it.
    #[error(
        "image {0} has layers, and cannot be served read-only: what a guest has not flushed is in this \
         host's memory; serve a snapshot of it (--snapshot), or the disk for writing"
    )]
    ReadOnly(String),
    /// Not by the rules of the record.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The system's.
    #[error("cannot {what} {name}: {source}; check the storage and the space on it")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// The file.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// What a step has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do.
    Going,
    /// The next step has to be made while no request is in flight.
    AtRest,
    /// Nothing is left to do.
    Over,
}

/// What is going on.
#[derive(Debug)]
struct Work {
    plan: Plan,
    /// A snapshot that somebody asked for.
    told: bool,
    frozen: bool,
    /// Bytes of the disk.
    size: u64,
    /// The layer that is opened, or merged.
    layer: LayerId,
    /// Its files, until the switch.
    level: Option<Arc<Level>>,
    looks: Vec<(Arc<Level>, Look)>,
    /// The layer, of those in an act that are done one by one.
    index: usize,
    /// The block from which on the layer is still to be copied.
    at: u64,
    /// Blocks that were copied.
    copied: u64,
    /// A layer that no record names any more.
    gone: Option<Key>,
}

/// The chain of one image, for the process that writes it.
pub struct Keeper {
    files: Arc<dyn Files>,
    writer: Claim,
    record: Record,
    /// The record, written, locked, and not flushed yet.
    entered: Option<Arc<dyn Bytes>>,
    current: Arc<Current>,
    work: Option<Work>,
    /// The layer that was switched to last, and whether what the layers below it stand on was on the
    /// medium before.
    switched: Option<(LayerId, Arc<AtomicBool>)>,
}

/// How much of a chain goes into the image when nobody serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorten {
    /// The lowest layers whose snapshots nobody wants.
    Unwanted,
    /// These, after the snapshots up to this one were given up.
    Through(LayerId),
    /// All.
    All,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("record", &self.record).finish_non_exhaustive()
    }
}

impl Keeper {
    /// Opens the chain of an image whose lock is held, and has `current` serve it. Waits until what a
    /// dead process was writing into its files has ended. `id` is what a new chain is called.
    ///
    /// # Errors
    /// [`LayersError`]: the disk must not be served.
    pub fn open(
        files: Arc<dyn Files>,
        writer: Claim,
        current: Arc<Current>,
        (size, id): (u64, Id),
    ) -> Result<Self, LayersError> {
        let record = read_record(&*files, Access::Write)?;
        let record = record.unwrap_or_else(|| Record::new(id, writer));
        let (entered, work, switched) = (None, None, None);
        let keeper = Self { files, writer, record, entered, current, work, switched };
        keeper.check_epoch(&keeper.record)?;
        if keeper.record.sequence > 0 {
            keeper.remove_strays()?;
        }
        let levels = keeper.open_levels()?;
        if !levels.is_empty() {
            let settled = keeper.record.top().is_some_and(|top| top.state != State::Opened);
            keeper.serve(levels, size, Arc::new(AtomicBool::new(settled)));
        }
        Ok(keeper)
    }

    /// The record as it was read or written last.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Reads the record again, unless something goes on: readers write their pins into it.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn refresh(&mut self) -> Result<(), LayersError> {
        if self.work.is_none() && self.record.sequence > 0 {
            let (_, record) = locked_record(&*self.files)?;
            self.check_epoch(&record)?;
            self.record = record;
        }
        Ok(())
    }

    /// Bytes that the maps take in memory, and for each layer those that its file holds.
    pub fn sizes(&self) -> (u64, Vec<(LayerId, u64)>) {
        let chain = self.current.get();
        let levels = chain.iter().flat_map(|chain| &chain.levels);
        let held = levels.clone().map(|l| (l.key.id, l.bits.count_data() * BLOCK)).collect();
        (levels.map(|level| level.bits.resident()).sum(), held)
    }

    /// Whether a layer has to be opened before anything is written: the highest is another epoch's.
    pub fn needs_layer(&self) -> bool {
        self.record.top().is_some_and(|top| top.writer != self.writer)
    }

    /// What is left to do of what an earlier process had begun, or nobody wants any more.
    pub fn left_over(&self) -> Option<Aim> {
        if !self.serves_what_is_on_record() {
            return None;
        }
        if self.record.top().is_some_and(|top| top.state == State::Opened) {
            return Some(Aim::Seal);
        }
        let lowest = self.record.chain().first()?;
        let unwanted = matches!(lowest.state, State::Lapsed | State::Merging);
        if unwanted && self.record.mergeable().is_ok() {
            return Some(Aim::Merge);
        }
        let mine = self.record.top().is_some_and(|top| top.writer == self.writer);
        (mine && self.record.liftable().is_ok()).then_some(Aim::Lift)
    }

    /// Begins to do something; [`Keeper::step`] does it. `size`: bytes of the disk.
    ///
    /// # Errors
    /// [`Refused`]: something goes on already, or the record is against it.
    pub fn begin(&mut self, aim: Aim, size: u64, frozen: bool) -> Result<(), Refused> {
        if self.work.is_some() {
            return Err(Refused::Busy);
        }
        if !self.serves_what_is_on_record() {
            return Err(Refused::Torn);
        }
        let mut ahead = self.record.clone();
        let layer = match aim {
            Aim::Snapshot | Aim::Extend => ahead.open(self.new_layer(size, frozen), most(aim))?,
            Aim::Seal => self.record.top().ok_or(Refused::Nothing)?.id,
            Aim::Merge => ahead.begin_merge()?,
            Aim::Fold => ahead.begin_fold()?,
            Aim::Lift => ahead.liftable()?,
        };
        self.work = Some(Work {
            plan: Plan::new(aim),
            told: aim == Aim::Snapshot,
            frozen,
            size,
            layer,
            level: None,
            looks: Vec::new(),
            index: 0,
            at: 0,
            copied: 0,
            gone: None,
        });
        Ok(())
    }

    /// The act that is next, the layer it is about, and how far a copy has come, in blocks.
    pub fn doing(&self) -> Option<(Aim, Act, LayerId, u64)> {
        let work = self.work.as_ref()?;
        Some((work.plan.aim, work.plan.act()?, work.layer, work.at))
    }

    /// Blocks that were copied by what goes on.
    pub fn copied(&self) -> u64 {
        self.work.as_ref().map_or(0, |work| work.copied)
    }

    /// Makes the next step.
    ///
    /// # Errors
    /// [`LayersError`]: what was begun has ended there, as if the process had died.
    pub fn step(&mut self) -> Result<Progress, LayersError> {
        let Some(mut work) = self.work.take() else { return Ok(Progress::Over) };
        let Some(act) = work.plan.act() else { return Ok(Progress::Over) };
        let event = match self.carry_out(act, &mut work) {
            Ok(event) => event,
            Err(error) => {
                self.entered = None;
                return Err(error);
            }
        };
        if event == Event::Done {
            work.index = 0;
        }
        work.plan = work.plan.after(event);
        let progress = match work.plan.act() {
            None => return Ok(Progress::Over),
            Some(Act::Switch) => Progress::AtRest,
            Some(_) => Progress::Going,
        };
        self.work = Some(work);
        Ok(progress)
    }

    /// Makes all steps. No request is in flight.
    ///
    /// # Errors
    /// As [`Keeper::step`].
    pub fn finish(&mut self) -> Result<(), LayersError> {
        while self.step()? != Progress::Over {}
        Ok(())
    }

    /// Gives up the snapshots up to this one.
    ///
    /// # Errors
    /// [`LayersError`]; [`Refused::Pinned`] if one of them is read, and all are kept then.
    pub fn give_up_through(&mut self, through: LayerId) -> Result<(), LayersError> {
        let wanted = |layer: &&Layer| layer.id <= through && layer.state == State::Sealed;
        let unwanted: Vec<_> =
            self.record.chain().iter().filter(wanted).map(|layer| layer.id).collect();
        let pinned = self.record.pins.iter().find(|pin| unwanted.contains(&pin.snapshot));
        if let Some(Pin { snapshot, reader }) = pinned.cloned() {
            return Err(Refused::Pinned { layer: snapshot, snapshot, reader }.into());
        }
        if unwanted.is_empty() {
            return Ok(());
        }
        self.change(|record| unwanted.iter().try_for_each(|id| record.lapse(*id)))
    }

    /// Gives up one snapshot, also one that is still being taken.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn give_up(&mut self, snapshot: LayerId) -> Result<(), LayersError> {
        let opened = |layer: &Layer| layer.state == State::Opened;
        if self.record.layer(snapshot).is_some_and(opened) {
            if let Some(work) = self.work.as_mut().filter(|work| work.layer == snapshot) {
                work.told = false;
            }
            return Ok(());
        }
        self.change(|record| record.lapse(snapshot))
    }

    /// Takes a layer back that was opened last, or is about to be: there is no such snapshot then, and
    /// requests go where they went before. No request is in flight, unless the switch is still to come.
    /// False, and nothing has changed, for a layer that has blocks, or that another process has opened, or
    /// that stands on one of another epoch, whose files this process must not write; or while a merge goes
    /// on: what is copied into the image takes no writes. (A layer whose merge an earlier process had begun
    /// takes some: the next merge copies all of it again.)
    ///
    /// # Errors
    /// [`LayersError`]. If the record was changed and could not be flushed, requests go where they went
    /// before all the same.
    pub fn take_back(&mut self, id: LayerId) -> Result<bool, LayersError> {
        let chain = self.current.get();
        let level = chain.as_ref().and_then(|chain| chain.top()).filter(|top| top.key.id == id);
        let before = self.switched.as_ref().filter(|(switched, _)| *switched == id);
        let settled = match (level, before) {
            (None, _) => None,
            (Some(level), Some((_, settled))) if level.bits.next(0, 1).is_none() => {
                Some(Arc::clone(settled))
            }
            (Some(_), _) => return Ok(false),
        };
        let entered = self.record.top().is_some_and(|top| top.id == id);
        let begun = self.work.as_ref().is_some_and(|work| work.layer == id);
        if !entered && !begun {
            return Err(Refused::Missing(id).into());
        }
        let below = self.record.chain().iter().take_while(|layer| layer.id != id).last();
        let foreign = below.is_some_and(|layer| layer.writer != self.writer);
        let copies = |work: &Work| matches!(work.plan.aim, Aim::Merge | Aim::Lift);
        if foreign || self.work.as_ref().is_some_and(copies) {
            return Ok(false);
        }
        if begun {
            self.work = None;
        }
        let gone = Key { epoch: self.writer.epoch, id };
        let mut flushed = Ok(());
        if entered {
            self.flush_record()?;
            self.enter(|record| record.take_back(id))?;
            // Durable before requests go below: there they would change what a snapshot has. Below they go
            // also where that fails: what a layer takes that is not on record is gone with the process.
            flushed = self.flush_record();
        }
        if let (Some(chain), Some(settled)) = (chain, settled) {
            let below = chain.levels.len() - 1;
            self.serve(chain.levels[..below].to_vec(), chain.size, settled);
        }
        self.switched = None;
        flushed?;
        self.remove(gone)?;
        Ok(true)
    }

    /// What is next where nobody serves the disk: the highest layer is sealed, then what nobody wants
    /// goes into the image.
    fn next_to_shorten(&self) -> Option<Aim> {
        let chain = self.record.chain();
        if chain.last()?.state == State::Opened {
            return Some(Aim::Seal);
        }
        let unwanted = matches!(chain.first()?.state, State::Lapsed | State::Merging);
        let aim = if chain.len() == 1 { Aim::Fold } else { Aim::Merge };
        unwanted.then_some(aim)
    }

    /// Begins what is next of [`Keeper::shorten`]; false when nothing is left. `how` is what is left of it.
    pub(crate) fn begin_to_shorten(
        &mut self,
        how: &mut Shorten,
        size: u64,
    ) -> Result<bool, LayersError> {
        if self.next_to_shorten() != Some(Aim::Seal) {
            match std::mem::replace(how, Shorten::Unwanted) {
                Shorten::Unwanted => {}
                Shorten::Through(id) => self.give_up_through(id)?,
                Shorten::All => self.give_up_through(LayerId::MAX)?,
            }
        }
        if let Some(aim) = self.next_to_shorten() {
            self.begin(aim, size, false)?;
            return Ok(true);
        }
        self.tidy()?;
        if self.record.layers.is_empty() {
            let name = || "the epoch record of the image".to_owned();
            self.files.mark(false).map_err(failed("write", name))?;
        }
        Ok(false)
    }

    /// Merges layers into the image of a disk that nobody serves; gives those that are gone. `tell` hears
    /// after each act, or part of one, which it was, of which layer, and how many of that layer's blocks
    /// had been looked at. Where no layer is left, programs that know none may use the image again.
    ///
    /// # Errors
    /// [`LayersError`]; [`Refused::Pinned`] if somebody reads what would go.
    pub fn shorten(
        &mut self,
        mut how: Shorten,
        size: u64,
        tell: &mut dyn FnMut(Act, LayerId, u64),
    ) -> Result<Vec<LayerId>, LayersError> {
        if self.record.sequence == 0 {
            return Ok(Vec::new());
        }
        let before: Vec<_> = self.record.chain().iter().map(|layer| layer.id).collect();
        while self.begin_to_shorten(&mut how, size)? {
            while let Some((_, act, layer, at)) = self.doing() {
                self.step()?;
                tell(act, layer, at);
            }
        }
        Ok(before.into_iter().filter(|id| self.record.layer(*id).is_none()).collect())
    }

    /// Changes the record, and has it on the medium.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn change<T>(
        &mut self,
        change: impl FnOnce(&mut Record) -> Result<T, Refused>,
    ) -> Result<T, LayersError> {
        // What goes on may just have entered something: the record is locked until that is flushed.
        self.flush_record()?;
        let changed = self.enter(change)?;
        self.flush_record()?;
        Ok(changed)
    }

    /// Removes the files that were kept for readers that are gone.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn tidy(&mut self) -> Result<(), LayersError> {
        if self.remove_dropped()? {
            self.change(|record| Ok(record.forget_dropped()))?;
        }
        Ok(())
    }

    /// Not if the record was written and could not be flushed: then it says more than is known.
    fn serves_what_is_on_record(&self) -> bool {
        let chain = self.current.get();
        let served = chain.iter().flat_map(|chain| &chain.levels).map(|level| level.key);
        served.eq(self.record.chain().iter().map(Key::from))
    }

    fn new_layer(&self, size: u64, frozen: bool) -> Layer {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (writer, state, time) = (self.writer, State::Opened, now.as_secs());
        Layer { id: 0, writer, size, time, state, frozen }
    }

    fn carry_out(&mut self, act: Act, work: &mut Work) -> Result<Event, LayersError> {
        match act {
            Act::BeginRecord => self.begin_record()?,
            Act::MarkImage => self.mark()?,
            Act::MakeFiles => work.level = Some(self.make_files(work)?),
            Act::FlushNames => self.sync_names()?,
            Act::EnterOpened => {
                let (layer, most) = (self.new_layer(work.size, work.frozen), most(work.plan.aim));
                let opened = self.enter(|record| record.open(layer, most))?;
                if opened != work.layer {
                    // Nobody else opens layers while this process has the image.
                    return Err(LayersError::Damaged(self.files.name(Part::Record)));
                }
            }
            Act::FlushRecord => self.flush_record()?,
            Act::Switch => {
                if let Some(level) = work.level.take() {
                    let before = self.current.get();
                    // An image alone is flushed as a whole.
                    let settled = before.as_ref().map(|chain| Arc::clone(&chain.settled));
                    self.switched = Some((work.layer, settled.unwrap_or_default()));
                    let below = before.map(|chain| chain.levels.clone());
                    let levels = below.into_iter().flatten().chain([level]).collect();
                    self.serve(levels, work.size, Arc::default());
                }
            }
            Act::LookAtMaps => {
                let below = self.below_top().into_iter();
                work.looks = below.map(|level| (Arc::clone(&level), level.look())).collect();
            }
            Act::FlushImage => {
                self.files.base().sync().map_err(failed("flush", || "the image".to_owned()))?;
            }
            Act::FlushData | Act::WriteMaps | Act::FlushMaps => return self.flush_one(act, work),
            Act::EnterSealed => {
                self.enter(|record| {
                    record.seal(work.layer, work.told);
                    Ok(())
                })?;
                if let Some(chain) = self.current.get() {
                    chain.settled.store(true, Ordering::SeqCst);
                }
            }
            Act::EnterMerging => {
                work.layer = match work.plan.aim {
                    Aim::Fold => self.enter(Record::begin_fold)?,
                    Aim::Snapshot | Aim::Extend | Aim::Seal | Aim::Merge | Aim::Lift => {
                        self.enter(Record::begin_merge)?
                    }
                };
            }
            Act::Copy => return self.copy(work),
            Act::EnterDropped => self.enter(|record| {
                record.drop_layer(work.layer);
                Ok(())
            })?,
            Act::Unchain => {
                if let Some(chain) = self.current.get() {
                    let dropped = |level: &&Arc<Level>| level.key.id != work.layer;
                    let levels = chain.levels.iter().filter(dropped).cloned().collect();
                    self.serve(levels, chain.size, Arc::clone(&chain.settled));
                }
            }
            Act::RemoveFiles => {
                self.remove_dropped()?;
            }
            Act::EnterGone => {
                self.enter(|record| Ok(record.forget_dropped()))?;
            }
            Act::CopyUp => return self.copy_up(work),
            Act::FlushTop => {
                if let Some(top) = self.current.get().as_ref().and_then(|chain| chain.top()) {
                    let name = || self.files.name(Part::Data(top.key));
                    top.sync().map_err(failed("flush", name))?;
                }
            }
            Act::EnterLifted => {
                work.gone = self.record.layer(work.layer).map(Key::from);
                self.enter(Record::lift)?;
            }
            Act::RemoveLifted => work.gone.take().map_or(Ok(()), |key| self.remove(key))?,
        }
        Ok(Event::Done)
    }

    fn serve(&self, levels: Vec<Arc<Level>>, size: u64, settled: Arc<AtomicBool>) {
        let base = self.files.base();
        let chain = Chain { base, levels, size, settled };
        self.current.set((!chain.levels.is_empty()).then(|| Arc::new(chain)));
    }

    fn below_top(&self) -> Vec<Arc<Level>> {
        let Some(chain) = self.current.get() else { return Vec::new() };
        let below = chain.levels.len().saturating_sub(1);
        chain.levels[..below].to_vec()
    }

    /// One of the layers below the highest: its data, or its map.
    fn flush_one(&mut self, act: Act, work: &mut Work) -> Result<Event, LayersError> {
        let Some((level, look)) = work.looks.get_mut(work.index) else { return Ok(Event::Done) };
        let name = || self.files.name(Part::Map(level.key));
        match act {
            Act::FlushData => {
                let name = || self.files.name(Part::Data(level.key));
                level.data.sync().map_err(failed("flush", name))?;
            }
            _ if look.is_empty() => {}
            Act::WriteMaps => level.write(look).map_err(failed("write", name))?,
            _ => {
                level.map.sync().map_err(failed("flush", name))?;
                level.flushed(look);
            }
        }
        work.index += 1;
        Ok(Event::Part)
    }

    /// Copies some of the lowest layer's blocks into the image.
    fn copy(&self, work: &mut Work) -> Result<Event, LayersError> {
        let Some(chain) = self.current.get() else { return Ok(Event::Done) };
        let Some(level) = chain.levels.iter().find(|level| level.key.id == work.layer) else {
            return Ok(Event::Done);
        };
        let Some((first, have, count)) = level.bits.next(work.at, COPY_BLOCKS) else {
            return Ok(Event::Done);
        };
        let (offset, end) = (first * BLOCK, ((first + count) * BLOCK).min(chain.size));
        let len = end.saturating_sub(offset);
        match have {
            Have::Data => {
                let mut pages = Pages::new(count as usize);
                let name = || self.files.name(Part::Data(level.key));
                let bytes = &mut pages.bytes()[..(count * BLOCK) as usize];
                let read = level.data.read_at(bytes, offset).map_err(failed("read", name))?;
                bytes[read..].fill(0);
                let written = chain.base.write_at(&bytes[..len as usize], offset);
                written.map_err(failed("write", || "the image".to_owned()))?;
            }
            Have::Zeros => {
                let punched = chain.base.punch(offset, len);
                punched.map_err(failed("write", || "the image".to_owned()))?;
            }
            Have::Absent => {}
        }
        work.at = first + count;
        work.copied += count;
        Ok(Event::Part)
    }

    /// Copies some of the blocks of the layer below the highest that the highest has not.
    fn copy_up(&self, work: &mut Work) -> Result<Event, LayersError> {
        let Some(chain) = self.current.get() else { return Ok(Event::Done) };
        let level = chain.levels.iter().find(|level| level.key.id == work.layer);
        let (Some(level), Some(top)) = (level, chain.top()) else { return Ok(Event::Done) };
        let Some((first, have, count)) = level.bits.next(work.at, COPY_BLOCKS) else {
            return Ok(Event::Done);
        };
        let end = first + count;
        let lacks = |block: &u64| top.bits.get(*block) == Have::Absent;
        let start = (first..end).find(lacks).unwrap_or(end);
        let mut stop = start;
        // The guest's writes are newer: no block is written here that one is on its way to.
        while stop < end && lacks(&stop) && self.files.try_alone(stop) {
            stop += 1;
        }
        // It may have been written since it was looked at.
        let kept = (start..stop).find(|block| !lacks(block)).unwrap_or(stop);
        let copied = self.copy_run(level, top, have, (start, kept));
        (start..stop).for_each(|block| self.files.leave(block));
        copied?;
        work.at = kept;
        work.copied += kept - start;
        Ok(Event::Part)
    }

    /// Copies blocks, all of which are had alike, from one layer into another.
    fn copy_run(
        &self,
        from: &Level,
        to: &Level,
        have: Have,
        (start, end): (u64, u64),
    ) -> Result<(), LayersError> {
        if start == end {
            return Ok(());
        }
        if have == Have::Data {
            let mut pages = Pages::new((end - start) as usize);
            let name = || self.files.name(Part::Data(from.key));
            let bytes = pages.bytes();
            let read = from.data.read_at(bytes, start * BLOCK).map_err(failed("read", name))?;
            bytes[read..].fill(0);
            let name = || self.files.name(Part::Data(to.key));
            to.data.write_at(bytes, start * BLOCK).map_err(failed("write", name))?;
        }
        let name = || self.files.name(Part::Map(to.key));
        to.note(start, end - start, have).map_err(failed("write", name))?;
        Ok(())
    }

    fn begin_record(&mut self) -> Result<(), LayersError> {
        if self.record.sequence > 0 {
            return Ok(());
        }
        let name = || self.files.name(Part::Record);
        let made = self.files.create(Part::Record, FILE_BYTES as u64);
        let file = made.map_err(failed("make", name))?;
        let record = Record { sequence: 1, ..self.record.clone() };
        let at = record.sequence % 2 * SLOT_BYTES as u64;
        let written = file.write_at(&record.encode(), at).and_then(|()| file.sync());
        written.map_err(failed("write", name))?;
        self.sync_names()?;
        self.record = record;
        Ok(())
    }

    fn mark(&self) -> Result<(), LayersError> {
        let name = || "the epoch record of the image".to_owned();
        self.files.mark(true).map_err(failed("write", name))
    }

    fn sync_names(&self) -> Result<(), LayersError> {
        let name = || "the directory of the image".to_owned();
        self.files.sync_names().map_err(failed("flush", name))
    }

    fn make_files(&self, work: &Work) -> Result<Arc<Level>, LayersError> {
        let key = Key { epoch: self.writer.epoch, id: work.layer };
        let (chain, layer, writer) = (self.record.chain, work.layer, self.writer);
        let identity = Identity { chain, layer, writer, size: work.size };
        let make = |part, kind| {
            let name = || self.files.name(part);
            let file = self.files.create(part, identity.file_bytes(kind));
            let file = file.map_err(failed("make", name))?;
            // Direct I/O does not take any memory.
            let mut header = Pages::new(1);
            header.bytes().copy_from_slice(&identity.encode(kind));
            let headed = file.write_at(header.bytes(), identity.header_at(kind));
            headed.and_then(|()| file.sync()).map_err(failed("write", name))?;
            Ok::<_, LayersError>(file)
        };
        let data = make(Part::Data(key), Kind::Data)?;
        let map = make(Part::Map(key), Kind::Map)?;
        self.files.forget(key);
        let name = || format!("the memory of the map of layer {layer}");
        let bits = self.files.memory(&identity).map_err(failed("make", name))?;
        Ok(Arc::new(Level::new(key, (data, map), bits, false)))
    }

    /// Removes files of layers that no record names: of one whose maker died.
    fn remove_strays(&self) -> Result<(), LayersError> {
        let all = self.files.layers();
        let all = all.map_err(failed("read", || "the directory of the image".to_owned()))?;
        let known = |key: &Key| self.record.layers.iter().any(|layer| Key::from(layer) == *key);
        all.into_iter().filter(|key| !known(key)).try_for_each(|key| self.remove(key))
    }

    fn remove(&self, key: Key) -> Result<(), LayersError> {
        for part in [Part::Data(key), Part::Map(key)] {
            let removed = self.files.remove(part);
            removed.map_err(failed("remove", || self.files.name(part)))?;
        }
        self.files.forget(key);
        Ok(())
    }

    /// Removes the files that nobody has open any more; whether there are such.
    fn remove_dropped(&self) -> Result<bool, LayersError> {
        let gone = self.record.clone().forget_dropped();
        gone.iter().try_for_each(|layer| self.remove(Key::from(layer)))?;
        Ok(!gone.is_empty())
    }

    fn open_levels(&self) -> Result<Vec<Arc<Level>>, LayersError> {
        let mine = |layer: &Layer| layer.writer == self.writer;
        let open = |layer: &Layer| {
            let memory = |identity: &Identity| match mine(layer) {
                // What an earlier process of this claim has completed.
                true => self.files.memory(identity),
                // What another host has completed is on the medium, or its guest is gone.
                false => Bits::anonymous(identity).map(Arc::new),
            };
            open_level(&*self.files, self.record.chain, layer, (Access::Write, &memory))
        };
        self.record.chain().iter().map(open).collect()
    }

    fn check_epoch(&self, record: &Record) -> Result<(), LayersError> {
        if record.writer.epoch <= self.writer.epoch {
            return Ok(());
        }
        let (found, mine) = (record.writer.epoch, self.writer.epoch);
        Err(LayersError::Stale { name: self.files.name(Part::Record), found, mine })
    }

    /// Changes the record; [`Keeper::flush_record`] has to follow. It is locked meanwhile.
    fn enter<T>(
        &mut self,
        change: impl FnOnce(&mut Record) -> Result<T, Refused>,
    ) -> Result<T, LayersError> {
        let (file, mut record) = locked_record(&*self.files)?;
        self.check_epoch(&record)?;
        record.writer = self.writer;
        let changed = change(&mut record)?;
        write_record(&*self.files, &*file, &mut record)?;
        self.record = record;
        self.entered = Some(file);
        Ok(changed)
    }

    fn flush_record(&mut self) -> Result<(), LayersError> {
        let Some(file) = self.entered.take() else { return Ok(()) };
        file.sync().map_err(failed("flush", || self.files.name(Part::Record)))
    }
}

fn most(aim: Aim) -> usize {
    match aim {
        // Nobody can wait for a merge when a VM comes from another host.
        Aim::Extend => LAYERS_MAX,
        Aim::Snapshot | Aim::Seal | Aim::Merge | Aim::Fold | Aim::Lift => CHAIN_MAX,
    }
}

fn failed<'a>(
    what: &'static str,
    name: impl Fn() -> String + 'a,
) -> impl FnOnce(io::Error) -> LayersError + 'a {
    move |source| LayersError::Io { what, name: name(), source }
}

/// The record of an image, on the medium; `None` where the image is all of the disk.
///
/// # Errors
/// [`LayersError`].
pub(crate) fn read_record(
    files: &dyn Files,
    access: Access,
) -> Result<Option<Record>, LayersError> {
    let name = || files.name(Part::Record);
    let Some(file) = files.open(Part::Record, access).map_err(failed("open", name))? else {
        let marked = files.is_marked();
        let marked = marked.map_err(failed("read", || "the epoch record".to_owned()))?;
        return if marked { Err(LayersError::NoRecord(name())) } else { Ok(None) };
    };
    let record = read_from(files, &*file)?;
    // Who wrote it may have died before the flush, and then it is in this host's memory alone.
    if access == Access::Write && record.is_some() && !made(Mistake::BelieveRecord) {
        file.sync().map_err(failed("flush", name))?;
    }
    Ok(record)
}

fn read_from(files: &dyn Files, file: &dyn Bytes) -> Result<Option<Record>, LayersError> {
    let name = || files.name(Part::Record);
    let mut content = vec![0; FILE_BYTES];
    let read = file.read_at(&mut content, 0).map_err(failed("read", name))?;
    let content = &content[..read];
    match newest(content) {
        Ok(None) if content.iter().any(|byte| *byte != 0) => Err(LayersError::Damaged(name())),
        Ok(found) => Ok(found),
        Err(newer) => Err(LayersError::Newer { name: name(), version: newer.version }),
    }
}

/// The record, locked until the file is closed.
pub(crate) fn locked_record(files: &dyn Files) -> Result<(Arc<dyn Bytes>, Record), LayersError> {
    let name = || files.name(Part::Record);
    let file = files.open(Part::Record, Access::Write).map_err(failed("open", name))?;
    let file = file.ok_or_else(|| LayersError::NoRecord(name()))?;
    let record = read_from(files, &*file)?.ok_or_else(|| LayersError::Damaged(name()))?;
    Ok((file, record))
}

/// Writes the record into the slot that is not in force.
pub(crate) fn write_record(
    files: &dyn Files,
    file: &dyn Bytes,
    record: &mut Record,
) -> Result<(), LayersError> {
    let name = || files.name(Part::Record);
    // No writer gets there; and one more would be a zero, which is never valid.
    let sequence = record.sequence.checked_add(1);
    record.sequence = sequence.ok_or_else(|| LayersError::Damaged(name()))?;
    let at = record.sequence % 2 * SLOT_BYTES as u64;
    file.write_at(&record.encode(), at).map_err(failed("write", name))
}

/// Notes, or takes out, a pin, on behalf of a reader: it is on the medium at the return.
///
/// # Errors
/// [`LayersError`].
pub fn set_pin(files: &dyn Files, pin: Pin, there: bool) -> Result<Record, LayersError> {
    let (file, mut record) = locked_record(files)?;
    if there {
        record.pin(pin)?;
    } else if !record.unpin(&pin) {
        return Ok(record);
    }
    write_record(files, &*file, &mut record)?;
    file.sync().map_err(failed("flush", || files.name(Part::Record)))?;
    Ok(record)
}

/// Where the bits of a layer are to be had in memory.
pub(crate) type Memory<'a> = &'a dyn Fn(&Identity) -> io::Result<Arc<Bits>>;

/// Opens a layer's files and its bits: those in memory, and those of the medium.
pub(crate) fn open_level(
    files: &dyn Files,
    chain: Id,
    layer: &Layer,
    (access, memory): (Access, Memory<'_>),
) -> Result<Arc<Level>, LayersError> {
    let key = Key::from(layer);
    let identity = Identity { chain, layer: layer.id, writer: layer.writer, size: layer.size };
    let open = |part, kind| {
        let name = || files.name(part);
        let file = files.open(part, access).map_err(failed("open", name))?;
        let file = file.ok_or_else(|| LayersError::Missing(name()))?;
        let mut header = Pages::new(1);
        let header = &mut header.bytes()[..HEADER_BYTES];
        let read = file.read_at(header, identity.header_at(kind)).map_err(failed("read", name))?;
        let whole = file.size().map_err(failed("read", name))? == identity.file_bytes(kind);
        let known = read == HEADER_BYTES && Identity::decode(header, kind) == Some(identity);
        if whole && known { Ok(file) } else { Err(LayersError::Foreign(name())) }
    };
    let data = open(Part::Data(key), Kind::Data)?;
    let map = open(Part::Map(key), Kind::Map)?;
    let name = || files.name(Part::Map(key));
    let bits = memory(&identity).map_err(failed("map", name))?;
    for chunk in 0..identity.chunks() {
        let mut medium = [0; CHUNK_BYTES];
        let read = map.read_at(&mut medium, chunk_at(chunk)).map_err(failed("read", name))?;
        if read < CHUNK_BYTES {
            return Err(LayersError::Foreign(name()));
        }
        bits.load(chunk, &medium).map_err(failed("map", name))?;
    }
    Ok(Arc::new(Level::new(key, (data, map), bits, access == Access::Write)))
}

/// Memory that direct I/O takes.
pub(crate) struct Pages(Vec<Page>);

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; BLOCK as usize]);

impl Pages {
    pub(crate) fn new(count: usize) -> Self {
        Self(vec![Page([0; BLOCK as usize]); count])
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let len = self.0.len() * BLOCK as usize;
        // SAFETY: a Page is exactly BLOCK plain bytes without padding.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}
