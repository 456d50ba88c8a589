//! Queues and threads: the map, its change while the disk is in use, polling, and rest.

use serde_json::{Value, json};

use crate::backend::{Backend, ENGINES, Site, wait_until};
use crate::machine::{Ask, Machine, Waited};

fn threads(backend: &Backend) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        // A thread that ends meanwhile has no name any more.
        std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()
    };
    let names = tasks.map(name).filter(|name| name.starts_with("queues-"));
    let mut names: Vec<String> = names.map(|name| name.trim().to_owned()).collect();
    names.sort();
    names
}

fn map_of(status: &Value) -> Vec<u64> {
    let queues = status["queues"].as_array().unwrap();
    queues.iter().map(|queue| queue["thread"].as_u64().unwrap()).collect()
}

#[test]
fn there_are_as_many_threads_as_the_map_names() {
    let site = Site::new(1 << 20);
    let backend = site.start(&["--num-queues=6", "--thread-map=0,0,1,1,2,2"]);
    let status = backend.status();
    assert_eq!((map_of(&status), &status["threads"]), (vec![0, 0, 1, 1, 2, 2], &json!(3)));
    assert_eq!(threads(&backend), ["queues-0", "queues-1", "queues-2"]);
    backend.rebind(&[0, 0, 0, 0, 0, 0]);
    wait_until("the end of two threads", || (threads(&backend) == ["queues-0"]).then_some(()));
    backend.rebind(&[3, 2, 1, 0, 0, 0]);
    assert_eq!(threads(&backend).len(), 4);
    assert_eq!(map_of(&backend.status()), [3, 2, 1, 0, 0, 0]);
}

#[test]
fn a_map_that_makes_no_sense_is_refused_and_changes_nothing() {
    let site = Site::new(1 << 20);
    let mut wrong = site.start(&["--num-queues=2", "--thread-map=0,2"]);
    assert_eq!(wrong.wait_exit().code(), Some(2));
    assert!(wrong.log().contains("thread 1 of the map has no queue"), "{}", wrong.log());
    let backend = site.start(&["--num-queues=2", "--thread-map=0,1"]);
    for (map, word) in [
        (json!([0]), "2"),
        (json!([0, 2]), "thread 1"),
        (json!([]), "0 queues"),
        (json!(null), "no map"),
        (json!([0, 65536]), "not a request"),
        (json!([0, -1]), "not a request"),
    ] {
        let answer = backend.control(&json!({"id": 1, "cmd": "threads", "map": map}));
        assert_eq!(answer["error"]["kind"], json!("invalid"), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(word), "{answer}");
    }
    assert_eq!(map_of(&backend.status()), [0, 1]);
}

#[test]
fn queues_move_under_load_and_nothing_is_lost() {
    for &engine in ENGINES {
        let site = Site::new(4 << 20);
        let backend = site.start(&["--num-queues=4", engine, "--thread-map=0,0,1,1"]);
        let mut machine = Machine::new(4, 64);
        machine.connect(&site.socket()).unwrap();
        let maps: [&[u16]; 4] = [&[0; 4], &[0, 1, 2, 3], &[3, 2, 1, 0], &[0, 1, 0, 1]];
        let mut tickets = Vec::new();
        for round in 0..60u64 {
            for queue in 0..4 {
                for n in 0..8 {
                    let sector = (round * 32 + queue as u64 * 8 + n) % 8192;
                    let write = Ask::write(sector, vec![(sector % 255) as u8; 512]);
                    tickets.push((machine.submit(queue, &write), sector));
                }
            }
            // While these are under way.
            backend.rebind(maps[round as usize % 4]);
            assert_eq!(machine.wait_all(&backend), Waited::Answered);
        }
        for (ticket, _) in &tickets {
            assert_eq!(machine.answer(*ticket).status, 0);
        }
        let content = std::fs::read(&site.image).unwrap();
        for (_, sector) in tickets {
            let at = sector as usize * 512;
            assert!(content[at..at + 512].iter().all(|byte| *byte == (sector % 255) as u8));
        }
        assert_eq!(backend.status()["counters"]["replayed"], json!(0), "drained, not replayed");
    }
}

/// Processor time of a process so far, in ns.
fn processor_ns(backend: &Backend) -> u64 {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap() {
        let path = task.unwrap().path().join("schedstat");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        sum += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    sum
}

#[test]
fn a_disk_at_rest_sleeps_however_long_it_may_poll() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let backend = site.start(&["--num-queues=4", engine, "--threads=4", "--poll-us=1000"]);
        let mut machine = Machine::new(4, 64);
        machine.connect(&site.socket()).unwrap();
        for n in 0..200u64 {
            assert_eq!(machine.ask(&backend, &Ask::read(n % 8, 512)).status, 0);
        }
        // Nothing is left to look for once the last looks were in vain.
        wait_until("rest", || {
            let before = processor_ns(&backend);
            std::thread::sleep(std::time::Duration::from_millis(300)); // the interval measured
            (processor_ns(&backend) - before < 300_000).then_some(())
        });
    }
}
