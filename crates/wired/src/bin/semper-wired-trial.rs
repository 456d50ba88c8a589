//! `semper-wired-trial`: semper-wired for corruption campaigns; see `trial` in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    semper_wired::trial_main()
}
