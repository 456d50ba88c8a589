//! SIGKILL while snapshots are taken, undone and merged under 16 writers, with a spare that takes over:
//! every completed write is read, every snapshot stays byte for byte what it was, and the disk is served
//! on. At random instants, and with the feature `crash-points` after each act. A short form runs with the
//! tests, `make layers-kills` has the long one.
//!
//! The control: one sector that is changed behind the backend's back is noticed by the same judge.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::backend::{Backend, DEADLINE, ENGINES, Site, wait_until};
use crate::machine::Machine;
use crate::writers::{QUEUES, SECTOR, SECTORS, Writers, number_of};

/// Most layers that are let stand before some are merged.
const TALL: usize = 3;

pub fn read_all(machine: &mut Machine, backend: &Backend) -> Vec<u8> {
    machine.read_first(backend, SECTORS as usize * SECTOR)
}

/// A backend that can take snapshots.
pub fn start(
    site: &Site,
    engine: &str,
    options: &[String],
    more: &[&str],
    environment: &[(&str, &str)],
) -> Backend {
    let memory = format!("--layer-map={}", site.path("map").display());
    let all = [engine, &memory, "--num-queues=4", "--threads=2"];
    let options = options.iter().map(String::as_str);
    let all: Vec<_> = all.into_iter().chain(options).chain(more.iter().copied()).collect();
    site.start_in(&all, environment)
}

/// By another process, as on another host.
pub fn read_snapshot(image: &Path, engine: &str, id: u64) -> Vec<u8> {
    let elsewhere = Site::sharing(image);
    let (id, reader) = (format!("--snapshot={id}"), "--reader=bonn".to_owned());
    let mut backend = elsewhere.start(&[engine, &id, &reader]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&elsewhere.socket()).unwrap_or_else(|_| panic!("{}", backend.log()));
    let got = read_all(&mut machine, &backend);
    machine.disconnect();
    assert!(backend.terminate().success(), "{}", backend.log());
    got
}

/// The first sector that is none of the two.
fn wrong(got: &[u8], least: &[u64], most: &[u64]) -> Option<String> {
    got.chunks_exact(SECTOR).enumerate().find_map(|(n, sector)| {
        let number = number_of(sector);
        let fits = number == Some(least[n]) || number == Some(most[n]);
        (!fits).then(|| format!("sector {n} is {number:?}, not {} or {}", least[n], most[n]))
    })
}

/// A disk that is written, and whose snapshots are known.
pub struct Trial {
    // Ended before its files are gone.
    pub active: Backend,
    pub engine: &'static str,
    pub machine: Machine,
    pub writers: Writers,
    /// Snapshots that were told, as they were read first.
    pub snapshots: BTreeMap<u64, Vec<u8>>,
    pub told: u64,
    pub site: Site,
    /// Of each backend, beside what all have.
    options: Vec<String>,
}

impl Trial {
    pub fn new(site: Site, engine: &'static str, seed: u64, die: Option<&str>) -> Self {
        Self::with(site, engine, seed, die, Vec::new())
    }

    /// As [`Trial::new`], with further options for each backend.
    pub fn with(
        site: Site,
        engine: &'static str,
        seed: u64,
        die: Option<&str>,
        options: Vec<String>,
    ) -> Self {
        let environment: Vec<_> = die.iter().map(|act| ("SEMPER_DIE_AFTER", *act)).collect();
        let active = start(&site, engine, &options, &[], &environment);
        active.wait_status("/state", &json!("listening"));
        let mut machine = Machine::new(QUEUES, 64);
        machine.connect(&site.socket()).unwrap();
        let writers = Writers::new(seed);
        let snapshots = BTreeMap::new();
        Self { site, engine, machine, writers, active, snapshots, told: 0, options }
    }

    pub fn spare(&self) -> Backend {
        let spare = start(&self.site, self.engine, &self.options, &["--spare"], &[]);
        wait_until("a spare that is ready", || {
            spare.status()["timeline_ns"]["spare_ready"].is_u64().then_some(())
        });
        spare
    }

    /// Asks, and writes on until there is an answer, the process has died, or the time is over.
    pub fn ask_for(&mut self, request: &Value, longest: Duration) -> Option<Value> {
        let mut stream = self.active.try_connect()?;
        stream.write_all(format!("{request}\n").as_bytes()).ok()?;
        stream.set_nonblocking(true).unwrap();
        let (end, mut line) = (Instant::now() + longest, Vec::new());
        while Instant::now() < end {
            self.writers.fill(&mut self.machine);
            self.writers.judge(&mut self.machine);
            let mut piece = [0; 4096];
            match std::io::Read::read(&mut stream, &mut piece) {
                Ok(0) => return None,
                Ok(n) => line.extend_from_slice(&piece[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return None,
            }
            if line.ends_with(b"\n") {
                return serde_json::from_slice(&line).ok();
            }
        }
        None
    }

    /// A snapshot that is told is what it is from then on.
    pub fn snapshot(&mut self, longest: Duration) {
        let (before, began) = (self.writers.done.clone(), self.writers.number);
        let mut settled = vec![true; SECTORS as usize];
        for (_, (first, count, _)) in self.writers.open.values() {
            settled[*first as usize..(first + count) as usize].fill(false);
        }
        let request = json!({"id": 1, "cmd": "snapshot", "wait": true});
        let Some(told) = self.ask_for(&request, longest) else { return };
        let Some(id) = told["ok"]["snapshot"].as_u64() else { return };
        self.told += 1;
        let got = self.read_snapshot(id);
        // What was written in between is in it or not.
        for (n, sector) in got.chunks_exact(SECTOR).enumerate() {
            let number = number_of(sector).unwrap_or_else(|| panic!("sector {n} is torn"));
            let known = number == 0 || number >= before[n] && number <= self.writers.number;
            let untouched = settled[n] && self.writers.last[n] <= began;
            let what = format!("sector {n} of snapshot {id}, {}", self.engine);
            assert!(known && (!untouched || number == before[n]), "{what}: {number}");
        }
        self.snapshots.insert(id, got);
    }

    fn read_snapshot(&self, id: u64) -> Vec<u8> {
        read_snapshot(&self.site.image, self.engine, id)
    }

    /// Something is asked for, and a random time is waited for it at most.
    pub fn stir(&mut self) {
        let longest = Duration::from_micros(self.writers.dice.below(30_000));
        let chain = self.active.control(&json!({"id": 1, "cmd": "layers"}))["ok"].clone();
        let layers = chain["layers"].as_array().map_or(0, Vec::len);
        let newest = chain["layers"].as_array().and_then(|all| all.last()?["id"].as_u64());
        match self.writers.dice.below(8) {
            0 if newest.is_some_and(|id| !self.snapshots.contains_key(&id)) => {
                let request = json!({"id": 1, "cmd": "undo", "snapshot": newest});
                self.ask_for(&request, longest);
            }
            n if n < 3 || layers > TALL => {
                let oldest = chain["layers"][0]["id"].as_u64();
                let through = oldest.map(|id| id + self.writers.dice.below(2));
                if let Some(through) = through {
                    self.snapshots.retain(|id, _| *id > through);
                }
                self.ask_for(&json!({"id": 1, "cmd": "merge", "through": through}), longest);
            }
            3 => {
                self.ask_for(&json!({"id": 1, "cmd": "snapshot"}), longest);
            }
            _ => self.snapshot(Duration::from_secs(1).min(longest * 20)),
        }
    }

    /// Of three snapshots the last two are given up: what lies between goes up.
    #[cfg(feature = "crash-points")]
    fn want_only_the_first(&mut self) {
        while self.active.is_alive() && self.snapshots.len() < 3 && self.told < 3 {
            self.snapshot(Duration::from_secs(2));
        }
        while self.active.is_alive()
            && self.snapshots.len() > 1
            && let Some((id, _)) = self.snapshots.pop_last()
        {
            let request = json!({"id": 1, "cmd": "undo", "snapshot": id});
            self.ask_for(&request, Duration::from_secs(2));
        }
    }

    /// The active process is dead: the spare goes on, and nothing is lost.
    pub fn go_on(&mut self, spare: Backend, what: &str) {
        self.machine.disconnect();
        self.machine.connect(&self.site.socket()).unwrap();
        self.active = spare;
        self.writers.finish(&mut self.machine, &self.active);
        self.check(what);
    }

    fn check(&mut self, what: &str) {
        let got = read_all(&mut self.machine, &self.active);
        let (done, engine) = (&self.writers.done, self.engine);
        if let Some(fault) = wrong(&got, done, done) {
            panic!("{what}, {engine}: {fault}");
        }
        for (id, content) in &self.snapshots {
            assert!(self.read_snapshot(*id) == *content, "{what}, {engine}: snapshot {id} changed");
        }
    }
}

/// A number for the campaign; the short form without.
pub fn count(variable: &str, short: u64) -> u64 {
    std::env::var(variable).ok().and_then(|n| n.parse().ok()).unwrap_or(short)
}

#[test]
fn nothing_is_lost_at_random_instants() {
    let (kills, seed) = (count("SEMPERVIRT_LAYER_KILLS", 24), count("SEMPERVIRT_SEED", 1));
    let (mut done, mut told, mut writes) = (0, 0, 0);
    for (n, &engine) in ENGINES.iter().enumerate() {
        let size = SECTORS * 512;
        let site = if n % 2 == 0 { Site::new(size) } else { Site::on_tmpfs(size) };
        let mut trial = Trial::new(site, engine, seed << 8 | n as u64, None);
        for kill in 0..kills.div_ceil(ENGINES.len() as u64) {
            let spare = trial.spare();
            for _ in 0..1 + trial.writers.dice.below(3) {
                trial.stir();
            }
            let pause = Duration::from_micros(trial.writers.dice.below(10_000));
            trial.writers.pump(&mut trial.machine, Instant::now() + pause);
            trial.active.kill();
            done += 1;
            trial.go_on(spare, &format!("kill {kill} of seed {seed}"));
        }
        told += trial.told;
        writes += trial.writers.writes;
    }
    println!("kills={done} snapshots={told} writes={writes} lost=0");
    assert!(told > 0 && writes > 0, "nothing was tried");
}

#[cfg(feature = "crash-points")]
#[test]
fn nothing_is_lost_after_any_act() {
    const LIFTS: [&str; 4] = ["copy-up", "flush-top", "enter-lifted", "remove-lifted"];
    const ACTS: [&str; 19] = [
        "begin-record",
        "mark-image",
        "make-files",
        "flush-names",
        "enter-opened",
        "flush-record",
        "switch",
        "look-at-maps",
        "flush-image",
        "flush-data",
        "write-maps",
        "flush-maps",
        "enter-sealed",
        "enter-merging",
        "copy",
        "enter-dropped",
        "unchain",
        "remove-files",
        "enter-gone",
    ];
    let (times, mut done) = (count("SEMPERVIRT_LAYER_ROUNDS", 1), 0);
    for round in 0..times {
        for (n, act) in ACTS.into_iter().chain(LIFTS).enumerate() {
            let all = times > 1;
            let engines =
                ENGINES.iter().enumerate().filter(|(e, _)| all || n % ENGINES.len() == *e);
            for (e, &engine) in engines {
                let site = Site::new(SECTORS * 512);
                let seed = round << 16 | (n as u64) << 8 | e as u64;
                let mut trial = Trial::new(site, engine, seed, Some(act));
                let spare = trial.spare();
                let end = Instant::now() + DEADLINE;
                while trial.active.is_alive() {
                    assert!(Instant::now() < end, "{act}: it does not die");
                    trial.snapshot(Duration::from_secs(2));
                    if LIFTS.contains(&act) {
                        trial.want_only_the_first();
                        continue;
                    }
                    let through = trial.snapshots.keys().next().copied();
                    if trial.active.is_alive() && through.is_some() {
                        trial.snapshots.clear();
                        let merge = json!({"id": 1, "cmd": "merge", "through": through});
                        trial.ask_for(&merge, Duration::from_secs(2));
                    }
                }
                done += 1;
                trial.go_on(spare, act);
                trial.snapshot(Duration::from_secs(5));
                trial.writers.finish(&mut trial.machine, &trial.active);
                trial.check(act);
            }
        }
    }
    println!("kills={done} lost=0");
}

/// A snapshot is served by a process that knows nothing of the disk's own, as on another host, while those
/// write, merge, stop, come back and die: what it reads never changes, and its pin is heeded.
#[test]
fn a_snapshot_is_served_elsewhere_whatever_becomes_of_the_disk() {
    let rounds = count("SEMPERVIRT_LAYER_HOSTS", 6);
    for round in 0..rounds {
        let engine = ENGINES[round as usize % ENGINES.len()];
        let mut trial = Trial::new(Site::new(SECTORS * 512), engine, 0x5000 + round, None);
        trial.writers.pump(&mut trial.machine, Instant::now() + Duration::from_millis(20));
        trial.snapshot(DEADLINE);
        trial.snapshot(DEADLINE);
        let (id, content) = trial.snapshots.pop_last().expect("a snapshot");
        let elsewhere = Site::sharing(&trial.site.image);
        let mut reader =
            elsewhere.start(&[engine, &format!("--snapshot={id}"), "--reader=amsterdam"]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&elsewhere.socket()).unwrap();
        assert!(read_all(&mut machine, &reader) == content, "{engine}");
        for step in 0..4 {
            let spare = trial.spare();
            // What it does not have goes into the image below it; what it has does not.
            let request = json!({"id": 1, "cmd": "merge", "through": id});
            let told = trial.ask_for(&request, DEADLINE).expect("an answer");
            // Later it may have been given up, and stays for its reader all the same.
            assert!(step > 0 || told["error"]["kind"] == json!("pinned"), "{told}");
            trial.snapshots.clear();
            trial.ask_for(&json!({"id": 1, "cmd": "merge", "through": id - 1}), DEADLINE);
            trial.stir();
            // Cut off for a while, in the middle of what it was doing.
            let pid = trial.active.pid() as i32;
            // SAFETY: a signal to a child that was not waited for.
            unsafe { libc::kill(pid, libc::SIGSTOP) };
            assert!(read_all(&mut machine, &reader) == content, "{engine}, step {step}: stopped");
            // SAFETY: as above.
            unsafe { libc::kill(pid, libc::SIGCONT) };
            trial.writers.pump(&mut trial.machine, Instant::now() + Duration::from_millis(5));
            trial.active.kill();
            assert!(read_all(&mut machine, &reader) == content, "{engine}, step {step}: dead");
            trial.go_on(spare, "a death under a reader");
            assert!(read_all(&mut machine, &reader) == content, "{engine}, step {step}");
        }
        machine.disconnect();
        assert!(reader.terminate().success(), "{}", reader.log());
        // The control: without the pin it goes.
        let told = trial.ask_for(&json!({"id": 1, "cmd": "merge", "through": id}), DEADLINE);
        assert!(told.is_some_and(|told| told["ok"].is_object()), "{engine}");
    }
    println!("hosts={rounds} changed=0");
}

/// The judge sees one sector that is not what was written, in the disk and in a snapshot.
#[test]
fn a_loss_would_be_noticed() {
    let mut trial = Trial::new(Site::new(SECTORS * 512), "--engine=sync", 9, None);
    while trial.writers.writes == 0 {
        trial.writers.pump(&mut trial.machine, Instant::now() + Duration::from_millis(50));
    }
    trial.writers.finish(&mut trial.machine, &trial.active);
    trial.snapshot(DEADLINE);
    let content = trial.snapshots.values().next().cloned().unwrap();
    let lost = trial.writers.done.iter().position(|number| *number > 0).unwrap();
    let image = fs::File::options().write(true).open(&trial.site.image).unwrap();
    image.write_all_at(&[0xff; SECTOR], (lost * SECTOR) as u64).unwrap();
    let id = *trial.snapshots.keys().next().unwrap();
    assert!(trial.read_snapshot(id) != content);
    let done = vec![u64::MAX; SECTORS as usize];
    assert!(wrong(&content, &done, &done).is_some());
}
