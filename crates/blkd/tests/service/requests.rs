//! Every kind of request, with the statuses of VIRTIO 1.2, 5.2.6.

use std::os::unix::fs::FileExt;

use crate::backend::{Backend, ENGINES, Site};
use crate::machine::{Ask, F_EVENT_IDX, Machine, T_DISCARD, T_OUT, T_WRITE_ZEROES};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn started(size: u64, options: &[&str]) -> (Site, Backend, Machine) {
    let site = Site::new(size);
    let backend = site.start(options);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    (site, backend, machine)
}

fn all_kinds(options: &[&str]) {
    let (site, backend, mut machine) = started(1 << 20, options);
    let data: Vec<u8> = (0..8192u32).map(|i| (i * 7 + i / 512) as u8).collect();
    for pieces in [1, 2, 7, 16] {
        machine.pieces = pieces;
        let sector = 16 * pieces as u64;
        let answer = machine.ask(&backend, &Ask::write(sector, data.clone()));
        assert_eq!((answer.status, answer.written), (OK, 1));
        let answer = machine.ask(&backend, &Ask::read(sector, 8192));
        assert_eq!((answer.status, answer.written), (OK, 8193));
        assert!(answer.data == data, "{pieces} pieces, {options:?}");
    }
    assert_eq!(machine.ask(&backend, &Ask::flush()).status, OK);
    let id = machine.ask(&backend, &Ask::get_id());
    assert_eq!(
        (id.status, id.written, &id.data[..]),
        (OK, 21, &b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..])
    );

    let pieces = machine.pieces as u64;
    for (kind, flags) in [(T_WRITE_ZEROES, 0), (T_WRITE_ZEROES, 1), (T_DISCARD, 0)] {
        assert_eq!(machine.ask(&backend, &Ask::write(16 * pieces, data.clone())).status, OK);
        let zero = machine.ask(&backend, &Ask::trim(kind, 16 * pieces + 1, 3, flags));
        assert_eq!((zero.status, zero.written), (OK, 1), "kind {kind}");
        let mut expected = data.clone();
        expected[512..2048].fill(0);
        assert!(machine.ask(&backend, &Ask::read(16 * pieces, 8192)).data == expected);
    }
    assert_eq!(std::fs::metadata(&site.image).unwrap().len(), 1 << 20, "the size changed");
}

#[test]
fn all_kinds_of_requests_with_sync() {
    all_kinds(&["--engine=sync", "--serial=disk-7"]);
}

#[test]
fn all_kinds_of_requests_with_nowait() {
    all_kinds(&["--engine=nowait", "--serial=disk-7"]);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn all_kinds_of_requests_with_mmap() {
    all_kinds(&["--engine=mmap", "--serial=disk-7"]);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn mmap_and_direct_io_exclude_each_other() {
    let site = Site::new(1 << 20);
    let mut backend = site.start(&["--engine=mmap", "--direct"]);
    assert_eq!(backend.wait_exit().code(), Some(2));
    assert!(backend.log().contains("leave one of the two out"), "{}", backend.log());
}

#[test]
fn all_kinds_of_requests_with_uring() {
    all_kinds(&["--engine=uring", "--serial=disk-7"]);
}

#[test]
fn all_kinds_of_requests_with_uring_and_direct_io() {
    all_kinds(&["--engine=uring", "--serial=disk-7", "--direct"]);
}

#[test]
fn requests_out_of_range_or_unknown_fail_and_change_nothing() {
    let (site, backend, mut machine) = started(64 << 10, &[]);
    let last = 127;
    let cases = [
        (Ask::write(last, [1; 512]), OK),
        (Ask::write(last, [1; 1024]), IOERR),
        (Ask::write(last + 1, [1; 512]), IOERR),
        (Ask::read(last, 1024), IOERR),
        (Ask::read(u64::MAX, 512), IOERR),
        (Ask::read(u64::MAX / 512, 512), IOERR),
        (Ask::read(1 << 55, 512), IOERR),
        (Ask::read(0, 100), IOERR),
        (Ask::write(0, [1; 513]), IOERR),
        (Ask::trim(T_DISCARD, last, 2, 0), IOERR),
        (Ask::trim(T_DISCARD, 0, u32::MAX, 0), IOERR),
        (Ask::trim(T_DISCARD, u64::MAX, 1, 0), IOERR),
        (Ask::trim(T_DISCARD, 0, 1, 1), UNSUPPORTED),
        (Ask::trim(T_WRITE_ZEROES, 0, 1, 2), UNSUPPORTED),
        (Ask { out: vec![0; 32], ..Ask::trim(T_DISCARD, 0, 1, 0) }, IOERR),
        (Ask { out: vec![0; 8], ..Ask::trim(T_WRITE_ZEROES, 0, 1, 0) }, IOERR),
        (Ask { kind: 77, ..Ask::write(0, [1; 512]) }, UNSUPPORTED),
        (Ask { kind: T_OUT, ..Ask::flush() }, OK),
        (Ask::trim(T_DISCARD, 0, 0, 0), OK),
    ];
    for (ask, status) in cases {
        let answer = machine.ask(&backend, &ask);
        assert_eq!(answer.status, status, "{ask:?}");
        assert!(answer.data.iter().all(|&byte| byte == 0xee), "{ask:?} wrote something");
    }
    let mut expected = vec![0; 64 << 10];
    expected[127 * 512..].fill(1);
    assert!(std::fs::read(&site.image).unwrap() == expected);
}

#[test]
fn a_read_only_disk_refuses_whatever_would_change_it() {
    let site = Site::new(1 << 20);
    std::fs::write(&site.image, vec![9; 1 << 20]).unwrap();
    let backend = site.start(&["--read-only"]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    for ask in
        [Ask::write(0, [1; 512]), Ask::trim(T_DISCARD, 0, 8, 0), Ask::trim(T_WRITE_ZEROES, 0, 8, 0)]
    {
        assert_eq!(machine.ask(&backend, &ask).status, IOERR);
    }
    assert_eq!(machine.ask(&backend, &Ask::flush()).status, OK);
    assert_eq!(machine.ask(&backend, &Ask::read(0, 4096)).data, [9; 4096]);
    assert!(std::fs::read(&site.image).unwrap().iter().all(|&byte| byte == 9));
}

#[test]
fn the_last_sector_of_an_odd_file_reads_as_zeros_beyond_the_end() {
    let cached = ENGINES.iter().map(|engine| (*engine, None));
    let direct = ["--engine=sync", "--engine=uring"].map(|engine| (engine, Some("--direct")));
    for (engine, way) in cached.chain(direct) {
        let site = Site::new(1000);
        std::fs::write(&site.image, [5; 1000]).unwrap();
        let options: Vec<&str> = [engine].into_iter().chain(way).collect();
        let backend = site.start(&options);
        let mut machine = Machine::new(1, 64);
        machine.pieces = 3;
        machine.connect(&site.socket()).unwrap();
        let answer = machine.ask(&backend, &Ask::read(0, 1024));
        let mut expected = [5; 1024];
        expected[1000..].fill(0);
        assert_eq!((answer.status, answer.written), (OK, 1025));
        assert!(answer.data == expected);
        assert_eq!(machine.ask(&backend, &Ask::write(1, [6; 512])).status, OK);
        assert_eq!(machine.ask(&backend, &Ask::read(1, 512)).data, [6; 512]);
    }
}

#[test]
fn overlapping_requests_keep_their_order() {
    for &engine in ENGINES {
        let (site, backend, mut machine) = started(1 << 20, &[engine]);
        for round in 0..200u32 {
            let mut reads = Vec::new();
            // All of them at once, on two sectors.
            for n in 0..8u32 {
                let value = (round * 8 + n) as u8;
                machine.prepare(0, &Ask::write(u64::from(n % 2), vec![value; 1024]));
                reads.push((machine.prepare(0, &Ask::read(1, 512)), value));
            }
            machine.show(0);
            machine.wait_all(&backend);
            for (read, value) in reads {
                assert_eq!(machine.answer(read).data, [value; 512], "{engine}, round {round}");
            }
        }
        let mut end = [0; 512];
        std::fs::File::open(&site.image).unwrap().read_exact_at(&mut end, 512).unwrap();
        assert_eq!(end, [(199 * 8 + 7) as u8; 512]);
    }
}

#[test]
fn several_queues_and_threads_serve_side_by_side() {
    for (engine, threads) in
        [("sync", 1), ("sync", 3), ("uring", 1), ("uring", 4), ("nowait", 2), ("auto", 2)]
    {
        let site = Site::new(4 << 20);
        let engine = format!("--engine={engine}");
        let threads = format!("--threads={threads}");
        let backend = site.start(&["--num-queues=4", &engine, &threads]);
        let mut machine = Machine::new(4, 64);
        machine.features = if threads.ends_with('1') { u64::MAX } else { !F_EVENT_IDX };
        machine.connect(&site.socket()).unwrap();
        let mut tickets = Vec::new();
        for round in 0..40u64 {
            for queue in 0..4 {
                let sector = round * 4 + queue as u64;
                let value = (sector * 3 + 1) as u8;
                tickets
                    .push((machine.submit(queue, &Ask::write(sector, vec![value; 512])), sector));
            }
            if round % 8 == 7 {
                machine.wait_all(&backend);
            }
        }
        assert!(tickets.iter().all(|(ticket, _)| machine.answer(*ticket).status == OK));
        for sector in 0..160u64 {
            let value = (sector * 3 + 1) as u8;
            let read = machine.submit(sector as usize % 4, &Ask::read(sector, 512));
            machine.wait_all(&backend);
            assert_eq!(machine.answer(read).data, [value; 512]);
        }
        let status = backend.status();
        let writes: u64 = (0..4).map(|q| status["queues"][q]["writes"].as_u64().unwrap()).sum();
        assert_eq!((writes, &status["counters"]["guest_errors"]), (160, &serde_json::json!(0)));
    }
}
