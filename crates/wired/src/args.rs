//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, Subcommand};

/// Carries the migration of one VM between two hosts: pages that stand on a shared disk as
/// references, the rest packed, over mutual TLS.
#[derive(Debug, Parser)]
#[command(name = "semper-wired", version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The end beside the QEMU that the VM leaves: it listens for `migrate unix:PATH`.
    Source(SourceArgs),
    /// The end beside the QEMU that the VM goes to: it connects to `-incoming unix:PATH`.
    Destination(DestinationArgs),
    /// Wait, ready, for one line on stdin that says which end to be, for a host on which no program
    /// may start any more.
    Wait,
}

impl Command {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Command::Source(_) => "source",
            Command::Destination(_) => "destination",
            Command::Wait => "wait",
        }
    }
}

/// What both ends are told.
#[derive(Debug, clap::Args)]
pub(crate) struct EndArgs {
    /// Name of this migration, the same at both ends; a peer of another is refused.
    #[arg(long, value_name = "NAME")]
    pub migration: String,

    /// Certificate authority that both ends trust (PEM).
    #[arg(long, value_name = "PEM")]
    pub ca: PathBuf,

    /// Certificate of this host (PEM).
    #[arg(long, value_name = "PEM")]
    pub cert: PathBuf,

    /// Its private key (PEM).
    #[arg(long, value_name = "PEM")]
    pub key: PathBuf,

    /// Name that must stand in the peer's certificate.
    #[arg(long, value_name = "HOST")]
    pub peer_name: String,

    /// A disk that both ends can read: NAME=PATH, and after commas: direct (go around the page
    /// cache); backend=SOCKET (the control socket of this host's semper-blkd: the source asks it
    /// for its page/block map, the destination tells it which blocks the guest has used); map=FILE
    /// (at the source, an exported map). Without a map the source reads all of the disk.
    #[arg(long = "disk", value_name = "NAME=PATH[,…]")]
    pub disks: Vec<DiskArg>,

    /// Serve state and counters on this unix socket (JSON lines).
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Most of the stream that may be under way, in MiB.
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u64).range(4..=1024))]
    pub window_mib: u64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SourceArgs {
    #[command(flatten)]
    pub end: EndArgs,

    /// Listen here for QEMU.
    #[arg(long, value_name = "PATH")]
    pub qemu_socket: PathBuf,

    /// The destination.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub connect: SocketAddr,

    /// Level of zstd.
    #[arg(long, value_name = "N", default_value_t = 1, allow_hyphen_values = true,
          value_parser = clap::value_parser!(i32).range(-7..=19))]
    pub level: i32,

    /// Most memory for the index of blocks, in MiB (64 bytes for each block, at most).
    #[arg(long, value_name = "N", default_value_t = 512,
          value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub index_mib: u64,

    /// Longest wait for the index, in seconds: then QEMU may begin, and the index goes on growing.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub index_wait_s: u64,

    /// Threads that hash and pack; 0: as many as there are processors, but four at most.
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u16).range(0..=64))]
    pub pack_threads: u16,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DestinationArgs {
    #[command(flatten)]
    pub end: EndArgs,

    /// The unix socket where QEMU listens for the migration.
    #[arg(long, value_name = "PATH")]
    pub qemu_socket: PathBuf,

    /// Listen here for the source; port 0 takes a free one, and the control socket tells which.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
}

/// One `--disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskArg {
    pub name: String,
    pub path: PathBuf,
    pub direct: bool,
    pub map: Option<MapSource>,
}

/// Where the page/block map of a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MapSource {
    File(PathBuf),
    Backend(PathBuf),
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let (name, path) = words
            .next()
            .and_then(|word| word.split_once('='))
            .ok_or("a disk is given as NAME=PATH, where NAME is the same at both ends")?;
        if name.is_empty() || path.is_empty() || name.len() > semper_wire::format::MAX_TEXT {
            return Err("name and path of a disk may not be empty, nor the name too long".into());
        }
        let mut disk = Self { name: name.to_owned(), path: path.into(), direct: false, map: None };
        for word in words {
            match word.split_once('=') {
                None if word == "direct" => disk.direct = true,
                Some(("map", file)) => disk.map = Some(MapSource::File(file.into())),
                Some(("backend", socket)) => disk.map = Some(MapSource::Backend(socket.into())),
                _ => {
                    return Err(format!(
                        "unknown option {word:?} of a disk; known are direct, map=FILE and \
                         backend=SOCKET"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_understood() {
        let disk: DiskArg = "root=/a/b.raw,direct,map=/m".parse().unwrap();
        assert_eq!((disk.name.as_str(), disk.direct), ("root", true));
        assert_eq!(disk.map, Some(MapSource::File("/m".into())));
        for wrong in ["", "root", "=x", "root=", "root=/a,fast"] {
            assert!(wrong.parse::<DiskArg>().is_err(), "{wrong}");
        }
    }
}
