//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use semper_epoch::{Holder, Id};

/// What stands behind the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// An NVMe controller of our own, on a raw image.
    Nvme,
    /// A device for teaching, as QEMU's edu: it computes factorials and copies memory.
    Edu,
    /// A real PCI device, bound to vfio-pci: an NVMe controller.
    Pci,
}

/// What is known of a real PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Profile {
    /// An NVMe controller.
    Nvme,
    /// Nothing.
    Plain,
}

/// What does the I/O of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineKind {
    /// uring with --direct, otherwise mmap.
    Auto,
    /// One system call for each request, in the device's own thread.
    Sync,
    /// The same where the page cache has the data, and io_uring where it has not.
    Nowait,
    /// io_uring: many requests in flight.
    Uring,
    /// Copying from a mapping of the image what the page cache has. Not with --direct.
    #[cfg(target_arch = "x86_64")]
    Mmap,
}

/// How a driver's doorbells arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Doorbells {
    /// The guest writes them to memory, and nobody is told.
    Direct,
    /// Each is a message of QEMU.
    Trapped,
}

/// Serves a device to a QEMU (11.1 or newer) by vfio-user, so that its VM can be moved.
#[derive(Debug, Parser)]
#[command(
    name = "semper-vfiod",
    version,
    after_help = "Example:\n  semper-vfiod --socket-path=/tmp/nvme.sock --blk-file=disk.raw\n  \
    qemu-system-x86_64 -machine q35,memory-backend=mem \
    -object memory-backend-memfd,id=mem,size=1G,share=on \
    -device '{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"/tmp/nvme.sock\"}}' …"
)]
pub(crate) struct Args {
    /// Listen on this unix socket for the device.
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Listen on this inherited file descriptor (a listening unix socket).
    #[arg(long, value_name = "N", conflicts_with = "socket_path")]
    pub fd: Option<i32>,

    /// Listen on this unix socket for the shim: a second device, with which direct doorbells are
    /// captured.
    #[arg(long, value_name = "PATH")]
    pub shim_socket_path: Option<PathBuf>,

    /// Listen on this inherited file descriptor for the shim.
    #[arg(long, value_name = "N", conflicts_with = "shim_socket_path")]
    pub shim_fd: Option<i32>,

    /// Keep what another process needs to go on when this one dies, and tell it to a spare that comes to
    /// this unix socket.
    #[arg(long, value_name = "PATH")]
    pub session_socket: Option<PathBuf>,

    /// Be that spare: follow whoever serves at --session-socket, and go on in its place on the same
    /// connections when it dies. The other options have to be the same.
    #[arg(long, requires = "session_socket", conflicts_with_all = ["fd", "socket_path", "shim_fd",
          "shim_socket_path"])]
    pub spare: bool,

    /// Serve state and commands on this unix socket (JSON lines).
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Print what this program can do as JSON, and exit.
    #[arg(long)]
    pub print_capabilities: bool,

    /// What the device is.
    #[arg(long, value_enum, default_value_t = Kind::Nvme)]
    pub kind: Kind,

    /// The address of a real PCI device, as 0000:01:00.0; for --kind=pci, with both descriptors.
    #[arg(
        long,
        value_name = "ADDRESS",
        requires = "vfio_group_fd",
        requires = "vfio_container_fd"
    )]
    pub pci: Option<String>,

    /// The IOMMU group of that device (/dev/vfio/N), inherited.
    #[arg(long, value_name = "N", requires = "pci")]
    pub vfio_group_fd: Option<i32>,

    /// A new container (/dev/vfio/vfio), inherited.
    #[arg(long, value_name = "N", requires = "pci")]
    pub vfio_container_fd: Option<i32>,

    /// Of a real PCI device: which registers it has. "plain" is any with MSI-X, which stays where it is.
    #[arg(long, value_enum, default_value_t = Profile::Nvme)]
    pub profile: Profile,

    /// How doorbells arrive.
    #[arg(long, value_enum, default_value_t = Doorbells::Direct)]
    pub doorbells: Doorbells,

    /// Have an interrupt line, for a driver without MSI-X. With direct doorbells QEMU then traps
    /// every access while the line is in use.
    #[arg(long)]
    pub interrupt_line: bool,

    /// The image of an NVMe controller: a raw file or a block device.
    #[arg(long, value_name = "IMAGE")]
    pub blk_file: Option<PathBuf>,

    /// Never write to the image.
    #[arg(long)]
    pub read_only: bool,

    /// Go around the host's page cache (O_DIRECT).
    #[arg(long)]
    pub direct: bool,

    /// Logical block size that the guest sees, in bytes.
    #[arg(long, value_name = "BYTES")]
    pub block_size: Option<u32>,

    /// Serial number that the guest sees, at most 20 bytes.
    #[arg(long, value_name = "S", default_value = "sempervirt")]
    pub serial: String,

    /// What does the I/O.
    #[arg(long, value_enum, default_value_t = EngineKind::Auto)]
    pub engine: EngineKind,

    /// Most I/O queues that the guest may use.
    #[arg(long, value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// The device's state comes by the control socket; until "resume" nothing is done for the guest,
    /// and the image is another's.
    #[arg(long, requires = "control_socket")]
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

    /// The claim comes later, by the control socket ("claim").
    #[arg(long, requires = "incoming", requires = "epoch_file", group = "right")]
    pub await_claim: bool,
}

fn claim_id(text: &str) -> Result<Id, &'static str> {
    Id::from_hex(text).ok_or("it has to be 32 hexadecimal digits")
}

fn host_name(text: &str) -> Result<Holder, &'static str> {
    Holder::new(text).ok_or("it has to be of 1 to 40 bytes")
}
