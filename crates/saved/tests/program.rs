//! What `semper-saved` says on stdout looks as its readers expect: see `crates/control/golden`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use semper_control::golden::check;
use semper_saved::PAGE;
use semper_saved::answers::Done;
use serde_json::{Value, json};
use tempfile::TempDir;

fn path(site: &TempDir, name: &str) -> PathBuf {
    site.path().join(name)
}

fn option(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}

fn run(arguments: &[String]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_semper-saved")).args(arguments).output().unwrap()
}

/// Its last line.
fn last(output: &Output) -> Value {
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(said.lines().last().unwrap()).unwrap()
}

#[test]
fn a_save_a_look_and_a_restore_are_told() {
    // Not on tmpfs, where an image has no stamp.
    told(&TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), "saved-show");
    told(&TempDir::new_in("/dev/shm").unwrap(), "saved-show-without-stamp");
}

fn told(site: &TempDir, golden_of_show: &str) {
    let block: Vec<u8> = (0..PAGE).map(|n| n as u8).collect();
    fs::write(path(site, "disk"), block.repeat(8)).unwrap();
    fs::write(path(site, "memory"), [block, vec![0; 127 * PAGE]].concat()).unwrap();
    fs::write(path(site, "state"), b"devices").unwrap();
    fs::write(path(site, "vm"), json!({"name": "web"}).to_string()).unwrap();
    let image = format!("--image=root={}", path(site, "disk").display());
    let saved = path(site, "saved");
    let saving = run(&[
        "save".to_owned(),
        option("memory", &path(site, "memory")),
        option("state", &path(site, "state")),
        option("vm", &path(site, "vm")),
        image,
        option("output", &saved),
    ]);
    check("saved-save", &last(&saving));
    let shown = run(&["show".to_owned(), saved.display().to_string()]);
    check(golden_of_show, &last(&shown));

    let memory = path(site, "restored");
    fs::File::create(&memory).unwrap().set_len(128 * PAGE as u64).unwrap();
    let restore = [
        "restore".to_owned(),
        option("file", &saved),
        option("memory", &memory),
        option("state", &path(site, "state-restored")),
    ];
    check("saved-restore", &last(&run(&restore)));
    assert_eq!(fs::read(&memory).unwrap(), fs::read(path(site, "memory")).unwrap());

    // The exit status says whose matter a failure is.
    let code = |arguments: &[String]| run(arguments).status.code();
    fs::write(path(site, "disk"), [7; 8 * PAGE]).unwrap();
    assert_eq!(code(&restore), Some(3));
    assert_eq!(code(&["show".to_owned(), path(site, "disk").display().to_string()]), Some(4));
    assert_eq!(code(&["show".to_owned(), path(site, "absent").display().to_string()]), Some(1));
}

#[test]
fn work_under_way_is_told() {
    check("saved-done", &json!(Done { done: 1 << 20, of: 1 << 30 }));
}

#[test]
fn a_pipe_is_no_saved_state_and_nobody_waits_for_its_writer() {
    let site = TempDir::new().unwrap();
    let pipe = path(&site, "pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let output = run(&["show".to_owned(), pipe.display().to_string()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("it is neither a file nor a block device"), "{said}");
}
