//! A control socket and its clients.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use semper_control::{Answer, BindError, MAX_LINE, bind, serve};
use serde_json::{Value, json};

fn echo(line: &str) -> Answer {
    match serde_json::from_str::<Value>(line) {
        Ok(Value::Array(bytes)) => {
            let line = json!({"id": null, "ok": {"bytes": bytes.len()}});
            Answer { line, bytes: vec![b'\n'; bytes.len()] }
        }
        Ok(request) => Answer::ok(&request["id"], request.clone()),
        Err(_) => Answer::refused(&Value::Null, "invalid", format!("{} bytes", line.len())),
    }
}

fn client(path: &Path) -> (UnixStream, BufReader<UnixStream>) {
    let stream = UnixStream::connect(path).unwrap();
    let reader = BufReader::new(stream.try_clone().unwrap());
    (stream, reader)
}

fn line(reader: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[test]
fn each_request_has_one_answer_and_clients_do_not_wait_for_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    serve(bind(&path).unwrap(), echo).unwrap();
    let (_silent, _) = client(&path);
    let (mut stream, mut reader) = client(&path);
    stream.write_all(b"{\"id\":7}\nnonsense\n[1,2,3]\n{\"id\":8}\n").unwrap();
    assert_eq!(line(&mut reader), json!({"id": 7, "ok": {"id": 7}}));
    let refused = json!({"id": null, "error": {"kind": "invalid", "message": "9 bytes"}});
    assert_eq!(line(&mut reader), refused);
    assert_eq!(line(&mut reader)["ok"]["bytes"], json!(3));
    let mut bytes = [0; 3];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"\n\n\n");
    assert_eq!(line(&mut reader)["id"], json!(8));
}

#[test]
fn a_line_without_an_end_is_bounded_and_bytes_that_are_no_text_end_the_connection() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    serve(bind(&path).unwrap(), echo).unwrap();
    let (mut stream, mut reader) = client(&path);
    stream.write_all(&vec![b'x'; MAX_LINE as usize]).unwrap();
    let said = format!("{MAX_LINE} bytes");
    assert_eq!(line(&mut reader)["error"]["message"], json!(said));
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    let (mut stream, mut reader) = client(&path);
    stream.write_all(b"\xff\xfe\n").unwrap();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[test]
fn only_a_socket_that_nobody_serves_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let here = at("socket");
    let first = bind(&here).unwrap();
    let refused = bind(&here).unwrap_err();
    assert!(matches!(refused, BindError::InUse(_)), "{refused}");
    drop(first);
    drop(bind(&here).unwrap());

    fs::write(at("file"), "precious").unwrap();
    fs::create_dir(at("directory")).unwrap();
    drop(UnixListener::bind(at("stale")).unwrap());
    symlink(at("stale"), at("link")).unwrap();
    symlink(at("absent"), at("dangling")).unwrap();
    for name in ["file", "directory", "link", "dangling"] {
        let refused = bind(&at(name)).unwrap_err();
        assert!(matches!(refused, BindError::NoSocket(_)), "{refused}");
        let said = refused.to_string();
        assert!(said.contains(name) && said.contains("choose another path"), "{said}");
        assert!(at(name).symlink_metadata().is_ok());
    }
    assert_eq!(fs::read(at("file")).unwrap(), b"precious");
    let refused = bind(&at("absent/socket")).unwrap_err();
    assert!(matches!(refused, BindError::Io { .. }) && refused.to_string().contains("directory"));
}
