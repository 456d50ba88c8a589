//! What a saved state that takes the program over can do to its host.

use std::process::Command;

fn try_it(name: &str, at: &str, walls: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("saved");
    std::fs::write(&file, "").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_semper-saved"))
        .arg("show")
        .arg(&file)
        .envs([("SEMPER_BREAKOUT", name), ("SEMPER_BREAKOUT_AT", at), ("SEMPER_WALLS", walls)])
        .output()
        .unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn it_reads_nothing_else_says_nothing_and_executes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let new = folder.path().join("new").to_string_lossy().into_owned();
    let tries = [("read", "/etc/shadow"), ("create", &new), ("udp", ""), ("execute", "/bin/echo")];
    for (name, at) in tries {
        let said = try_it(name, at, "all");
        assert!(!said.contains("broke out") && !said.is_empty(), "{name}: {said}");
        let said = try_it(name, at, "none");
        assert!(said.contains("broke out"), "the control, {name}: {said}");
    }
}
