//! Death at every named point, for real: the process kills itself there, the next one recovers.

use std::collections::HashMap;

use semper_inflight::Point;
use serde_json::json;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq as Request, VhostUserConfigFlags};

use crate::backend::{Backend, Site};
use crate::machine::{Ask, Machine, Ticket, Waited};

/// One process' death: the point, and at which of its passages.
type Death = (Point, u32);

/// A load that keeps the whole life cycle busy, and what must come of it.
struct Load {
    writes: Vec<(Ticket, u64, u8)>,
    reads: Vec<(Ticket, u8)>,
    disk: HashMap<u64, u8>,
    next: u8,
}

impl Load {
    fn new() -> Self {
        Self { writes: Vec::new(), reads: Vec::new(), disk: HashMap::new(), next: 1 }
    }

    /// Sixteen requests on five blocks: the first five may be in flight together.
    fn submit(&mut self, machine: &mut Machine) {
        for n in 0..16u64 {
            let sector = n % 5 * 8;
            if n % 4 == 3 {
                let expected = self.disk.get(&sector).copied().unwrap_or(0);
                self.reads.push((machine.prepare(0, &Ask::read(sector, 2048)), expected));
            } else {
                let value = self.next;
                self.next = self.next.wrapping_add(1);
                let ticket = machine.prepare(0, &Ask::write(sector, vec![value; 2048]));
                self.disk.insert(sector, value);
                self.writes.push((ticket, sector, value));
            }
        }
        machine.show(0);
    }

    /// Every request was answered once (the machine sees to that) and did what it should.
    fn judge(&mut self, machine: &mut Machine, backend: &Backend) {
        for (ticket, sector, value) in self.writes.drain(..) {
            let answer = machine.answer(ticket);
            assert_eq!((answer.status, answer.written), (0, 1), "write of {value} to {sector}");
        }
        for (ticket, earliest) in self.reads.drain(..) {
            let answer = machine.answer(ticket);
            assert_eq!((answer.status, answer.written), (0, 2049));
            // Whole, and not older than what was there when it was submitted. A later write that
            // was in progress with it may have been first: the disk promises no more.
            let value = answer.data[0];
            assert!(answer.data.iter().all(|&byte| byte == value), "a torn read");
            assert!(value >= earliest, "read {value}, but {earliest} was there before");
        }
        for (&sector, &value) in &self.disk {
            let answer = machine.ask(backend, &Ask::read(sector, 2048));
            assert_eq!(answer.data, vec![value; 2048], "sector {sector}");
        }
    }
}

/// One process after the other dies at its point; the last one finishes everything.
fn survives(engine: &str, deaths: &[Death]) {
    let site = Site::new(1 << 20);
    let log = site.path("deaths");
    let log = log.to_str().unwrap();
    let engine = format!("--engine={engine}");
    let mut machine = Machine::new(1, 64);
    let mut load = Load::new();
    for (number, (point, passage)) in deaths.iter().enumerate() {
        let at = format!("{}:{passage}:{}", point.name(), number + 1);
        let environment = [("SEMPER_DIE_AT", at.as_str()), ("SEMPER_DIE_LOG", log)];
        let mut backend = site.start_in(&[&engine], &environment);
        // It may die before the connection stands.
        if machine.connect(&site.socket()).is_ok() {
            if machine.pending() == 0 {
                load.submit(&mut machine);
            }
            // Some points come after the last answer.
            machine.wait_all(&backend);
        }
        backend.wait_exit();
        machine.disconnect();
        let died = std::fs::read_to_string(log).unwrap_or_default();
        let last = died.lines().nth(number).unwrap_or_default();
        assert!(last.starts_with(point.name()), "{engine}: died at {died:?}, not {point:?}");
        machine.reap();
    }
    let backend = site.start_in(&[&engine], &[]);
    machine.connect(&site.socket()).unwrap();
    if machine.pending() == 0 && load.writes.is_empty() {
        load.submit(&mut machine);
    }
    assert_eq!(machine.wait_all(&backend), Waited::Answered);
    load.judge(&mut machine, &backend);
    // And a further load finds nothing strange.
    load.submit(&mut machine);
    assert_eq!(machine.wait_all(&backend), Waited::Answered);
    load.judge(&mut machine, &backend);
    assert_eq!(backend.status()["counters"]["guest_errors"], json!(0));
}

/// How a process comes to pass `point`, by the deaths of those before it.
fn ancestors(point: Point) -> Vec<Death> {
    match point {
        // There must be a batch that the dead process has published and not cleared.
        Point::RecoverClear | Point::RecoverIndex => vec![(Point::UsedIndex, 1)],
        // There must be something in flight.
        Point::ReplaySubmit | Point::ReplayPublished => vec![(Point::IoSubmitted, 4)],
        _ => Vec::new(),
    }
}

/// Whether a process passes `point` three times at least, whatever the size of its batches.
fn is_passed_often(point: Point) -> bool {
    use Point::*;
    match point {
        PopStart | PopCounter | PopMark | IoSubmitted | IoDone | StatusStored | UsedElement
        | BatchNext | BatchHead | ClearEntry | ReplaySubmit => true,
        UsedIndex | RegionIndex | CallPending | RecoverStart | RecoverClear | RecoverIndex
        | ReplayPublished => false,
    }
}

fn every_point(engine: &str) {
    for point in Point::ALL {
        for passage in if is_passed_often(point) { &[1, 3][..] } else { &[1] } {
            let mut deaths = ancestors(point);
            deaths.push((point, *passage));
            survives(engine, &deaths);
        }
    }
}

#[test]
fn every_point_with_sync() {
    every_point("sync");
}

#[test]
fn every_point_with_uring() {
    every_point("uring");
}

/// The replay dies, and the replay of the replay, and the one after that.
fn three_deaths(engine: &str) {
    use Point::*;
    let families: [&[Death]; 8] = [
        &[(IoSubmitted, 4), (ReplaySubmit, 3), (ReplaySubmit, 2)],
        &[(UsedElement, 3), (ReplayPublished, 1), (IoSubmitted, 2)],
        &[(UsedIndex, 1), (RecoverClear, 1), (RecoverClear, 1), (RecoverIndex, 1)],
        &[(ClearEntry, 1), (RecoverClear, 1), (RecoverIndex, 1), (RecoverStart, 1)],
        &[(BatchNext, 2), (BatchHead, 1), (StatusStored, 2)],
        &[(PopMark, 5), (IoDone, 1), (UsedIndex, 1), (RecoverIndex, 1)],
        &[(PopCounter, 2), (RecoverStart, 1), (RecoverStart, 1), (ReplaySubmit, 1)],
        &[(IoSubmitted, 4), (UsedElement, 1), (ClearEntry, 1), (RecoverClear, 1)],
    ];
    for deaths in families {
        survives(engine, deaths);
    }
}

#[test]
fn replay_of_a_replay_with_sync() {
    three_deaths("sync");
}

#[test]
fn replay_of_a_replay_with_uring() {
    three_deaths("uring");
}

const STEPS: [&str; 9] =
    ["see", "begin", "handle", "tell", "taking", "take", "put", "answering", "answer"];
const REQUESTS: [Request; 21] = [
    Request::GET_FEATURES,
    Request::SET_FEATURES,
    Request::SET_OWNER,
    Request::GET_PROTOCOL_FEATURES,
    Request::SET_PROTOCOL_FEATURES,
    Request::GET_QUEUE_NUM,
    Request::GET_INFLIGHT_FD,
    Request::SET_INFLIGHT_FD,
    Request::SET_MEM_TABLE,
    Request::ADD_MEM_REG,
    Request::REM_MEM_REG,
    Request::SET_VRING_NUM,
    Request::SET_VRING_BASE,
    Request::SET_VRING_ADDR,
    Request::SET_VRING_KICK,
    Request::SET_VRING_CALL,
    Request::SET_VRING_ENABLE,
    Request::GET_CONFIG,
    Request::SET_CONFIG,
    Request::GET_VRING_BASE,
    Request::RESET_DEVICE,
];

/// The life of a front end that never connects again: negotiates, works, stops a queue, goes on.
fn live(machine: &mut Machine, site: &Site, spare: &Backend) -> vhost::Result<()> {
    machine.connect(&site.socket())?;
    let flags = VhostUserConfigFlags::WRITABLE;
    assert_eq!(machine.session().get_config(0, 60, flags, &[0; 60])?.1.len(), 60);
    machine.session().set_config(32, flags, &[1])?;
    // The next message proves that the answer has arrived.
    machine.session().get_features()?;
    let write = machine.submit(0, &Ask::write(8, vec![9; 4096]));
    machine.wait_all(spare);
    assert_eq!(machine.answer(write).status, 0);
    machine.add_memory()?;
    machine.remove_memory()?;
    assert_eq!(machine.session().get_vring_base(0)?, 1);
    machine.start(0)?;
    let read = machine.submit(0, &Ask::read(8, 4096));
    machine.wait_all(spare);
    assert_eq!(machine.answer(read).data, [9; 4096]);
    machine.session().get_vring_base(0)?;
    machine.session().reset_device()?;
    machine.session().get_features().map(drop)
}

#[test]
fn a_front_end_does_not_notice_a_death_in_the_middle_of_any_message() {
    for (request, step) in REQUESTS.iter().flat_map(|r| STEPS.iter().map(move |s| (*r, *s))) {
        let site = Site::new(1 << 20);
        let session = format!("--session-socket={}", site.path("session").display());
        let place = format!("{}:{step}", request as u32);
        let mut active = site.start_in(&[&session], &[("SEMPER_DIE_IN", &place)]);
        active.wait_status("/state", &json!("listening"));
        let spare = site.start(&[&session, "--spare"]);
        spare.wait_status("/session", &json!("following"));
        let mut machine = Machine::new(1, 64);
        let lived = live(&mut machine, &site, &spare);
        // What cannot be known: whether an answer with a file that was announced has arrived.
        if step == "answering" && request == Request::GET_INFLIGHT_FD {
            assert!(lived.is_err(), "{request:?}: an answer from nobody");
            continue;
        }
        lived.unwrap_or_else(|error| panic!("{request:?} {step}: {error}"));
        let with_answer = ["put", "answering", "answer"].contains(&step);
        let died = if step == "put" && request == Request::GET_INFLIGHT_FD {
            false
        } else {
            !with_answer || has_answer(request)
        };
        if died {
            // The spare goes on before the last thread of the dead one is gone.
            active.wait_exit();
        }
        assert_eq!(active.is_alive(), !died, "{request:?} {step}");
        assert_eq!(spare.status()["resumed"], json!(died), "{request:?} {step}");
    }
}

/// The machine wants a word for each message that it sends once it may.
fn has_answer(request: Request) -> bool {
    request != Request::SET_PROTOCOL_FEATURES
}
