//! Model checking of the in-flight logic: every interleaving, every death, every order.
//!
//! **Real**: `TrackedQueue` with its recovery, `QueueRegion`, `SplitQueue` and its chains: the code
//! of these crates, as it is, on real memory. **Modelled**, and only this:
//!
//! * the guest (`semper_testbed::Guest`): submits a program of requests at any time, in indirect
//!   chains, uses heads again, polls or sleeps until an interrupt, and checks what it is told;
//! * the kernel (`semper_testbed::World`): carries out I/O in any order, and after the death of a process in any
//!   subset and block by block, but never later than that (the image lock);
//! * the loop of the backend (`device.rs`): takes, completes and publishes in any order that
//!   `crates/blkd` could, and keeps overlapping requests apart as `overlap.rs` there does. The loop
//!   itself is explored in `crates/blkd/src/model.rs`.
//!
//! A process may die at every `Point`, and where I/O is synchronous in the middle of the system
//! call; so may the one that recovers what it left, and the one after that. Whatever happens,
//!
//! * the guest is never given a head that the device did not have, nor one twice, nor a status or
//!   a length that is not the request's own;
//! * after the last recovery everything that was submitted is completed;
//! * an order of the requests that respects time explains every read and the final disk, and the
//!   writes took effect in the order of submission.
//!
//! The search is exhaustive within a scenario: it is cut short only in states that were explored
//! before. `controls.rs` shows that it sees faults. With `SEMPER_MODEL=thorough` more processes die
//! one after the other than the tests have time for.

mod controls;
mod device;
mod explore;
mod scenario;

use semper_inflight::Point;
use semper_testbed::Request;

use crate::explore::{Report, explore};
use crate::scenario::Scenario;

const fn write(block: usize, value: u8) -> Request {
    Request::write(block, 1, value)
}

const fn write_two(first: usize, value: u8) -> Request {
    Request::write(first, 2, value)
}

const fn read(block: usize) -> Request {
    Request::read(block, 1)
}

const fn read_two(first: usize) -> Request {
    Request::read(first, 2)
}

/// How much there is time for: an unoptimised build does little, a thorough run much.
fn deaths(quick: u32, normal: u32, thorough: u32) -> u32 {
    match std::env::var("SEMPER_MODEL").as_deref() {
        Ok("thorough") => thorough,
        _ if cfg!(debug_assertions) => quick,
        _ => normal,
    }
}

/// Explores all scenarios, and holds their number of states to at least `least`, or a quarter of it
/// in an unoptimised build: an exploration that suddenly is small has lost its way.
fn prove(what: &str, scenarios: impl IntoIterator<Item = Scenario>, least: usize) -> Report {
    let (mut sum, mut count) = (Report::default(), 0);
    for scenario in scenarios {
        let report = explore(&scenario).unwrap_or_else(|broken| panic!("{scenario:#?}\n{broken}"));
        sum.add(&report);
        count += 1;
    }
    println!("{what}: {count} scenarios, {sum}");
    let least = if cfg!(debug_assertions) { least / 4 } else { least };
    assert!(sum.states >= least, "only {} states", sum.states);
    sum
}

/// Every verb on every range of the first two blocks.
fn all_requests(value: u8) -> [Request; 6] {
    [write(0, value), write(1, value), write_two(0, value), read(0), read(1), read_two(0)]
}

#[test]
fn every_program_of_three_requests_on_two_blocks() {
    let mut scenarios = Vec::new();
    for first in all_requests(1) {
        // What is left out differs from what is in by the names of the blocks.
        if first.first == 1 {
            continue;
        }
        for second in all_requests(2) {
            for third in all_requests(3) {
                let program = [first, second, third];
                scenarios.push(Scenario::new(4, deaths(2, 2, 3), &program).with_tearing());
            }
        }
    }
    prove("three requests", scenarios, 1_100_000);
}

/// Programs of four requests with overlaps of every kind.
const FOUR: [[Request; 4]; 6] = [
    [write(0, 1), write(0, 2), read(0), write(0, 3)],
    [write(0, 1), write(1, 2), read_two(0), write(0, 3)],
    [write_two(0, 1), read(0), write_two(1, 2), read_two(1)],
    [write(0, 1), read(0), write(0, 2), read(0)],
    [read_two(0), write_two(0, 1), read(1), write(1, 2)],
    [write(0, 1), write(1, 2), write(2, 3), read(1)],
];

#[test]
fn four_requests_in_flight() {
    let scenarios = FOUR.iter().flat_map(|program| {
        let scenario = Scenario::new(4, deaths(2, 3, 4), program);
        [scenario.clone().synchronous(), scenario]
    });
    let report = prove("four requests", scenarios, 1_500_000);
    for point in Point::ALL {
        assert!(report.deaths[point as usize] > 0, "no process died at {}", point.name());
    }
}

#[test]
fn four_requests_that_may_end_half_done() {
    let scenarios = FOUR.iter().flat_map(|program| {
        let scenario = Scenario::new(4, deaths(2, 2, 3), program).with_tearing();
        [scenario.clone().synchronous(), scenario]
    });
    prove("four torn requests", scenarios, 500_000);
}

#[test]
fn heads_are_used_again_and_indices_wrap() {
    let six = [write(0, 1), write(1, 2), read_two(0), write(0, 3), read(0), write(1, 4)];
    let five = [write_two(0, 1), read(1), write(1, 2), write(0, 3), read_two(0)];
    let scenarios = [
        Scenario::new(2, deaths(2, 3, 4), &six),
        Scenario::new(2, deaths(2, 3, 4), &six).starting_at(65533).oldest_head_first(),
        Scenario::new(4, deaths(2, 2, 3), &five).starting_at(65534),
        Scenario::new(4, deaths(2, 2, 3), &five).starting_at(65535).oldest_head_first(),
        Scenario::new(8, deaths(2, 2, 3), &five).starting_at(65532).oldest_head_first(),
        Scenario::new(4, deaths(2, 3, 4), &six).starting_at(65534).synchronous(),
        Scenario::new(4, deaths(2, 2, 3), &five).starting_at(7).on_half_made_region(),
    ];
    prove("heads used again", scenarios, 1_100_000);
}

#[test]
fn a_guest_that_sleeps_is_woken() {
    let three = [write(0, 1), read(0), write(1, 2)];
    let four = [write(0, 1), write(1, 2), read_two(0), write(0, 3)];
    let scenarios = [true, false].into_iter().flat_map(|event_idx| {
        [
            Scenario::new(2, deaths(2, 3, 4), &three).with_interrupts(event_idx),
            Scenario::new(2, deaths(2, 3, 4), &four).with_interrupts(event_idx).starting_at(65534),
            Scenario::new(4, deaths(2, 2, 3), &four).with_interrupts(event_idx),
            Scenario::new(4, deaths(2, 3, 4), &four).with_interrupts(event_idx).synchronous(),
        ]
    });
    prove("sleeping guests", scenarios, 240_000);
}

#[test]
fn processes_may_die_one_after_the_other() {
    let programs =
        [[write(0, 1), write(0, 2)], [write_two(0, 1), read_two(0)], [write(0, 1), write(1, 2)]];
    let scenarios = programs.iter().flat_map(|program| {
        let scenario = Scenario::new(4, deaths(3, 6, 9), program).starting_at(65535);
        [scenario.clone().synchronous(), scenario]
    });
    prove("many deaths", scenarios, 8_000);
}
