//! SIGKILL at any instant under load, with a spare that takes over: what a guest sees, without
//! the guest. (That a loss would be noticed is shown in `recovery`, where one is certain.)

use std::collections::HashMap;

use serde_json::json;

use crate::backend::{Backend, ENGINES, Site, wait_until};
use crate::machine::{Ask, Machine, Ticket, Waited};

const QUEUES: usize = 2;
const DEPTH: usize = 24;
const BLOCKS: u64 = 64;
const BLOCK: usize = 4096;

/// A small generator of numbers; the same ones in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Stamped blocks: which number was written to each last, and which is known to be there.
struct Load {
    dice: Dice,
    submitted: Vec<u64>,
    completed: Vec<u64>,
    open: HashMap<Ticket, (u64, Option<u64>)>,
    answers: u64,
    /// Reads that found a part of one write and a part of another.
    mixed: u64,
}

impl Load {
    fn new() -> Self {
        let none = vec![0; BLOCKS as usize];
        let dice = Dice(0x9e37_79b9_7f4a_7c15);
        let (submitted, open) = (none.clone(), HashMap::new());
        Self { dice, submitted, completed: none, open, answers: 0, mixed: 0 }
    }

    /// Fills all queues up to the depth. A block belongs to one queue, as it belongs to one
    /// processor of a guest.
    fn fill(&mut self, machine: &mut Machine) {
        for queue in 0..QUEUES {
            while machine.pending_on(queue) < DEPTH {
                let block = self.dice.below(BLOCKS / 2) * 2 + queue as u64;
                let slot = &mut self.submitted[block as usize];
                let sector = block * (BLOCK as u64 / 512);
                if self.dice.below(3) == 0 {
                    let ticket = machine.submit(queue, &Ask::read(sector, BLOCK));
                    // Not older than what was completed when the read was submitted.
                    let least = self.completed[block as usize];
                    self.open.insert(ticket, (block, Some(least)));
                } else {
                    *slot += 1;
                    let stamp = stamp(block, *slot);
                    let ticket = machine.submit(queue, &Ask::write(sector, stamp));
                    self.open.insert(ticket, (block, None));
                }
            }
        }
    }

    /// Judges what was answered.
    fn judge(&mut self, machine: &mut Machine) {
        let answered: Vec<_> =
            self.open.keys().copied().filter(|ticket| machine.is_answered(*ticket)).collect();
        for ticket in answered {
            self.answers += 1;
            let answer = machine.answer(ticket);
            assert_eq!(answer.status, 0);
            let Some((block, least)) = self.open.remove(&ticket) else { continue };
            match least {
                // Writes of one block are kept in order, so what is completed is a lower bound.
                None => {
                    let open = self.open.values().filter(|(b, l)| *b == block && l.is_none());
                    let floor = self.submitted[block as usize] - open.count() as u64;
                    let completed = &mut self.completed[block as usize];
                    *completed = floor.max(*completed);
                }
                // Nothing older than what was completed when it was submitted. One that was under way together
                // with a write of its block, and is done again before that write, finds there what the
                // dead process had written of it: a part of each.
                Some(least) => {
                    let known: Vec<_> =
                        (least..=self.submitted[block as usize]).map(|n| stamp(block, n)).collect();
                    let is_known =
                        |(at, byte): (usize, &u8)| known.iter().any(|it| it[at] == *byte);
                    let data = &answer.data;
                    if !known.contains(data) {
                        assert!(
                            data.len() == BLOCK && data.iter().enumerate().all(is_known),
                            "{block}"
                        );
                        self.mixed += 1;
                    }
                }
            }
        }
    }
}

/// What a block has after that write of it; 0 is before the first.
fn stamp(block: u64, number: u64) -> Vec<u8> {
    if number == 0 {
        return vec![0; BLOCK];
    }
    let mut bytes = number.to_le_bytes().to_vec();
    let mut dice = Dice(block << 32 | number);
    while bytes.len() < BLOCK {
        bytes.extend(dice.below(u64::MAX).to_le_bytes());
    }
    bytes
}

fn ready_spare(site: &Site, options: &[&str]) -> Backend {
    let options: Vec<&str> = options.iter().copied().chain(["--spare"]).collect();
    let spare = site.start(&options);
    wait_until("a spare that is ready", || {
        spare.status()["timeline_ns"]["spare_ready"].is_u64().then_some(())
    });
    spare
}

fn survives(kills: u32, options: &[&str]) {
    survives_on(Site::new(BLOCKS * BLOCK as u64), kills, options, |_, _| ());
}

/// `meanwhile` happens under load, before each kill.
fn survives_on(site: Site, kills: u32, options: &[&str], meanwhile: impl Fn(u32, &Backend)) {
    let mut active = site.start(options);
    active.wait_status("/state", &json!("listening"));
    let mut machine = Machine::new(QUEUES, 64);
    machine.connect(&site.socket()).unwrap();
    let mut load = Load::new();
    for kill in 0..kills {
        let spare = ready_spare(&site, options);
        let target = load.answers + 1 + load.dice.below(300);
        while load.answers < target {
            load.fill(&mut machine);
            machine.wait_for_pending(QUEUES * DEPTH - 1, &active);
            load.judge(&mut machine);
        }
        load.fill(&mut machine);
        meanwhile(kill, &active);
        load.fill(&mut machine);
        active.kill();
        machine.disconnect();
        machine.connect(&site.socket()).unwrap();
        active = spare;
    }
    assert_eq!(machine.wait_all(&active), Waited::Answered);
    load.judge(&mut machine);
    assert!(load.open.is_empty());
    // Seldom: a dead process was in the middle of one write of each queue, if of any.
    assert!(load.mixed <= u64::from(kills), "{} mixed", load.mixed);
    for (block, number) in load.submitted.iter().enumerate().filter(|(_, number)| **number > 0) {
        let answer = machine.ask(&active, &Ask::read(block as u64 * 8, BLOCK));
        assert!(answer.data == stamp(block as u64, *number), "block {block} is not {number}");
    }
    assert_eq!(active.status()["counters"]["guest_errors"], json!(0));
}

#[test]
fn with_the_sync_engine() {
    survives(60, &["--num-queues=2", "--engine=sync", "--threads=2"]);
}

#[test]
fn with_the_uring_engine() {
    survives(60, &["--num-queues=2", "--engine=uring"]);
}

#[test]
fn with_the_nowait_engine() {
    survives(60, &["--num-queues=2", "--engine=nowait", "--threads=2"]);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn with_the_mmap_engine() {
    survives(60, &["--num-queues=2", "--engine=mmap", "--threads=2"]);
    let site = Site::on_tmpfs(BLOCKS * BLOCK as u64);
    survives_on(site, 60, &["--num-queues=2", "--engine=mmap"], |_, _| ());
}

#[test]
fn while_queues_move_between_threads() {
    for &engine in ENGINES {
        let maps: [&[u16]; 4] = [&[0, 0], &[0, 1], &[1, 0], &[0, 1]];
        let site = Site::new(BLOCKS * BLOCK as u64);
        let options = ["--num-queues=2", engine, "--thread-map=0,1"];
        survives_on(site, 30, &options, |kill, active| {
            for n in 0..5 {
                active.rebind(maps[(kill as usize + n) % maps.len()]);
            }
        });
    }
}

#[test]
fn with_the_uring_engine_and_direct_io() {
    survives(60, &["--num-queues=2", "--engine=uring", "--direct", "--threads=2"]);
}
