//! The writers and their judge on a plain file: nothing is wrong by itself, and each kind of damage
//! done to the file behind their back is found, named and counted once (negative controls).

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use semper_probe::config::Config;
use semper_probe::device::Device;
use semper_probe::ledger::Ledger;
use semper_probe::shared::LaneState;
use semper_probe::verify::verify;
use semper_probe::wakeup::Wakeup;
use semper_probe::writers::Run;
use serde_json::{Value, json};
use tempfile::TempDir;

const SPAN: u64 = 1 << 20;
const NONCE: u128 = 0xfeed_beef;

struct Bench {
    run: Run,
    block_size: u64,
    file: File,
    _folder: TempDir,
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1)); // poll interval
    }
}

fn config(path: &Path, changes: Value) -> Config {
    let mut members = json!({"device": path, "writers": 4, "span_bytes": SPAN});
    for (key, value) in changes.as_object().unwrap() {
        members[key] = value.clone();
    }
    serde_json::from_value::<Config>(members).unwrap().checked(SPAN).unwrap()
}

fn start(path: &Path, changes: Value, nonce: u128, ledger: Option<Arc<Ledger>>) -> Run {
    let config = config(path, changes);
    let device = Device::find(path.to_str().unwrap()).unwrap();
    let ledger = ledger.unwrap_or_else(|| Arc::new(config.new_ledger(1)));
    Run::start(config, device, nonce, ledger, Wakeup::new().unwrap()).unwrap()
}

fn sum(run: &Run, field: fn(&LaneState) -> u64) -> u64 {
    run.shared.lanes.lock().unwrap().iter().map(|lane| field(lane)).sum()
}

fn settled(run: &Run) -> bool {
    (0..run.shared.ledger.blocks()).all(|index| {
        let entry = run.shared.ledger.entry(index);
        entry.acked > 0 && entry.attempted > 2
    })
}

fn stop(run: &Run) {
    run.request_stop();
    wait_until("the lanes came back", || run.is_quiet());
}

impl Bench {
    /// Writers that have written every block at least twice, and were stopped.
    fn new(changes: Value) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(SPAN).unwrap();
        let run = start(&path, changes, NONCE, None);
        wait_until("every block was written twice", || settled(&run));
        stop(&run);
        let block_size = u64::from(run.shared.config.block_size);
        Self { run, block_size, file, _folder: folder }
    }

    fn read(&self, block: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.block_size as usize];
        self.file.read_exact_at(&mut bytes, block * self.block_size).unwrap();
        bytes
    }

    fn write(&self, block: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, block * self.block_size).unwrap();
    }

    /// Writes on until each of the blocks has a newer acknowledged write.
    fn outdate(&self, blocks: &[u64]) {
        let acked = |block: &u64| self.run.shared.ledger.entry(*block as usize).attempted;
        let before: Vec<u32> = blocks.iter().map(acked).collect();
        self.run.resume().unwrap();
        wait_until("the blocks were written again", || {
            blocks.iter().zip(&before).all(|(block, old)| acked(block) > *old + 2)
        });
        stop(&self.run);
    }

    fn wrong(&self) -> [u64; 4] {
        self.run.shared.wrong().counts
    }

    fn verified(&self) -> [u64; 4] {
        let report = verify(&self.run.shared);
        assert!(report.complete && report.unreadable == 0);
        self.wrong()
    }
}

#[test]
fn nothing_is_wrong_by_itself() {
    for changes in [
        json!({}),
        json!({"writers": 16, "depth": 4}),
        json!({"block_size": 512, "flush_every": 50}),
        json!({"block_size": 65536, "writers": 2}),
        json!({"mode": "write"}),
        json!({"mode": "overlap", "writers": 8, "span_bytes": 16 * 4096}),
        json!({"mode": "overlap", "writers": 32, "block_size": 512, "span_bytes": 16 * 512}),
    ] {
        let bench = Bench::new(changes.clone());
        assert_eq!(bench.verified(), [0; 4], "{changes}");
        assert_eq!(bench.run.shared.error_count.load(Ordering::Relaxed), 0, "{changes}");
        let reads = sum(&bench.run, |lane| lane.reads.load(Ordering::Relaxed));
        let verified = sum(&bench.run, |lane| lane.verified.load(Ordering::Relaxed));
        assert_eq!(reads > 0, changes["mode"] != "write", "{changes}");
        assert!(verified <= reads || changes["mode"] == "overlap");
        let writes = sum(&bench.run, |lane| lane.writes.load(Ordering::Relaxed));
        let flushes = sum(&bench.run, |lane| lane.flushes.load(Ordering::Relaxed));
        let (_, counts) = bench.run.shared.timeline.counts(0, u64::MAX >> 1);
        assert!(counts.is_empty() || counts.iter().all(|count| *count == 0));
        let now = semper_probe::clock::now_ns();
        let (_, counts) = bench.run.shared.timeline.counts(0, now);
        let total: u64 = counts.iter().map(|count| u64::from(*count)).sum();
        assert_eq!(total, writes + reads + flushes, "{changes}");
        assert_eq!(flushes > 0, !changes["flush_every"].is_null(), "{changes}");
    }
}

#[test]
fn an_older_write_put_back_is_lost() {
    let bench = Bench::new(json!({}));
    let old = bench.read(7);
    bench.outdate(&[7]);
    bench.write(7, &old);
    assert_eq!(bench.verified(), [1, 0, 0, 0]);
    let details = serde_json::to_value(bench.run.shared.wrong().details).unwrap();
    assert_eq!((&details[0]["kind"], &details[0]["block"]), (&json!("lost"), &json!(7)));
}

#[test]
fn half_a_block_is_torn() {
    let bench = Bench::new(json!({}));
    let old = bench.read(9);
    bench.outdate(&[9]);
    let new = bench.read(9);
    bench.write(9, &[&old[..2048], &new[2048..]].concat());
    assert_eq!(bench.verified(), [0, 1, 0, 0]);
}

#[test]
fn a_flipped_bit_is_torn() {
    let bench = Bench::new(json!({}));
    let mut bytes = bench.read(3);
    bytes[777] ^= 0x10;
    bench.write(3, &bytes);
    assert_eq!(bench.verified(), [0, 1, 0, 0]);
}

#[test]
fn a_zeroed_sector_is_torn_and_a_zeroed_block_foreign() {
    let bench = Bench::new(json!({}));
    let bytes = bench.read(3);
    bench.write(3, &[&bytes[..512], &[0; 512], &bytes[1024..]].concat());
    assert_eq!(bench.verified(), [0, 1, 0, 0]);
    bench.write(4, &[0; 4096]);
    assert_eq!(bench.verified(), [0, 1, 0, 1]);
}

#[test]
fn another_block_is_misplaced() {
    let bench = Bench::new(json!({}));
    // A neighbour belongs to another lane, the fourth next to the same one.
    bench.write(20, &bench.read(21));
    bench.write(30, &bench.read(34));
    assert_eq!(bench.verified(), [0, 0, 2, 0]);
}

#[test]
fn another_boot_is_foreign() {
    let bench = Bench::new(json!({}));
    let other = Bench::new(json!({}));
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("other");
    fs::write(&path, vec![0; SPAN as usize]).unwrap();
    let run = start(&path, json!({}), NONCE + 1, None);
    wait_until("every block was written twice", || settled(&run));
    stop(&run);
    let mut bytes = vec![0; 4096];
    File::open(&path).unwrap().read_exact_at(&mut bytes, 11 * 4096).unwrap();
    bench.write(11, &bytes);
    // The same boot and place, but another device: a write that went to the wrong disk.
    bench.write(12, &other.read(12));
    assert_eq!(bench.verified(), [0, 0, 1, 1]);
}

#[test]
fn a_wrong_block_counts_once_until_it_is_written_again() {
    let bench = Bench::new(json!({}));
    let old = bench.read(7);
    bench.outdate(&[7]);
    bench.write(7, &old);
    assert_eq!(bench.verified(), [1, 0, 0, 0]);
    assert_eq!(bench.verified(), [1, 0, 0, 0]);
    bench.outdate(&[7]);
    assert_eq!(bench.verified(), [1, 0, 0, 0]);
    bench.write(7, &old);
    assert_eq!(bench.verified(), [2, 0, 0, 0]);
}

#[test]
fn readers_find_damage_while_they_run() {
    let bench = Bench::new(json!({}));
    let old = bench.read(7);
    bench.outdate(&[7]);
    bench.write(7, &old);
    bench.write(20, &bench.read(21));
    // A run that begins counts for itself what an earlier one counted.
    assert_eq!(bench.verified(), [1, 0, 1, 0]);
    let path = bench.run.shared.device.path.clone();
    let ledger = Arc::clone(&bench.run.shared.ledger);
    let reader = start(&path, json!({"mode": "read"}), NONCE, Some(ledger));
    wait_until("the readers saw both", || reader.shared.wrong().counts == [1, 0, 1, 0]);
    stop(&reader);
    assert_eq!(sum(&reader, |lane| lane.writes.load(Ordering::Relaxed)), 0);
    assert_eq!(reader.shared.wrong().counts, [1, 0, 1, 0]);
}

#[test]
fn where_writes_overlap_an_outdated_one_is_lost() {
    let bench = Bench::new(json!({"mode": "overlap", "span_bytes": 16 * 4096}));
    let old = bench.read(7);
    bench.outdate(&[7]);
    assert_eq!(bench.verified(), [0; 4]);
    bench.write(7, &old);
    assert_eq!(bench.verified(), [1, 0, 0, 0]);
    bench.write(8, &bench.read(9));
    assert_eq!(bench.verified(), [1, 0, 1, 0]);
}

#[test]
fn the_first_ten_wrong_blocks_are_kept() {
    let bench = Bench::new(json!({}));
    for block in 0..25 {
        bench.write(block, &[0; 4096]);
    }
    assert_eq!(bench.verified(), [0, 0, 0, 25]);
    assert_eq!(bench.run.shared.wrong().details.len(), 10);
}

#[test]
fn a_stray_in_a_block_never_written_is_found() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![0; SPAN as usize]).unwrap();
    let run = start(&path, json!({"mode": "read"}), NONCE, None);
    stop(&run);
    let other = Bench::new(json!({}));
    let file = File::options().write(true).open(&path).unwrap();
    assert_eq!(verify(&run.shared).untouched, SPAN / 4096);
    file.write_all_at(&other.read(1), 5 * 4096).unwrap();
    verify(&run.shared);
    assert_eq!(run.shared.wrong().counts, [0, 0, 1, 0]);
}

#[test]
fn a_failing_device_is_reported_and_the_writers_go_on() {
    let bench = Bench::new(json!({"hang_s": 5.0}));
    bench.file.set_len(SPAN / 2).unwrap();
    let path = bench.run.shared.device.path.clone();
    let reader = start(&path, json!({"mode": "read"}), NONCE, None);
    let errors = || reader.shared.error_count.load(Ordering::Relaxed);
    wait_until("reads beyond the end failed", || errors() > 20);
    wait_until("others went on", || sum(&reader, |lane| lane.reads.load(Ordering::Relaxed)) > 100);
    stop(&reader);
    assert_eq!(reader.shared.errors().len(), 20);
    let report = verify(&bench.run.shared);
    assert!(!report.complete);
    assert_eq!(report.unreadable, SPAN / 2 / 4096);
    assert_eq!(bench.wrong(), [0; 4], "what cannot be read is not wrong");
}
