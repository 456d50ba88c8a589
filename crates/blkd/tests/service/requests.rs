//! Every kind of request, with the statuses of VIRTIO 1.2, 5.2.6.

use std::os::unix::fs::FileExt;

use crate::backend::{Backend, ENGINES, Site};
use crate::machine::{
    Ask, F_EVENT_IDX, Machine, T_DISCARD, T_GET_LIFETIME, T_OUT, T_SECURE_ERASE, T_WRITE_ZEROES,
};

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

/// One path on which a request is refused: what is asked, the status, and why that one.
struct Refusal(Ask, u8, &'static str);

fn refusals() -> Vec<Refusal> {
    const LAST: u64 = 127;
    let several = |kind| {
        let mut out = Ask::trim(kind, 0, 1, 0).out;
        out.extend(Ask::trim(kind, 8, 1, 0).out);
        Ask { out, ..Ask::trim(kind, 0, 1, 0) }
    };
    let cut = |kind, bytes| Ask { out: vec![0; bytes], ..Ask::trim(kind, 0, 1, 0) };
    let range = "a range that is not on the disk, or not of sectors, is an I/O error";
    let segments = "QEMU's own devices say so to more segments than the configuration space allows";
    let form = "what is no segment cannot be carried out";
    let flags = "VIRTIO 1.2, 5.2.6.2: an unknown flag, and unmap for a discard, are not supported";
    let large = "more sectors than the configuration space allows are an I/O error, as in QEMU";
    let unknown = "VIRTIO 1.2, 5.2.6: a type that the device does not know";
    vec![
        Refusal(Ask::write(LAST, [1; 1024]), IOERR, range),
        Refusal(Ask::write(LAST + 1, [1; 512]), IOERR, range),
        Refusal(Ask::read(LAST, 1024), IOERR, range),
        Refusal(Ask::read(u64::MAX, 512), IOERR, range),
        Refusal(Ask::read(u64::MAX / 512, 512), IOERR, range),
        Refusal(Ask::read(1 << 55, 512), IOERR, range),
        Refusal(Ask::read(0, 100), IOERR, range),
        Refusal(Ask::write(0, [1; 513]), IOERR, range),
        Refusal(Ask::trim(T_DISCARD, LAST, 2, 0), IOERR, range),
        Refusal(Ask::trim(T_WRITE_ZEROES, LAST, 2, 0), IOERR, range),
        Refusal(Ask::trim(T_DISCARD, u64::MAX, 1, 0), IOERR, range),
        Refusal(Ask::trim(T_DISCARD, 0, u32::MAX, 0), IOERR, large),
        Refusal(Ask::trim(T_WRITE_ZEROES, 0, (2 << 20) + 1, 0), IOERR, large),
        Refusal(Ask::trim(T_DISCARD, 0, 1, 1), UNSUPPORTED, flags),
        Refusal(Ask::trim(T_DISCARD, 0, 1, 2), UNSUPPORTED, flags),
        Refusal(Ask::trim(T_WRITE_ZEROES, 0, 1, 2), UNSUPPORTED, flags),
        Refusal(several(T_DISCARD), UNSUPPORTED, segments),
        Refusal(several(T_WRITE_ZEROES), UNSUPPORTED, segments),
        Refusal(cut(T_DISCARD, 4096), UNSUPPORTED, segments),
        Refusal(cut(T_DISCARD, 0), IOERR, form),
        Refusal(cut(T_WRITE_ZEROES, 8), IOERR, form),
        Refusal(cut(T_WRITE_ZEROES, 24), IOERR, form),
        Refusal(Ask { kind: 77, ..Ask::write(0, [1; 512]) }, UNSUPPORTED, unknown),
        Refusal(Ask { kind: T_SECURE_ERASE, ..cut(T_DISCARD, 16) }, UNSUPPORTED, unknown),
        Refusal(Ask { kind: T_GET_LIFETIME, ..Ask::read(0, 512) }, UNSUPPORTED, unknown),
    ]
}

/// What is refused to a read-only disk alone; the rest of the table holds for it as well.
fn read_only_refusals() -> Vec<Refusal> {
    let why = "VIRTIO 1.2, 5.2.6.2: a write to a read-only disk is an I/O error";
    let writes = [
        Ask::write(0, [1; 512]),
        Ask::write(0, []),
        Ask::trim(T_DISCARD, 0, 8, 0),
        Ask::trim(T_WRITE_ZEROES, 0, 8, 0),
    ];
    writes.map(|ask| Refusal(ask, IOERR, why)).into()
}

fn is_refused(machine: &mut Machine, backend: &Backend, Refusal(ask, status, why): &Refusal) {
    let answer = machine.ask(backend, ask);
    assert_eq!((answer.status, answer.written), (*status, 1), "{ask:?}: {why}");
    assert!(answer.data.iter().all(|&byte| byte == 0xee), "{ask:?} wrote something");
}

#[test]
fn what_is_refused_is_refused_with_its_status_and_changes_nothing() {
    for engine in ENGINES {
        let (site, backend, mut machine) = started(64 << 10, &[engine]);
        assert_eq!(machine.ask(&backend, &Ask::write(127, [1; 512])).status, OK);
        refusals().iter().for_each(|refusal| is_refused(&mut machine, &backend, refusal));
        let errors = &backend.status()["queues"][0]["errors"];
        assert_eq!(*errors, serde_json::json!(refusals().len()), "each is counted");
        // Next to these, what asks for nothing is no error.
        for ask in [Ask { kind: T_OUT, ..Ask::flush() }, Ask::trim(T_DISCARD, 0, 0, 0)] {
            assert_eq!(machine.ask(&backend, &ask).status, OK, "{ask:?}");
        }
        let mut expected = vec![0; 64 << 10];
        expected[127 * 512..].fill(1);
        assert!(std::fs::read(&site.image).unwrap() == expected);
    }
}

#[test]
fn a_read_only_disk_refuses_whatever_would_change_it() {
    let site = Site::new(64 << 10);
    std::fs::write(&site.image, vec![9; 64 << 10]).unwrap();
    let backend = site.start(&["--read-only"]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    for refusal in read_only_refusals() {
        is_refused(&mut machine, &backend, &refusal);
    }
    for Refusal(ask, status, why) in refusals() {
        let changes = matches!(ask.kind, T_DISCARD | T_WRITE_ZEROES);
        let status = if changes { IOERR } else { status };
        is_refused(&mut machine, &backend, &Refusal(ask, status, why));
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
