//! Ports that lead to unix sockets: `bridge PORT=PATH …`. By it a test outside of an emulated machine reaches
//! the sockets of what runs inside (`tests/vfio/nested.py`).

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

fn copy(mut from: impl io::Read, mut to: impl io::Write) {
    // The end of either side is the end of both.
    let _ = io::copy(&mut from, &mut to);
}

fn serve(near: TcpStream, path: &str) -> io::Result<()> {
    let far = UnixStream::connect(path)?;
    near.set_nodelay(true)?;
    let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
    std::thread::spawn(move || {
        copy(&near_too, &far_too);
        let _ = far_too.shutdown(Shutdown::Write);
    });
    copy(&far, &near);
    let _ = near.shutdown(Shutdown::Both);
    Ok(())
}

fn main() -> io::Result<()> {
    let mut threads = Vec::new();
    for argument in std::env::args().skip(1) {
        let (port, path) = argument.split_once('=').ok_or(io::ErrorKind::InvalidInput)?;
        let port: u16 = port.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
        let (listener, path) = (TcpListener::bind(("0.0.0.0", port))?, path.to_owned());
        threads.push(std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let path = path.clone();
                std::thread::spawn(move || {
                    if let Err(error) = serve(near, &path) {
                        eprintln!("{path}: {error}");
                    }
                });
            }
        }));
    }
    threads.into_iter().for_each(|thread| drop(thread.join()));
    Ok(())
}
