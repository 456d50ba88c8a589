//! The command line and its exit statuses.

use std::fs::File;

use crate::backend::{Site, blk_file, run};

/// One line, which names cause and remedy, and this exit status.
fn refused(arguments: &[&str], status: i32, words: &[&str]) {
    let (code, _, said) = run(arguments);
    assert_eq!(code, status, "{said}");
    assert!(said.starts_with("semper-blkd: error: ") && said.lines().count() == 1, "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
}

#[test]
fn it_tells_what_it_can_do() {
    let (code, said, _) = run(&["--print-capabilities"]);
    let capabilities: serde_json::Value = serde_json::from_str(&said).unwrap();
    let features = ["read-only", "blk-file", "session", "layers"];
    let expected = serde_json::json!({"type": "block", "features": features});
    assert_eq!((code, capabilities), (0, expected));
    let (code, said, _) = run(&["--version"]);
    assert_eq!((code, said.trim()), (0, concat!("semper-blkd ", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn wrong_usage_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    File::create(&image).unwrap().set_len(4096).unwrap();
    let image = blk_file(&image);
    refused(&["--socket-path=/tmp/never.sock"], 2, &["--blk-file"]);
    refused(&[&image], 2, &["--socket-path"]);
    refused(&[&image, "--fd=0"], 2, &["not a listening socket"]);
    refused(&[&image, "--fd=999"], 2, &["not a listening socket"]);
    let serial = "--serial=twenty-one characters";
    refused(&[&image, "--socket-path=/tmp/never.sock", serial], 2, &["serial", "20"]);
    assert_eq!(run(&[&image, "--fd=3", "--socket-path=/tmp/never.sock"]).0, 2);
    assert_eq!(run(&[&image, "--engine=steam"]).0, 2);
    assert_eq!(run(&[&image, "--spare", "--read-only"]).0, 2);
}

#[test]
fn sockets_that_it_made_are_gone_after_an_orderly_end() {
    let site = Site::new(4096);
    let socket = site.path("front");
    let control = site.path("control");
    let arguments = [
        format!("--socket-path={}", socket.display()),
        format!("--control-socket={}", control.display()),
        blk_file(&site.image),
    ];
    let start = || {
        let child = crate::backend::program().args(&arguments).spawn().unwrap();
        crate::backend::wait_until("both sockets", || {
            std::os::unix::net::UnixStream::connect(&socket).ok()?;
            std::os::unix::net::UnixStream::connect(&control).ok()
        });
        child
    };
    let end = |mut child: std::process::Child, signal: i32| {
        // SAFETY: no memory is passed; the child has not been waited for.
        unsafe { libc::kill(child.id() as i32, signal) };
        child.wait().unwrap().code()
    };
    assert_eq!(end(start(), libc::SIGTERM), Some(0));
    assert!(!socket.exists() && !control.exists());
    // The control: nobody can do so who is killed. What is left is replaced.
    assert_eq!(end(start(), libc::SIGKILL), None);
    assert!(socket.exists() && control.exists());
    let child = start();
    // What another program has put there is left alone.
    std::fs::remove_file(&control).unwrap();
    let other = std::os::unix::net::UnixListener::bind(&control).unwrap();
    assert_eq!(end(child, libc::SIGINT), Some(0));
    assert!(!socket.exists() && control.exists());
    drop(other);
    // A spare that is told to end, and one that cannot begin.
    let holder = site.start(&[]);
    holder.wait_status("/standing", &serde_json::json!("held"));
    std::fs::remove_file(&control).unwrap();
    let (code, _, said) = run(&arguments.each_ref().map(String::as_str));
    assert_eq!((code, socket.exists(), control.exists()), (3, false, false), "{said}");
    let spare = crate::backend::program().args(&arguments).arg("--spare").spawn().unwrap();
    crate::backend::wait_until("the spare", || control.exists().then_some(()));
    assert_eq!(end(spare, libc::SIGTERM), Some(0));
    assert!(!socket.exists() && !control.exists());
}

#[test]
fn an_image_that_cannot_be_used_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let socket = format!("--socket-path={}", path("s").display());
    refused(&[&socket, &blk_file(&path("absent"))], 4, &["absent", "does not exist"]);
    File::create(path("empty")).unwrap();
    refused(&[&socket, &blk_file(&path("empty"))], 4, &["is empty", "restore"]);
    refused(&[&socket, &blk_file(dir.path())], 4, &["neither a regular file nor a block device"]);
    refused(&[&socket, &blk_file("/dev/null".as_ref())], 4, &["neither a regular file"]);
    File::create(path("odd")).unwrap().set_len(4096 + 512).unwrap();
    refused(
        &[&socket, &blk_file(&path("odd")), "--block-size=4096"],
        4,
        &["has 4608 bytes", "4096"],
    );
    refused(&[&socket, &blk_file(&path("odd")), "--block-size=513"], 4, &["block size 513"]);
}

#[test]
fn a_socket_that_somebody_listens_on_is_refused_and_one_left_behind_is_replaced() {
    let site = Site::new(1 << 20);
    let socket = format!("--socket-path={}", site.socket().display());
    refused(&[&socket, &blk_file(&site.image)], 1, &["cannot listen on"]);
    let long = format!("--socket-path=/tmp/{}", "x".repeat(120));
    refused(&[&long, &blk_file(&site.image)], 1, &["107 bytes"]);

    let left_behind = site.path("old.sock");
    drop(std::os::unix::net::UnixListener::bind(&left_behind).unwrap());
    assert!(left_behind.exists());
    let socket = format!("--socket-path={}", left_behind.display());
    let mut process =
        crate::backend::program().args([&socket, &blk_file(&site.image)]).spawn().unwrap();
    let connect = || std::os::unix::net::UnixStream::connect(&left_behind).ok();
    crate::backend::wait_until("the new socket", connect);
    process.kill().unwrap();
    process.wait().unwrap();
}
