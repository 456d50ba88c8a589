//! Block devices as the kernel makes them of files. Needs root.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device; it is detached when the value goes.
pub struct LoopDevice {
    /// Its node.
    pub node: PathBuf,
}

impl LoopDevice {
    /// On `file`, with sectors of so many bytes.
    ///
    /// # Panics
    /// Where this process may not make one: run the tests as root.
    pub fn new(file: &Path, sector: u32) -> Self {
        Self::with(file, sector, &[])
    }

    /// As [`LoopDevice::new`], around the page cache: what is written to it is written to the file at once.
    ///
    /// # Panics
    /// As [`LoopDevice::new`].
    pub fn direct(file: &Path, sector: u32) -> Self {
        Self::with(file, sector, &["--direct-io=on"])
    }

    fn with(file: &Path, sector: u32, options: &[&str]) -> Self {
        let mut command = Command::new("losetup");
        command.args(["--find", "--show", "--sector-size", &sector.to_string()]);
        command.args(options).arg(file);
        let output = command.output().expect("losetup (util-linux)");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "no loop device: run as root ({said})");
        Self { node: String::from_utf8_lossy(&output.stdout).trim().into() }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // What is left of it shows in the next test that looks for one.
        let _ = Command::new("losetup").arg("--detach").arg(&self.node).status();
    }
}
