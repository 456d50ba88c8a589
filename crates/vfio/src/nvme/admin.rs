//! What a driver has set up by commands: queues, features, event requests. No register shows them.
//!
//! The device interrupts us for its admin queue and not the guest, so each command is looked at before the
//! guest hears of its end, and so before its place in the queue can be taken by another.
//!
//! ```text
//!   commands    … ended │ fetched, not ended │ in memory, perhaps not rung │ of a round before
//!                                  completions say ─┘              └─ `guess`, or the doorbell, if it was seen
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use semper_device::{Bus, Unreachable};
use semper_nvme::command::Command;

use super::spec::{CQE, DOORBELL_BUFFER, SQE, admin, feature};
use super::state::{Pair, Registers, Ring};

type Entry = [u8; SQE as usize];

/// Commands that may wait for their ends: more than the largest queue has, and few enough to be kept.
const BEGUN_MOST: usize = 4096;
const FLOOD: &str = "its driver tells of the ends of commands that there cannot be";

/// A queue that was created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Created {
    pub address: u64,
    pub size: u32,
    /// Dword 11 of its command: flags, and the vector or the completion queue.
    pub word: u32,
}

/// The admin queues of a controller that is on.
#[derive(Debug)]
pub(super) struct Admin {
    submissions_at: u64,
    completions_at: u64,
    sizes: (u32, u32),
    /// The next command to be looked at.
    next: u32,
    /// The next completion, and its phase.
    head: u32,
    phase: bool,
    /// Each place as it was when it was last looked at.
    seen: Vec<Entry>,
    /// What has not ended, in order.
    begun: Vec<Command>,
    pub submissions: BTreeMap<u16, Created>,
    pub completions: BTreeMap<u16, Created>,
    features: Vec<[u32; 6]>,
    /// Why the state is not known.
    pub unknown: Option<&'static str>,
    /// Commands that were looked at.
    pub count: u64,
}

fn sizes(registers: &Registers) -> (u32, u32) {
    ((registers.aqa & 0xfff) + 1, (registers.aqa >> 16 & 0xfff) + 1)
}

impl Admin {
    /// Of a controller that is about to be switched on.
    pub(super) fn new(registers: &Registers, bus: &dyn Bus) -> Result<Self, Unreachable> {
        let sizes = sizes(registers);
        let mut admin = Self {
            submissions_at: registers.asq & !0xfff,
            completions_at: registers.acq & !0xfff,
            sizes,
            next: 0,
            head: 0,
            phase: true,
            seen: Vec::new(),
            begun: Vec::new(),
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            features: Vec::new(),
            unknown: None,
            count: 0,
        };
        for place in 0..sizes.0 {
            let entry = admin.entry(place, bus)?;
            admin.seen.push(entry);
        }
        Ok(admin)
    }

    fn entry(&self, place: u32, bus: &dyn Bus) -> Result<Entry, Unreachable> {
        let mut entry = [0; SQE as usize];
        bus.read(self.submissions_at + u64::from(place) * SQE, &mut entry)?;
        Ok(entry)
    }

    /// Takes the next command; what it does is known at its end.
    fn take(&mut self, bus: &dyn Bus, taken: &mut Vec<Command>) -> Result<(), Unreachable> {
        let entry = self.entry(self.next, bus)?;
        self.seen[self.next as usize] = entry;
        self.next = (self.next + 1) % self.sizes.0;
        self.count += 1;
        if self.begun.len() == BEGUN_MOST {
            self.unknown = Some(FLOOD);
            self.begun.clear();
        }
        let command = Command::from(entry);
        self.begun.push(command);
        taken.push(command);
        Ok(())
    }

    /// The doorbell was seen. Gives commands that begin.
    pub(super) fn rung(&mut self, tail: u32, bus: &dyn Bus) -> Result<Vec<Command>, Unreachable> {
        let mut taken = Vec::new();
        while tail < self.sizes.0 && self.next != tail {
            self.take(bus, &mut taken)?;
        }
        Ok(taken)
    }

    /// Takes what has come into memory behind the last command: of a doorbell that nobody saw.
    pub(super) fn guess(&mut self, bus: &dyn Bus) -> Result<Vec<Command>, Unreachable> {
        let mut taken = Vec::new();
        while taken.len() + 1 < self.sizes.0 as usize
            && self.entry(self.next, bus)? != self.seen[self.next as usize]
        {
            self.take(bus, &mut taken)?;
        }
        Ok(taken)
    }

    /// Looks at what has ended since the last look. Gives commands that were not known before.
    pub(super) fn look(&mut self, bus: &dyn Bus) -> Result<Vec<Command>, Unreachable> {
        let mut taken = Vec::new();
        for _ in 0..self.sizes.1 {
            if self.unknown == Some(FLOOD) {
                break;
            }
            let at = self.completions_at + u64::from(self.head) * CQE;
            let mut status = [0; 2];
            bus.read(at + 14, &mut status)?;
            if (status[0] & 1 != 0) != self.phase {
                break;
            }
            fence(Ordering::Acquire);
            let mut entry = [0; CQE as usize];
            bus.read(at, &mut entry)?;
            let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
            let (fetched, id, status) = (u32::from(half(8)), half(12), half(14) >> 1);
            // Those before it may have come by a doorbell that was seen.
            let ahead = (fetched + self.sizes.0 - self.next) % self.sizes.0;
            let known = self.begun.iter().any(|command| command.id() == id);
            if !known && fetched < self.sizes.0 {
                for _ in 0..ahead {
                    self.take(bus, &mut taken)?;
                }
            }
            self.head = (self.head + 1) % self.sizes.1;
            self.phase ^= self.head == 0;
            match self.begun.iter().position(|command| command.id() == id) {
                Some(index) => {
                    let command = self.begun.remove(index);
                    if status & 0x7ff == 0 {
                        self.ended(&command);
                    }
                }
                None if self.unknown == Some(FLOOD) => {}
                None => self.unknown = Some("a command of its driver was not seen"),
            }
        }
        Ok(taken)
    }

    fn ended(&mut self, command: &Command) {
        let (word, more) = (command.dword(10), command.dword(11));
        let (id, size) = (word as u16, (word >> 16) + 1);
        let created = Created { address: command.prp1(), size, word: more };
        match command.opcode() {
            admin::CREATE_CQ => drop(self.completions.insert(id, created)),
            admin::CREATE_SQ => drop(self.submissions.insert(id, created)),
            admin::DELETE_CQ => drop(self.completions.remove(&id)),
            admin::DELETE_SQ => drop(self.submissions.remove(&id)),
            admin::SET_FEATURES => self.set(command),
            DOORBELL_BUFFER => self.unknown = Some("its driver rings doorbells in memory"),
            // Format, namespaces: blocks are others than they were.
            0x0d | 0x15 | 0x80 => self.unknown = Some("its namespaces were changed"),
            _ => {}
        }
    }

    fn set(&mut self, command: &Command) {
        let words: [u32; 6] = std::array::from_fn(|index| command.dword(10 + index));
        let number = words[0] as u8;
        match number {
            feature::HOST_MEMORY if words[1] & 1 != 0 => {
                self.unknown = Some("its driver lends it memory (HMB)");
            }
            // With data that is not there any more; none of it changes what is read and written.
            feature::RANGES
            | feature::POWER
            | feature::HOST_MEMORY
            | feature::TIME
            | feature::HOST => {}
            _ => {
                let part = |words: &[u32; 6]| match number {
                    feature::VECTOR => words[1] & 0xffff,
                    feature::TEMPERATURE => words[1] >> 16,
                    _ => 0,
                };
                let same = |old: &[u32; 6]| old[0] as u8 == number && part(old) == part(&words);
                self.features.retain(|old| !same(old));
                self.features.push(words);
            }
        }
    }

    /// Event requests that wait, in order; `None` while anything else has not ended.
    pub(super) fn events(&self) -> Option<Vec<u16>> {
        let waits = |command: &Command| command.opcode() == admin::EVENT;
        let events = self.begun.iter().map(Command::id).collect();
        self.begun.iter().all(waits).then_some(events)
    }

    /// What was set.
    pub(super) fn features(&self) -> Vec<[u32; 6]> {
        self.features.clone()
    }

    /// Where the device stands in the admin queues.
    pub(super) fn pair(&self) -> Pair {
        let at = self.head + if self.phase { 0 } else { self.sizes.1 };
        let ring = |address, size, at| Ring { address, size, at };
        Pair {
            id: 0,
            completes_in: 0,
            submissions: ring(self.submissions_at, self.sizes.0, self.next),
            completions: ring(self.completions_at, self.sizes.1, at),
            flags: (0, 0),
        }
    }

    /// The vectors of completion queues.
    pub(super) fn vectors(&self) -> Vec<u16> {
        let with = |queue: &&Created| queue.word & 2 != 0;
        let mut vectors = vec![0];
        vectors
            .extend(self.completions.values().filter(with).map(|queue| (queue.word >> 16) as u16));
        vectors.sort_unstable();
        vectors.dedup();
        vectors
    }

    /// At another device that was brought to where this state is.
    pub(super) fn restored(
        state: &super::state::State,
        bus: impl Fn(u64, &mut [u8]) -> bool,
    ) -> Option<Self> {
        let pair = state.admin?;
        let (from, to) = (pair.submissions, pair.completions);
        let mut seen = Vec::new();
        for place in 0..u64::from(from.size) {
            let mut entry = [0; SQE as usize];
            if !bus(from.address + place * SQE, &mut entry) {
                return None;
            }
            seen.push(entry);
        }
        let event = |id: &u16| {
            let mut entry = [0; SQE as usize];
            entry[0] = admin::EVENT;
            entry[2..4].copy_from_slice(&id.to_le_bytes());
            Command::from(entry)
        };
        let created = |ring: Ring, flags: u32, word: u32| Created {
            address: ring.address,
            size: ring.size,
            word: word << 16 | flags,
        };
        let submissions = state.pairs.iter().map(|pair| {
            (pair.id, created(pair.submissions, pair.flags.0, pair.completes_in.into()))
        });
        let completions = state.pairs.iter().map(|pair| {
            let vector = pair.flags.1 >> 16;
            (pair.completes_in, created(pair.completions, pair.flags.1 & 0xffff, vector))
        });
        Some(Self {
            submissions_at: from.address,
            completions_at: to.address,
            sizes: (from.size, to.size),
            next: from.at,
            head: to.at % to.size,
            phase: to.at < to.size,
            seen,
            begun: state.events.iter().map(event).collect(),
            submissions: submissions.collect(),
            completions: completions.collect(),
            features: state.features.clone(),
            unknown: None,
            count: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use semper_device::Route;
    use semper_ring::GuestMemory;

    use super::*;

    const REGISTERS: Registers = Registers { cc: 0, aqa: 3 << 16 | 3, asq: 0x1000, acq: 0x2000 };

    /// The guest's memory, and its driver and its device in one.
    struct Guest {
        memory: Arc<GuestMemory>,
        tail: u32,
        completed: u32,
    }

    impl Bus for Guest {
        fn memory(&self) -> &Arc<GuestMemory> {
            &self.memory
        }

        fn route(&self) -> Route {
            Route::Direct
        }

        fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Unreachable> {
            let len = into.len() as u64;
            let from = self.memory.translate(address, len).ok_or(Unreachable { address, len })?;
            // SAFETY: `translate` checked the range.
            unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
            Ok(())
        }

        fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Unreachable> {
            let to = self.memory.translate(address, bytes.len() as u64).expect("memory");
            // SAFETY: `translate` checked the range.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
            Ok(())
        }

        fn wrote(&mut self, _: u64, _: u64) {}

        fn interrupt(&mut self, _: u16) {}

        fn is_congested(&self) -> bool {
            false
        }
    }

    impl Guest {
        fn new() -> Self {
            let memory = Arc::new(GuestMemory::anonymous(0, 0x4000).unwrap());
            Self { memory, tail: 0, completed: 0 }
        }

        fn submit(&mut self, opcode: u8, id: u16, words: &[u32]) {
            let mut entry = [0; 64];
            entry[0] = opcode;
            entry[2..4].copy_from_slice(&id.to_le_bytes());
            for (at, word) in words.iter().enumerate() {
                entry[40 + 4 * at..44 + 4 * at].copy_from_slice(&word.to_le_bytes());
            }
            self.write(0x1000 + u64::from(self.tail) * 64, &entry).unwrap();
            self.tail = (self.tail + 1) % 4;
        }

        fn complete(&mut self, id: u16, status: u16) {
            let mut entry = [0; 16];
            entry[8..10].copy_from_slice(&(self.tail as u16).to_le_bytes());
            entry[12..14].copy_from_slice(&id.to_le_bytes());
            let phase = u16::from(self.completed / 4 % 2 == 0);
            entry[14..].copy_from_slice(&(status << 1 | phase).to_le_bytes());
            self.write(0x2000 + u64::from(self.completed % 4) * 16, &entry).unwrap();
            self.completed += 1;
        }

        fn run(&mut self, opcode: u8, id: u16, words: &[u32], status: u16) {
            self.submit(opcode, id, words);
            self.complete(id, status);
        }
    }

    #[test]
    fn what_commands_have_set_up_is_known_over_many_rounds_of_the_queues() {
        let mut guest = Guest::new();
        let mut admin = Admin::new(&REGISTERS, &guest).unwrap();
        for round in 0..7 {
            guest.run(admin::CREATE_CQ, 1, &[15 << 16 | 3, 2 << 16 | 3], 0);
            guest.run(admin::CREATE_SQ, 2, &[15 << 16 | 3, 3 << 16 | 1], 0);
            assert_eq!(admin.look(&guest).unwrap().len(), 2);
            // One that the device refuses has set nothing.
            guest.run(admin::SET_FEATURES, 3, &[7, 9], 2);
            guest.run(admin::SET_FEATURES, 4, &[0xb, round], 0);
            admin.look(&guest).unwrap();
            assert_eq!(admin.features(), [[0xb, round, 0, 0, 0, 0]]);
            assert_eq!(admin.submissions[&3].size, 16);
            assert_eq!((admin.vectors(), admin.pair().submissions.at), (vec![0, 2], guest.tail));
            guest.run(admin::DELETE_SQ, 5, &[3], 0);
            guest.run(admin::DELETE_CQ, 6, &[3], 0);
            admin.look(&guest).unwrap();
            assert!(admin.submissions.is_empty() && admin.completions.is_empty());
            let pair = admin.pair();
            assert_eq!(pair.completions.at, guest.completed % 8);
            assert!(super::super::state::State::commands(&pair, 0, 0).is_some());
        }
        assert_eq!((admin.unknown, admin.count), (None, 42));
    }

    #[test]
    fn a_request_that_waits_is_found_behind_the_last_completion_and_kept() {
        let mut guest = Guest::new();
        guest.submit(admin::IDENTIFY, 9, &[1]);
        guest.tail = 0;
        let mut admin = Admin::new(&REGISTERS, &guest).unwrap();
        // What lay there when the controller was switched on is no command.
        assert!(admin.guess(&guest).unwrap().is_empty());
        guest.run(admin::IDENTIFY, 1, &[1], 0);
        admin.look(&guest).unwrap();
        guest.submit(admin::EVENT, 30, &[]);
        assert_eq!(admin.events(), Some(Vec::new()));
        assert_eq!(admin.guess(&guest).unwrap().len(), 1);
        assert_eq!(admin.events(), Some(vec![30]));
        assert!(admin.guess(&guest).unwrap().is_empty());
        guest.submit(admin::IDENTIFY, 2, &[1]);
        assert_eq!(admin.rung(guest.tail, &guest).unwrap().len(), 1);
        assert_eq!(admin.events(), None, "a command that has not ended is no request");
        guest.complete(2, 0);
        assert!(admin.look(&guest).unwrap().is_empty(), "it was known");
        assert_eq!(admin.events(), Some(vec![30]));
        assert_eq!(admin.unknown, None);
    }

    #[test]
    fn a_driver_that_writes_completions_itself_has_no_more_kept_than_a_queue_holds() {
        let mut guest = Guest::new();
        let mut admin = Admin::new(&REGISTERS, &guest).unwrap();
        for _ in 0..3000 {
            // Each says that three more commands were fetched, and is the end of none of them.
            guest.tail = (guest.tail + 3) % 4;
            guest.complete(60_000, 0);
            assert!(admin.look(&guest).unwrap().len() <= 3);
            assert!(admin.begun.len() <= BEGUN_MOST);
        }
        assert_eq!((admin.unknown, admin.begun.len() < 4), (Some(FLOOD), true));
    }

    #[test]
    fn what_cannot_be_known_is_told() {
        let mut guest = Guest::new();
        let mut admin = Admin::new(&REGISTERS, &guest).unwrap();
        // The end of a command that never was in the queue.
        guest.complete(77, 0);
        admin.look(&guest).unwrap();
        assert!(admin.unknown.unwrap().contains("not seen"));
        for (opcode, words, why) in
            [(DOORBELL_BUFFER, [0, 0], "in memory"), (admin::SET_FEATURES, [0xd, 1], "lends")]
        {
            let mut guest = Guest::new();
            let mut admin = Admin::new(&REGISTERS, &guest).unwrap();
            guest.run(opcode, 1, &words, 0);
            admin.look(&guest).unwrap();
            assert!(admin.unknown.unwrap().contains(why));
        }
    }
}
