//! What a mediator that was taken over by its guest can do to its host: nothing of this list.

use std::net::TcpListener;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::Command;

use crate::machine::Place;

fn try_it(place: &Place, name: &str, at: &str, walls: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_semper-vfiod"))
        .arg(format!("--socket-path={}", place.path("front").display()))
        .arg(format!("--control-socket={}", place.path("control").display()))
        .arg(format!("--blk-file={}", place.path("image").display()))
        .arg("--engine=nowait")
        .envs([("SEMPER_BREAKOUT", name), ("SEMPER_BREAKOUT_AT", at), ("SEMPER_WALLS", walls)])
        .output()
        .unwrap();
    for socket in ["front", "control"] {
        let _ = std::fs::remove_file(place.path(socket));
    }
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn it_reads_nothing_else_says_nothing_and_executes_nothing() {
    let place = Place::new();
    std::fs::write(place.path("other"), "another image").unwrap();
    let new = place.path("new").to_string_lossy().into_owned();
    let other = place.path("other").to_string_lossy().into_owned();
    let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = bystander.id().to_string();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let at = |name: &str| place.path(name).to_string_lossy().into_owned();
    let (monitor, log) = (at("monitor"), at("log"));
    let _monitor = UnixListener::bind(&monitor).unwrap();
    let _log = UnixDatagram::bind(&log).unwrap();
    let tries = [
        ("read", "/etc/shadow"),
        ("write", &*other),
        ("create", &new),
        ("list", "/etc"),
        ("memory", &pid),
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
    ];
    for (name, at) in tries {
        let said = try_it(&place, name, at, "all");
        assert!(!said.contains("broke out") && !said.is_empty(), "{name}: {said}");
        let said = try_it(&place, name, at, "none");
        assert!(said.contains("broke out"), "the control, {name}: {said}");
        let _ = std::fs::remove_file(&new);
    }
    bystander.kill().and_then(|()| bystander.wait()).unwrap();
}
