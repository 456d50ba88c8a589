//! Looks for bytes that make the attack `semper_attacks::layers` succeed.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| semper_attacks::layers(data));
