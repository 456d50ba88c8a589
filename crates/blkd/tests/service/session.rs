//! A spare goes on with the front end's connection: the front end of these tests never connects
//! again.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::json;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::backend::{Backend, DEADLINE, ENGINES, Site, wait_until};
use crate::machine::{Ask, Machine, Waited};

/// The option that names the session's socket.
fn session(site: &Site) -> String {
    format!("--session-socket={}", site.path("session").display())
}

/// A machine with an active backend and a spare that follows it.
fn served(site: &Site, queues: usize, options: &[&str]) -> (Machine, Backend, Backend) {
    let active = start(site, queues, options, false);
    active.wait_status("/state", &json!("listening"));
    let mut machine = Machine::new(queues, 128);
    machine.connect(&site.socket()).unwrap();
    (machine, active, follow(site, queues, options))
}

/// A spare that knows what the front end has said.
fn follow(site: &Site, queues: usize, options: &[&str]) -> Backend {
    let spare = start(site, queues, options, true);
    spare.wait_status("/session", &json!("following"));
    spare
}

fn start(site: &Site, queues: usize, options: &[&str], spare: bool) -> Backend {
    let (session, queues) = (session(site), format!("--num-queues={queues}"));
    let mut all = vec![session.as_str(), queues.as_str()];
    all.extend(options);
    all.extend(spare.then_some("--spare"));
    site.start(&all)
}

/// A message and its answer, on the connection as it is.
fn is_connected(machine: &mut Machine) -> bool {
    machine.session().get_features().is_ok()
}

#[test]
fn requests_survive_many_deaths_on_one_connection() {
    for engine in ENGINES {
        let site = Site::on_tmpfs(1 << 20);
        let (mut machine, mut active, mut spare) = served(&site, 2, &[engine]);
        for round in 0..12u8 {
            for queue in 0..2 {
                for block in 0..32u64 {
                    let sector = (block * 2 + queue) * 8;
                    machine.submit(queue as usize, &Ask::write(sector, vec![round; 4096]));
                }
            }
            // One by the signal that lets it end in order, as in an upgrade.
            if round % 4 == 3 {
                assert!(active.terminate().success());
            } else {
                active.kill();
            }
            assert_eq!(machine.wait_all(&spare), Waited::Answered);
            for block in [0, 17, 63] {
                assert_eq!(machine.ask(&spare, &Ask::read(block * 8, 4096)).data, [round; 4096]);
            }
            assert!(is_connected(&mut machine));
            let status = spare.status();
            assert_eq!(status["resumed"], json!(true));
            assert_eq!(status["counters"]["connections"], json!(0));
            active = spare;
            spare = follow(&site, 2, &[engine]);
        }
    }
}

/// The negative control: this is what the session is for.
#[test]
fn without_a_session_the_connection_ends_with_the_process() {
    let site = Site::new(1 << 20);
    let mut active = site.start(&[]);
    let mut machine = Machine::new(1, 128);
    machine.connect(&site.socket()).unwrap();
    assert!(is_connected(&mut machine));
    let spare = site.start(&["--spare"]);
    spare.wait_status("/state", &json!("spare"));
    active.kill();
    assert!(!is_connected(&mut machine));
}

/// Waits until the region says that something is in flight.
fn wait_in_flight(machine: &Machine) {
    wait_until("a request in flight", || {
        let region = &machine.inflight().unwrap().1;
        let mut entries = [0; 16 * 129];
        region.read_exact_at(&mut entries, 0).unwrap();
        entries[16..].chunks(16).any(|entry| entry[0] == 1).then_some(())
    });
}

#[test]
fn a_message_in_the_middle_of_which_a_process_dies_is_answered_by_the_next() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, spare) = served(&site, 1, &[]);
    active.fault(json!({"op": "write", "delay_ms": 3000}));
    let write = machine.submit(0, &Ask::write(8, vec![7; 4096]));
    wait_in_flight(&machine);
    let base = std::thread::scope(|scope| {
        let front_end = machine.session().clone();
        let asks = scope.spawn(move || front_end.get_vring_base(0));
        // The process waits for the write.
        std::thread::sleep(Duration::from_millis(200));
        assert!(!asks.is_finished());
        active.kill();
        asks.join().unwrap()
    });
    assert_eq!(base.unwrap(), 1);
    machine.reap();
    assert!(spare.log().contains("goes on with the front end"), "{}", spare.log());
    assert_eq!(machine.answer(write).status, 0);
    assert_eq!(spare.status()["resumed"], json!(true));
}

#[test]
fn a_spare_that_stands_still_holds_nobody_up_and_follows_again() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, spare) = served(&site, 1, &[]);
    // SAFETY: signals to a child.
    let signal = |number| unsafe { libc::kill(spare.pid() as i32, number) };
    signal(libc::SIGSTOP);
    for _ in 0..2000 {
        assert!(is_connected(&mut machine));
    }
    active.wait_status("/session", &json!("alone"));
    signal(libc::SIGCONT);
    active.wait_status("/session", &json!("followed"));
    active.kill();
    assert_eq!(machine.ask(&spare, &Ask::write(0, vec![1; 512])).status, 0);
    assert!(is_connected(&mut machine));
}

#[test]
fn a_spare_that_was_not_told_everything_has_the_front_end_connect_again() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, spare) = served(&site, 1, &[]);
    // SAFETY: signals to a child.
    let signal = |number| unsafe { libc::kill(spare.pid() as i32, number) };
    signal(libc::SIGSTOP);
    for _ in 0..2000 {
        assert!(is_connected(&mut machine));
    }
    let write = machine.submit(0, &Ask::write(0, vec![1; 512]));
    active.kill();
    signal(libc::SIGCONT);
    wait_until("the end of the connection", || (!is_connected(&mut machine)).then_some(()));
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.wait_all(&spare), Waited::Answered);
    assert_eq!(machine.answer(write).status, 0);
    assert_eq!(spare.status()["resumed"], json!(false));
}

#[test]
fn whoever_is_followed_by_a_stranger_to_the_format_serves_on() {
    let site = Site::new(1 << 20);
    let (mut machine, active, _spare) = served(&site, 1, &[]);
    // A stream socket is no spare.
    assert!(UnixStream::connect(site.path("session")).is_err());
    assert!(is_connected(&mut machine));
    assert_eq!(active.status()["session"], json!("followed"));
}

#[test]
fn a_front_end_that_is_gone_is_gone_for_the_spare_as_well() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, spare) = served(&site, 1, &[]);
    machine.disconnect();
    active.wait_status("/state", &json!("listening"));
    active.kill();
    spare.wait_status("/state", &json!("listening"));
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&spare, &Ask::write(0, vec![1; 512])).status, 0);
    assert_eq!(spare.status()["resumed"], json!(false));
}

#[test]
fn what_a_migration_logs_is_not_continued() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, spare) = served(&site, 1, &[]);
    machine.set_logging(true);
    active.kill();
    wait_until("the end of the connection", || (!is_connected(&mut machine)).then_some(()));
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&spare, &Ask::write(0, vec![1; 512])).status, 0);
}

/// A signal to a backend, which is a child.
fn signal(backend: &Backend, number: i32) {
    // SAFETY: a signal to a child that was not waited for.
    unsafe { libc::kill(backend.pid() as i32, number) };
}

#[test]
fn a_death_right_behind_an_answer_is_not_noticed() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, mut spare) = served(&site, 1, &[]);
    for _ in 0..20 {
        assert!(is_connected(&mut machine));
        active.kill();
        assert!(is_connected(&mut machine));
        assert_eq!(spare.status()["resumed"], json!(true));
        active = spare;
        spare = follow(&site, 1, &[]);
    }
}

#[test]
fn what_is_refused_is_answered_before_the_connection_ends() {
    let site = Site::new(1 << 20);
    let (mut machine, active, _spare) = served(&site, 1, &[]);
    let refused = machine.session().set_vring_num(0, 3).unwrap_err().to_string();
    assert!(refused.contains("backend internal error"), "{refused}");
    assert!(!is_connected(&mut machine));
    active.wait_status("/counters/protocol_errors", &json!(1));
}

#[test]
fn a_migration_that_was_given_up_leaves_no_trace() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, spare) = served(&site, 1, &[]);
    machine.set_logging(true);
    assert_eq!(machine.ask(&active, &Ask::write(0, vec![1; 512])).status, 0);
    machine.set_logging(false);
    active.kill();
    assert_eq!(machine.ask(&spare, &Ask::read(0, 512)).data, [1; 512]);
    assert!(is_connected(&mut machine));
    assert_eq!(spare.status()["resumed"], json!(true));
}

#[test]
fn a_postcopy_that_has_ended_leaves_no_trace() {
    let site = Site::new(1 << 20);
    let mut active = start(&site, 1, &["--incoming"], false);
    let mut machine = Machine::new(1, 64);
    machine.listen = true;
    let write = machine.submit(0, &Ask::write(0, vec![1; 512]));
    machine.connect(&site.socket()).unwrap();
    machine.place_all();
    assert_eq!(machine.wait_all(&active), Waited::Answered);
    assert_eq!(machine.answer(write).status, 0);
    let spare = follow(&site, 1, &[]);
    machine.session().postcopy_end().unwrap();
    active.kill();
    assert_eq!(machine.ask(&spare, &Ask::read(0, 512)).data, [1; 512]);
    assert!(is_connected(&mut machine));
    assert_eq!(spare.status()["resumed"], json!(true));
}

/// All memory came before the guest ran: nobody says that there will be no postcopy.
#[test]
fn a_postcopy_that_was_not_needed_leaves_no_trace() {
    let site = Site::new(1 << 20);
    let mut active = start(&site, 1, &["--incoming"], false);
    let mut machine = Machine::new(1, 64);
    machine.advise = true;
    machine.connect(&site.socket()).unwrap();
    assert_eq!(active.status()["memory"], json!("complete"));
    let spare = follow(&site, 1, &[]);
    active.kill();
    assert_eq!(machine.ask(&spare, &Ask::write(0, vec![1; 512])).status, 0);
    assert!(is_connected(&mut machine));
    assert_eq!(spare.status()["resumed"], json!(true));
}

#[test]
fn a_guest_that_has_just_begun_anew_is_served_on() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, spare) = served(&site, 1, &[]);
    assert_eq!(machine.ask(&active, &Ask::write(0, vec![1; 512])).status, 0);
    machine.session().get_vring_base(0).unwrap();
    machine.session().reset_device().unwrap();
    active.kill();
    let status = spare.wait_status("/state", &json!("connected"));
    assert_eq!(status["queues"][0]["enabled"], json!(false));
    assert!(is_connected(&mut machine));
    assert_eq!(spare.status()["resumed"], json!(true));
}

#[test]
fn memory_comes_and_goes_between_deaths() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, mut spare) = served(&site, 1, &[]);
    for plugs_in in [true, false, true] {
        if plugs_in {
            machine.add_memory().unwrap()
        } else {
            machine.remove_memory().unwrap()
        }
        active.kill();
        assert_eq!(machine.ask(&spare, &Ask::write(0, vec![1; 512])).status, 0);
        assert_eq!(spare.status()["resumed"], json!(true));
        active = spare;
        spare = follow(&site, 1, &[]);
    }
    assert!(is_connected(&mut machine));
}

#[test]
fn a_cache_that_was_switched_off_before_the_first_queue_stays_off() {
    let site = Site::new(1 << 20);
    let mut active = start(&site, 1, &[], false);
    let mut machine = Machine::new(1, 64);
    machine.track = false;
    machine.negotiate(&site.socket()).unwrap();
    let spare = follow(&site, 1, &[]);
    machine.set_write_cache(false);
    assert_eq!(active.status()["write_cache"], json!("write-through"));
    active.kill();
    // What is answered by now was said behind everything else.
    assert!(is_connected(&mut machine));
    let status = spare.status();
    assert_eq!(
        (&status["resumed"], &status["write_cache"]),
        (&json!(true), &json!("write-through"))
    );
}

/// What comes from nobody's front end: the disk is there for the next one.
#[test]
fn whoever_says_half_a_message_and_leaves_is_let_go() {
    let site = Site::new(1 << 20);
    let backend = start(&site, 1, &[], false);
    for length in [5, 12, 15] {
        let mut stranger = UnixStream::connect(site.socket()).unwrap();
        // GET_CONFIG, with a body of 32 bytes.
        let message: Vec<u8> = [24u32, 1, 32, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
        stranger.write_all(&message[..length]).unwrap();
        backend.wait_status("/state", &json!("connected"));
        drop(stranger);
        backend.wait_status("/state", &json!("listening"));
    }
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.ask(&backend, &Ask::write(0, vec![1; 512])).status, 0);
}

#[test]
fn a_spare_that_has_ended_follows_nobody() {
    let site = Site::new(1 << 20);
    let (mut machine, active, mut spare) = served(&site, 1, &[]);
    assert_eq!(active.status()["session"], json!("followed"));
    spare.kill();
    assert_eq!(active.status()["session"], json!("alone"));
    assert!(is_connected(&mut machine));
}

/// Of two spares one stood still and knows only of the process before the last.
#[test]
fn a_spare_that_missed_a_whole_process_does_not_go_on_with_what_it_knows() {
    let site = Site::new(1 << 20);
    let (mut machine, mut first, mut second) = served(&site, 1, &[]);
    let third = start(&site, 1, &[], true);
    third.wait_status("/session", &json!("following"));
    signal(&third, libc::SIGSTOP);
    first.kill();
    assert_eq!(machine.ask(&second, &Ask::write(0, vec![1; 512])).status, 0);
    assert_eq!(second.status()["resumed"], json!(true));
    // The second one hears that the queue stands still.
    machine.session().get_vring_base(0).unwrap();
    second.kill();
    signal(&third, libc::SIGCONT);
    let status = third.wait_status("/standing", &json!("held"));
    assert_eq!(status["queues"][0]["enabled"], json!(false));
    wait_until("the end of the connection", || (!is_connected(&mut machine)).then_some(()));
    let write = machine.submit(0, &Ask::write(0, vec![2; 512]));
    machine.connect(&site.socket()).unwrap();
    assert_eq!(machine.wait_all(&third), Waited::Answered);
    assert_eq!(machine.answer(write).status, 0);
}

#[test]
fn whoever_cannot_be_understood_is_asked_ever_more_rarely() {
    let site = Site::new(1 << 20);
    let active = site.start(&[]);
    active.wait_status("/state", &json!("listening"));
    let address = SocketAddrUnix::new(site.path("session")).unwrap();
    let kind = SocketType::SEQPACKET;
    let listener: OwnedFd =
        rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 4).unwrap();
    let spare = start(&site, 1, &[], true);
    // From its first attempt on.
    let (mut came, mut begin) = (0, None);
    let started = Instant::now();
    while begin.is_none_or(|first: Instant| first.elapsed() < Duration::from_secs(2)) {
        assert!(begin.is_some() || started.elapsed() < DEADLINE, "it does not come");
        let limit = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let mut ready = [PollFd::new(&listener, PollFlags::IN)];
        if poll(&mut ready, Some(&limit)).unwrap() > 0 {
            let link = rustix::net::accept(&listener).unwrap();
            rustix::net::send(&link, b"of another version", rustix::net::SendFlags::NOSIGNAL)
                .unwrap();
            came += 1;
            begin.get_or_insert_with(Instant::now);
        }
    }
    // 10 ms, 20 ms, and so on to a second.
    assert!((2..=10).contains(&came), "{came} times");
    assert!(spare.log().lines().count() < 20, "{}", spare.log());
    // Ready all the same: the front end will connect again.
    spare.wait_status("/session", &json!("seeking"));
    wait_until("a ready spare", || spare.status()["timeline_ns"]["spare_ready"].as_u64().map(drop));
}

#[test]
fn hundreds_of_queues_go_on() {
    const QUEUES: usize = 256;
    let mut site = Site::on_tmpfs(1 << 20);
    // What most systems give a service that does not ask for more.
    site.descriptors = Some(1024);
    let (mut machine, mut active, mut spare) = served(&site, QUEUES, &["--threads=4"]);
    for round in 0..2 {
        active.kill();
        for queue in 0..QUEUES {
            machine.submit(queue, &Ask::write(queue as u64 * 8, vec![round; 4096]));
        }
        assert_eq!(machine.wait_all(&spare), Waited::Answered);
        assert!(is_connected(&mut machine));
        active = spare;
        spare = follow(&site, QUEUES, &["--threads=4"]);
    }
}

#[test]
fn an_end_in_order_in_the_middle_of_a_message_is_not_noticed() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, spare) = served(&site, 1, &[]);
    active.fault(json!({"op": "write", "delay_ms": 500}));
    let write = machine.submit(0, &Ask::write(8, vec![7; 4096]));
    wait_in_flight(&machine);
    let base = std::thread::scope(|scope| {
        let front_end = machine.session().clone();
        let asks = scope.spawn(move || front_end.get_vring_base(0));
        assert!(active.terminate().success());
        asks.join().unwrap()
    });
    assert_eq!(base.unwrap(), 1);
    machine.reap();
    assert_eq!(machine.answer(write).status, 0);
    assert_eq!(spare.status()["resumed"], json!(true));
}

/// What a core file would hold is told by the kernel: "dd" is *do not dump*.
#[test]
fn neither_guest_memory_nor_the_image_gets_into_a_core_file() {
    let site = Site::on_tmpfs(1 << 20);
    let (mut machine, active, _spare) = served(&site, 1, &["--engine=mmap"]);
    assert_eq!(machine.ask(&active, &Ask::read(0, 4096)).status, 0);
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", active.pid())).unwrap();
    let (mut name, mut found) = ("", 0);
    for line in maps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let secret = name.contains("memfd:guest") || name.contains("disk.raw");
            found += usize::from(secret);
            let kept_out = flags.split(' ').any(|flag| flag == "dd");
            assert!(kept_out || !secret, "{name}");
            // The control: what is dumped by default has no such flag.
            assert!(!kept_out || !name.contains("[heap]"));
        } else if line.split(' ').next().is_some_and(|first| first.contains('-')) {
            name = line;
        }
    }
    assert!(found >= 2, "{found} mappings");
}

/// The scheduling policy of each thread, by its name.
fn policies(backend: &Backend) -> Vec<(String, i32)> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
    let each = threads.filter_map(|thread| {
        // A thread may end meanwhile.
        let stat = std::fs::read_to_string(thread.ok()?.path().join("stat")).ok()?;
        let (name, rest) = stat.split_once('(').unwrap().1.rsplit_once(')').unwrap();
        // The 41st field; the rest begins with the third.
        let policy = rest.split_whitespace().nth(38).unwrap().parse().unwrap();
        Some((name.to_owned(), policy))
    });
    each.collect()
}

#[test]
fn a_spare_hurries_until_its_guest_is_served_and_no_longer() {
    let site = Site::new(1 << 20);
    let (mut machine, mut active, spare) = served(&site, 2, &["--threads=2"]);
    // SAFETY: no memory is passed but a valid structure.
    let may = unsafe {
        let param = libc::sched_param { sched_priority: 1 };
        let own = std::thread::spawn(move || libc::sched_setscheduler(0, libc::SCHED_FIFO, &param));
        own.join().unwrap() == 0
    };
    let urgent = |backend: &Backend| -> Vec<String> {
        let urgent = policies(backend).into_iter().filter(|thread| thread.1 == libc::SCHED_FIFO);
        let mut names: Vec<String> = urgent.map(|thread| thread.0).collect();
        names.sort();
        names
    };
    assert_eq!(urgent(&active), [""; 0]);
    if !may {
        assert!(spare.log().contains("wait its turn"), "{}", spare.log());
        return;
    }
    wait_until("a spare in a hurry", || {
        (urgent(&spare) == ["queues-0", "queues-1", "semper-blkd"]).then_some(())
    });
    active.kill();
    assert_eq!(machine.ask(&spare, &Ask::write(8, vec![7; 4096])).status, 0);
    // The other thread has had nothing to do yet.
    wait_until("one thread in a hurry", || (urgent(&spare) == ["queues-1"]).then_some(()));
    let read = machine.submit(1, &Ask::read(8, 4096));
    assert_eq!(machine.wait_all(&spare), Waited::Answered);
    assert_eq!(machine.answer(read).data, [7; 4096]);
    wait_until("nobody in a hurry", || urgent(&spare).is_empty().then_some(()));
}

/// At the end of a process that has one, the kernel takes the lock of its whole memory, which the
/// thread that looks for pages may have while it waits for a processor, before it frees the image.
#[test]
fn a_process_that_no_memory_arrives_at_has_no_descriptor_for_page_faults() {
    let site = Site::new(1 << 20);
    let (mut machine, active, spare) = served(&site, 1, &[]);
    assert_eq!(machine.ask(&active, &Ask::write(8, vec![7; 4096])).status, 0);
    for backend in [&active, &spare] {
        let files = std::fs::read_dir(format!("/proc/{}/fd", backend.pid())).unwrap();
        let names = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
        let names: Vec<String> = names.map(|name| name.display().to_string()).collect();
        assert!(names.iter().any(|name| name.contains("disk.raw")), "{names:?}");
        assert!(!names.iter().any(|name| name.contains("userfaultfd")), "{names:?}");
    }
}
