//! Sixteen writers on a disk of their own, and what it has to be after a death or a power cut.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use crate::backend::Backend;
use crate::machine::{Ask, Machine, T_WRITE_ZEROES, Ticket, Waited};

pub const QUEUES: usize = 4;
const WRITERS: u64 = 16;
/// Of each writer, side by side; the disk has no more.
const BLOCKS: u64 = 6;
pub const SECTORS: u64 = WRITERS * BLOCKS * 8;
pub const SECTOR: usize = 512;
/// Steps through 2^64 numbers (splitmix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// What a writer has in flight: from which sector, how many, and the number of the write.
type Open = (u64, u64, u64);

/// Sixteen writers, each with one request in flight, on blocks of its own. A sector has the number of
/// its write, 0 for zeros, in all of its words.
pub struct Writers {
    pub dice: Dice,
    pub number: u64,
    /// What was completed last, and what may have been written since.
    pub done: Vec<u64>,
    asked: Vec<u64>,
    /// The last request of each sector, zeros too.
    pub last: Vec<u64>,
    pub open: HashMap<Ticket, (u64, Open)>,
    /// What a power cut may leave of each sector, by request: from the one that was flushed last on.
    left: Vec<VecDeque<(u64, u64)>>,
    /// The request of each sector that was completed last; and what each flush in flight has to keep.
    ended: Vec<u64>,
    flushing: HashMap<Ticket, Vec<u64>>,
    pub writes: u64,
}

impl Writers {
    pub fn new(seed: u64) -> Self {
        let zeros = vec![0; SECTORS as usize];
        let dice = Dice(seed);
        let (done, asked, last) = (zeros.clone(), zeros.clone(), zeros);
        let left = vec![VecDeque::from([(0, 0)]); SECTORS as usize];
        let (open, flushing, ended) = (HashMap::new(), HashMap::new(), last.clone());
        Self { dice, number: 0, done, asked, last, open, left, ended, flushing, writes: 0 }
    }

    /// Every writer that waits for nothing writes, or flushes.
    pub fn fill(&mut self, machine: &mut Machine) {
        for writer in 0..WRITERS {
            if self.open.values().any(|(busy, _)| *busy == writer) {
                continue;
            }
            let queue = (writer % QUEUES as u64) as usize;
            let span = BLOCKS * 8;
            let (mut first, mut count) = (self.dice.below(span), 1 + self.dice.below(20));
            if self.dice.below(2) == 0 {
                (first, count) = (first / 8 * 8, count.next_multiple_of(8));
            }
            let first = writer * span + first;
            let count = count.min((writer + 1) * span - first);
            self.number += 1;
            let (ask, open) = match self.dice.below(16) {
                0 => (Ask::flush(), (0, 0, 0)),
                1 => {
                    let unmap = self.dice.below(2) as u32;
                    (Ask::trim(T_WRITE_ZEROES, first, count as u32, unmap), (first, count, 0))
                }
                _ => {
                    let bytes = self.number.to_le_bytes().repeat(count as usize * SECTOR / 8);
                    (Ask::write(first, bytes), (first, count, self.number))
                }
            };
            for sector in open.0..open.0 + open.1 {
                self.asked[sector as usize] = open.2;
                self.last[sector as usize] = self.number;
                self.left[sector as usize].push_back((self.number, open.2));
            }
            let ticket = machine.submit(queue, &ask);
            if open.1 == 0 {
                self.flushing.insert(ticket, self.ended.clone());
            }
            self.open.insert(ticket, (writer, open));
        }
    }

    pub fn judge(&mut self, machine: &mut Machine) {
        machine.reap();
        let answered: Vec<_> =
            self.open.keys().copied().filter(|ticket| machine.is_answered(*ticket)).collect();
        for ticket in answered {
            assert_eq!(machine.answer(ticket).status, 0, "a request failed");
            let Some((_, (first, count, number))) = self.open.remove(&ticket) else { continue };
            for sector in first as usize..(first + count) as usize {
                self.done[sector] = number;
                self.ended[sector] = self.last[sector];
            }
            for (left, kept) in
                self.left.iter_mut().zip(self.flushing.remove(&ticket).iter().flatten())
            {
                while left.front().is_some_and(|(request, _)| request < kept) {
                    left.pop_front();
                }
            }
            self.writes += 1;
        }
    }

    /// Writes until the end.
    pub fn pump(&mut self, machine: &mut Machine, end: Instant) {
        while Instant::now() < end {
            self.fill(machine);
            self.judge(machine);
        }
    }

    /// As [`Writers::pump`], for a host that may have lost its disk: how many requests failed.
    pub fn pump_failing(&mut self, machine: &mut Machine, end: Instant) -> usize {
        let mut failed = 0;
        while Instant::now() < end {
            self.fill(machine);
            machine.reap();
            self.open.retain(|ticket, _| {
                let waits = !machine.is_answered(*ticket);
                failed += usize::from(!waits && machine.answer(*ticket).status != 0);
                waits
            });
        }
        failed
    }

    /// Every request is answered, by whichever process.
    pub fn finish(&mut self, machine: &mut Machine, backend: &Backend) {
        assert_eq!(machine.wait_all(backend), Waited::Answered);
        self.judge(machine);
        assert!(self.open.is_empty() && self.done == self.asked, "a request was not answered");
    }
}

/// The first sector that no power cut may leave so, after what the writers were told.
pub fn lost(got: &[u8], writers: &Writers) -> Option<String> {
    got.chunks_exact(SECTOR).zip(&writers.left).enumerate().find_map(|(n, (sector, left))| {
        let number = number_of(sector);
        let fits = left.iter().any(|(_, value)| Some(*value) == number);
        (!fits).then(|| format!("sector {n} is {number:?}, not one of {left:?}"))
    })
}

/// A sector's number; none if the sector is torn.
pub fn number_of(sector: &[u8]) -> Option<u64> {
    let mut words = sector.chunks_exact(8);
    let first = words.next()?;
    words.all(|word| word == first).then(|| u64::from_le_bytes(first.try_into().unwrap()))
}
