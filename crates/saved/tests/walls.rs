//! What a saved state that takes the program over can do to its host.

use std::net::TcpListener;
use std::os::unix::net::{UnixDatagram, UnixListener};
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
    let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = bystander.id().to_string();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (monitor, log) = (at("monitor"), at("log"));
    let _monitor = UnixListener::bind(&monitor).unwrap();
    let _log = UnixDatagram::bind(&log).unwrap();
    let tries = [
        ("read", "/etc/shadow"),
        ("create", &new),
        ("list", "/etc"),
        ("memory", &pid),
        ("root", &pid),
        ("trace", &pid),
        ("signal", &pid),
        ("tcp", &port),
        ("udp", ""),
        ("path", &monitor),
        ("datagram", &log),
        ("pair", &log),
        ("execute", "/bin/echo"),
        ("fork", ""),
        ("ring", ""),
        ("userfaultfd", ""),
        ("bpf", ""),
        ("mount", "/tmp"),
        ("namespace", ""),
        ("code", ""),
        ("owner", ""),
    ];
    for (name, at) in tries {
        let said = try_it(name, at, "all");
        assert!(!said.contains("broke out") && !said.is_empty(), "{name}: {said}");
        let said = try_it(name, at, "none");
        assert!(said.contains("broke out"), "the control, {name}: {said}");
        let _ = std::fs::remove_file(&new);
    }
    bystander.kill().and_then(|()| bystander.wait()).unwrap();
}
