//! Looks for bytes that make the attack `semper_attacks::saved` succeed.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| semper_attacks::saved(data));
