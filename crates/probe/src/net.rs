//! The guest's network, as far as tests need it: an address, and a TCP echo.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use serde::Deserialize;
use serde_json::json;

use crate::program;
use crate::protocol::{Answer, Failure};

/// Arguments of `net_up`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    device: String,
    /// With prefix: `10.0.2.15/24`.
    address: String,
    #[serde(default)]
    gateway: Option<String>,
}

impl Interface {
    /// Gives the interface its address and brings it up. Blocks.
    pub fn bring_up(&self) -> Answer {
        let ip = |arguments: &[&str]| program::busybox("ip", arguments);
        ip(&["link", "set", "lo", "up"])?;
        ip(&["addr", "flush", "dev", &self.device])?;
        ip(&["addr", "add", &self.address, "dev", &self.device])?;
        ip(&["link", "set", &self.device, "up"])?;
        if let Some(gateway) = &self.gateway {
            ip(&["route", "replace", "default", "via", gateway, "dev", &self.device])?;
        }
        Ok(json!({}))
    }
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 16 << 10];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..count])?;
    }
}

/// Starts the echo; port 0 chooses one. It lasts until the probe ends.
pub fn start_echo(port: u16) -> Answer {
    let failed = |error: io::Error| Failure::failed(format!("echo on port {port}: {error}"));
    let listener = TcpListener::bind(("0.0.0.0", port)).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let serve = move || {
        for stream in listener.incoming().flatten() {
            // A connection that breaks is its client's affair.
            let _ = thread::Builder::new().name("echo".to_owned()).spawn(|| echo(stream));
        }
    };
    thread::Builder::new().name("echo".to_owned()).spawn(serve).map_err(failed)?;
    Ok(json!({"port": port}))
}
