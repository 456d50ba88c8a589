//! A second device, to show how small one is: registers as those of QEMU's `edu` (docs/specs/edu.rst),
//! which computes factorials and copies memory.
//!
//! ```text
//!   0x00 identification │ 0x04 complement │ 0x08 factorial │ 0x24 interrupt status │ 0x60 raise │ 0x64 ack
//!   0x80 from │ 0x88 to │ 0x90 bytes │ 0x98 1: copy (2: from the buffer to memory, 4: interrupt)
//! ```
//!
//! Its own buffer is at 0x40000, 4 KiB. It has no page that is written directly, no request that takes
//! time, and one vector.

use std::sync::Arc;

use semper_device::ledger::{Cell, Ledger};
use semper_device::page::Page;
use semper_device::registers::{Kind, Register};
use semper_device::{Activity, Bus, Counters, Device, Identity, Window};
use serde::{Deserialize, Serialize};

const IDENTIFICATION: u32 = 0x0100_00ed;
const BUFFER: u64 = 0x40000;
const BUFFER_LEN: usize = 4096;
/// Of the command: begin, from the buffer to memory, interrupt at the end.
const BEGIN: u64 = 1;
const TO_MEMORY: u64 = 2;
const INTERRUPT: u64 = 4;
/// Why it interrupts: a factorial, a copy.
const AT_COPY: u32 = 0x100;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    kind: String,
    complement: u32,
    factorial: u32,
    causes: u32,
    from: u64,
    to: u64,
    len: u64,
    command: u64,
    buffer: Vec<u8>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            kind: "edu".to_owned(),
            complement: 0,
            factorial: 0,
            causes: 0,
            from: 0,
            to: 0,
            len: 0,
            command: 0,
            buffer: vec![0; BUFFER_LEN],
        }
    }
}

/// The device.
#[derive(Debug, Default)]
pub(crate) struct Edu {
    state: State,
    /// Interrupts that the next step makes.
    raised: bool,
    hold: bool,
    counters: Counters,
    ledger: Option<Arc<Ledger>>,
}

impl Edu {
    /// The part of the buffer that a copy names.
    fn part(address: u64, len: u64) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(address.checked_sub(BUFFER)?).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        (end <= BUFFER_LEN).then_some(start..end)
    }

    /// All of its state is small, and changes with its registers alone.
    fn keep(&self) {
        if let Some(ledger) = &self.ledger {
            ledger.put(Cell::Device, &self.save());
        }
    }

    fn copy(&mut self, bus: &mut dyn Bus) {
        let State { from, to, len, command, .. } = self.state;
        let to_memory = command & TO_MEMORY != 0;
        let done = match Self::part(if to_memory { from } else { to }, len) {
            Some(part) if to_memory => bus.write(to, &self.state.buffer[part]).is_ok(),
            Some(part) => bus.read(from, &mut self.state.buffer[part]).is_ok(),
            None => false,
        };
        self.counters.others += 1;
        self.counters.errors += u64::from(!done);
        self.state.command = 0;
        if command & INTERRUPT != 0 {
            self.state.causes |= AT_COPY;
            self.raised = true;
        }
    }
}

impl Device for Edu {
    fn kind(&self) -> &'static str {
        "edu"
    }

    fn identity(&self) -> Identity {
        Identity {
            ids: (0x1b36, 0x5e03),
            subsystem: (0x1af4, 0x5e03),
            class: [0x00, 0x00, 0xff],
            revision: 1,
        }
    }

    fn window(&self) -> Window {
        Window { size: 0x4000, direct: None, table: 0x2000, pending: 0x3000, vectors: 1 }
    }

    fn registers(&self) -> Vec<Register> {
        vec![
            Register::one("complement", 0x04, 4, Kind::Mask),
            Register::one("factorial", 0x08, 4, Kind::Mask),
            Register::one("from", 0x80, 8, Kind::Level),
            Register::one("to", 0x88, 8, Kind::Level),
            Register::one("bytes", 0x90, 8, Kind::Level),
            Register::one("raise", 0x60, 4, Kind::Mask),
            Register::one("ack", 0x64, 4, Kind::Mask),
            Register::one("command", 0x98, 8, Kind::Event),
            Register::one("identification", 0x00, 4, Kind::Status),
            Register::one("causes", 0x24, 4, Kind::Status),
        ]
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) {
        let state = &self.state;
        let value = match offset {
            0x00 => IDENTIFICATION.into(),
            0x04 => state.complement.into(),
            0x08 => state.factorial.into(),
            0x24 => state.causes.into(),
            0x80 => state.from,
            0x88 => state.to,
            0x90 => state.len,
            0x98 => state.command,
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        into.iter_mut()
            .enumerate()
            .for_each(|(at, byte)| *byte = bytes.get(at).copied().unwrap_or(0));
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let long = u64::from_le_bytes(std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0)));
        let word = long as u32;
        let state = &mut self.state;
        match (offset, bytes.len()) {
            (0x04, 4) => state.complement = !word,
            (0x08, 4) => state.factorial = (1..=word.min(34)).fold(1, u32::wrapping_mul),
            (0x60, 4) => {
                state.causes |= word;
                self.raised = true;
            }
            (0x64, 4) => state.causes &= !word,
            (0x80, 4 | 8) => state.from = long,
            (0x88, 4 | 8) => state.to = long,
            (0x90, 4 | 8) => state.len = long,
            (0x98, 4 | 8) => state.command = long & (BEGIN | TO_MEMORY | INTERRUPT),
            _ => {}
        }
        self.keep();
    }

    fn step(&mut self, _page: &Page, bus: &mut dyn Bus) -> Activity {
        let copies = self.state.command & BEGIN != 0 && !self.hold;
        if copies {
            self.copy(bus);
            self.keep();
        }
        if !self.hold && std::mem::take(&mut self.raised) && self.state.causes != 0 {
            bus.interrupt(0);
        }
        if copies { Activity::Busy } else { Activity::Idle }
    }

    fn reset(&mut self) {
        (self.state, self.raised) = (State::default(), false);
        self.keep();
    }

    fn is_resetting(&self) -> bool {
        false
    }

    fn hold(&mut self, hold: bool) {
        self.hold = hold;
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn save(&self) -> String {
        // Strings, numbers and an array: nothing that JSON does not have.
        serde_json::to_string(&self.state).unwrap_or_default()
    }

    fn restore(&mut self, state: &str, _page: &Page, replayed: bool) -> Result<usize, String> {
        let saved: State = serde_json::from_str(state)
            .map_err(|error| format!("it is no state of an edu device: {error}"))?;
        if saved.kind != "edu" || saved.buffer.len() != BUFFER_LEN {
            return Err("it is no state of an edu device".to_owned());
        }
        let values = |state: &State| {
            [state.complement.into(), state.factorial.into(), state.from, state.to, state.len]
        };
        let pairs = values(&self.state).into_iter().zip(values(&saved));
        let differing = pairs.filter(|(ours, theirs)| ours != theirs).count();
        self.state = match replayed {
            // What no register shows.
            true => State { buffer: saved.buffer, causes: saved.causes, ..self.state.clone() },
            false => saved,
        };
        self.raised = self.state.causes != 0;
        self.keep();
        Ok(differing)
    }

    fn ledger_words(&self) -> Option<usize> {
        Some(0)
    }

    fn keep_in(&mut self, ledger: Arc<Ledger>) {
        self.ledger = Some(ledger);
    }

    fn recover(&mut self, page: &Page) -> Result<(), String> {
        let text = self.ledger.as_ref().and_then(|ledger| ledger.get(Cell::Device));
        text.map_or(Ok(()), |text| self.restore(&text, page, false).map(drop))
    }

    fn owed(&self) -> Vec<u16> {
        if self.state.causes != 0 { vec![0] } else { Vec::new() }
    }

    fn asserts_line(&self) -> bool {
        self.state.causes != 0
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}
