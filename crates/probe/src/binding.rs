//! Unbinding a device from its driver and binding it again: a device reset, as the kernel does it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::device::{Device, bound_to};
use crate::protocol::{Answer, Failure};

const APPEARS_WITHIN: Duration = Duration::from_secs(20);

/// Where a device that is unbound now was: by the name it had as a disk.
static UNBOUND: Mutex<BTreeMap<String, (PathBuf, PathBuf)>> = Mutex::new(BTreeMap::new());

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text)
        .map_err(|error| Failure::failed(format!("{text} > {}: {error}", path.display())))
}

/// Takes the driver off the device behind a disk. Blocks while requests are in flight.
pub fn unbind(wanted: &str) -> Answer {
    let name = Device::find(wanted)?.name;
    let device = bound_to(&name)
        .ok_or_else(|| Failure::invalid(format!("{name} has no device with a driver")))?;
    let driver = fs::canonicalize(device.join("driver"))
        .map_err(|error| Failure::failed(format!("driver of {name}: {error}")))?;
    write(&driver.join("unbind"), &file_name(&device))?;
    let answer =
        json!({"device": name, "bus_name": file_name(&device), "driver": file_name(&driver)});
    UNBOUND.lock().expect("a thread that panics ends the probe").insert(name, (device, driver));
    Ok(answer)
}

/// Gives the driver back to a disk that was unbound by the name it had, and waits for the disk.
pub fn bind(name: &str) -> Answer {
    let unbound = UNBOUND.lock().expect("a thread that panics ends the probe").get(name).cloned();
    let (device, driver) =
        unbound.ok_or_else(|| Failure::invalid(format!("{name} was not unbound")))?;
    write(&driver.join("bind"), &file_name(&device))?;
    UNBOUND.lock().expect("a thread that panics ends the probe").remove(name);
    let deadline = Instant::now() + APPEARS_WITHIN;
    loop {
        let disk = fs::read_dir("/sys/block").ok().and_then(|entries| {
            entries
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .find(|disk| bound_to(disk).as_ref() == Some(&device))
        });
        if let Some(disk) = disk.filter(|disk| Path::new("/dev").join(disk).exists()) {
            return Ok(json!({"device": disk}));
        }
        if Instant::now() > deadline {
            return Err(Failure::failed(format!("{name} was bound, but no disk appeared")));
        }
        thread::sleep(Duration::from_millis(1));
    }
}
