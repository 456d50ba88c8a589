//! What goes to the other end of a move: JSON with a version. Nothing in it is believed before it is found
//! to be possible ([`State::check`]).

use semper_nvme::command::Command;
use serde::{Deserialize, Serialize};

use super::rings::commands_to;
use crate::nvme::spec::{QUEUES, SQE};

/// Of this format.
const FORMAT: u32 = 1;
/// Features, and event requests, that a state may have.
const MOST: usize = 64;

/// Registers as the guest has written them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Configuration.
    pub cc: u32,
    /// Sizes of the admin queues.
    pub aqa: u32,
    /// Admin submission queue.
    pub asq: u64,
    /// Admin completion queue.
    pub acq: u64,
}

/// A namespace, by which a device is known to be the one that was meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Its number.
    pub id: u32,
    /// Blocks.
    pub blocks: u64,
    /// Bytes of a block, as a power of two.
    pub block_shift: u8,
    /// NGUID and EUI64, hexadecimal.
    pub name: String,
}

/// How much a read brings; `None` where its namespace is not among these.
pub(super) fn bytes(namespaces: &[Namespace], command: &Command) -> Option<u64> {
    let found = namespaces.iter().find(|namespace| namespace.id == command.namespace());
    found.map(|namespace| command.blocks() << namespace.block_shift)
}

/// A queue and where its device stands in it: entries fetched modulo its size, or completions modulo twice
/// its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// In the guest's memory.
    pub address: u64,
    /// Entries.
    pub size: u32,
    /// See above.
    pub at: u32,
}

impl Ring {
    fn fits(&self, entry: u64, modulo: u32) -> bool {
        let end = self.address.checked_add(u64::from(self.size) * entry);
        self.address % 4096 == 0
            && end.is_some_and(|end| end < 1 << 52)
            && (2..=65536).contains(&self.size)
            && self.at < modulo
    }
}

/// A submission queue and its completion queue, of the same number or another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// Of the submission queue.
    pub id: u16,
    /// Of the completion queue.
    pub completes_in: u16,
    /// Entries of 64 bytes.
    pub submissions: Ring,
    /// Of 16 bytes.
    pub completions: Ring,
    /// Dwords 11 of the commands that made them, without numbers of queues.
    pub flags: (u32, u32),
}

/// A controller's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub(super) kind: String,
    pub(super) format: u32,
    /// Vendor and device.
    pub ids: (u16, u16),
    /// CAP.
    pub capabilities: u64,
    /// See there.
    pub namespaces: Vec<Namespace>,
    /// See there.
    pub registers: Registers,
    /// None of a controller that is off.
    pub admin: Option<Pair>,
    /// Event requests that wait: their numbers, in order.
    pub events: Vec<u16>,
    /// Dwords 10 to 15 of commands that set features, in order.
    pub features: Vec<[u32; 6]>,
    /// See there.
    pub pairs: Vec<Pair>,
}

impl State {
    /// Of a controller that is off.
    pub fn new(ids: (u16, u16), capabilities: u64, namespaces: Vec<Namespace>) -> Self {
        Self {
            kind: super::KIND.to_owned(),
            format: FORMAT,
            ids,
            capabilities,
            namespaces,
            registers: Registers::default(),
            admin: None,
            events: Vec::new(),
            features: Vec::new(),
            pairs: Vec::new(),
        }
    }

    /// Commands that bring a new pair of queues to where this one was.
    pub(super) fn commands(pair: &Pair, waiting: u32, least: u32) -> Option<u32> {
        let (to, from) = (pair.completions, pair.submissions);
        let fetched = (from.at + from.size - waiting % from.size) % from.size;
        commands_to((to.at, to.size), (fetched, from.size), least)
    }

    /// Reads a text, for a device that has these.
    ///
    /// # Errors
    /// A sentence.
    pub fn read(
        text: &str,
        ids: (u16, u16),
        capabilities: u64,
        namespaces: &[Namespace],
    ) -> Result<Self, String> {
        let state: Self = serde_json::from_str(text)
            .map_err(|error| format!("it is no state of an NVMe controller: {error}"))?;
        if state.kind != super::KIND || state.format != FORMAT {
            return Err(format!("it is a state of {:.40}, format {}", state.kind, state.format));
        }
        if state.ids != ids || state.capabilities != capabilities {
            return Err(
                "it is of another kind of controller; both have to be the same model".into()
            );
        }
        if state.namespaces != namespaces {
            return Err(
                "its namespaces are others; both controllers have to lead to the same ones, as \
                        the ports of one subsystem do"
                    .into(),
            );
        }
        state.check().then_some(state).ok_or_else(|| "no controller has such a state".to_owned())
    }

    fn check(&self) -> bool {
        let deepest = (self.capabilities & 0xffff) as u32 + 1;
        let pair_fits = |pair: &Pair, admin: bool, waiting: usize| {
            let (from, to) = (&pair.submissions, &pair.completions);
            let most = if admin { 4096 } else { deepest };
            from.fits(SQE, from.size)
                && to.fits(16, 2 * to.size)
                && from.size <= most
                && to.size <= most
                && waiting < from.size as usize
                && Self::commands(pair, waiting as u32, 0).is_some()
        };
        let mut numbers: Vec<_> = self.pairs.iter().map(|pair| pair.id).collect();
        let mut targets: Vec<_> = self.pairs.iter().map(|pair| pair.completes_in).collect();
        for list in [&mut numbers, &mut targets] {
            list.sort_unstable();
            list.dedup();
        }
        let distinct = numbers.len() == self.pairs.len() && targets.len() == self.pairs.len();
        let known = |id: &u16| (1..QUEUES).contains(id);
        distinct
            && numbers.iter().all(known)
            && targets.iter().all(known)
            && self.events.len() <= MOST
            && self.features.len() <= MOST
            && self.pairs.iter().all(|pair| pair_fits(pair, false, 0))
            && self.admin.is_some() == (self.registers.cc & 1 != 0)
            && self.admin.as_ref().is_none_or(|pair| pair_fits(pair, true, self.events.len()))
            && (self.admin.is_some() || self.pairs.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(id: u16, at: u32) -> Pair {
        let ring = |address, at| Ring { address, size: 32, at };
        Pair {
            id,
            completes_in: id,
            submissions: ring(0x10_0000, at % 32),
            completions: ring(0x20_0000, at),
            flags: (1, 3),
        }
    }

    fn state() -> State {
        let mut state = State::new((1, 2), 0x7ff, Vec::new());
        state.registers.cc = 1;
        state.admin = Some(pair(0, 40));
        state.pairs = vec![pair(1, 63), pair(2, 0)];
        state
    }

    fn read(state: &State) -> Result<State, String> {
        State::read(&serde_json::to_string(state).unwrap(), (1, 2), 0x7ff, &[])
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        assert_eq!(read(&state()).unwrap(), state());
        let mut waiting = state();
        waiting.events = vec![30, 31];
        waiting.admin.as_mut().unwrap().submissions.at = 10;
        assert_eq!(read(&waiting).unwrap(), waiting);
        assert_eq!(State::commands(&waiting.admin.unwrap(), 2, 41), Some(104));
    }

    #[test]
    fn of_a_namespace_that_was_not_looked_at_nobody_knows_what_is_read() {
        let namespace = Namespace { id: 3, blocks: 8, block_shift: 12, name: String::new() };
        let read = |id: u8| {
            let mut entry = [0; SQE as usize];
            (entry[0], entry[4], entry[48]) = (2, id, 1);
            bytes(std::slice::from_ref(&namespace), &Command::from(entry))
        };
        assert_eq!((read(3), read(4)), (Some(2 << 12), None));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let broken: [&dyn Fn(&mut State); 9] = [
            &|state| state.kind = "edu".to_owned(),
            &|state| state.ids = (1, 3),
            &|state| {
                state.namespaces =
                    vec![Namespace { id: 1, blocks: 1, block_shift: 9, name: String::new() }]
            },
            &|state| state.pairs[0].id = 2,
            &|state| state.pairs[0].id = QUEUES,
            &|state| state.pairs[0].completions.size = 0,
            &|state| state.pairs[0].submissions.address = u64::MAX - 4095,
            &|state| state.pairs[0].submissions.at = 5,
            &|state| state.registers.cc = 0,
        ];
        for (number, breaks) in broken.iter().enumerate() {
            let mut state = state();
            breaks(&mut state);
            assert!(read(&state).is_err(), "{number}");
        }
        assert!(State::read("{}", (1, 2), 0x7ff, &[]).is_err());
    }
}
