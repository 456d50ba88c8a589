//! Snapshots of a disk that a guest writes: real processes, with each engine.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::backend::{Backend, ENGINES, Site, wait_until};
use crate::machine::{Ask, Machine, T_DISCARD, T_WRITE_ZEROES, Waited};

/// Of an epoch record.
const SLOT: usize = 512;
/// No multiple of 4 KiB.
const SIZE: u64 = (1 << 20) + 1536;
const SECTORS: u64 = SIZE / 512;

/// Steps through 2^64 numbers (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// A disk with a guest, and what the guest has written.
struct World {
    site: Site,
    engine: &'static str,
    machine: Machine,
    disk: Vec<u8>,
    dice: Dice,
    value: u8,
}

impl World {
    fn new(site: Site, engine: &'static str, seed: u64) -> Self {
        let disk = vec![0; SIZE as usize];
        Self { site, engine, machine: Machine::new(2, 64), disk, dice: Dice(seed), value: 0 }
    }

    fn memory(&self) -> String {
        let place = fs::canonicalize(&self.site.image).unwrap();
        let name = place.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        format!("--layer-map=/dev/shm/{name}.layer")
    }

    fn start(&mut self) -> Backend {
        self.start_with(&[])
    }

    fn start_with(&mut self, environment: &[(&str, &str)]) -> Backend {
        let memory = self.memory();
        let options = [self.engine, &memory, "--num-queues=2", "--threads=2"];
        let backend = self.site.start_in(&options, environment);
        self.machine.connect(&self.site.socket()).unwrap();
        backend
    }

    /// Requests of all kinds that do not overlap, all in flight together.
    fn write(&mut self) {
        let mut at = self.dice.below(16);
        let mut queue = 0;
        while at < SECTORS {
            let most = (SECTORS - at).min(24);
            let count = 1 + self.dice.below(most);
            self.value = self.value % 250 + 1;
            let (from, to) = ((at * 512) as usize, ((at + count) * 512) as usize);
            let ask = match self.dice.below(8) {
                0 => {
                    self.disk[from..to].fill(0);
                    Ask::trim(T_WRITE_ZEROES, at, count as u32, self.dice.below(2) as u32)
                }
                _ => {
                    self.disk[from..to].fill(self.value);
                    Ask::write(at, vec![self.value; to - from])
                }
            };
            self.machine.submit(queue, &ask);
            queue = 1 - queue;
            // Blocks are not shared by requests in flight, whose order nobody promises.
            at = (at + count).next_multiple_of(8) + self.dice.below(64);
            if self.machine.pending() > 50 {
                break;
            }
        }
    }

    fn finish(&mut self, backend: &Backend) {
        assert_eq!(self.machine.wait_all(backend), Waited::Answered);
    }

    fn read(&mut self, backend: &Backend) -> Vec<u8> {
        read_all(&mut self.machine, backend)
    }

    fn check(&mut self, backend: &Backend, what: &str) {
        let got = self.read(backend);
        assert_equal(&got, &self.disk, &format!("{what}, {}", self.engine));
    }
}

fn read_all(machine: &mut Machine, backend: &Backend) -> Vec<u8> {
    machine.read_first(backend, SIZE as usize)
}

fn assert_equal(got: &[u8], wanted: &[u8], what: &str) {
    if let Some(at) = (0..wanted.len()).find(|at| got.get(*at) != Some(&wanted[*at])) {
        panic!("{what}: byte {at} of sector {} is {:?}, not {}", at / 512, got.get(at), wanted[at]);
    }
    assert_eq!(got.len(), wanted.len());
}

impl Drop for World {
    fn drop(&mut self) {
        let memory = self.memory();
        let prefix = PathBuf::from(memory.trim_start_matches("--layer-map="));
        let name = prefix.file_name().unwrap().to_str().unwrap();
        for entry in fs::read_dir("/dev/shm").unwrap().flatten() {
            if entry.file_name().to_str().is_some_and(|file| file.starts_with(name)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn ask(backend: &Backend, request: Value) -> Value {
    let answer = backend.control(&request);
    assert!(answer["ok"].is_object(), "{request}: {answer}");
    answer["ok"].clone()
}

fn refusal(backend: &Backend, request: Value) -> (String, String) {
    let error = backend.control(&request)["error"].clone();
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    (text("kind"), text("message"))
}

pub fn snapshot(backend: &Backend) -> u64 {
    let taken = ask(backend, json!({"id": 1, "cmd": "snapshot", "wait": true}));
    assert_eq!(taken["state"], json!("sealed"));
    taken["snapshot"].as_u64().unwrap()
}

fn layers(backend: &Backend) -> Value {
    ask(backend, json!({"id": 1, "cmd": "layers"}))
}

pub fn wait_layers(backend: &Backend, count: usize) {
    wait_until(&format!("{count} layers"), || {
        let told = layers(backend);
        assert!(told["last_error"].is_null(), "{told}");
        let there = told["layers"].as_array().unwrap().len();
        (there == count && told["task"].is_null()).then_some(())
    });
}

/// What another process reads of a snapshot, as it would on another host.
fn read_snapshot(site: &Site, engine: &str, id: u64, reader: &str) -> Vec<u8> {
    let elsewhere = Site::sharing(&site.image);
    let (id, reader) = (format!("--snapshot={id}"), format!("--reader={reader}"));
    let mut backend = elsewhere.start(&[engine, &id, &reader]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&elsewhere.socket()).unwrap();
    let got = read_all(&mut machine, &backend);
    assert_eq!(machine.ask(&backend, &Ask::write(0, [1; 512])).status, 1, "it is read-only");
    machine.disconnect();
    assert!(backend.terminate().success());
    got
}

#[test]
fn a_snapshot_stays_what_it_was_and_the_disk_goes_on() {
    for (n, &engine) in ENGINES.iter().enumerate() {
        for site in [Site::new(SIZE), Site::on_tmpfs(SIZE)] {
            let mut world = World::new(site, engine, n as u64);
            let mut backend = world.start();
            world.write();
            let first = snapshot(&backend);
            world.finish(&backend);
            world.check(&backend, "after a snapshot");
            let second = snapshot(&backend);
            let content = world.disk.clone();
            for _ in 0..3 {
                world.write();
                world.finish(&backend);
            }
            assert_eq!(world.machine.ask(&backend, &Ask::flush()).status, 0);
            world.check(&backend, "with two layers");
            let got = read_snapshot(&world.site, engine, second, "bonn");
            assert_equal(&got, &content, &format!("snapshot {second}, {engine}"));

            backend.kill();
            world.machine.disconnect();
            let backend = world.start();
            world.check(&backend, "after a death");
            let got = read_snapshot(&world.site, engine, second, "bonn");
            assert_equal(&got, &content, &format!("snapshot {second} after a death, {engine}"));

            ask(&backend, json!({"id": 1, "cmd": "merge", "through": second}));
            wait_layers(&backend, 1);
            world.check(&backend, "after a merge");
            let gone = Site::sharing(&world.site.image);
            let gone = gone.start(&[&format!("--snapshot={first}"), "--reader=bonn"]).wait_exit();
            assert_eq!(gone.code(), Some(4));
            world.write();
            world.finish(&backend);
            world.check(&backend, "with one layer");
        }
    }
}

#[test]
fn what_a_layer_on_tmpfs_has_discarded_takes_no_memory_when_it_is_read() {
    use std::os::unix::fs::MetadataExt;
    let mut world = World::new(Site::on_tmpfs(SIZE), "--engine=mmap", 1);
    let mut folder = fs::canonicalize(&world.site.image).unwrap().into_os_string();
    folder.push(".layers");
    let taken = || -> u64 {
        let files = fs::read_dir(&folder).unwrap().flatten();
        files.map(|file| file.metadata().unwrap().blocks()).sum()
    };
    let mut backend = world.start();
    snapshot(&backend);
    let empty = taken();
    for block in 0..16 {
        assert_eq!(world.machine.ask(&backend, &Ask::write(block * 8, [1; 4096])).status, 0);
    }
    // The control: what is written takes memory.
    assert!(taken() >= empty + 128, "{empty}, {}", taken());
    assert_eq!(world.machine.ask(&backend, &Ask::trim(T_DISCARD, 0, 128, 0)).status, 0);
    let discarded = taken();
    assert!(discarded < empty + 64, "{empty}, {discarded}");
    world.check(&backend, "after a discard");
    assert_eq!(taken(), discarded);
    // The next process is not told which blocks are holes.
    assert!(backend.terminate().success());
    world.machine.disconnect();
    let backend = world.start();
    let discarded = taken();
    let end = Instant::now() + Duration::from_secs(1);
    while Instant::now() < end {
        world.check(&backend, "by the next process");
    }
    assert_eq!(taken(), discarded);
}

#[test]
fn what_a_layer_has_not_is_discarded_as_well() {
    let mut world = World::new(Site::new(SIZE), "--engine=sync", 1);
    let backend = world.start();
    let ones = Ask::write(0, vec![1; 12 << 10]);
    assert_eq!(world.machine.ask(&backend, &ones).status, 0);
    snapshot(&backend);
    let discard = Ask::trim(T_DISCARD, 4, 16, 0);
    assert_eq!(world.machine.ask(&backend, &discard).status, 0);
    world.disk[..12 << 10].fill(1);
    // Whole blocks of 4 KiB; the parts of others are left.
    world.disk[4096..8192].fill(0);
    world.check(&backend, "after a discard");
    assert_eq!(world.machine.ask(&backend, &Ask::write(9, [2; 512])).status, 0);
    world.disk[9 * 512..10 * 512].fill(2);
    world.check(&backend, "after a write into it");
}

#[test]
fn a_pin_stands_against_a_merge_and_a_full_chain_against_a_snapshot() {
    let mut world = World::new(Site::new(SIZE), "--engine=nowait", 2);
    let backend = world.start();
    world.write();
    world.finish(&backend);
    let first = snapshot(&backend);
    let pin = |cmd: &str| json!({"id": 1, "cmd": cmd, "snapshot": first, "reader": "bonn"});
    assert_eq!(ask(&backend, pin("pin"))["pins"][0]["reader"], json!("bonn"));
    (0..3).for_each(|_| _ = snapshot(&backend));
    let (kind, message) = refusal(&backend, json!({"id": 1, "cmd": "snapshot"}));
    assert_eq!(kind, "full", "{message}");
    let merge = json!({"id": 1, "cmd": "merge", "through": first + 1});
    let (kind, message) = refusal(&backend, merge.clone());
    assert!(kind == "pinned" && message.contains("bonn"), "{message}");
    let resize = json!({"id": 1, "cmd": "resize", "size_bytes": 2 << 20});
    let (kind, message) = refusal(&backend, resize);
    assert!(kind == "invalid" && message.contains("merge them all"), "{message}");
    assert_eq!(backend.status()["size_bytes"], json!(SIZE));
    assert_eq!(fs::metadata(&world.site.image).unwrap().len(), SIZE);
    assert_eq!(ask(&backend, pin("unpin"))["pins"], json!([]));
    assert_eq!(ask(&backend, merge)["merging"], json!([first, first + 1]));
    wait_layers(&backend, 2);
    world.check(&backend, "after two merges");
    let (kind, _) = refusal(&backend, pin("pin"));
    assert_eq!(kind, "invalid", "it is not there any more");
}

#[test]
fn what_cannot_be_is_refused_with_its_cause() {
    let site = Site::new(SIZE);
    let backend = site.start(&[]);
    let (kind, message) = refusal(&backend, json!({"id": 1, "cmd": "snapshot"}));
    assert!(kind == "invalid" && message.contains("--layer-map"), "{message}");
    let (kind, _) = refusal(&backend, json!({"id": 1, "cmd": "quiesce", "for_ms": 60_000}));
    assert_eq!(kind, "invalid");
    drop(backend);
    let mut world = World::new(site, "--engine=sync", 3);
    let mut backend = world.start();
    world.write();
    snapshot(&backend);
    world.finish(&backend);
    assert!(backend.terminate().success());
    world.machine.disconnect();
    drop(backend);

    let memory = world.memory();
    let refused = |words: &str, options: &[&str]| {
        let mut backend = world.site.start(options);
        let status = backend.wait_exit();
        assert_eq!(status.code(), Some(4), "{}", backend.log());
        assert!(backend.log().contains(words), "{}", backend.log());
    };
    refused("read-only", &["--read-only"]);
    let beside = |name: &str| {
        let mut path = fs::canonicalize(&world.site.image).unwrap().into_os_string();
        path.push(".layers");
        PathBuf::from(path).join(name)
    };
    let away = world.site.path("away");
    for (ending, words) in [("record", "not all of the disk"), ("0-1", "missing")] {
        fs::rename(beside(ending), &away).unwrap();
        refused(words, &[&memory]);
        fs::rename(&away, beside(ending)).unwrap();
    }
    let file = fs::File::options().write(true).open(beside("0-1")).unwrap();
    let whole = file.metadata().unwrap().len();
    file.set_len(whole - 4096).unwrap();
    refused("cut off", &[&memory]);
    file.set_len(whole).unwrap();
    refused("another's", &[&memory]);
    let record = fs::read(beside("record")).unwrap();
    let file = fs::File::options().write(true).open(beside("record")).unwrap();
    file.write_all_at(&[9], 100).unwrap();
    file.write_all_at(&[9], 4096 + 100).unwrap();
    refused("damaged", &[&memory]);
    fs::write(beside("record"), record).unwrap();
}

#[test]
fn several_disks_stand_still_together_and_not_for_ever() {
    let mut world = World::new(Site::new(SIZE), "--engine=sync", 4);
    let backend = world.start();
    ask(&backend, json!({"id": 1, "cmd": "quiesce", "for_ms": 2000}));
    let write = world.machine.submit(0, &Ask::write(0, [1; 512]));
    snapshot(&backend);
    world.machine.reap();
    assert!(!world.machine.is_answered(write), "it waits");
    let resumed = ask(&backend, json!({"id": 1, "cmd": "resume"}));
    assert_eq!(resumed["held"], json!(true));
    world.finish(&backend);
    ask(&backend, json!({"id": 1, "cmd": "quiesce", "for_ms": 1}));
    world.machine.submit(0, &Ask::write(0, [2; 512]));
    world.finish(&backend);
    assert_eq!(ask(&backend, json!({"id": 1, "cmd": "resume"}))["held"], json!(false));
}

/// Whether a thread of the process is in a sleep, as a request that takes its time is.
fn sleeps(pid: u32) -> bool {
    let sleep = format!("{} ", libc::SYS_clock_nanosleep);
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let calls = threads.filter_map(|thread| fs::read_to_string(thread.path().join("syscall")).ok());
    calls.into_iter().any(|call| call.starts_with(&sleep))
}

/// The pause has a bound: storage that does not answer costs the snapshot, and no request.
#[test]
fn a_snapshot_gives_up_when_requests_do_not_end() {
    let mut world = World::new(Site::new(SIZE), "--engine=sync", 5);
    let backend = world.start();
    let kinds = [
        json!({"id": 1, "cmd": "snapshot", "within_ms": 50}),
        json!({"id": 1, "cmd": "quiesce", "for_ms": 50}),
    ];
    for (n, request) in kinds.into_iter().enumerate() {
        backend.fault(json!({"op": "write", "delay_ms": 4000, "limit": 1}));
        let slow = world.machine.submit(0, &Ask::write(0, [1 + n as u8; 512]));
        wait_until("the write takes its time", || sleeps(backend.pid()).then_some(()));
        let began = Instant::now();
        let (kind, message) = refusal(&backend, request);
        // By its own bound, and not by the longest that may be asked for.
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert_eq!(kind, "slow", "{message}");
        assert!(message.contains("queue 0") && message.contains("storage"), "{message}");
        world.machine.reap();
        assert!(!world.machine.is_answered(slow), "it was the write that was waited for");
        // The other queue goes on at once, and this one when its write has ended.
        let other = world.machine.submit(1, &Ask::write(64, [7; 512]));
        wait_until("the other queue", || {
            world.machine.reap();
            world.machine.is_answered(other).then_some(())
        });
        world.finish(&backend);
        let told = layers(&backend);
        assert!(told["layers"] == json!([]) && told["task"].is_null(), "{told}");
        backend.fault(Value::Null);
        world.disk[..512].fill(1 + n as u8);
        world.disk[64 * 512..65 * 512].fill(7);
        world.check(&backend, "after a snapshot that was given up");
    }
    // The control: without the delay there is one.
    assert!(snapshot(&backend) > 0);
    world.write();
    world.finish(&backend);
    world.check(&backend, "after a snapshot");
    drop(backend);
    world.machine.disconnect();
    let backend = world.start();
    world.check(&backend, "after a death");
}

#[test]
fn a_snapshot_is_undone_as_if_it_had_never_been_or_given_up() {
    for &engine in ENGINES {
        let mut world = World::new(Site::on_tmpfs(SIZE), engine, 6);
        let backend = world.start();
        world.write();
        world.finish(&backend);
        let kept = snapshot(&backend);
        world.write();
        world.finish(&backend);
        ask(&backend, json!({"id": 1, "cmd": "quiesce", "for_ms": 2000}));
        let taken = ask(&backend, json!({"id": 1, "cmd": "snapshot"}))["snapshot"].clone();
        let undone = ask(&backend, json!({"id": 1, "cmd": "undo", "snapshot": taken}));
        assert_eq!(undone["taken_back"], json!(true));
        ask(&backend, json!({"id": 1, "cmd": "resume"}));
        wait_layers(&backend, 1);
        world.write();
        world.finish(&backend);
        world.check(&backend, "after an undone snapshot");
        let (kind, _) = refusal(&backend, json!({"id": 1, "cmd": "undo", "snapshot": taken}));
        assert_eq!(kind, "invalid", "there is none any more");
        // With blocks it stays, and nobody wants its snapshot.
        let taken = snapshot(&backend);
        assert!(taken > kept);
        world.write();
        world.finish(&backend);
        let undone = ask(&backend, json!({"id": 1, "cmd": "undo", "snapshot": taken}));
        assert_eq!(undone["taken_back"], json!(false));
        let told = layers(&backend);
        let state = |n: usize| told["layers"][n]["state"].clone();
        assert_eq!((state(0), state(1)), (json!("sealed"), json!("lapsed")), "{told}");
        world.check(&backend, "after a snapshot that was given up");
    }
}

/// What `--merge` comes to.
fn merge_offline(world: &World, how: &str, environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = crate::backend::program();
    let output = command
        .arg(crate::backend::blk_file(&world.site.image))
        .args([world.memory(), format!("--merge={how}")])
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text)
}

#[test]
fn the_last_layer_goes_into_the_image_of_a_disk_that_nobody_serves() {
    for (n, &engine) in ENGINES.iter().enumerate() {
        let mut world = World::new(Site::new(SIZE), engine, 40 + n as u64);
        let mut backend = world.start();
        for _ in 0..3 {
            world.write();
            world.finish(&backend);
            snapshot(&backend);
        }
        world.write();
        world.finish(&backend);
        let (code, said) = merge_offline(&world, "all", &[]);
        assert_eq!(code, Some(3), "it is served: {said}");
        // Killed: what was not flushed is in the memory of the host.
        backend.kill();
        world.machine.disconnect();
        let (code, said) = merge_offline(&world, "unwanted", &[]);
        assert!(code == Some(0) && said.contains("{\"layers\":3,\"merged\":[]}"), "{said}");
        let (code, said) = merge_offline(&world, "1", &[]);
        assert!(code == Some(0) && said.contains("{\"layers\":2,\"merged\":[1]}"), "{said}");
        let (code, said) = merge_offline(&world, "all", &[]);
        assert!(code == Some(0) && said.contains("{\"layers\":0,\"merged\":[2,3]}"), "{said}");
        // The image alone is the disk, and no slot of its epoch record is of the version of layers.
        assert_equal(&fs::read(&world.site.image).unwrap(), &world.disk, engine);
        let record = fs::read(world.site.image.with_extension("raw.epoch")).unwrap();
        assert!(record.chunks(SLOT).all(|slot| slot[8] == 1), "{record:?}");
        let backend = world.start();
        world.check(&backend, "after merges while it was not served");
        assert_eq!(snapshot(&backend), 4);
        world.write();
        world.finish(&backend);
        world.check(&backend, "after another snapshot");
    }
}

#[test]
fn what_somebody_reads_is_not_merged_and_the_rest_is() {
    let mut world = World::new(Site::new(SIZE), "--engine=sync", 50);
    let mut backend = world.start();
    world.write();
    world.finish(&backend);
    let first = snapshot(&backend);
    ask(&backend, json!({"id": 1, "cmd": "pin", "snapshot": first, "reader": "bonn"}));
    assert!(backend.terminate().success());
    world.machine.disconnect();
    let (code, said) = merge_offline(&world, "all", &[]);
    assert!(code == Some(4) && said.contains("bonn"), "{said}");
    let backend = world.start();
    world.check(&backend, "after a merge that was refused");
    ask(&backend, json!({"id": 1, "cmd": "unpin", "snapshot": first, "reader": "bonn"}));
    drop(backend);
    world.machine.disconnect();
    let (code, said) = merge_offline(&world, "all", &[]);
    assert_eq!(code, Some(0), "{said}");
    assert_equal(&fs::read(&world.site.image).unwrap(), &world.disk, "the image");
}

#[cfg(feature = "crash-points")]
#[test]
fn nothing_is_lost_when_a_merge_of_a_disk_that_is_not_served_dies() {
    let acts = [
        "flush-record",
        "enter-merging",
        "copy",
        "flush-image",
        "enter-dropped",
        "unchain",
        "remove-files",
        "enter-gone",
    ];
    for (n, act) in acts.into_iter().enumerate() {
        let engine = ENGINES[n % ENGINES.len()];
        let mut world = World::new(Site::new(SIZE), engine, 60 + n as u64);
        let mut backend = world.start();
        for _ in 0..2 {
            world.write();
            world.finish(&backend);
            snapshot(&backend);
        }
        world.write();
        world.finish(&backend);
        backend.kill();
        world.machine.disconnect();
        let die = [("SEMPER_DIE_AFTER", act)];
        // Twice: also in the merge of the last layer.
        assert_eq!(merge_offline(&world, "1", &die).0, None, "{act}");
        assert_eq!(merge_offline(&world, "1", &[]).0, Some(0), "{act}");
        assert_eq!(merge_offline(&world, "all", &die).0, None, "{act}");
        if n % 2 == 0 {
            // Served, and written, before the merge goes on.
            let mut backend = world.start();
            world.check(&backend, act);
            world.write();
            world.finish(&backend);
            world.check(&backend, act);
            backend.kill();
            world.machine.disconnect();
        }
        let (code, said) = merge_offline(&world, "all", &[]);
        assert_eq!(code, Some(0), "{act}: {said}");
        assert_equal(&fs::read(&world.site.image).unwrap(), &world.disk, act);
    }
}

/// Snapshots, merges and SIGKILL at any instant, while requests are in flight.
#[test]
fn nothing_is_lost_whenever_the_process_dies() {
    for (n, &engine) in ENGINES.iter().enumerate() {
        let mut world = World::new(Site::new(SIZE), engine, 100 + n as u64);
        let mut told: Option<(u64, Vec<u8>)> = None;
        for round in 0..12 {
            let mut backend = world.start();
            world.finish(&backend);
            world.check(&backend, &format!("round {round}"));
            if let Some((id, content)) = told.take() {
                let got = read_snapshot(&world.site, engine, id, "bonn");
                assert_equal(&got, &content, &format!("snapshot {id}, {engine}"));
                ask(&backend, json!({"id": 1, "cmd": "merge", "through": id}));
            } else if world.dice.below(2) == 0 {
                let before = world.disk.clone();
                let taken = backend.control(&json!({"id": 1, "cmd": "snapshot", "wait": true}));
                told = taken["ok"]["snapshot"].as_u64().map(|id| (id, before));
            }
            world.write();
            let request = if world.dice.below(2) == 0 { "snapshot" } else { "merge" };
            backend.control(&json!({"id": 1, "cmd": request}));
            let pause = std::time::Duration::from_micros(world.dice.below(20_000));
            std::thread::sleep(pause); // poll interval: the instant of the death
            backend.kill();
            world.machine.disconnect();
        }
    }
}

#[cfg(feature = "crash-points")]
#[test]
fn nothing_is_lost_at_any_named_point() {
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
    for (n, act) in ACTS.into_iter().enumerate() {
        let engine = ENGINES[n % ENGINES.len()];
        let mut world = World::new(Site::new(SIZE), engine, 200 + n as u64);
        let mut backend = world.start_with(&[("SEMPER_DIE_AFTER", act)]);
        world.write();
        // Without an answer where the process dies before it.
        let request = |cmd: &str| json!({"id": 1, "cmd": cmd, "wait": true, "through": 1});
        for cmd in ["snapshot", "snapshot", "merge"] {
            let _ = backend.try_control(&request(cmd));
        }
        backend.wait_exit();
        world.machine.disconnect();
        let backend = world.start();
        world.finish(&backend);
        world.check(&backend, act);
        wait_until("the end of what was begun", || {
            let told = layers(&backend);
            let opened = told["layers"].to_string().contains("\"opened\"");
            (told["task"].is_null() && !opened).then_some(())
        });
        world.check(&backend, act);
        snapshot(&backend);
        world.write();
        world.finish(&backend);
        world.check(&backend, act);
    }
}
