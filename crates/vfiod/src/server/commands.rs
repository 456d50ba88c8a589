//! The control commands.

use semper_control::Answer;
use semper_device::Route;
use semper_device::dirty::{DirtySource, Parsed};
use semper_device::registers::Kind;
use semper_epoch::{Claim, Id};
use serde::Serialize;

use super::{Phase, Server};
use crate::answers;
use crate::args::Doorbells;
use crate::control::{
    Dirty, Refusal, Registers, Request, busy, failed, from_hex, invalid, to_hex, writes,
};
use crate::failure::Failure;
use crate::inbox::Port;
use crate::message::is_quiet;
use crate::tenure::Tenure;

/// Control commands.
impl Server {
    pub(crate) fn answer(&mut self, request: &Request) -> Answer {
        let id = &request.id;
        match self.carry_out(request) {
            Ok(answer) => Answer::ok(id, answer),
            Err(Refusal(kind, message)) => Answer::refused(id, kind, message),
        }
    }

    fn carry_out(&mut self, request: &Request) -> Result<serde_json::Value, Refusal> {
        match request.cmd.as_str() {
            "status" => value(self.status()),
            "configuration" => value(self.configuration()?),
            "msix" => value(self.write_table(request)?),
            "capture" => value(self.set_capture(request)?),
            "round" => value(self.round()?),
            "replay" => value(self.replay(request)?),
            "quiesce" => value(self.quiesce()?),
            "touch" => value(self.touch()?),
            "export" => value(self.export()?),
            "import" => value(self.import(request)?),
            "release" => value(self.release()?),
            "claim" => value(self.take_claim(request)?),
            "resume" => value(self.resume()?),
            other => Err(invalid(format!(
                "unknown command {other:?}; known are \"status\", \"configuration\", \"msix\", \
                 \"capture\", \"round\", \"replay\", \"quiesce\", \"touch\", \"export\", \"import\", \
                 \"release\", \"claim\" and \"resume\""
            ))),
        }
    }

    fn state(&self) -> &'static str {
        match self.phase {
            Phase::Waiting => "waiting",
            Phase::Running if self.captured.is_some() => "captured",
            Phase::Running => "running",
            Phase::Quiesced => "quiesced",
            Phase::Incoming { .. } => "incoming",
        }
    }

    fn need(&self, phase: Phase) -> Result<(), Refusal> {
        if self.phase == phase {
            return Ok(());
        }
        let needed = match phase {
            Phase::Waiting => "waiting for QEMU",
            Phase::Running => "running",
            Phase::Quiesced => "quiesced (\"quiesce\")",
            Phase::Incoming { .. } => "incoming (--incoming, before \"resume\")",
        };
        Err(busy(format!("the device has to be {needed}, and is {}", self.state())))
    }

    fn need_qemu(&self) -> Result<(), Refusal> {
        let there = self.stream(Port::Device).is_some();
        there.then_some(()).ok_or_else(|| busy("QEMU has not connected yet"))
    }

    fn status(&self) -> answers::Status {
        let image = self.tenure.as_ref().map(Tenure::image);
        let device = self.device.counters();
        answers::Status {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            kind: self.device.kind(),
            state: self.state(),
            spare: self.spare(),
            resumed: self.resumed,
            flush_failed: self.device.has_lost(),
            connected: self.stream(Port::Device).is_some(),
            shim: self.stream(Port::Shim).is_some(),
            owns_image: self.tenure.as_ref().is_some_and(Tenure::is_held),
            claim: self.claim_status(),
            image: image.map(|image| image.path().to_string_lossy().into_owned()),
            size_bytes: image.map_or(0, semper_block::Image::capacity),
            block_size: image.map_or(0, semper_block::Image::block_size),
            read_only: image.is_some_and(semper_block::Image::read_only),
            serial: self.facts.serial.clone(),
            engine: self.facts.engine,
            doorbells: match self.facts.doorbells {
                Doorbells::Direct => "direct",
                Doorbells::Trapped => "trapped",
            },
            counters: answers::Counters {
                device,
                doorbells_direct: device.rung,
                doorbells_captured: self.doorbells_captured,
                doorbells_trapped: self.doorbells_trapped,
                interrupts: self.dma.interrupts.raised,
                interrupts_held: self.dma.held_back,
                vectors: self.dma.interrupts.connected(),
                dma_refused: self.dma.refused,
                protocol_errors: self.protocol_errors,
                dirty_pages: self.dma.dirty_pages(),
                mediated_bytes: self.dma.mediated_bytes,
            },
            last_error: self.last_error.clone(),
            walls: self.facts.walls.clone(),
        }
    }

    fn claim_status(&self) -> semper_title::Status {
        let none = || semper_title::Title::none().status();
        self.tenure.as_ref().map_or_else(none, Tenure::claim)
    }

    /// Asks QEMU, and waits for its reply.
    fn wait_reply(&mut self, id: u16) -> Result<Vec<u8>, Refusal> {
        (self.wanted, self.reply) = (Some(id), None);
        let came = self.turn_until(|server| server.reply.is_some());
        self.wanted = None;
        match self.reply.take().filter(|_| came) {
            Some(Ok(body)) => Ok(body),
            Some(Err(errno)) => Err(failed(format!("QEMU refused the access, errno {errno}"))),
            None => Err(failed("QEMU has not answered; its main loop may stand still")),
        }
    }

    fn configuration(&mut self) -> Result<answers::Configuration, Refusal> {
        let (before, after) = self.config.restoring();
        let address = self.config.bar().map(|bar| bar + self.window.table);
        let len = u64::from(self.window.vectors) * 16;
        let asks = self.stream(Port::Device).is_some() && self.config.is_master();
        let table = match address.filter(|_| asks) {
            Some(address) => {
                let id = self.dma.ask_to_read(address, len);
                let body = self.wait_reply(id)?;
                let table = body.get(16..16 + len as usize);
                Some(to_hex(table.ok_or_else(|| failed("QEMU's answer is too short"))?))
            }
            None => None,
        };
        Ok(answers::Configuration {
            config: to_hex(self.config.used()),
            before,
            after,
            msix_table: answers::Table {
                bar: 0,
                offset: self.window.table,
                vectors: self.window.vectors,
                address,
                table,
            },
        })
    }

    fn write_table(&mut self, request: &Request) -> Result<answers::Written, Refusal> {
        self.need_qemu()?;
        let table = request.table.as_deref().and_then(from_hex);
        let (Some(address), Some(table)) = (request.address, table) else {
            return Err(invalid("name the \"address\" and the \"table\", hexadecimal"));
        };
        if table.len() != usize::from(self.window.vectors) * 16 {
            return Err(invalid(format!(
                "the table has {} bytes, and {} vectors of 16 are needed",
                table.len(),
                self.window.vectors
            )));
        }
        // Anywhere else it would be the guest's memory that is overwritten.
        if self.config.bar().map(|bar| bar + self.window.table) != Some(address) {
            return Err(busy(format!(
                "the table is not at {address:#x} here; restore the configuration before"
            )));
        }
        let id = self.dma.ask_to_write(address, &table, true);
        self.wait_reply(id)?;
        Ok(answers::Written { written: table.len() })
    }

    /// Takes no command, and ends those that there are; gives how many.
    fn drain(&mut self) -> Result<usize, Refusal> {
        self.device.hold(true);
        let in_flight = self.device.in_flight();
        let done = |server: &Self| {
            server.device.in_flight() == 0 && server.dma.is_settled() && server.has_heard_all()
        };
        match self.turn_until(done) {
            true => Ok(in_flight),
            false => Err(failed(format!(
                "requests did not end within {} s; look at the image's storage, and whether QEMU \
                 still answers",
                self.patience.as_secs()
            ))),
        }
    }

    /// QEMU does not wait for a doorbell to be heard, so one that the guest rang before it stood still may be in
    /// a connection yet. Heard later it would be older than what the guest has rung since by memory, and
    /// commands of a round before would be taken once more.
    fn has_heard_all(&self) -> bool {
        self.streams.iter().flatten().all(|stream| is_quiet(stream))
    }

    fn hear_all(&mut self) -> Result<(), Refusal> {
        match self.turn_until(Self::has_heard_all) {
            true => Ok(()),
            false => Err(failed(format!(
                "QEMU has sent more than could be heard within {} s; try it again",
                self.patience.as_secs()
            ))),
        }
    }

    fn go_on(&mut self) -> usize {
        self.dma.quiet = false;
        self.device.hold(false);
        let owed = self.device.owed();
        owed.iter().for_each(|vector| self.dma.raise(*vector));
        owed.len()
    }

    fn set_capture(&mut self, request: &Request) -> Result<answers::Captured, Refusal> {
        let on = request.on.ok_or_else(|| invalid("say whether it is on: true or false"))?;
        if on {
            self.need_whole()?;
            self.need_movable()?;
        }
        let wanted = on.then_some(match request.dirty {
            // What hardware writes does not go by way of us.
            Dirty::Mediated if self.device.hardware().is_some() => Dirty::Touch,
            dirty => dirty,
        });
        if wanted != self.captured {
            self.need(Phase::Running)?;
            let (route, source): (_, Option<Box<dyn DirtySource>>) = match wanted {
                Some(Dirty::Mediated) => (Route::Mediated, Some(Box::<Parsed>::default())),
                Some(Dirty::Touch) => (Route::Direct, Some(Box::<Parsed>::default())),
                Some(Dirty::None) | None => (Route::Direct, None),
            };
            let drained = match self.device.hardware() {
                // It goes on: what is in flight is looked at.
                Some(_) => self.hear_all().map(|()| 0),
                None => self.drain(),
            };
            if drained.is_ok() {
                if let Some(hardware) = self.device.hardware_mut() {
                    hardware.capture(on);
                }
                self.dma.track(source);
                self.dma.take_route(route);
                self.capture.set(on);
                self.captured = wanted;
                self.note_registers();
            }
            self.device.hold(false);
            drained?;
        }
        self.flush_early(on);
        let page = self.config.bar().zip(self.window.direct).map(|(bar, start)| bar + start);
        Ok(answers::Captured { on, page })
    }

    /// The first round has all registers as they are, in the order in which they are restored.
    pub(super) fn note_registers(&mut self) {
        for register in self.device.registers() {
            if !matches!(register.kind, Kind::Level | Kind::Event) {
                continue;
            }
            for at in 0..register.count {
                let offset = register.offset + at * register.size;
                let mut bytes = [0; 8];
                let bytes = &mut bytes[..register.size as usize];
                self.read_bar(offset, bytes);
                self.capture.note(offset, bytes);
            }
        }
    }

    /// The image is about to be given away, and another host sees what is on its storage.
    fn flush_early(&self, moves: bool) {
        if let Some(tenure) = self.tenure.as_ref().filter(|_| moves) {
            tenure.flush_early();
        }
    }

    fn round(&mut self) -> Result<answers::Round, Refusal> {
        if !self.capture.is_on() {
            return Err(busy("nothing is captured; switch it on with \"capture\""));
        }
        self.flush_early(true);
        let (noted, overflowed) = self.capture.take();
        let writes = serde_json::to_string(&noted).map_err(|error| failed(error.to_string()))?;
        Ok(answers::Round { writes, count: noted.len(), overflowed })
    }

    fn need_incoming(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Incoming { .. } => Ok(()),
            _ => self.need(Phase::Incoming { imported: false }),
        }
    }

    fn replay(&mut self, request: &Request) -> Result<answers::Replayed, Refusal> {
        self.need_incoming()?;
        let text = request.writes.as_deref().ok_or_else(|| invalid("name the \"writes\""))?;
        let noted = writes(text)?;
        if self.phase == (Phase::Incoming { imported: true }) {
            // A round that the state has overtaken on its way: the state has every register as it was
            // at the end, and an older doorbell would have old commands taken once more.
            return Ok(answers::Replayed { replayed: 0 });
        }
        let mut replayed = 0;
        for write in noted {
            let bytes = write.bytes();
            let end = write.offset.checked_add(write.size.into());
            let fits = end.is_some_and(|end| end <= self.window.size);
            let Some(bytes) = bytes.filter(|_| fits) else {
                return Err(invalid(format!("there is no register at {:#x}", write.offset)));
            };
            self.write_bar(write.offset, &bytes);
            replayed += 1;
        }
        Ok(answers::Replayed { replayed })
    }

    fn quiesce(&mut self) -> Result<answers::Quiesced, Refusal> {
        if self.phase == Phase::Quiesced {
            return Ok(answers::Quiesced { drained: 0 });
        }
        self.need(Phase::Running)?;
        self.need_known()?;
        // From here the completions that arrive are interrupted for at the destination.
        self.dma.quiet = true;
        // What has ended meanwhile may have made it one that cannot be moved.
        match self.drain().and_then(|drained| self.need_movable().map(|()| drained)) {
            Ok(drained) => {
                self.phase = Phase::Quiesced;
                Ok(answers::Quiesced { drained })
            }
            Err(refusal) => {
                self.go_on();
                Err(refusal)
            }
        }
    }

    fn touch(&mut self) -> Result<answers::Touched, Refusal> {
        self.need(Phase::Quiesced)?;
        self.need_qemu()?;
        let dirty = self.dma.take_dirty();
        // Memory that is gone meanwhile needs no touch.
        let pages = dirty.into_iter().filter(|page| self.dma.touch(*page).is_ok()).count();
        match self.turn_until(|server| server.dma.is_settled()) {
            true => Ok(answers::Touched { pages }),
            false => Err(failed("QEMU has not taken all pages; do not go on with the move")),
        }
    }

    fn export(&mut self) -> Result<answers::Exported, Refusal> {
        self.need(Phase::Quiesced)?;
        let state = self.device.save();
        Ok(answers::Exported { bytes: state.len(), state })
    }

    fn import(&mut self, request: &Request) -> Result<answers::Imported, Refusal> {
        self.need_incoming()?;
        let state = request.state.as_deref().ok_or_else(|| invalid("name the \"state\""))?;
        if let Some(tenure) = &self.tenure {
            // Its size may be another by now; the state is held against it.
            tenure.image().refresh_size().map_err(|error| failed(error.to_string()))?;
        }
        let replayed = request.registers == Registers::Replayed;
        let differing = self
            .device
            .restore(state, &self.page, replayed)
            .map_err(|why| invalid(format!("the state was not taken: {why}")))?;
        self.phase = Phase::Incoming { imported: true };
        Ok(answers::Imported { vectors: self.device.owed().len(), differing })
    }

    /// A flush that has failed is known to this process alone.
    fn need_whole(&self) -> Result<(), Refusal> {
        if !self.device.has_lost() {
            return Ok(());
        }
        Err(failed(
            "a flush of the image has failed, and every further one fails here until the VM was stopped and \
             started; at another host they would seem to succeed; check the storage, stop the VM, and \
             check its file systems (fsck)",
        ))
    }

    fn need_movable(&self) -> Result<(), Refusal> {
        let hardware = self.device.hardware();
        let why = hardware.and_then(|hardware| hardware.unmovable());
        why.map_or(Ok(()), |why| Err(failed(format!("the device cannot be moved: {why}"))))
    }

    /// Of hardware, what it does is known while it is captured.
    fn need_known(&self) -> Result<(), Refusal> {
        self.need_movable()?;
        match (self.device.hardware(), self.captured) {
            (Some(_), None) => {
                Err(busy("the device has to be captured; switch it on with \"capture\""))
            }
            _ => Ok(()),
        }
    }

    fn release(&mut self) -> Result<answers::Released, Refusal> {
        self.need_whole()?;
        self.need(Phase::Quiesced)?;
        if let Some(tenure) = &mut self.tenure {
            tenure.give_away().map_err(|error| {
                failed(format!(
                    "the image cannot be flushed, and is kept: {error}; another host would not see what \
                     the guest has written; look at the storage of the image"
                ))
            })?;
        }
        Ok(answers::Released { owns_image: self.tenure.as_ref().is_some_and(Tenure::is_held) })
    }

    fn take_claim(&mut self, request: &Request) -> Result<answers::Claimed, Refusal> {
        let epoch = request.epoch.filter(|epoch| *epoch > 0);
        let id = request.claim.as_deref().and_then(Id::from_hex);
        let Some((epoch, id)) = epoch.zip(id) else {
            return Err(invalid("name the epoch, from 1, and the claim, 32 hexadecimal digits"));
        };
        if let Some(tenure) = &self.tenure {
            tenure.give_claim(Claim { epoch, id }).map_err(invalid)?;
        }
        Ok(answers::Claimed { claim: self.claim_status() })
    }

    fn resume(&mut self) -> Result<answers::Resumed, Refusal> {
        match self.phase {
            Phase::Running => return Ok(answers::Resumed { kicked: 0 }),
            Phase::Quiesced | Phase::Incoming { imported: true } => {}
            Phase::Incoming { imported: false } => {
                return Err(busy("the device has no state yet; send it with \"import\""));
            }
            Phase::Waiting => return Err(busy("QEMU has not connected yet")),
        }
        if let Some(tenure) = &mut self.tenure {
            if tenure.is_awaited() {
                return Err(busy("the claim is still to come; send it with \"claim\""));
            }
            tenure.take().map_err(|failure| {
                let kind = if matches!(failure, Failure::Lock(_)) { "in-use" } else { "failed" };
                Refusal(kind, failure.to_string())
            })?;
        }
        if matches!(self.phase, Phase::Incoming { .. })
            && let Some(hardware) = self.device.hardware_mut()
        {
            hardware.take_over().map_err(|why| {
                failed(format!("the device could not be brought to where the other one was: {why}"))
            })?;
        }
        self.phase = Phase::Running;
        Ok(answers::Resumed { kicked: self.go_on() })
    }
}

fn value(answer: impl Serialize) -> Result<serde_json::Value, Refusal> {
    serde_json::to_value(answer).map_err(|error| failed(error.to_string()))
}
