//! Looks for bytes that make the attack `semper_attacks::nvme` succeed.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| semper_attacks::nvme(data));
