//! Kernel modules: those that match a device are loaded, with what they need, and no others.
//!
//! The image's builder resolves everything beforehand and leaves a list, one line a module, a module
//! after all that it needs:
//!
//! ```text
//!   virtio.ko<TAB>-<TAB>
//!   virtio_blk.ko<TAB>virtio.ko virtio_ring.ko<TAB>virtio:d00000002v*
//!   vmgenid.ko<TAB>-<TAB>acpi*:VMGENID:* …
//! ```
//!
//! File, the files that it needs in the order of loading (`-` = none), and patterns of the devices
//! that it drives (none = loaded only if needed).

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Mutex;

use rustix::io::Errno;
use rustix::system::finit_module;

const FOLDER: &str = "/lib/modules-sv";
const BUSES: [&str; 4] = ["pci", "acpi", "virtio", "scsi"];

/// Files that were loaded, or could not be.
static DONE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

#[derive(Debug, PartialEq, Eq)]
struct Module {
    file: String,
    needs: Vec<String>,
    drives: Vec<String>,
}

fn parse(list: &str) -> Vec<Module> {
    let words = |text: Option<&str>| -> Vec<String> {
        let words = text.unwrap_or_default().split_whitespace();
        words.filter(|word| *word != "-").map(str::to_owned).collect()
    };
    let module = |line: &str| {
        let mut fields = line.split('\t');
        let file = fields.next()?.to_owned();
        Some(Module { file, needs: words(fields.next()), drives: words(fields.next()) })
    };
    list.lines().filter(|line| !line.is_empty()).filter_map(module).collect()
}

/// Whether a pattern with `*`, `?` and `[a-z]` matches the whole text.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', rest @ ..] => (0..=text.len()).any(|skip| matches(rest, &text[skip..])),
        [b'[', set @ ..] => {
            let (Some(end), [first, after @ ..]) = (set.iter().position(|c| *c == b']'), text)
            else {
                return false;
            };
            let mut set_left = &set[..end];
            let mut inside = false;
            while let [from, more @ ..] = set_left {
                let (to, next) = match more {
                    [b'-', to, next @ ..] => (to, next),
                    _ => (from, more),
                };
                inside |= (from..=to).contains(&first);
                set_left = next;
            }
            inside && matches(&set[end + 1..], after)
        }
        [b'?', rest @ ..] => !text.is_empty() && matches(rest, &text[1..]),
        [letter, rest @ ..] => text.first() == Some(letter) && matches(rest, &text[1..]),
    }
}

fn devices() -> Vec<String> {
    let mut aliases = BTreeSet::new();
    for bus in BUSES {
        let Ok(entries) = fs::read_dir(format!("/sys/bus/{bus}/devices")) else { continue };
        for entry in entries.flatten() {
            if let Ok(alias) = fs::read_to_string(entry.path().join("modalias")) {
                aliases.extend(alias.lines().map(|line| line.trim().to_owned()));
            }
        }
    }
    aliases.into_iter().collect()
}

fn load(file: &str, parameters: &CStr) -> Result<(), String> {
    let path = Path::new(FOLDER).join(file);
    let opened = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    match finit_module(&opened, parameters, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(format!("cannot load {file}: {errno}")),
    }
}

/// Loads what matches the devices that are there now, and again as long as that brings new ones.
/// Returns the files that were loaded; what could not be loaded is said on the console, once.
pub fn load_matching() -> Vec<String> {
    let list = fs::read_to_string(Path::new(FOLDER).join("list")).unwrap_or_default();
    let modules = parse(&list);
    let mut done = DONE.lock().expect("a thread that panics ends the probe");
    let mut loaded = Vec::new();
    loop {
        let before = done.len();
        let devices = devices();
        for module in &modules {
            let drives = |pattern: &String| {
                devices.iter().any(|device| matches(pattern.as_bytes(), device.as_bytes()))
            };
            if done.contains(&module.file) || !module.drives.iter().any(drives) {
                continue;
            }
            for file in module.needs.iter().chain([&module.file]) {
                if done.insert(file.clone()) {
                    match load(file, c"") {
                        Ok(()) => loaded.push(file.clone()),
                        Err(error) => eprintln!("semper-probe: {error}"),
                    }
                }
            }
        }
        if done.len() == before {
            return loaded;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_read() {
        let list = "virtio.ko\t-\t\nvirtio_blk.ko\tvirtio.ko ring.ko\tvirtio:d00000002v* x\n\n";
        let modules = parse(list);
        assert_eq!(modules.len(), 2);
        assert_eq!(modules[0].needs, Vec::<String>::new());
        assert_eq!(modules[1].needs, ["virtio.ko", "ring.ko"]);
        assert_eq!(modules[1].drives, ["virtio:d00000002v*", "x"]);
    }

    #[test]
    fn patterns_match_as_a_shell_does() {
        let pci = b"pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00";
        for (pattern, text, expected) in [
            ("pci:v00001AF4d*sv*sd*bc*sc*i*", pci.as_slice(), true),
            ("pci:v00008086d*sv*sd*bc*sc*i*", pci, false),
            ("virtio:d00000002v*", b"virtio:d00000002v00001AF4", true),
            ("virtio:d00000002v*", b"virtio:d00000003v00001AF4", false),
            ("a[0-3x]c", b"a2c", true),
            ("a[0-3x]c", b"axc", true),
            ("a[0-3x]c", b"a4c", false),
            ("a[0", b"a0", false),
            ("a?", b"a", false),
            ("", b"", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text), expected, "{pattern}");
        }
    }
}
