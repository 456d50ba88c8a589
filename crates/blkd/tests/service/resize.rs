//! Disks that grow while they are served, and the front end that is told to look.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::backend::{Backend, DEADLINE, ENGINES, Site};
use crate::machine::{Ask, Machine};

const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;

fn resize(backend: &Backend, size: u64) -> Value {
    backend.control(&json!({"id": 1, "cmd": "resize", "size_bytes": size}))
}

fn capacity(machine: &mut Machine) -> u64 {
    u64::from_le_bytes(machine.config()[..8].try_into().unwrap()) * 512
}

/// Gives the device the channel on which it speaks first; our end of it.
fn channel(machine: &mut Machine) -> UnixStream {
    use vhost::vhost_user::VhostUserFrontend;
    let (ours, theirs) = UnixStream::pair().unwrap();
    machine.session().set_backend_request_fd(&theirs).unwrap();
    ours
}

/// For what is not to come.
const SOON: Duration = Duration::from_millis(500);

/// Whether the device says within that time that the configuration space changed, and nothing else.
fn told(channel: &mut UnixStream, within: Duration) -> bool {
    let mut message = [0; 12];
    channel.set_read_timeout(Some(within)).unwrap();
    match channel.read_exact(&mut message) {
        Ok(()) => {
            assert_eq!(message.to_vec(), [2u32, 1, 0].map(u32::to_ne_bytes).concat());
            true
        }
        Err(_) => false,
    }
}

#[test]
fn a_running_disk_grows_and_the_front_end_is_told() {
    for &engine in ENGINES {
        for site in [Site::new(8 * MIB), Site::on_tmpfs(8 * MIB)] {
            let backend = site.start(&[engine, "--num-queues=2"]);
            let mut machine = Machine::new(2, 64);
            machine.negotiate(&site.socket()).unwrap();
            let mut from_device = channel(&mut machine);
            assert_eq!(capacity(&mut machine), 8 * MIB);
            (0..2).for_each(|queue| machine.start(queue).unwrap());
            assert_eq!(machine.ask(&backend, &Ask::write(8, [1; 4096])).status, 0);
            let beyond = 8 * MIB / 512;
            assert_eq!(machine.ask(&backend, &Ask::read(beyond, 4096)).status, IOERR);
            let done = resize(&backend, 16 * MIB);
            assert_eq!(done["ok"], json!({"size_bytes": 16 * MIB, "told": true}), "{done}");
            assert_eq!(site.image.metadata().unwrap().len(), 16 * MIB);
            assert!(told(&mut from_device, DEADLINE), "{engine}");
            assert_eq!(capacity(&mut machine), 16 * MIB);
            assert_eq!(machine.ask(&backend, &Ask::write(beyond, [2; 4096])).status, 0);
            assert_eq!(machine.ask(&backend, &Ask::read(beyond, 4096)).data, [2; 4096]);
            assert_eq!(machine.ask(&backend, &Ask::read(8, 4096)).data, [1; 4096]);
            assert_eq!(backend.status()["size_bytes"], json!(16 * MIB));
            // The same again is no change, and nobody is told anything.
            assert_eq!(resize(&backend, 16 * MIB)["ok"]["told"], json!(true));
            assert!(!told(&mut from_device, SOON));
        }
    }
}

#[test]
fn a_successor_serves_the_new_size_and_tells_a_front_end_that_does_not_ask() {
    let site = Site::new(8 * MIB);
    let mut first = site.start(&[]);
    first.wait_status("/standing", &json!("held"));
    let second = site.start(&["--spare"]);
    second.wait_status("/standing", &json!("waiting"));
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    // Without a channel nobody is told, and the size is served all the same.
    assert_eq!(resize(&first, 16 * MIB)["ok"], json!({"size_bytes": 16 * MIB, "told": false}));
    first.kill();
    machine.disconnect();
    machine.negotiate(&site.socket()).unwrap();
    let mut from_device = channel(&mut machine);
    assert!(!told(&mut from_device, SOON), "no queue runs yet");
    machine.start(0).unwrap();
    assert!(told(&mut from_device, DEADLINE));
    assert_eq!(machine.ask(&second, &Ask::read(16 * MIB / 512 - 8, 4096)).status, 0);
    // The control: one that has read the size is not told.
    machine.disconnect();
    machine.negotiate(&site.socket()).unwrap();
    let mut from_device = channel(&mut machine);
    assert_eq!(capacity(&mut machine), 16 * MIB);
    machine.start(0).unwrap();
    assert!(!told(&mut from_device, SOON));
}

#[test]
fn nothing_is_cut_off_and_each_refusal_says_why() {
    let site = Site::new(8 * MIB);
    let backend = site.start(&["--block-size=4096"]);
    for (size, words) in [
        (4 * MIB, "never made smaller"),
        (0, "never made smaller"),
        (8 * MIB + 5, "no whole sectors"),
        (8 * MIB + 512, "no multiple of 4096"),
        (!4095, "cannot be made"),
    ] {
        let refused = resize(&backend, size);
        let message = refused["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{size}: {message}");
        assert_eq!(refused["error"]["kind"], json!("invalid"));
        assert_eq!(site.image.metadata().unwrap().len(), 8 * MIB);
        assert_eq!(backend.status()["size_bytes"], json!(8 * MIB));
    }
    // What has grown behind our back is served only up to what is asked for, or not at all.
    std::fs::OpenOptions::new().write(true).open(&site.image).unwrap().set_len(16 * MIB).unwrap();
    assert!(resize(&backend, 12 * MIB)["error"]["message"].is_string());
    assert_eq!(resize(&backend, 16 * MIB)["ok"]["size_bytes"], json!(16 * MIB));

    let other = Site::new(8 * MIB);
    let reader = other.start(&["--read-only"]);
    let refused = resize(&reader, 16 * MIB);
    assert!(refused["error"]["message"].as_str().unwrap().contains("read-only"), "{refused}");
    let spare = site.start(&["--spare"]);
    spare.wait_status("/standing", &json!("waiting"));
    let refused = resize(&spare, 32 * MIB);
    assert_eq!(refused["error"]["kind"], json!("busy"), "{refused}");
}

/// What a take-over tells: a change that the front end does not know of, and nothing else.
#[test]
fn a_front_end_that_notices_no_take_over_is_told_of_a_size_that_it_does_not_know() {
    for grows in [false, true] {
        let site = Site::new(4 * MIB);
        let session = format!("--session-socket={}", site.path("session").display());
        let mut first = site.start(&[&session]);
        first.wait_status("/state", &json!("listening"));
        let mut machine = Machine::new(1, 64);
        machine.negotiate(&site.socket()).unwrap();
        assert_eq!(machine.config().len(), 60);
        let mut from_device = channel(&mut machine);
        machine.start(0).unwrap();
        let spare = site.start(&[&session, "--spare"]);
        spare.wait_status("/session", &json!("following"));
        if grows {
            let image = std::fs::File::options().write(true).open(&site.image).unwrap();
            image.set_len(8 * MIB).unwrap();
        }
        first.kill();
        assert_eq!(machine.ask(&spare, &Ask::read(0, 512)).status, 0);
        assert_eq!(spare.status()["resumed"], json!(true));
        let within = if grows { DEADLINE } else { SOON };
        assert_eq!(told(&mut from_device, within), grows);
    }
}
