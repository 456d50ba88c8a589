//! One attack with random inputs for some seconds: where no nightly compiler is, which `make fuzz` needs.
//!
//! ```text
//!   cargo run -p semper-attacks --example campaign -- nvme 60 [SEED]
//! ```

use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Bytes of the longest input.
const LONGEST: u64 = 700;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let word = |at: usize| arguments.get(at).map_or("", String::as_str);
    let attack = semper_attacks::ALL.iter().find(|(name, _)| *name == word(1));
    let (Some((name, attack)), Ok(seconds)) = (attack, word(2).parse()) else {
        let known: Vec<_> = semper_attacks::ALL.iter().map(|(name, _)| *name).collect();
        eprintln!("usage: campaign ATTACK SECONDS [SEED]; attacks are {}", known.join(", "));
        return ExitCode::from(2);
    };
    let mut state = word(3).parse().unwrap_or(0u64) ^ 0x9e37_79b9_7f4a_7c15;
    // xorshift64: never 0, and the same each time.
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (begun, mut executions) = (Instant::now(), 0u64);
    while begun.elapsed() < Duration::from_secs(seconds) {
        let len = next() % LONGEST;
        let mut byte = || match next() % 3 {
            0 => 0,
            1 => (next() % 16) as u8,
            _ => next() as u8,
        };
        let input: Vec<u8> = (0..len).map(|_| byte()).collect();
        attack(&input);
        executions += 1;
    }
    println!("{name}: {executions} executions, nothing found");
    ExitCode::SUCCESS
}
