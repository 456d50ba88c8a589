//! Two hosts and one disk with layers, on a file server that takes the lock of a silent client away
//! (`tests/revoking_server.py`): a is cut off while it writes, snapshots and merges, b takes over under the
//! next epoch, and a comes back. What a was told to be flushed is read by b, a snapshot that a told is the
//! same on b, and nothing that a writes late is read by anybody, as the stamps say. A short form runs with
//! the tests, `make layers-kills` has a hundred. Needs root.
//!
//! The control: a server that lets late writes through, and what b reads then changes.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use crate::backend::{DEADLINE, ENGINES, Site};
use crate::layer_kills::{Trial, count, read_all, read_snapshot, start};
use crate::machine::Machine;
use crate::snapshots::wait_layers;
use crate::writers::{QUEUES, SECTOR, SECTORS, Writers, lost, number_of};

/// Numbers of b's writes, which a never gets to.
const OF_B: u64 = 1 << 32;

/// The file server, with a mount for each host.
struct Server {
    process: Child,
    said: BufReader<ChildStdout>,
    dir: TempDir,
}

impl Server {
    fn new(refuses: bool) -> Self {
        let dir = tempfile::Builder::new().prefix("hosts").tempdir_in("/tmp").unwrap();
        for name in ["backing", "mount-a", "mount-b"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let image = fs::File::create(dir.path().join("backing/disk.raw")).unwrap();
        image.set_len(SECTORS * SECTOR as u64).unwrap();
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/revoking_server.py");
        let mut process = Command::new("python3")
            .arg(program.canonicalize().unwrap())
            .arg(dir.path().join("backing"))
            .args(["0.3", if refuses { "1" } else { "0" }, "a", "b"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let said = BufReader::new(process.stdout.take().unwrap());
        let mut server = Self { process, said, dir };
        server.hear("mounted");
        server
    }

    fn hear(&mut self, word: &str) {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), word, "the file server: FUSE is needed, /dev/fuse and root");
    }

    fn tell(&mut self, what: &str) {
        let told = self.process.stdin.as_mut().unwrap();
        told.write_all(format!("{what}\n").as_bytes()).unwrap();
        self.hear("done");
    }

    fn image(&self, host: &str) -> PathBuf {
        self.dir.path().join(format!("mount-{host}/disk.raw"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Whoever still waits for it gets an error then.
        let _ = self.process.kill();
        let _ = self.process.wait();
        for host in ["a", "b"] {
            let mount = self.dir.path().join(format!("mount-{host}"));
            let _ = Command::new("umount").arg("--lazy").arg(mount).status();
        }
    }
}

fn claim(server: &Server, host: &str, epoch: u64) -> Vec<String> {
    let record = server.image(host).with_extension("raw.epoch");
    vec![
        format!("--epoch-file={}", record.display()),
        format!("--epoch={epoch}"),
        format!("--claim={}", epoch.to_string().repeat(32)),
        format!("--holder={host}"),
    ]
}

/// What b read of a's late writes, if it did.
fn take_over(round: u64, refuses: bool) -> Option<String> {
    let mut server = Server::new(refuses);
    // In the control nothing may come out of b's page cache.
    let engine = if refuses { ENGINES[round as usize % ENGINES.len()] } else { "--engine=sync" };
    let direct: &[&str] = if refuses { &[] } else { &["--direct"] };
    let site = Site::sharing(&server.image("a"));
    let mut a = Trial::with(site, engine, 0x7000 + round, None, claim(&server, "a", 1));
    a.writers.pump(&mut a.machine, Instant::now() + Duration::from_millis(20));
    a.snapshot(DEADLINE);
    for _ in 0..a.writers.dice.below(3) {
        a.stir();
    }
    let end = Instant::now() + DEADLINE;
    while a.snapshots.is_empty() {
        assert!(Instant::now() < end, "a has no snapshot");
        a.stir();
    }
    let known = a.snapshots.clone();

    // In the middle of something.
    let oldest = *known.keys().next().unwrap();
    let request = match a.writers.dice.below(2) {
        0 => json!({"id": 1, "cmd": "merge", "through": oldest - 1}),
        _ => json!({"id": 1, "cmd": "snapshot"}),
    };
    let longest = Duration::from_micros(a.writers.dice.below(20_000));
    a.ask_for(&request, longest);
    server.tell("cut a");
    a.writers.pump(&mut a.machine, Instant::now() + Duration::from_millis(5));

    let other = Site::sharing(&server.image("b"));
    let options = claim(&server, "b", 2);
    let mut b = start(&other, engine, &options, &[direct, &["--spare"]].concat(), &[]);
    b.wait_status("/state", &json!("listening"));
    let mut machine = Machine::new(QUEUES, 64);
    machine.connect(&other.socket()).unwrap_or_else(|_| panic!("{}", b.log()));
    let found = read_all(&mut machine, &b);
    if let Some(fault) = lost(&found, &a.writers) {
        panic!("round {round}, {engine}: b does not read what a had flushed: {fault}");
    }
    let mut writers = Writers::new(round);
    writers.number = OF_B;
    for _ in 0..2 {
        writers.fill(&mut machine);
        writers.finish(&mut machine, &b);
    }
    let expected = read_all(&mut machine, &b);
    for (n, (sector, before)) in
        expected.chunks_exact(SECTOR).zip(found.chunks_exact(SECTOR)).enumerate()
    {
        let wanted = if writers.last[n] > 0 { Some(writers.done[n]) } else { number_of(before) };
        assert_eq!(number_of(sector), wanted, "round {round}, {engine}: sector {n} on b");
    }

    // a is back, and goes on as far as it can.
    server.tell("restore a");
    let end = Instant::now() + Duration::from_millis(100);
    let failed = a.writers.pump_failing(&mut a.machine, end);
    assert!(!refuses || failed > 0, "round {round}: a was not refused");
    for request in [json!({"id": 1, "cmd": "snapshot"}), json!({"id": 1, "cmd": "merge"})] {
        let told = a.active.control(&request);
        let harmless = told["error"].is_object() || told["ok"]["merging"] == json!([]);
        assert!(harmless, "round {round}: a may still change the chain: {told}");
    }
    let read = |machine: &mut Machine, b| {
        let got = read_all(machine, b);
        let places = got.chunks_exact(SECTOR).zip(expected.chunks_exact(SECTOR)).enumerate();
        let mut changed = places.filter(|(_, (now, before))| now != before);
        changed.next().map(|(n, (now, _))| format!("sector {n} is {:?} now", number_of(now)))
    };
    let mut seen = read(&mut machine, &b);
    if !refuses {
        return seen;
    }
    for (id, content) in &known {
        let got = read_snapshot(&server.image("b"), engine, *id);
        assert!(got == *content, "round {round}, {engine}: snapshot {id} is another on b");
    }
    // What a has left becomes a part of the image.
    a.active.kill();
    let chain = b.control(&json!({"id": 1, "cmd": "layers"}))["ok"]["layers"].clone();
    let newest = chain.as_array().unwrap().last().unwrap()["id"].clone();
    let told = b.control(&json!({"id": 1, "cmd": "merge", "through": newest}));
    assert!(told["ok"].is_object(), "{told}");
    wait_layers(&b, 1);
    seen = seen.or_else(|| read(&mut machine, &b));
    machine.disconnect();
    assert!(b.terminate().success(), "{}", b.log());
    seen
}

#[test]
fn nothing_that_a_host_writes_late_is_read_by_another() {
    let rounds = count("SEMPERVIRT_LAYER_HOSTS", 4);
    for round in 0..rounds {
        if let Some(fault) = take_over(round, true) {
            panic!("round {round}: {fault}");
        }
    }
    println!("take-overs={rounds} late writes read=0");
}

/// The control: without a fence the stamps tell.
#[test]
fn late_writes_that_are_let_through_would_be_noticed() {
    let noticed = (0..20).find_map(|round| take_over(round, false));
    assert!(noticed.is_some(), "nothing was noticed");
}
