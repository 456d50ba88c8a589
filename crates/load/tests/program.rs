//! The program against a real backend that is not ours: qemu-storage-daemon.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(90);

struct Backend {
    process: Child,
    folder: PathBuf,
}

impl Backend {
    /// Serves an image of 16 MiB with two queues.
    fn start(name: &str) -> Self {
        let folder =
            std::env::temp_dir().join(format!("semper-load-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (image, socket) = (folder.join("image"), folder.join("socket"));
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let process = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,filename={},node-name=disk", image.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,\
                 addr.type=unix,addr.path={}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon must be installed: make setup");
        Self { process, folder }
    }

    fn load(&self, arguments: &[&str]) -> Command {
        let mut command = load(arguments);
        command.arg("--socket").arg(self.folder.join("socket"));
        command
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.process.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Waits until the backend has worked for so long: it is under load.
    fn wait_busy(&self) {
        let deadline = Instant::now() + DEADLINE;
        let path = format!("/proc/{}/schedstat", self.process.id());
        let run_ns = || -> u64 {
            let text = fs::read_to_string(&path).unwrap();
            text.split_whitespace().next().unwrap().parse().unwrap()
        };
        let idle = run_ns();
        while run_ns() < idle + 100_000_000 {
            assert!(Instant::now() < deadline, "the backend has nothing to do");
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn load(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_semper-load"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn report(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("no report ({error}): {}", String::from_utf8_lossy(&output.stderr))
    })
}

#[test]
fn a_verified_load_is_counted_and_right() {
    let backend = Backend::start("verified");
    let pid = backend.process.id().to_string();
    let output = backend
        .load(&["--mode=mixed", "--read-percent=50", "--verify", "--flush-every=50", "--depth=8"])
        .args(["--queues=2", "--count=4000", "--warmup=0.5", "--series=10", "--pid", &pid])
        .output()
        .unwrap();
    let report = report(&output);
    assert_eq!(output.status.code(), Some(0), "{report}");
    semper_control::golden::check("load-report-verified", &report);
    assert_eq!(report["ios"], 4000);
    assert_eq!(report["hung"], 0);
    let completed = report["series"]["completed"].as_array().unwrap().iter();
    assert!(completed.filter_map(|count| count.as_u64()).sum::<u64>() > 4000, "and the warm-up");
    assert!(report["flushes"].as_u64() > Some(0));
    assert!(report["verified"]["right"].as_u64() > Some(1000));
    assert!(report["backend"]["cpu_us_per_io"].as_f64() > Some(0.0));
    assert!(report["latency_us"]["p50"].as_f64() <= report["latency_us"]["p99"].as_f64());
}

#[test]
fn one_thread_drives_several_queues() {
    let backend = Backend::start("shared");
    let arguments = ["--queues=2", "--threads=1", "--depth=4", "--count=2000", "--poll-us=20"];
    let output = backend.load(&arguments).output().unwrap();
    let report = report(&output);
    semper_control::golden::check("load-report", &report);
    assert_eq!(report["ios"], 2000);
}

#[test]
fn requests_arrive_at_the_rate_and_are_right() {
    let backend = Backend::start("rate");
    for waiting in [&["--poll-us=0"][..], &["--poll"]] {
        // Never more; as many, once this machine has the time for them.
        let mut tries = (0..10).map(|_| {
            let output = backend
                .load(&["--mode=mixed", "--verify", "--rate=2000", "--queues=2", "--depth=16"])
                .args(["--seconds=0.5", "--warmup=0.05"])
                .args(waiting)
                .output()
                .unwrap();
            let report = report(&output);
            assert_eq!(output.status.code(), Some(0), "{report}");
            assert_eq!(report["rate"], 2000.0);
            let ios = report["ios"].as_u64().unwrap();
            assert!(ios < 1300, "{report}");
            ios
        });
        assert!(tries.any(|ios| ios > 700), "fewer than were to arrive, every time");
    }
}

#[test]
fn a_request_that_had_to_wait_counts_from_its_arrival() {
    let backend = Backend::start("overload");
    let arguments = ["--rate=1e7", "--depth=1", "--seconds=0.3", "--warmup=0", "--poll"];
    let report = report(&backend.load(&arguments).output().unwrap());
    // The queue grows all the time: half of them have waited for a third of it and more.
    assert!(report["latency_us"]["p50"].as_f64() > Some(50_000.0), "{report}");
}

#[test]
fn a_backend_that_dies_under_load_is_an_error() {
    let backend = Backend::start("killed");
    let load = backend.load(&["--depth=16", "--seconds=60"]).spawn().unwrap();
    backend.wait_busy();
    backend.signal("-KILL");
    let output = load.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(report(&output)["lost"].as_str().unwrap().contains("closed the connection"));
}

#[test]
fn a_backend_that_hangs_under_load_is_an_error() {
    let backend = Backend::start("stopped");
    let load = backend.load(&["--depth=16", "--seconds=60", "--patience=3"]).spawn().unwrap();
    backend.wait_busy();
    backend.signal("-STOP");
    let output = load.wait_with_output().unwrap();
    let report = report(&output);
    assert_eq!((output.status.code(), &report["hung"]), (Some(4), &16.into()));
    assert!(report["lost"].as_str().unwrap().contains("no completion"));
}

#[test]
fn nobody_listens() {
    let output = load(&["--socket=/nonexistent/socket", "--patience=0.1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/socket"));
}

#[test]
fn wrong_usage() {
    let output = load(&["--socket=/nonexistent/socket", "--block-size=1000"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
