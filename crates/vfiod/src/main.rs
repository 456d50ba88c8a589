//! `semper-vfiod`: the program. Everything is in the library of the same name.

use std::process::ExitCode;

fn main() -> ExitCode {
    semper_vfiod::main()
}
