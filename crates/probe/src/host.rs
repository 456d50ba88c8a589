//! What the probe does on a host: the same judge, without a guest.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use semper_probe::config::Config;
use semper_probe::control::Control;
use semper_probe::device::Device;
use semper_probe::kmsg::Tally;
use semper_probe::link::Link;
use semper_probe::runs::stats;
use semper_probe::subject::Role;
use semper_probe::verify::verify;
use semper_probe::wakeup::Wakeup;
use semper_probe::writers::Run;
use serde_json::{Map, Value, json};

const LANES_COME_BACK_WITHIN: Duration = Duration::from_secs(30);

fn nonce() -> io::Result<u128> {
    let mut bytes = [0; 16];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u128::from_ne_bytes(bytes))
}

/// Serves the commands on a unix socket, one connection after the other, until it is killed.
pub fn serve(path: &str) -> io::Result<bool> {
    let listener = UnixListener::bind(path)?;
    let mut control = Control::new(Role::Host, nonce()?, || ())?;
    loop {
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(true)?;
        // A connection that breaks is its client's affair.
        if let Err(error) = control.serve(&mut Link::new(OwnedFd::from(stream))) {
            eprintln!("semper-probe: {error}");
        }
    }
}

/// Turns `--block-size 512` into the member `"block_size": 512` of a configuration.
fn options_as_json(options: &[&str]) -> io::Result<(Map<String, Value>, f64)> {
    let mut members = Map::new();
    for pair in options.chunks(2) {
        let [name, value] = pair else {
            return Err(io::Error::other(format!("{} has no value", pair[0])));
        };
        let name = name.strip_prefix("--").unwrap_or(name).replace('-', "_");
        let value = match serde_json::from_str(value) {
            Ok(number @ Value::Number(_)) => number,
            _ => json!(value),
        };
        members.insert(name, value);
    }
    let seconds = members.remove("seconds").and_then(|value| value.as_f64()).unwrap_or(5.0);
    Ok((members, seconds))
}

/// Writes for some seconds, verifies everything, prints the figures; false if a block was wrong.
pub fn write(options: &[&str]) -> io::Result<bool> {
    let (members, seconds) = options_as_json(options)?;
    let config: Config = serde_json::from_value(Value::Object(members))?;
    let failed =
        |failure: semper_probe::protocol::Failure| io::Error::other(failure.message().to_owned());
    let device = Device::find(&config.device).map_err(failed)?;
    let config = config.checked(device.size_bytes()?).map_err(failed)?;
    let ledger = Arc::new(config.new_ledger(1));
    let run = Run::start(config, device, nonce()?, ledger, Wakeup::new()?).map_err(failed)?;
    thread::sleep(Duration::from_secs_f64(seconds));
    run.request_stop();
    let deadline = Instant::now() + LANES_COME_BACK_WITHIN;
    while !run.is_quiet() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    let report = verify(&run.shared);
    let mut figures = stats(&run.shared, false, &Tally::default());
    let [lost, torn, misplaced, foreign] = run.shared.wrong().counts;
    let sound = run.is_quiet() && report.complete && lost + torn + misplaced + foreign == 0;
    figures["verified_final"] = serde_json::to_value(report)?;
    println!("{figures:#}");
    Ok(sound)
}
