//! Block devices of the guest (and, on a host, plain files): finding, opening and listing them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::Serialize;

use crate::protocol::Failure;

const SYS_BLOCK: &str = "/sys/block";

/// A device by the name it was asked for, resolved to a path.
#[derive(Clone, Debug)]
pub struct Device {
    /// Kernel name (`vda`), or the file's path.
    pub name: String,
    /// What to open.
    pub path: PathBuf,
    /// Serial number, if it has one.
    pub serial: String,
}

/// One line of the command `list`.
#[derive(Debug, Serialize)]
pub struct Listed {
    name: String,
    size_bytes: u64,
    serial: String,
    queues: usize,
    block_size: u64,
    read_only: bool,
    driver: String,
    write_cache: String,
    scheduler: String,
}

fn attribute(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn serial_of(name: &str) -> String {
    let block = Path::new(SYS_BLOCK).join(name);
    let mut serial = attribute(&block.join("serial"));
    if serial.is_empty() {
        serial = attribute(&block.join("device/serial"));
    }
    serial
}

fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(SYS_BLOCK) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        // A path of a multipath NVMe disk has no node of its own.
        .filter(|entry| attribute(&entry.path().join("hidden")) != "1")
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The directory of the device in sysfs that a driver is bound to, above a block device.
pub fn bound_to(name: &str) -> Option<PathBuf> {
    let start = fs::canonicalize(Path::new(SYS_BLOCK).join(name).join("device")).ok()?;
    start.ancestors().find(|dir| dir.join("driver").exists()).map(Path::to_path_buf)
}

/// All block devices.
pub fn list() -> Vec<Listed> {
    let listed = |name: String| {
        let block = Path::new(SYS_BLOCK).join(&name);
        let number = |key: &str| attribute(&block.join(key)).parse::<u64>().unwrap_or(0);
        let driver = bound_to(&name).and_then(|dir| fs::canonicalize(dir.join("driver")).ok());
        Listed {
            size_bytes: number("size") * 512,
            serial: serial_of(&name),
            queues: fs::read_dir(block.join("mq")).map_or(0, Iterator::count),
            block_size: number("queue/logical_block_size"),
            read_only: number("ro") != 0,
            driver: driver
                .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
                .unwrap_or_default(),
            write_cache: attribute(&block.join("queue/write_cache")),
            scheduler: attribute(&block.join("queue/scheduler")),
            name,
        }
    };
    names().into_iter().map(listed).collect()
}

impl Device {
    /// Finds a device by `vda`, `serial:S` or an absolute path.
    pub fn find(wanted: &str) -> Result<Self, Failure> {
        if wanted.starts_with('/') {
            let path = PathBuf::from(wanted);
            return Ok(Self { name: wanted.to_owned(), path, serial: String::new() });
        }
        let name = match wanted.strip_prefix("serial:") {
            Some(serial) => names().into_iter().find(|name| serial_of(name) == serial),
            None => names().into_iter().find(|name| name == wanted),
        };
        let name = name.ok_or_else(|| {
            let known = names().join(", ");
            Failure::invalid(format!("no block device {wanted:?}; there are: {known}"))
        })?;
        let serial = serial_of(&name);
        Ok(Self { path: Path::new("/dev").join(&name), serial, name })
    }

    /// Tells this device apart from the others of this guest, in a stamp.
    pub fn id(&self) -> u64 {
        let key = if self.serial.is_empty() { &self.name } else { &self.serial };
        // FNV-1a
        key.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }

    /// Opens it for O_DIRECT. A plain file on a file system without O_DIRECT is opened without;
    /// a block device never is.
    pub fn open(&self, write: bool) -> io::Result<File> {
        let flags = OFlags::DIRECT | OFlags::CLOEXEC;
        let mut options = OpenOptions::new();
        options.read(true).write(write);
        let direct = options.clone().custom_flags(flags.bits() as i32).open(&self.path);
        match direct {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                if fs::metadata(&self.path)?.file_type().is_block_device() {
                    return Err(error);
                }
                options.open(&self.path)
            }
            other => other,
        }
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> io::Result<u64> {
        self.open(false)?.seek(SeekFrom::End(0))
    }
}
