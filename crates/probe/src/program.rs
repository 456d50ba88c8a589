//! Programs that run in the guest: busybox, for what is not worth writing again.

use std::process::{Command, Output, Stdio};

use serde::Deserialize;
use serde_json::json;

use crate::protocol::{Answer, Failure};

/// The one program of the image beside the probe.
pub const BUSYBOX: &str = "/bin/busybox";

/// Arguments of `exec`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// The program and its arguments; a name without a slash is an applet of busybox.
    argv: Vec<String>,
}

fn output_of(command: &mut Command) -> Result<Output, Failure> {
    let output = command.stdin(Stdio::null()).output();
    output.map_err(|error| Failure::failed(format!("{command:?}: {error}")))
}

impl Program {
    /// Runs it to its end. Blocks.
    pub fn run(&self) -> Answer {
        let [name, arguments @ ..] = self.argv.as_slice() else {
            return Err(Failure::invalid("argv is empty"));
        };
        let mut command = if name.contains('/') {
            Command::new(name)
        } else {
            let mut command = Command::new(BUSYBOX);
            command.arg(name);
            command
        };
        let output = output_of(command.args(arguments))?;
        Ok(json!({
            "status": output.status.code(),
            "stdout": String::from_utf8_lossy(&output.stdout),
            "stderr": String::from_utf8_lossy(&output.stderr),
        }))
    }
}

/// Runs an applet of busybox; what it says on its way out is the failure's message.
pub fn busybox(applet: &str, arguments: &[&str]) -> Result<(), Failure> {
    let output = output_of(Command::new(BUSYBOX).arg(applet).args(arguments))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(Failure::failed(format!("{applet} {}: {}", arguments.join(" "), message.trim())))
}
