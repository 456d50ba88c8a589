//! The short form of the fuzzing campaign: some thousand random inputs for each attack, and every
//! input that a fuzzer has found.

use std::fs;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

fn random_inputs(name: &str, cases: u32) {
    let (_, attack) = semper_attacks::ALL.iter().find(|(known, _)| *known == name).unwrap();
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let inputs = vec(prop_oneof![Just(0u8), 0..16u8, any::<u8>()], 0..400);
    TestRunner::new(config)
        .run(&inputs, |data| {
            attack(&data);
            Ok(())
        })
        .unwrap();
}

#[test]
fn random_rings() {
    random_inputs("ring", 10_000);
}

#[test]
fn random_regions() {
    random_inputs("region", 10_000);
}

#[test]
fn random_requests() {
    random_inputs("request", 10_000);
}

#[test]
fn random_messages() {
    random_inputs("messages", 2_000);
}

#[test]
fn random_control_lines() {
    random_inputs("control", 2_000);
}

#[test]
fn random_epoch_records() {
    random_inputs("epoch", 10_000);
}

#[test]
fn random_layers() {
    random_inputs("layers", 5_000);
}

#[test]
fn random_maps() {
    random_inputs("map", 10_000);
}

#[test]
fn random_streams() {
    random_inputs("stream", 1_000);
}

#[test]
fn random_sources() {
    random_inputs("source", 3_000);
}

#[test]
fn random_destinations() {
    random_inputs("destination", 3_000);
}

#[test]
fn random_nvme_guests() {
    random_inputs("nvme", 10_000);
}

#[test]
fn random_vfio_clients() {
    random_inputs("vfio", 10_000);
}

#[test]
fn random_saved_states() {
    random_inputs("saved", 2_000);
}

/// `fuzz/found/<attack>/`: what once broke something never does again.
#[test]
fn everything_that_a_fuzzer_has_found() {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/found");
    for (name, attack) in semper_attacks::ALL {
        let Ok(inputs) = fs::read_dir(found.join(name)) else { continue };
        for input in inputs {
            let path = input.unwrap().path();
            println!("{}", path.display());
            attack(&fs::read(path).unwrap());
        }
    }
}
