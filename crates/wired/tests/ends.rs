//! Both ends as processes, over TLS on the loopback, between two sockets that play QEMU.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SanType};
use semper_blockmap::format::{BlockRecord, Export};
use semper_wire::synthetic::{Stream, noise, prose};
use serde_json::{Value, json};
use tempfile::TempDir;

const BLOCKS: u64 = 2048;
const DEADLINE: Duration = Duration::from_secs(60);

/// A directory with certificates, a disk and sockets.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::Builder::new().prefix("sv-").tempdir_in("/tmp").unwrap());
        place.authority("ca", &["src", "dst", "liar@src", "fraud@dst"]);
        let disk: Vec<u8> = (0..BLOCKS).flat_map(noise).collect();
        fs::write(place.path("disk"), disk).unwrap();
        place
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn authority(&self, name: &str, hosts: &[&str]) {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer_key = KeyPair::generate().unwrap();
        let issuer = params.self_signed(&issuer_key).unwrap();
        fs::write(self.path(&format!("{name}.pem")), issuer.pem()).unwrap();
        for host in hosts {
            // "HOST@ADDRESS": a host that says to be where another's name leads.
            let (host, address) = host.split_once('@').unwrap_or((host, "elsewhere"));
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec![address.to_owned()]).unwrap();
            let urn = format!("urn:sempervirt:host:{host}");
            params.subject_alt_names.push(SanType::URI(urn.try_into().unwrap()));
            let certificate = params.signed_by(&key, &issuer, &issuer_key).unwrap();
            fs::write(self.path(&format!("{host}.pem")), certificate.pem()).unwrap();
            fs::write(self.path(&format!("{host}.key")), key.serialize_pem()).unwrap();
        }
    }

    fn end(&self, kind: &str, own: &str, peer: &str) -> Command {
        self.end_of("m-1", kind, own, peer)
    }

    fn end_of(&self, migration: &str, kind: &str, own: &str, peer: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_semper-wired"));
        command.arg(kind);
        command.args([format!("--migration={migration}"), format!("--peer-name={peer}")]);
        command.args([
            format!("--ca={}", self.path("ca.pem")),
            format!("--cert={}", self.path(&format!("{own}.pem"))),
            format!("--key={}", self.path(&format!("{own}.key"))),
            format!("--control-socket={}", self.path(&format!("{kind}.control"))),
            format!("--qemu-socket={}", self.path(&format!("{kind}.qemu"))),
        ]);
        command.stderr(Stdio::piped());
        command
    }

    fn destination(&self, disk: &str) -> End {
        let mut command = self.end("destination", "dst", "src");
        command.args(["--listen=127.0.0.1:0", &format!("--disk=root={}", self.path(disk))]);
        End::start(command, self.path("destination.control"))
    }

    fn source(&self, destination: &End) -> End {
        let mut command = self.end("source", "src", "dst");
        command.arg(format!("--connect={}", destination.address()));
        command.arg(format!("--disk=root={}", self.path("disk")));
        End::start(command, self.path("source.control"))
    }

    /// Both ends, and the sockets that QEMU would have.
    fn pair(&self, disk: &str) -> (End, End, UnixStream, UnixStream) {
        let incoming = UnixListener::bind(self.path("destination.qemu")).unwrap();
        let destination = self.destination(disk);
        let source = self.source(&destination);
        source.wait_state("ready");
        let outgoing = UnixStream::connect(self.path("source.qemu")).unwrap();
        let (incoming, _) = incoming.accept().unwrap();
        incoming.set_read_timeout(Some(DEADLINE)).unwrap();
        (source, destination, outgoing, incoming)
    }
}

/// What an end says that tries to break out of its walls.
fn try_it(mut command: Command, name: &str, at: &str, walls: &str) -> String {
    let tries = [("SEMPER_BREAKOUT", name), ("SEMPER_BREAKOUT_AT", at), ("SEMPER_WALLS", walls)];
    let output = command.envs(tries).output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn an_end_that_is_taken_over_reaches_nobody_else() {
    let place = Place::new();
    let [other, own] = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let port = |listener: &std::net::TcpListener| listener.local_addr().unwrap().port().to_string();
    let source = || {
        let mut command = place.end("source", "src", "dst");
        command.arg(format!("--connect=127.0.0.1:{}", port(&own)));
        command.arg(format!("--disk=root={}", place.path("disk")));
        command
    };
    let destination = || {
        let mut command = place.end("destination", "dst", "src");
        command.args(["--listen=127.0.0.1:0", &format!("--disk=root={}", place.path("disk"))]);
        command
    };
    let (disk, other, own_port) = (place.path("disk"), port(&other), port(&own));
    let (monitor, log) = (place.path("monitor"), place.path("log"));
    let _monitor = UnixListener::bind(&monitor).unwrap();
    let _log = UnixDatagram::bind(&log).unwrap();
    let new = place.path("new");
    let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = bystander.id().to_string();
    let name = format!("semper-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    let tries = [
        ("tcp", other.as_str()),
        // The other end's: the process beside has connected to it.
        ("tcp", &own_port),
        ("udp", ""),
        ("path", &monitor),
        ("datagram", &log),
        ("pair", &log),
        ("abstract", &name),
        ("read", "/etc/shadow"),
        ("write", &disk),
        ("create", &new),
        ("list", "/etc"),
        ("memory", &pid),
        ("root", &pid),
        ("trace", &pid),
        ("signal", &pid),
        ("execute", "/bin/echo"),
        ("fork", ""),
        ("ring", ""),
        ("userfaultfd", ""),
        ("bpf", ""),
        ("mount", "/tmp"),
        ("namespace", ""),
        ("code", ""),
        ("owner", ""),
    ];
    for (name, at) in tries {
        for command in [&source as &dyn Fn() -> Command, &destination] {
            let said = try_it(command(), name, at, "all");
            assert!(!said.contains("broke out") && !said.is_empty(), "{name}: {said}");
            let said = try_it(command(), name, at, "none");
            assert!(said.contains("broke out"), "the control, {name}: {said}");
            let _ = std::fs::remove_file(&new);
        }
    }
    bystander.kill().and_then(|()| bystander.wait()).unwrap();
    // What an end is for is not in the way.
    assert!(try_it(source(), "read", &disk, "all").contains("broke out"));
}

/// A process; killed at the end.
struct End {
    process: Child,
    control: String,
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits for a condition.
fn wait<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

impl End {
    fn start(mut command: Command, control: String) -> Self {
        Self { process: command.spawn().unwrap(), control }
    }

    fn status(&self) -> Option<Value> {
        let mut socket = UnixStream::connect(Path::new(&self.control)).ok()?;
        socket.write_all(b"{\"id\":1,\"cmd\":\"status\"}\n").ok()?;
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line).ok()?;
        Some(serde_json::from_str::<Value>(&line).ok()?["ok"].take())
    }

    fn wait_state(&self, state: &str) -> Value {
        wait(state, || self.status().filter(|status| status["state"] == state))
    }

    fn address(&self) -> String {
        wait("address", || Some(self.status()?["address"].as_str()?.to_owned()))
    }

    fn wait_end(&mut self) -> (ExitStatus, String) {
        let status = wait("exit", || self.process.try_wait().unwrap());
        let mut said = String::new();
        self.process.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status, said)
    }

    /// The last line of status that it logged.
    fn wait_success(&mut self) -> Value {
        let (status, said) = self.wait_end();
        assert!(status.success(), "{said}");
        let line = said.lines().rev().find_map(|line| line.split_once("status="));
        serde_json::from_str(line.unwrap().1).unwrap()
    }
}

fn stream() -> Vec<u8> {
    let mut stream = Stream::begin(1 << 16);
    stream.part();
    for round in 0..4 {
        (0..2000).for_each(|number| stream.zero(number));
        (0..1000).for_each(|number| stream.page(5000 + number, &noise(number + 100 * round)));
        (0..200).for_each(|number| stream.page(9000 + number, &prose(number + 77 * round)));
        stream.end_part();
        stream.part();
    }
    stream.finish()
}

/// Sends a stream as QEMU would; what arrived, and the figures of both ends.
fn carry(place: &Place, disk: &str) -> (Vec<u8>, Value, Value) {
    let (mut source, mut destination, mut outgoing, mut incoming) = place.pair(disk);
    let writer = thread::spawn(move || {
        outgoing.write_all(&stream()).unwrap();
        // The return path: what the destination's QEMU says arrives here.
        let mut said = [0; 5];
        outgoing.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"shut!");
    });
    let mut arrived = vec![0; stream().len()];
    incoming.read_exact(&mut arrived).unwrap();
    incoming.write_all(b"shut!").unwrap();
    writer.join().unwrap();
    assert_eq!(incoming.read(&mut [0]).unwrap(), 0, "more than was sent");
    drop(incoming);
    (arrived, source.wait_success(), destination.wait_success())
}

#[test]
fn a_stream_arrives_as_it_was_sent() {
    let place = Place::new();
    let (arrived, source, destination) = carry(&place, "disk");
    assert!(arrived == stream());
    assert_eq!(source["stream_bytes"], arrived.len());
    assert_eq!((&source["references"], &source["mismatches"]), (&4000.into(), &0.into()));
    assert_eq!(destination["references"], 4000);
    let wire = source["wire_bytes_sent"].as_u64().unwrap();
    assert!(wire * 8 < arrived.len() as u64, "{wire} of {}", arrived.len());
}

#[test]
fn another_disk_under_the_same_name_costs_time_and_nothing_else() {
    let place = Place::new();
    let other: Vec<u8> = (0..BLOCKS).flat_map(|n| noise(n + (n % 3) * 10_000)).collect();
    fs::write(place.path("other"), other).unwrap();
    let (arrived, source, destination) = carry(&place, "other");
    assert!(arrived == stream());
    let mismatches = source["mismatches"].as_u64().unwrap();
    assert!(mismatches > 50, "{mismatches}");
    assert_eq!(destination["repaired"], mismatches);
}

#[test]
fn a_disk_that_is_written_meanwhile_costs_time_and_nothing_else() {
    let place = Place::new();
    let disk = fs::OpenOptions::new().write(true).open(place.path("disk")).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (arrived, source, _) = thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                number += 1;
                disk.write_all_at(&noise(50_000 + number), number * 31 % BLOCKS * 4096).unwrap();
                thread::sleep(Duration::from_micros(50));
            }
        });
        let carried = carry(&place, "disk");
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        carried
    });
    assert!(arrived == stream());
    assert!(source["references"].as_u64().unwrap() > 0);
}

#[test]
fn strangers_are_refused_and_keep_nobody_out() {
    let place = Place::new();
    let incoming = UnixListener::bind(place.path("destination.qemu")).unwrap();
    let mut destination = place.destination("disk");
    let address = destination.address();
    // Of another authority; of the right one, but another host; of another migration; no TLS.
    let strange = Place::new();
    place.authority("other", &["thief"]);
    let attempt = |mut command: Command, control: String, why: &str| {
        command.arg(format!("--connect={address}"));
        let (status, said) = End::start(command, control).wait_end();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(why), "{said}");
    };
    let control = || place.path("source.control");
    attempt(strange.end("source", "src", "dst"), strange.path("source.control"), "TLS");
    attempt(place.end("source", "thief", "dst"), control(), "");
    attempt(place.end("source", "dst", "dst"), control(), "certificate");
    attempt(place.end("source", "liar", "dst"), control(), "certificate");
    attempt(place.end_of("m-2", "source", "src", "dst"), control(), "migration");
    let mut plain = std::net::TcpStream::connect(&address).unwrap();
    plain.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    drop(plain);
    // And now the one that was meant.
    let mut source = place.source(&destination);
    source.wait_state("ready");
    let mut outgoing = UnixStream::connect(place.path("source.qemu")).unwrap();
    let (mut incoming, _) = incoming.accept().unwrap();
    outgoing.write_all(b"hello").unwrap();
    outgoing.shutdown(Shutdown::Write).unwrap();
    let mut arrived = Vec::new();
    incoming.read_to_end(&mut arrived).unwrap();
    drop(incoming);
    assert_eq!(arrived, b"hello");
    source.wait_success();
    destination.wait_success();
}

#[test]
fn a_destination_that_is_where_another_is_called_is_not_that_one() {
    let place = Place::new();
    let mut command = place.end("destination", "fraud", "src");
    command.args(["--listen=127.0.0.1:0", &format!("--disk=root={}", place.path("disk"))]);
    let fraud = End::start(command, place.path("destination.control"));
    let mut command = place.end("source", "src", "dst");
    command.args([
        format!("--connect={}", fraud.address()),
        format!("--disk=root={}", place.path("disk")),
    ]);
    let (status, said) = End::start(command, place.path("source.control")).wait_end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("NotValidForName"), "{said}");
}

/// Without places of their own the silent ones would be waited for, ten seconds each.
#[test]
fn strangers_that_say_nothing_do_not_make_the_source_wait() {
    let place = Place::new();
    let _incoming = UnixListener::bind(place.path("destination.qemu")).unwrap();
    let destination = place.destination("disk");
    let address = destination.address();
    let begin = std::time::Instant::now();
    let silent: Vec<_> = (0..80).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    let source = place.source(&destination);
    source.wait_state("ready");
    assert!(begin.elapsed() < Duration::from_secs(9), "{:?}", begin.elapsed());
    for mut stranger in silent {
        stranger.set_read_timeout(Some(DEADLINE)).unwrap();
        // Each is cut off, though none said anything wrong.
        let end = stranger.read(&mut [0; 1]).map_err(|error| error.kind());
        assert!(matches!(end, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)), "{end:?}");
    }
}

#[test]
fn an_end_that_dies_takes_the_other_with_it() {
    for kill_source in [true, false] {
        let place = Place::new();
        let (mut source, mut destination, mut outgoing, mut incoming) = place.pair("disk");
        outgoing.write_all(&stream()[..1 << 20]).unwrap();
        incoming.read_exact(&mut [0; 1000]).unwrap();
        let (dies, stays, qemu) = if kill_source {
            (&mut source, &mut destination, &mut incoming)
        } else {
            (&mut destination, &mut source, &mut outgoing)
        };
        dies.process.kill().unwrap();
        let (status, said) = stays.wait_end();
        assert_eq!(status.code(), Some(1), "{said}");
        // QEMU sees its connection end.
        qemu.set_read_timeout(Some(DEADLINE)).unwrap();
        let _ = qemu.read_to_end(&mut Vec::new());
    }
}

#[test]
fn a_qemu_that_gives_up_is_told_to_the_other_side() {
    let place = Place::new();
    let (mut source, mut destination, mut outgoing, incoming) = place.pair("disk");
    drop(incoming);
    let _ = outgoing.write_all(&stream());
    let (status, said) = source.wait_end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert_eq!(destination.wait_end().0.code(), Some(1));
}

#[test]
fn what_waits_goes_out_when_qemu_is_silent() {
    let place = Place::new();
    let (_source, _destination, mut outgoing, mut incoming) = place.pair("disk");
    let mut worst = Duration::ZERO;
    outgoing.write_all(&Stream::begin(1 << 16).bytes).unwrap();
    incoming.read_exact(&mut vec![0; Stream::begin(1 << 16).bytes.len()]).unwrap();
    let mut delays = Vec::new();
    for number in 0..50u64 {
        let mut part = Stream::default();
        part.part();
        part.page(number, &noise(number));
        part.end_part();
        let began = Instant::now();
        outgoing.write_all(&part.bytes).unwrap();
        let mut arrived = vec![0; part.bytes.len()];
        incoming.read_exact(&mut arrived).unwrap();
        delays.push(began.elapsed());
        worst = worst.max(began.elapsed());
        assert!(arrived == part.bytes);
    }
    delays.sort();
    println!("one page through both ends: median {:?}, worst {worst:?}", delays[25]);
    // Not the median: on a busy machine others come in between.
    assert!(delays[12] < Duration::from_millis(10), "{:?}", delays[12]);
}

/// Plays semper-blkd: names the first `count` blocks to whoever asks, or exports them as a map where
/// it is an old one.
fn backend(path: &str, count: &Arc<AtomicU64>, old: bool) {
    let (listener, count) = (UnixListener::bind(path).unwrap(), Arc::clone(count));
    let answer = move |request: &str| {
        let (capacity, blocks) = (BLOCKS * 4096, 0..count.load(Relaxed));
        if request.contains("map-export") {
            let block = |block| BlockRecord { hash: [0; 16], block, stamp: 7 };
            let (key, blocks) = ([0; 32], blocks.map(block).collect());
            let (regions, pages) = (vec![], vec![]);
            let bytes = Export { capacity, key, verified: true, regions, pages, blocks }.to_bytes();
            return (json!({"ok": {"bytes": bytes.len()}}), bytes);
        }
        if old {
            return (json!({"error": {"kind": "invalid"}}), vec![]);
        }
        let bytes: Vec<u8> =
            blocks.flat_map(|block| [block, 7]).flat_map(u64::to_le_bytes).collect();
        (json!({"ok": {"bytes": bytes.len(), "capacity": capacity, "held": 50}}), bytes)
    };
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut request) = (client.unwrap(), String::new());
            BufReader::new(&client).read_line(&mut request).unwrap();
            let (line, bytes) = answer(&request);
            // Who has gone away does not want it.
            let _ = client.write_all(format!("{line}\n").as_bytes());
            let _ = client.write_all(&bytes);
        }
    });
}

#[test]
fn a_block_that_the_guest_reads_during_the_stream_is_referred_to_in_the_next_pass() {
    [false, true].into_iter().for_each(grows);
}

fn grows(old_backend: bool) {
    let place = Place::new();
    let known = Arc::new(AtomicU64::new(100));
    backend(&place.path("backend"), &known, old_backend);
    let incoming = UnixListener::bind(place.path("destination.qemu")).unwrap();
    let mut destination = place.destination("disk");
    let mut command = place.end("source", "src", "dst");
    command.arg(format!("--connect={}", destination.address()));
    let (disk, map) = (place.path("disk"), place.path("backend"));
    command.arg(format!("--disk=root={disk},backend={map}"));
    let mut source = End::start(command, place.path("source.control"));
    assert_eq!(source.wait_state("ready")["indexed_blocks"], 100);
    let mut outgoing = UnixStream::connect(place.path("source.qemu")).unwrap();
    let (mut incoming, _) = incoming.accept().unwrap();
    let reader = thread::spawn(move || {
        let mut arrived = Vec::new();
        incoming.read_to_end(&mut arrived).unwrap();
        arrived
    });
    let mut sent = Stream::begin(1 << 16).bytes;
    outgoing.write_all(&sent).unwrap();
    // Gives the source a pass; how many pages it has packed, in all, when that is under way.
    let mut pass = || {
        let mut part = Stream::default();
        part.part();
        (0..200).for_each(|number| part.page(number, &noise(number)));
        part.end_part();
        outgoing.write_all(&part.bytes).unwrap();
        sent.extend_from_slice(&part.bytes);
        let taken = |status: &Value| status["stream_bytes"] == sent.len();
        wait("a pass", || source.status().filter(taken))["pages"].as_u64().unwrap()
    };
    let first = pass();
    assert_eq!(first, 100);
    assert_eq!(pass(), first + 100);
    known.store(200, Relaxed);
    // The map is asked for again, and what it names is in the index before the next pass.
    let mut packed = first;
    wait("a larger index", || {
        packed = pass();
        source.status().filter(|status| status["indexed_blocks"] == 200)
    });
    assert_eq!(pass(), packed);
    drop(outgoing);
    assert!(reader.join().unwrap() == sent);
    assert_eq!(source.wait_success()["mismatches"], 0);
    destination.wait_success();
}

#[test]
fn the_destination_tells_its_backend_which_blocks_were_used() {
    let place = Place::new();
    let listener = UnixListener::bind(place.path("backend")).unwrap();
    let told = thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut request = String::new();
        BufReader::new(&client).read_line(&mut request).unwrap();
        client.write_all(b"{\"ok\":{}}\n").unwrap();
        serde_json::from_str::<Value>(&request).unwrap()
    });
    let incoming = UnixListener::bind(place.path("destination.qemu")).unwrap();
    let mut command = place.end("destination", "dst", "src");
    let (disk, backend) = (place.path("disk"), place.path("backend"));
    command.args(["--listen=127.0.0.1:0", &format!("--disk=root={disk},backend={backend}")]);
    let mut destination = End::start(command, place.path("destination.control"));
    let mut source = place.source(&destination);
    source.wait_state("ready");
    let mut outgoing = UnixStream::connect(place.path("source.qemu")).unwrap();
    let (mut incoming, _) = incoming.accept().unwrap();
    let mut stream = Stream::begin(1 << 16);
    stream.part();
    (10..30).chain(100..101).for_each(|number| stream.page(number, &noise(number)));
    outgoing.write_all(&stream.bytes).unwrap();
    drop(outgoing);
    incoming.read_to_end(&mut Vec::new()).unwrap();
    drop(incoming);
    source.wait_success();
    destination.wait_success();
    let told = told.join().unwrap();
    assert_eq!((&told["cmd"], &told["runs"]), (&"map-touch".into(), &json!([[10, 20], [100, 1]])));
}

/// `cargo test -p semper-wired --features unsafe-no-verify`
#[cfg(feature = "unsafe-no-verify")]
mod trial {
    use super::*;

    fn ask(end: &End, request: &str) -> Value {
        let mut socket = UnixStream::connect(&end.control).unwrap();
        socket.write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line).unwrap();
        serde_json::from_str::<Value>(&line).unwrap()["ok"].take()
    }

    /// Whether pages whose blocks are overwritten before they are read arrive as they were.
    fn survives(words: &str) -> bool {
        let place = Place::new();
        let incoming = UnixListener::bind(place.path("destination.qemu")).unwrap();
        let usual = place.end("destination", "dst", "src");
        let mut command = Command::new(env!("CARGO_BIN_EXE_semper-wired-trial"));
        command.args(usual.get_args()).arg("--listen=127.0.0.1:0").stderr(Stdio::piped());
        command.arg(format!("--disk=root={}", place.path("disk")));
        command.env("SEMPER_WIRED_TRIAL", words);
        let destination = End::start(command, place.path("destination.control"));
        let source = place.source(&destination);
        source.wait_state("ready");
        let mut outgoing = UnixStream::connect(place.path("source.qemu")).unwrap();
        let (mut incoming, _) = incoming.accept().unwrap();
        let mut stream = Stream::begin(1 << 16);
        stream.part();
        (0..8).for_each(|number| stream.page(number, &noise(40 + number)));
        stream.end_part();
        outgoing.write_all(&stream.bytes).unwrap();
        let waits = wait("a read that waits", || {
            let reads = ask(&destination, r#"{"cmd":"reads"}"#);
            Some(reads["waits"].clone()).filter(Value::is_object)
        });
        assert_eq!(waits, json!({"disk": 0, "block": 40, "count": 8}));
        let disk = fs::OpenOptions::new().write(true).open(place.path("disk")).unwrap();
        disk.write_all_at(&noise(99_999), 43 * 4096).unwrap();
        ask(&destination, r#"{"cmd":"reads","hold":false}"#);
        let mut arrived = vec![0; stream.bytes.len()];
        incoming.set_read_timeout(Some(DEADLINE)).unwrap();
        incoming.read_exact(&mut arrived).unwrap();
        arrived == stream.bytes
    }

    #[test]
    fn only_verification_saves_a_page_whose_block_was_overwritten() {
        assert!(survives("hold-reads"));
        assert!(!survives("hold-reads,no-verify"));
    }
}
