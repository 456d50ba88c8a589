//! What is offered, and what the guest finds in the configuration space.

use serde_json::json;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};

use crate::backend::Site;
use crate::machine::{Ask, F_BLK_RO, F_EVENT_IDX, Machine};

fn word(space: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(space[at..at + 4].try_into().unwrap())
}

#[test]
fn everything_promised_is_offered() {
    let site = Site::new((8 << 20) + 100);
    let backend = site.start(&["--num-queues=4", "--serial=SN-1"]);
    let mut machine = Machine::new(2, 64);
    machine.negotiate(&site.socket()).unwrap();
    let features = machine.session().get_features().unwrap();
    // SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES, INDIRECT_DESC,
    // EVENT_IDX, vhost-user's own, VERSION_1
    for bit in [2, 6, 9, 10, 11, 12, 13, 14, 28, 29, 30, 32] {
        assert_ne!(features & (1 << bit), 0, "feature {bit}");
    }
    assert_eq!(features & F_BLK_RO, 0);
    let protocol = machine.session().get_protocol_features().unwrap();
    assert!(protocol.contains(
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    ));
    assert_eq!(machine.session().get_queue_num().unwrap(), 4);
    assert!(machine.session().get_max_mem_slots().unwrap() >= 8);

    let space = machine.config();
    // Whole sectors: the last one is half in the file.
    assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), (8 << 20) / 512 + 1);
    assert_eq!((word(&space, 12), word(&space, 20)), (126, 512));
    assert_eq!((space[32], &space[34..36]), (1, &[4, 0][..]));
    assert!(word(&space, 36) > 0 && word(&space, 48) > 0 && space[56] == 1);
    let status = backend.wait_status("/state", &json!("connected"));
    assert_eq!((&status["serial"], &status["num_queues"]), (&json!("SN-1"), &json!(4)));
    assert_eq!(status["size_bytes"], json!((8 << 20) + 512));
}

#[test]
fn a_read_only_disk_says_so() {
    let site = Site::new(1 << 20);
    let backend = site.start(&["--read-only", "--block-size=4096"]);
    let mut machine = Machine::new(1, 64);
    machine.negotiate(&site.socket()).unwrap();
    let features = machine.session().get_features().unwrap();
    assert_ne!(features & F_BLK_RO, 0);
    assert_eq!(features & (1 << 13 | 1 << 14), 0, "a read-only disk discards nothing");
    assert_eq!(word(&machine.config(), 20), 4096);
    assert_eq!(backend.status()["read_only"], json!(true));
}

#[test]
fn features_that_were_not_offered_are_refused_and_the_backend_lives_on() {
    let site = Site::new(1 << 20);
    let mut backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.negotiate(&site.socket()).unwrap();
    // RING_PACKED
    assert!(machine.session().set_features(1 << 34).is_err());
    machine.disconnect();
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::read(0, 512)).status, 0);
    assert!(backend.is_alive());
}

#[test]
fn the_region_has_room_for_all_queues_and_strange_shapes_are_refused() {
    let site = Site::new(1 << 20);
    let _backend = site.start(&["--num-queues=2"]);
    for (queues, size, sensible) in
        [(2, 128, true), (1, 1024, true), (0, 128, false), (3, 128, false), (2, 0, false)]
    {
        let mut machine = Machine::new(1, 64);
        machine.negotiate(&site.socket()).unwrap();
        let asked = VhostUserInflight::new(0, 0, queues, size);
        match machine.session().get_inflight_fd(&asked) {
            Ok((shape, file)) => {
                assert!(sensible, "{queues} queues of {size}");
                assert!(shape.mmap_size >= u64::from(queues) * (16 + 16 * u64::from(size)));
                assert_eq!(file.metadata().unwrap().len(), shape.mmap_size);
                assert!(file.set_len(0).is_err(), "the region can be shrunk under us");
            }
            Err(error) => assert!(!sensible, "{queues} queues of {size}: {error}"),
        }
    }
}

#[test]
fn guests_without_event_idx_are_served() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.features = !F_EVENT_IDX;
    machine.connect(&site.socket()).unwrap();
    for round in 0..100u8 {
        let sector = u64::from(round);
        assert_eq!(machine.ask(&backend, &Ask::write(sector, vec![round; 512])).status, 0);
        assert_eq!(machine.ask(&backend, &Ask::read(sector, 512)).data, vec![round; 512]);
    }
}

#[test]
fn memory_can_be_added_and_taken_away_under_way() {
    use std::os::fd::AsRawFd;
    use vhost::VhostUserMemoryRegionInfo;

    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 16).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 40,
        memory_size: 1 << 16,
        userspace_addr: 1 << 44,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    for _ in 0..3 {
        machine.session().add_mem_region(&region).unwrap();
        assert_eq!(machine.ask(&backend, &Ask::write(3, [7; 512])).status, 0);
        machine.session().remove_mem_region(&region).unwrap();
        assert_eq!(machine.ask(&backend, &Ask::read(3, 512)).data, [7; 512]);
    }
    assert!(machine.session().remove_mem_region(&region).is_err());
}

#[test]
fn a_memory_region_too_many_is_refused_and_the_others_serve_on() {
    use std::os::fd::AsRawFd;
    use vhost::VhostUserMemoryRegionInfo;

    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    let limit = machine.session().get_max_mem_slots().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 16).unwrap();
    let region = |number: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: (1 << 40) + (number << 20),
        memory_size: 1 << 16,
        userspace_addr: (1 << 44) + (number << 20),
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    // One stands for the machine's own memory.
    for number in 1..limit {
        machine.session().add_mem_region(&region(number)).unwrap();
    }
    assert_eq!(machine.ask(&backend, &Ask::write(3, [7; 512])).status, 0);
    assert!(machine.session().add_mem_region(&region(limit)).is_err());
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::read(3, 512)).data, [7; 512]);
}
