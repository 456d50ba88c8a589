//! The command line, after QEMU's "Backend program conventions" (docs/interop/vhost-user.rst).

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use semper_epoch::{Holder, Id};
use semper_layers::keeper::Shorten;

/// What does the I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineKind {
    /// uring with --direct, otherwise mmap.
    Auto,
    /// One system call for each request, in the thread of the queue.
    Sync,
    /// The same where the page cache has the data, and io_uring where it has not.
    Nowait,
    /// io_uring: many requests in flight.
    Uring,
    /// Copying from a mapping of the image what the page cache has, and like nowait for the rest;
    /// on tmpfs writes are copied as well. Not with --direct.
    #[cfg(target_arch = "x86_64")]
    Mmap,
    /// No I/O at all, for measurements: writes are dropped, reads return nothing.
    Null,
}

/// Serves a raw image or a block device as a vhost-user-blk device.
///
/// The guest survives this process: kill it at any instant, start another one on the same socket,
/// and the requests in flight are done again.
#[derive(Debug, Parser)]
#[command(
    name = "semper-blkd",
    version,
    after_help = "Example:\n  semper-blkd \
    --socket-path=/tmp/disk.sock --blk-file=disk.raw\n  qemu-system-x86_64 … \
    -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem \
    -chardev socket,id=disk,path=/tmp/disk.sock,reconnect-ms=1 \
    -device vhost-user-blk-pci,chardev=disk"
)]
pub(crate) struct Args {
    /// Listen on this unix socket. Without it and --fd: on the one that a service manager passes
    /// (LISTEN_FDS), which is also told when the disk is ready (READY=1).
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Listen on this inherited file descriptor (a listening unix socket).
    #[arg(long, value_name = "N", conflicts_with = "socket_path")]
    pub fd: Option<i32>,

    /// Print what this program can do as JSON, and exit.
    #[arg(long)]
    pub print_capabilities: bool,

    /// The image: a raw file or a block device.
    #[arg(long, value_name = "IMAGE")]
    pub blk_file: Option<PathBuf>,

    /// Never write to the image.
    #[arg(long)]
    pub read_only: bool,

    /// Most queues that the guest may use.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=256))]
    pub num_queues: u16,

    /// Threads that serve the queues (queue i is served by thread i modulo N).
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: u16,

    /// The thread of each queue, numbered from 0: 0,0,1,1 puts four queues on two threads.
    #[arg(long, value_name = "T,T,…", value_delimiter = ',', conflicts_with = "threads")]
    pub thread_map: Vec<u16>,

    /// Look for requests for at most so many microseconds before sleeping, where that pays; 0
    /// never looks.
    #[arg(long, value_name = "N", default_value_t = 50,
          value_parser = clap::value_parser!(u16).range(0..=1000))]
    pub poll_us: u16,

    /// Serial number that the guest sees, at most 20 bytes.
    #[arg(long, value_name = "S", default_value = "", hide_default_value = true)]
    pub serial: String,

    /// Serve state and counters on this unix socket (JSON lines).
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// What does the I/O.
    #[arg(long, value_enum, default_value_t = EngineKind::Auto)]
    pub engine: EngineKind,

    /// Go around the host's page cache (O_DIRECT).
    #[arg(long)]
    pub direct: bool,

    /// Logical block size that the guest sees, in bytes; by default the one that the image was
    /// partitioned with, or else 512, whatever blocks its storage has.
    #[arg(long, value_name = "BYTES")]
    pub block_size: Option<u32>,

    /// Be the spare: prepare everything, then wait for the image's lock until the process that
    /// serves the image has ended.
    #[arg(long, conflicts_with = "read_only")]
    pub spare: bool,

    /// Let spares know here what the front end has said, so that a spare goes on with its
    /// connection; a spare learns it here. Without this option the front end connects again.
    #[arg(long, value_name = "PATH", conflicts_with = "read_only")]
    pub session_socket: Option<PathBuf>,

    /// Accept a front end, but take the image only when its first queue starts: for the VM at the
    /// receiving end of a migration.
    #[arg(long, conflicts_with_all = ["read_only", "spare"])]
    pub incoming: bool,

    /// What the image itself knows about who may write it: the file beside it, IMAGE.epoch.
    #[arg(
        long,
        value_name = "PATH",
        requires = "right",
        requires = "holder",
        conflicts_with = "read_only"
    )]
    pub epoch_file: Option<PathBuf>,

    /// Write the image under this epoch; refused if the image was given away under a later one.
    #[arg(long, value_name = "E", requires = "claim", requires = "epoch_file", group = "right",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub epoch: Option<u64>,

    /// The id of the claim that has this epoch: 32 hexadecimal digits.
    #[arg(long, value_name = "ID", requires = "epoch", value_parser = claim_id)]
    pub claim: Option<Id>,

    /// Whose claim it is: the name of this host.
    #[arg(long, value_name = "NAME", requires = "epoch_file", value_parser = host_name)]
    pub holder: Option<Holder>,

    /// The claim comes later, by the control socket ("claim"); queues that are started before wait
    /// for it, and the front end does not.
    #[arg(
        long,
        requires = "incoming",
        requires = "epoch_file",
        requires = "control_socket",
        group = "right"
    )]
    pub await_claim: bool,

    /// Keep in this file that a flush of the image has failed, and fail every flush while the file is
    /// there: the kernel tells a process once that data is lost. Whoever starts the VM anew removes
    /// it. (Also as a variable, which earlier releases ignore.)
    #[arg(long, value_name = "PATH", env = "SEMPER_BLKD_FLUSH_FILE", hide_env_values = true)]
    pub flush_file: Option<PathBuf>,

    /// Serve only a front end that is one of the processes noted in this file, "PID START_TICKS" in
    /// each line. (Also as a variable, which earlier releases ignore.)
    #[arg(long, value_name = "PATH", env = "SEMPER_BLKD_PEER_FILE", hide_env_values = true)]
    pub peer_file: Option<PathBuf>,

    /// Keep the maps of layers in files of this name with their numbers, so that the next process finds
    /// what was written: on tmpfs. Without it no snapshot can be taken. (Also as a variable, which earlier
    /// releases ignore.)
    #[arg(long, value_name = "PATH", env = "SEMPER_BLKD_LAYER_MAP", hide_env_values = true)]
    pub layer_map: Option<PathBuf>,

    /// Serve this snapshot of the image, read-only, while the disk itself is served elsewhere or here.
    #[arg(
        long,
        value_name = "ID",
        requires = "reader",
        conflicts_with_all = ["spare", "incoming", "epoch_file", "session_socket"]
    )]
    pub snapshot: Option<u64>,

    /// Who reads the snapshot: it is kept until the same reader ends in order.
    #[arg(long, value_name = "NAME", requires = "snapshot", value_parser = host_name)]
    pub reader: Option<Holder>,

    /// Write the snapshot to this file, which must not be there, and exit: one raw image. Without
    /// --snapshot the whole disk, which nobody may be serving.
    #[arg(long, value_name = "FILE")]
    pub export: Option<PathBuf>,

    /// Merge layers into the image, which nobody may be serving, and exit: "unwanted", those whose
    /// snapshots were given up; "all"; or N, after the snapshots up to N were given up.
    #[arg(
        long,
        value_name = "WHAT",
        value_parser = shorten,
        conflicts_with_all = ["export", "snapshot", "spare", "incoming", "read_only"]
    )]
    pub merge: Option<Shorten>,

    /// Do not track requests in flight. They are lost when this process dies: only for
    /// demonstrating just that.
    #[arg(long)]
    pub no_inflight: bool,

    /// Do not record which pages of the guest hold which blocks of the disk.
    #[arg(long)]
    pub no_map: bool,

    /// Keep in this file which blocks of the disk were ever read or written, so that the next
    /// process finds pages by their content; best on tmpfs.
    #[arg(long, value_name = "PATH", conflicts_with = "no_map")]
    pub map_file: Option<PathBuf>,
}

fn shorten(text: &str) -> Result<Shorten, &'static str> {
    match text {
        "unwanted" => Ok(Shorten::Unwanted),
        "all" => Ok(Shorten::All),
        number => match number.parse() {
            Ok(through) if through > 0 => Ok(Shorten::Through(through)),
            _ => Err("it has to be \"unwanted\", \"all\" or the number of a snapshot"),
        },
    }
}

fn claim_id(text: &str) -> Result<Id, &'static str> {
    Id::from_hex(text).ok_or("it has to be 32 hexadecimal digits")
}

fn host_name(text: &str) -> Result<Holder, &'static str> {
    Holder::new(text).ok_or("it has to be of 1 to 40 bytes")
}
