//! Disks whose storage has larger blocks than the guest: loop devices with sectors of 4,096 bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;

use semper_testbed::LoopDevice;

use crate::backend::{Backend, ENGINES, Site};
use crate::machine::{Ask, Machine, T_DISCARD, T_WRITE_ZEROES};

const OK: u8 = 0;
const SIZE: u64 = 1 << 20;
const SECTORS: u64 = SIZE / 512;

/// A disk on a device with large sectors, and what is behind the device.
struct Large {
    site: Site,
    device: LoopDevice,
}

impl Large {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("large").tempdir_in("/tmp").unwrap();
        let file = dir.path().join("behind.raw");
        File::create(&file).unwrap().set_len(SIZE).unwrap();
        let device = LoopDevice::new(&file, 4096);
        let site = Site::on(dir, device.node.clone());
        Self { site, device }
    }

    fn fill(&self, byte: u8) {
        std::fs::write(&self.device.node, vec![byte; SIZE as usize]).unwrap();
    }

    fn content(&self) -> Vec<u8> {
        let device = File::open(&self.device.node).unwrap();
        let mut content = vec![0; SIZE as usize];
        device.read_exact_at(&mut content, 0).unwrap();
        content
    }
}

/// Every engine through the page cache, and around it those that can.
fn ways() -> Vec<Vec<&'static str>> {
    let cached = ENGINES.iter().map(|engine| vec![*engine]);
    let direct = ["--engine=sync", "--engine=nowait", "--engine=uring"];
    cached.chain(direct.map(|engine| vec![engine, "--direct"])).collect()
}

fn block_size(machine: &mut Machine) -> u32 {
    u32::from_le_bytes(machine.config()[20..24].try_into().unwrap())
}

fn started(site: &Site, options: &[&str], queues: usize) -> (Backend, Machine) {
    let backend = site.start(options);
    let mut machine = Machine::new(queues, 64);
    machine.connect(&site.socket()).unwrap();
    (backend, machine)
}

/// Pseudo-random numbers, the same ones in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// The guest sees sectors of 512 bytes wherever its disk is, and every request for them does what
/// it does on any disk; of a discard, the parts of blocks at its ends are kept.
#[test]
fn requests_for_parts_of_blocks_do_what_they_do_on_any_disk() {
    for options in ways() {
        let large = Large::new();
        large.fill(0x77);
        let (backend, mut machine) = started(&large.site, &options, 1);
        assert_eq!(block_size(&mut machine), 512);
        assert_eq!(machine.config()[24], 3, "eight sectors to a block of the storage");
        let mut expected = vec![0x77; SIZE as usize];
        let mut numbers = Numbers(0x5eed_0001);
        for round in 0..300u64 {
            // In a few blocks, so that they meet.
            let sector = numbers.below(60);
            let sectors = 1 + numbers.below(24);
            let range = (sector * 512) as usize..((sector + sectors) * 512) as usize;
            machine.pieces = 1 + numbers.below(3) as usize;
            match numbers.below(4) {
                0 => {
                    let value = round as u8;
                    let ask = Ask::write(sector, vec![value; range.len()]);
                    assert_eq!(machine.ask(&backend, &ask).status, OK, "{options:?} {ask:?}");
                    expected[range].fill(value);
                }
                1 => {
                    let ask = Ask::trim(T_WRITE_ZEROES, sector, sectors as u32, round as u32 % 2);
                    assert_eq!(machine.ask(&backend, &ask).status, OK, "{options:?} {ask:?}");
                    expected[range].fill(0);
                }
                2 => {
                    let ask = Ask::trim(T_DISCARD, sector, sectors as u32, 0);
                    assert_eq!(machine.ask(&backend, &ask).status, OK, "{options:?} {ask:?}");
                    let (first, last) = (range.start.next_multiple_of(4096), range.end & !4095);
                    if first < last {
                        expected[first..last].fill(0);
                    }
                }
                _ => {
                    let answer = machine.ask(&backend, &Ask::read(sector, range.len()));
                    assert!(answer.data == expected[range], "{options:?}, round {round}");
                }
            }
        }
        assert_eq!(machine.ask(&backend, &Ask::flush()).status, OK);
        assert_eq!(backend.status()["counters"]["host_errors"], serde_json::json!(0));
        assert!(large.content() == expected, "{options:?}");
    }
}

/// Requests of several threads write different sectors of one block, and none is lost.
#[test]
fn writes_of_different_sectors_of_a_block_by_several_threads_are_all_kept() {
    for engine in ["--engine=sync", "--engine=uring"] {
        let large = Large::new();
        let options = ["--direct", engine, "--num-queues=4", "--threads=4"];
        let (backend, mut machine) = started(&large.site, &options, 4);
        for round in 0..100u8 {
            for sector in 0..32u64 {
                let ask = Ask::write(sector, vec![round ^ sector as u8; 512]);
                machine.prepare(sector as usize % 4, &ask);
            }
            // And whole blocks beside them.
            machine.prepare(0, &Ask::write(32 + 8 * u64::from(round % 4), vec![round; 4096]));
            (0..4).for_each(|queue| machine.show(queue));
            machine.wait_all(&backend);
            let content = large.content();
            for sector in 0..32usize {
                let found = &content[sector * 512..][..512];
                assert_eq!(found, [round ^ sector as u8; 512], "{engine} {round} {sector}");
            }
        }
    }
}

/// The node of a device is on a tmpfs, and the device is not: nothing is written to it through a
/// mapping, and `direct` goes around the page cache.
#[test]
fn a_device_is_not_taken_for_a_file_in_memory() {
    let large = Large::new();
    for (options, engine) in [
        (vec!["--direct"], "uring"),
        #[cfg(target_arch = "x86_64")]
        (vec![], "mmap"),
    ] {
        let (backend, mut machine) = started(&large.site, &options, 1);
        assert_eq!(backend.status()["engine"], serde_json::json!(engine), "{options:?}");
        assert_eq!(machine.ask(&backend, &Ask::write(0, [1; 4096])).status, OK);
    }
    let mut refused = large.site.start(&["--direct", "--engine=mmap"]);
    assert_eq!(refused.wait_exit().code(), Some(2));
}

/// A table that was made for blocks of 4,096 bytes says so; what the user says counts more.
#[test]
fn the_block_size_is_the_images_own() {
    let table = |at: usize| {
        let mut bytes = vec![0; SIZE as usize];
        bytes[at..at + 8].copy_from_slice(b"EFI PART");
        bytes
    };
    let large = Large::new();
    let small = Site::new(SIZE);
    for (at, options, expected) in [
        (512, vec![], 512),
        (4096, vec![], 4096),
        (4096, vec!["--direct", "--engine=uring"], 4096),
        (512, vec!["--direct", "--engine=uring"], 512),
        (4096, vec!["--block-size=512"], 512),
        (512, vec!["--block-size=4096"], 4096),
    ] {
        for site in [&large.site, &small] {
            let file = File::options().write(true).open(&site.image).unwrap();
            file.write_all_at(&table(at), 0).unwrap();
            file.sync_all().unwrap();
            let (backend, mut machine) = started(site, &options, 1);
            assert_eq!(block_size(&mut machine), expected, "{at} {options:?}");
            assert_eq!(machine.ask(&backend, &Ask::read(SECTORS - 1, 512)).data, [0; 512]);
        }
    }
}

#[test]
fn a_size_that_does_not_suit_is_named_with_what_to_do() {
    let refused = |site: &Site, options: &[&str]| {
        let mut backend = site.start(options);
        assert_eq!(backend.wait_exit().code(), Some(4), "{options:?}");
        backend.log()
    };
    let site = Site::new(1_000_448);
    let said = refused(&site, &["--block-size=4096"]);
    assert!(
        said.contains(
            "has 1000448 bytes, which is no multiple of 4096, the block size of its guest; \
             make it larger (truncate --size=1003520), or give it blocks of 512 bytes"
        ),
        "{said}"
    );
    let said = refused(&site, &["--block-size=1000"]);
    assert!(said.contains("block size 1000 is none that a disk can have; give a power"), "{said}");
    assert!(refused(&site, &["--block-size=131072"]).contains("from 512 to 65536"));
}
