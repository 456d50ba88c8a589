//! The source's stream: from QEMU's socket to the wire.
//!
//! ```text
//!   this thread        QEMU ─► Encoder ─► waits for room in the window ─► Pipeline
//!   packing threads    Pipeline: hashes, zstd
//!   sending thread     Pipeline ─► wire
//!   receiving thread   wire ─► verdicts (repairs go out at once), credit, return path ─► QEMU
//! ```
//!
//! What QEMU has written goes out when a batch is full, or when QEMU has written nothing for
//! [`DRY`]: so the end of the stream, during which the guest stands still, never waits for more.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use semper_wire::format::{self, Kind};
use semper_wire::{
    BlockRef, ContentIndex, Encoder, Frame, Ledger, LinkRate, MAX_ITEM, Packer, Page, Window,
    WireError,
};

use crate::channel::{Channel, Inbox};
use crate::failure::Failure;
use crate::indexing::News;
use crate::pipeline::Pipeline;
use crate::progress::{Phase, Progress};

/// Most bytes of one read.
const INPUT: usize = 256 << 10;
const DRY: Duration = Duration::from_millis(1);
/// So near to the end of the first pass the guest may be stopped soon.
const NEAR_THE_END: u64 = 8 << 20;
/// News of the index that are taken between two reads.
const NEWS: usize = 16;

/// What the threads share.
pub(crate) struct Carrier<'a> {
    pub channel: Channel,
    pub qemu: UnixStream,
    progress: &'a Progress,
    pipeline: Pipeline,
    ledger: Mutex<Ledger>,
    flow: Mutex<Flow>,
    changed: Condvar,
    began: Instant,
}

struct Flow {
    window: Window,
    link: LinkRate,
    mismatched: Vec<(BlockRef, Page)>,
    /// Length of the stream, once it has ended.
    length: Option<u64>,
    failure: Option<Failure>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Carrier<'a> {
    pub(crate) fn new(
        channel: Channel,
        qemu: UnixStream,
        window: u64,
        progress: &'a Progress,
    ) -> Self {
        let flow = Flow {
            window: Window::new(window),
            link: LinkRate::default(),
            mismatched: Vec::new(),
            length: None,
            failure: None,
        };
        Self {
            channel,
            qemu,
            progress,
            pipeline: Pipeline::default(),
            ledger: Mutex::default(),
            flow: Mutex::new(flow),
            changed: Condvar::new(),
            began: Instant::now(),
        }
    }

    /// Carries the stream until the destination has delivered all of it.
    pub(crate) fn carry(
        &self,
        inbox: Inbox,
        encoder: Encoder<ContentIndex>,
        news: Receiver<News>,
        packers: Vec<Packer>,
    ) -> Result<(), Failure> {
        thread::scope(|scope| {
            let started = self.start(scope, inbox, packers);
            match started.and_then(|()| self.stream(encoder, &news)) {
                Ok(()) => self.pipeline.end(),
                Err(failure) => self.fail(failure),
            }
            // All of them end, with DONE or with the connection.
        });
        locked(&self.flow).failure.take().map_or(Ok(()), Err)
    }

    fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        inbox: Inbox,
        packers: Vec<Packer>,
    ) -> Result<(), Failure> {
        let start = |name: &str, work: Box<dyn FnOnce() + Send + 'scope>| {
            let spawned = thread::Builder::new().name(name.into()).spawn_scoped(scope, work);
            spawned.map(drop).map_err(Failure::system("start a thread"))
        };
        let settle =
            |ended: Result<(), Failure>| ended.unwrap_or_else(|failure| self.fail(failure));
        start("receive", Box::new(move || settle(self.receive(inbox))))?;
        start("send", Box::new(move || settle(self.send())))?;
        for packer in packers {
            start("pack", Box::new(move || self.pipeline.work(packer)))?;
        }
        Ok(())
    }

    /// Ends everything. What the other end says is the cause, and a connection that breaks the
    /// consequence.
    fn fail(&self, failure: Failure) {
        self.pipeline.abandon();
        self.channel.close(Some(&failure));
        let mut flow = locked(&self.flow);
        if flow.failure.as_ref().is_none_or(|known| matches!(known, Failure::Lost(_))) {
            flow.failure = Some(failure);
        }
        drop(flow);
        self.changed.notify_all();
        let _ = self.qemu.shutdown(Shutdown::Both);
    }

    /// From QEMU to the pipeline, until QEMU closes its socket.
    fn stream(
        &self,
        mut encoder: Encoder<ContentIndex>,
        news: &Receiver<News>,
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
                self.learn(&mut encoder, news);
                let taken = encoder.feed(&input[..filled]);
                input.copy_within(taken..filled, 0);
                filled -= taken;
                waits = true;
            }
            if !self.push(&mut encoder) {
                return Ok(());
            }
        }
        self.progress.phase(Phase::Draining);
        encoder.finish(&input[..filled]);
        self.push(&mut encoder);
        locked(&self.flow).length = Some(encoder.counters().stream_bytes);
        Ok(())
    }

    /// Tells the index what has changed.
    fn learn(&self, encoder: &mut Encoder<ContentIndex>, news: &Receiver<News>) {
        let mismatched = std::mem::take(&mut locked(&self.flow).mismatched);
        encoder.mismatched(&mismatched);
        let index = encoder.index();
        for news in news.try_iter().take(NEWS) {
            // The stream goes on without an index as well.
            if let Err(failure) = news.apply(index) {
                log::warn!("the index is not complete error=\"{failure}\"");
            }
            self.progress.indexed(index.len() as u64);
        }
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

    /// Whatever the encoder has, as the window allows; false if the migration has failed.
    fn push(&self, encoder: &mut Encoder<ContentIndex>) -> bool {
        while let Some(draft) = encoder.pop() {
            let hurry = encoder.first_pass_left() < NEAR_THE_END;
            let mut flow = locked(&self.flow);
            flow.window.hurry(hurry, self.began.elapsed());
            while flow.failure.is_none() && !flow.window.has_room(draft.charge()) {
                flow = self.changed.wait(flow).unwrap_or_else(PoisonError::into_inner);
            }
            if flow.failure.is_some() {
                return false;
            }
            flow.window.send(draft.charge(), self.began.elapsed());
            drop(flow);
            self.pipeline.push(draft);
        }
        self.progress.encoded(encoder.counters(), encoder.lost());
        true
    }

    /// From the pipeline to the wire, until the stream has ended.
    fn send(&self) -> Result<(), Failure> {
        while let Some((charge, mut batch)) = self.pipeline.pop() {
            let length = batch.frame().len() as u64;
            locked(&self.flow).link.send(charge, length, self.began.elapsed());
            // Before its verdict can come.
            batch.held.take().into_iter().for_each(|held| locked(&self.ledger).hold(held));
            self.channel.send(batch.frame())?;
            self.progress.wire(self.channel.bytes());
        }
        let length = locked(&self.flow).length;
        length.map_or(Ok(()), |length| self.channel.send(&format::end(length)))
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
                self.progress.mismatched(repairs.mismatched.len());
                locked(&self.flow).mismatched.extend(repairs.mismatched);
            }
            Some(Kind::Credit) => {
                let total = format::parse_number(frame.payload)?;
                let mut flow = locked(&self.flow);
                let now = self.began.elapsed();
                flow.window.credit(total, now)?;
                flow.link.credit(total, now);
                self.progress.flow(flow.window.under_way(), flow.link.bytes_per_second());
                drop(flow);
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
