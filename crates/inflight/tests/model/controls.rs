//! Negative controls: with each of these mistakes the search must find a broken promise, and
//! without it the same scenario must hold.

use semper_testbed::Request;

use crate::explore::explore;
use crate::scenario::{Fault, Promise, Scenario};
use crate::{read, write, write_two};

/// The search finds that `fault` breaks `scenario`, and says so with these words.
fn caught(fault: Fault, promise: Promise, scenario: Scenario, words: &str) {
    if let Err(broken) = explore(&scenario.clone().with_fault(Fault::None, promise)) {
        panic!("{scenario:#?} breaks without a fault: {broken}");
    }
    match explore(&scenario.clone().with_fault(fault, promise)) {
        Ok(report) => panic!("{fault:?} was not seen in {report}\n{scenario:#?}"),
        Err(broken) if broken.contains(words) => println!("{fault:?}: {broken}"),
        Err(broken) => panic!("{fault:?} was seen, but not as {words:?}: {broken}"),
    }
}

const HANG: &str = "requests hang";
const NONSENSE: &str = "the guest was told nonsense";
const NO_ORDER: &str = "no legal order";
const TWO: [Request; 2] = [write(0, 1), write(1, 2)];

#[test]
fn entries_cleared_before_the_driver_sees_the_batch() {
    let scenario = Scenario::new(4, 1, &TWO);
    caught(Fault::ClearBeforePublish, Promise::SomeOrder, scenario, NONSENSE);
}

/// As long as overlapping requests are kept apart until the first is answered, nobody has seen
/// anything of a request in flight, and any order of the replay is legal. The counter gives more:
/// the order in which a careless guest wrote.
#[test]
fn replay_that_ignores_the_counters() {
    let scenario = Scenario::new(4, 1, &[write(0, 1), write(0, 2)]);
    caught(Fault::ReplayBackwards, Promise::WritesInOrder, scenario.clone(), "reordered");
    caught(Fault::ReplayBackwards, Promise::WritesInOrder, scenario.synchronous(), "reordered");
}

#[test]
fn fresh_region_without_the_used_index() {
    // The ring is not fresh: it has a history, as after an unclean change of the backend.
    let scenario = Scenario::new(4, 1, &TWO);
    let near = scenario.clone().starting_at(1);
    caught(Fault::FreshIndexForgotten, Promise::SomeOrder, near, NONSENSE);
    let far = scenario.starting_at(1000);
    caught(Fault::FreshIndexForgotten, Promise::SomeOrder, far, "recovery refused");
}

#[test]
fn last_batch_not_cleared_at_recovery() {
    let scenario = Scenario::new(4, 1, &TWO);
    caught(Fault::BatchForgotten, Promise::SomeOrder, scenario, NONSENSE);
}

#[test]
fn overlapping_requests_in_the_kernel_together() {
    // The old write was seen by a read, then overwritten, and comes back with the replay.
    let scenario = Scenario::new(4, 1, &[write(0, 1), read(0), write(0, 2)]);
    caught(Fault::OverlapsIgnored, Promise::SomeOrder, scenario, NO_ORDER);
    let scenario = Scenario::new(4, 0, &[write(0, 1), write_two(0, 2)]);
    caught(Fault::OverlapsIgnored, Promise::WritesInOrder, scenario, "reordered");
}

#[test]
fn region_index_stored_before_the_entries_are_cleared() {
    let scenario = Scenario::new(4, 1, &TWO);
    caught(Fault::RegionIndexFirst, Promise::SomeOrder, scenario, NONSENSE);
}

#[test]
fn new_requests_beside_the_replay() {
    let scenario = Scenario::new(4, 1, &[write(0, 1), write(0, 2), write(0, 3)]);
    caught(Fault::NewBeforeReplay, Promise::WritesInOrder, scenario, "reordered");
}

#[test]
fn late_writes_of_a_dead_process() {
    let scenario = Scenario::new(4, 1, &[write(0, 1), write(0, 2)]);
    caught(Fault::ImageNotLocked, Promise::SomeOrder, scenario, NO_ORDER);
}

#[test]
fn status_written_after_the_used_index() {
    let scenario = Scenario::new(4, 0, &TWO);
    caught(Fault::StatusLate, Promise::SomeOrder, scenario, "Status");
}

#[test]
fn nobody_calls_for_what_the_dead_has_published() {
    let scenario = Scenario::new(4, 1, &TWO).with_interrupts(true);
    caught(Fault::FirstCallForgotten, Promise::SomeOrder, scenario, HANG);
}

#[test]
fn available_ring_taken_up_without_what_is_in_flight() {
    let scenario = Scenario::new(4, 1, &TWO);
    caught(Fault::InFlightNotCounted, Promise::SomeOrder, scenario, NONSENSE);
}

#[test]
fn no_region_at_all() {
    let scenario = Scenario::new(4, 1, &TWO);
    caught(Fault::Untracked, Promise::SomeOrder, scenario, NONSENSE);
    // The least of it: one request, one death.
    let scenario = Scenario::new(4, 1, &[write(0, 1)]);
    caught(Fault::InFlightNotCounted, Promise::SomeOrder, scenario.clone(), NONSENSE);
    caught(Fault::RegionIndexFirst, Promise::SomeOrder, scenario, NONSENSE);
}
