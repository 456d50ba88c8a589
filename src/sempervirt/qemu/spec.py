"""What a VM is, as its owner writes it (TOML) and as the API takes it (JSON)."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from uuid import UUID, uuid4, uuid5

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from sempervirt.core.names import check_name
from sempervirt.core.printable import has_nul
from sempervirt.core.queue_map import check_map
from sempervirt.core.sizes import parse_size

MIB = 1 << 20
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)
# The kernel's IFNAMSIZ, less the NUL.
_INTERFACE = re.compile(r"[^\s/:]{1,15}")
_PCI = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_CHANNEL = re.compile(r"[A-Za-z0-9._-]{1,60}")
# What UUIDs of machines are derived in: any one that never changes.
_MACHINES = UUID("7f0a5c3e-9d51-4f7e-8f0c-5e3b1c9a2d64")
RESERVED_CHANNELS = ("qmp", "console", "agent")
# The name that qemu-ga looks for in the guest; libvirt gives the port the same.
GUEST_AGENT_CHANNEL = "org.qemu.guest_agent.0"
QUEUES_MAX = 64
# A queue for each virtual processor spares the guest the locks between them; beyond this many
# the memory for the queues is better spent otherwise.
AUTO_QUEUES_MAX = 16
# Of each kind. No machine has places for so many; looking at 20,000 takes the agent half a second.
DEVICES_MAX = 1024


def few(most: int) -> BeforeValidator:
    """Counts before any of them is looked at: errors of all would be made, as `max_length` does it
    for everything but a list.
    """

    def check(these: object) -> object:
        if isinstance(these, list | tuple | dict) and len(these) > most:
            raise ValueError(f"{len(these)} are too many: at most {most}")
        return these

    return BeforeValidator(check)


def _check_mac(mac: str) -> str:
    if not _MAC.fullmatch(mac):
        raise ValueError(f'"{mac}" is not a MAC address; write for example "52:54:00:12:34:56"')
    if int(mac[:2], 16) & 1:
        raise ValueError(f'"{mac}" is a multicast address; the first byte must be even')
    return mac.lower()


def _check_count(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= QUEUES_MAX):
        return value
    raise ValueError(f'write "auto" or a number from 1 to {QUEUES_MAX}')


Name = Annotated[str, AfterValidator(check_name)]
Size = Annotated[int, BeforeValidator(parse_size)]
Mac = Annotated[str, AfterValidator(_check_mac)]
Count = Annotated[
    int | Literal["auto"],
    PlainValidator(_check_count),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": QUEUES_MAX}, {"const": "auto"}]}
    ),
]
Engine = Literal["auto", "sync", "nowait", "uring", "mmap", "null"]
QEMU_ENGINES = ("auto", "sync", "uring")


class _Table(BaseModel):
    """A table of the file: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, table: Any) -> Any:
        """An error for each of 20,000 unknown keys would take 0.1 s."""
        if isinstance(table, dict) and len(unknown := table.keys() - cls.model_fields.keys()) > 9:
            some = ", ".join(repr(key)[:20] for key in sorted(map(str, unknown))[:3])
            raise ValueError(f"{len(unknown)} keys are none of a {cls.__name__}: {some}, …")
        return table


class DiskSpec(_Table):
    """A disk: a raw image or a block device, served by a backend of its own or by QEMU."""

    name: Name = Field(
        description="name within the VM; the disk is called VM/NAME", examples=["root"]
    )
    image: Path = Field(description="raw image file or block device", examples=["web.raw"])
    format: Literal["raw"] | None = Field(
        default=None,
        description="raw: also when it begins as an image of another format does",
        examples=["raw"],
    )
    backend: Literal["blkd", "qemu"] = Field(
        default="blkd",
        description="blkd outlives its own death; qemu is QEMU itself",
        examples=["qemu"],
    )
    bus: Literal["virtio-blk", "virtio-scsi"] = Field(
        default="virtio-blk",
        description="virtio-scsi needs backend = qemu",
        examples=["virtio-scsi"],
    )
    read_only: bool = Field(
        default=False, description="the guest cannot write to it", examples=[True]
    )
    queues: Count = Field(
        default="auto",
        description=f"virtqueues; auto: one for each vcpu, at most {AUTO_QUEUES_MAX}",
        examples=[4],
    )
    queue_size: Literal[32, 64, 128, 256, 512, 1024] = Field(
        default=256,
        description="requests that each queue can hold; a power of two",
        examples=[128],
    )
    queues_per_thread: Count = Field(
        default="auto",
        description="auto: as a preset of semper disk tune says, or 4",
        examples=[2],
    )
    thread_map: Annotated[tuple[int, ...] | None, few(QUEUES_MAX)] = Field(
        default=None,
        max_length=QUEUES_MAX,
        description="the thread of each queue",
        examples=[[0, 0, 1, 1]],
    )
    poll_us: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="how long a thread may poll, in microseconds; 0 = never",
        examples=[50],
    )
    engine: Engine = Field(
        default="auto",
        description="what does the I/O; auto: as a preset says, or built in",
        examples=["uring"],
    )
    direct: bool = Field(
        default=False, description="go around the host's page cache", examples=[True]
    )
    block_size: Literal[512, 4096] | None = Field(
        default=None,
        examples=[4096],
        description="logical block size that the guest sees; by default the one that the image was "
        "partitioned with, or else 512, whatever blocks its storage has",
    )
    serial: str = Field(
        default="",
        max_length=20,
        pattern=r"^[\x21-\x7e]*$",
        description="serial number that the guest sees, at most 20 characters",
        examples=["WEB-0001"],
    )
    keep: Literal["snapshot", "latest"] = Field(
        default="snapshot",
        examples=["latest"],
        description="what a standby has of the disk: a copy of a snapshot; latest: the disk "
        "itself, plugged in when the standby takes over, so that no write is lost",
    )
    snapshots: Literal["keep", "merge"] = Field(
        default="keep",
        examples=["merge"],
        description="merge: when the VM has ended its snapshots are given up, and all layers go "
        "into the image",
    )

    def queue_count(self, vcpus: int) -> int:
        """How many queues the disk has in a VM with that many processors.

        A running VM's disk must keep the number: it stands in the records of VMs as well.
        """
        if self.queues != "auto":
            return self.queues
        return len(self.thread_map) if self.thread_map else min(vcpus, AUTO_QUEUES_MAX)

    @field_validator("bus")
    @classmethod
    def _bus_fits_backend(cls, bus: str, info: ValidationInfo) -> str:
        if bus != "virtio-blk" and info.data.get("backend") == "blkd":
            raise ValueError(f'"{bus}" needs backend = "qemu"; semper-blkd serves virtio-blk')
        return bus

    @field_validator("keep")
    @classmethod
    def _keep_fits_backend(cls, keep: str, info: ValidationInfo) -> str:
        if keep == "latest" and (
            info.data.get("backend") != "blkd" or info.data.get("read_only") is True
        ):
            raise ValueError('"latest" is for disks that are written and have backend = "blkd"')
        return keep

    @field_validator("engine")
    @classmethod
    def _engine_fits_backend(cls, engine: str, info: ValidationInfo) -> str:
        if info.data.get("backend") == "qemu" and engine not in QEMU_ENGINES:
            raise ValueError(f'QEMU has no engine "{engine}"; choose auto, sync or uring')
        return engine

    @field_validator("thread_map")
    @classmethod
    def _map_fits_queues(
        cls, thread_map: tuple[int, ...] | None, info: ValidationInfo
    ) -> tuple[int, ...] | None:
        if thread_map is None:
            return None
        if info.data.get("queues_per_thread", "auto") != "auto":
            raise ValueError("give thread_map or queues_per_thread, not both")
        queues = info.data.get("queues", "auto")
        return check_map(thread_map, None if queues == "auto" else queues)


class PassthroughSpec(_Table):
    """A device that is handed to the guest through a mediator (semper-vfiod): the guest's own
    driver works with its registers, and no driver of ours is in between.
    """

    name: Name = Field(
        description="name within the VM, which no disk has; called VM/NAME", examples=["fast"]
    )
    kind: Literal["nvme"] = Field(
        default="nvme",
        description="nvme: an NVMe controller of our own, on an image",
        examples=["nvme"],
    )
    image: Path = Field(description="raw image file or block device", examples=["fast.raw"])
    format: Literal["raw"] | None = Field(
        default=None,
        description="raw: also when it begins as an image of another format does",
        examples=["raw"],
    )
    read_only: bool = Field(
        default=False, description="the guest cannot write to it", examples=[True]
    )
    queues: int = Field(
        default=4, ge=1, le=64, description="pairs of I/O queues at most", examples=[8]
    )
    engine: Literal["auto", "sync", "nowait", "uring", "mmap"] = Field(
        default="auto", description="what does the I/O", examples=["uring"]
    )
    direct: bool = Field(
        default=False, description="go around the host's page cache", examples=[True]
    )
    serial: str = Field(
        default="",
        max_length=20,
        pattern=r"^[\x21-\x7e]*$",
        description="serial number that the guest sees, at most 20 characters",
        examples=["FAST-0001"],
    )


class PciSpec(_Table):
    """A real PCI device of the host, bound to vfio-pci, that is handed to the guest through a
    mediator (semper-vfiod): its registers and its DMA are the guest's.
    """

    name: Name = Field(
        description="name within the VM, which no disk has; called VM/NAME", examples=["card"]
    )
    pci: str = Field(description="address on the host", examples=["0000:01:00.0"])
    profile: Literal["nvme", "plain"] = Field(
        default="nvme",
        examples=["plain"],
        description="nvme: an NVMe controller; plain: any device with MSI-X, which cannot be moved",
    )

    @field_validator("pci")
    @classmethod
    def _is_address(cls, pci: str) -> str:
        if not _PCI.fullmatch(pci):
            raise ValueError(f'"{pci:.40}" is no PCI address; see there: lspci -D')
        return pci


# No keys of a VM file: by these pydantic says which of both it has read.
OUR_DEVICE, HOST_DEVICE = "<device of ours>", "<device of the host>"


def _which_device(device: object) -> str:
    """A device with an address is the host's; so errors are about one of both."""
    named = "pci" in device if isinstance(device, dict) else isinstance(device, PciSpec)
    return HOST_DEVICE if named else OUR_DEVICE


PassedThrough = Annotated[
    Annotated[PassthroughSpec, Tag(OUR_DEVICE)] | Annotated[PciSpec, Tag(HOST_DEVICE)],
    Discriminator(_which_device),
]


class NicSpec(_Table):
    """A network card."""

    type: Literal["user", "tap"] = Field(
        default="user",
        description="user: QEMU connects for the guest, and nobody can connect to it; tap: an "
        "interface of the host",
        examples=["tap"],
    )
    tap: str | None = Field(
        default=None, description="tap interface, for type = tap", examples=["tap0"]
    )
    queues: int = Field(
        default=1,
        ge=1,
        le=64,
        description="pairs of virtqueues; more than 1 for a multi-queue tap",
        examples=[4],
    )
    vhost: bool | None = Field(
        default=None,
        description="serve in kernel threads (tap); by default where it works",
        examples=[False],
    )
    mac: Mac | None = Field(
        default=None,
        description="by default derived from VM and position",
        examples=["52:54:00:12:34:56"],
    )

    @model_validator(mode="after")
    def _tap_fits_type(self) -> Self:
        if (self.type == "tap") != (self.tap is not None):
            raise ValueError('tap = "…" belongs to type = "tap", and only to it')
        if self.tap is not None and not _INTERFACE.fullmatch(self.tap):
            raise ValueError(f'"{self.tap}" cannot be the name of an interface')
        if self.type == "user" and (self.queues != 1 or self.vhost):
            raise ValueError(
                'queues and vhost belong to type = "tap"; user-mode networking has one pair of '
                "queues in QEMU's main loop"
            )
        return self


class ChannelSpec(_Table):
    """A virtio-serial port; its host end is a unix socket named after the last component."""

    name: str = Field(
        description=f"as the guest finds it; {GUEST_AGENT_CHANNEL} is for QEMU's guest agent",
        examples=["org.example.port"],
    )

    @property
    def socket_name(self) -> str:
        """ "probe" for org.sempervirt.probe; "agent" for that of the QEMU guest agent."""
        return "agent" if self.name == GUEST_AGENT_CHANNEL else self.name.rpartition(".")[2]

    @model_validator(mode="after")
    def _name_is_usable(self) -> Self:
        if self.name == GUEST_AGENT_CHANNEL:
            return self
        if not _CHANNEL.fullmatch(self.name) or not self.socket_name:
            raise ValueError(f'"{self.name}" is not a channel name such as org.example.port')
        if self.socket_name in RESERVED_CHANNELS or self.socket_name.startswith("disk-"):
            raise ValueError(f'the last component of "{self.name}" is taken by the VM itself')
        return self


class HaSpec(_Table):
    """What becomes of the VM when its host has to be emptied."""

    priority: int = Field(
        default=50,
        ge=0,
        le=100,
        description="VMs of a higher priority leave the host first",
        examples=[80],
    )


# As long as somebody may want to wait, in seconds.
WAIT_MAX_S = 86400
Wait = Annotated[float, Field(ge=0, le=WAIT_MAX_S, allow_inf_nan=False)] | Literal["never"]


class TakeOverSpec(_Table):
    """How many seconds from what is seen of the VM to the take-over by a standby, or "never"."""

    qemu_ended: Wait = Field(
        default=0.0, description="QEMU has ended, and nobody wanted that", examples=[2.5]
    )
    guest_panicked: Wait = Field(
        default=0.0, description="the guest has reported a panic", examples=["never"]
    )
    guest_watchdog: Wait = Field(
        default=0.0, description="the guest's watchdog has run out", examples=[10]
    )
    monitor_silent: Wait = Field(
        default="never", description="QEMU's monitor does not answer", examples=[60]
    )
    service_silent: Wait = Field(
        default="never", description="`service` does not answer", examples=[30]
    )
    host_silent: Wait = Field(
        default=60.0,
        examples=["never"],
        description="its host's lease has ended; counts for a standby on another host, and only "
        "where it can be proved that the VM writes no more",
    )


class StandbySpec(_Table):
    """How a standby of the VM is made, and when it takes over."""

    initialised: Literal["agent", "channel", "console"] = Field(
        default="agent",
        examples=["console"],
        description="what shows that the guest's OS is up: its agent answers, or `marker` is read",
    )
    channel: str | None = Field(
        default=None,
        description="the channel on which marker is read",
        examples=["org.example.port"],
    )
    marker: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="what the guest says there when its OS is up",
        examples=["login:"],
    )
    deadline_s: int = Field(
        default=300,
        ge=1,
        le=3600,
        description="from its start until its OS is initialised",
        examples=[600],
    )
    service: str | None = Field(
        default=None,
        examples=["192.0.2.10:443"],
        max_length=300,
        pattern=r"^[^\s/]+:[0-9]{1,5}$",
        description='what the guest is there for: "ADDRESS:PORT", where it takes TCP connections',
    )
    take_over: TakeOverSpec = Field(
        default=TakeOverSpec(), description="what a standby takes over for, and how soon"
    )

    @field_validator("take_over")
    @classmethod
    def _silence_is_asked_for(cls, told: TakeOverSpec, info: ValidationInfo) -> TakeOverSpec:
        if told.service_silent != "never" and info.data.get("service") is None:
            raise ValueError('service_silent needs a service = "ADDRESS:PORT" that can be asked')
        return told

    @model_validator(mode="after")
    def _marker_has_a_place(self) -> Self:
        if (self.initialised == "agent") == (self.marker is not None):
            raise ValueError('marker belongs to initialised = "channel" or "console"')
        if (self.initialised == "channel") != (self.channel is not None):
            raise ValueError('channel belongs to initialised = "channel", and only to it')
        return self


# Each takes two slots of the machine: its own, and that of its shim.
PASSTHROUGH_MAX = 4


class VmSpec(_Table):
    """A virtual machine."""

    name: Name = Field(
        description="what the VM is called everywhere; unique in its cluster", examples=["web"]
    )
    memory: Size = Field(default=512 * MIB, description="a whole number of MiB", examples=["2G"])
    vcpus: int = Field(
        default=1, ge=1, le=1024, description="processors that the guest sees", examples=[2]
    )
    machine: Literal["q35", "pc"] = Field(
        default="q35", description="QEMU's machine", examples=["pc"]
    )
    cpu: str | None = Field(
        default=None,
        pattern=r"^[\w.+=,-]+$",
        description="QEMU's CPU model; name one that all hosts have where VMs move between hosts "
        "of several kinds",
        examples=["EPYC-v4"],
    )
    accel: Literal["auto", "kvm", "tcg"] = Field(
        default="auto",
        description="auto: KVM where it works, or else emulation (tcg)",
        examples=["kvm"],
    )
    kernel: Path | None = Field(
        default=None,
        description="a Linux kernel to start at once, instead of a boot loader",
        examples=["vmlinuz"],
    )
    initrd: Path | None = Field(
        default=None, description="initial file system of kernel", examples=["initrd.img"]
    )
    cmdline: str = Field(
        default="",
        description="command line of kernel",
        examples=["root=/dev/vda1 console=ttyS0"],
    )
    firmware: Path | None = Field(
        default=None,
        description="a whole firmware, or the code of one with firmware_vars; by default QEMU's "
        "own (BIOS)",
        examples=["/usr/share/ovmf/OVMF.fd"],
    )
    firmware_vars: Path | None = Field(
        default=None,
        description="template of the firmware's variables; each VM has its own copy",
        examples=["/usr/share/OVMF/OVMF_VARS_4M.fd"],
    )
    uuid: UUID | None = Field(
        default=None,
        description="the machine's UUID, by default derived from the name",
        examples=["6a1f4f0e-2f0b-4d51-9a3e-1c5b7d9e2f48"],
    )
    generation_id: UUID | None = Field(
        default=None,
        examples=["0c8f2a54-7b1d-4e36-8f90-2d6a5b3c1e07"],
        description="changes when the guest sees a time twice, so that it draws new random "
        "numbers; chosen at each start",
    )
    on_crash: Literal["poweroff", "pause"] = Field(
        default="pause", description="when the guest reports a panic", examples=["poweroff"]
    )
    on_reboot: Literal["reset", "poweroff"] = Field(
        default="reset", description="when the guest reboots", examples=["poweroff"]
    )
    standby: StandbySpec | None = Field(
        default=None, description="how a standby is made, and when it takes over"
    )
    # Left out where nothing is said: earlier releases refuse a key that they do not know.
    autostart: bool = Field(
        default=False,
        examples=[True],
        exclude_if=lambda wanted: not wanted,
        description="semperd starts the VM when the host is up",
    )
    on_host_shutdown: Literal["move", "power-off", "save"] = Field(
        default="move",
        examples=["power-off"],
        exclude_if=lambda wish: wish == "move",
        description="before the host goes down: to another host, or off where none takes it; save: "
        "memory is kept on this host, and the next start goes on from there",
    )
    ha: HaSpec = Field(default=HaSpec(), exclude_if=lambda ha: ha == HaSpec())
    disks: Annotated[tuple[DiskSpec, ...], few(DEVICES_MAX)] = Field(
        default=(), max_length=DEVICES_MAX
    )
    passthrough: Annotated[tuple[PassedThrough, ...], few(DEVICES_MAX)] = Field(
        default=(), max_length=PASSTHROUGH_MAX
    )
    nics: Annotated[tuple[NicSpec, ...], few(DEVICES_MAX)] = Field(
        default=(), max_length=DEVICES_MAX
    )
    channels: Annotated[tuple[ChannelSpec, ...], few(DEVICES_MAX)] = Field(
        default=(), max_length=DEVICES_MAX
    )

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        if has_nul(given):
            raise ValueError("a text of it holds a NUL, which no path and no argument can")
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.memory < MIB or self.memory % MIB:
            raise ValueError("memory must be a whole number of MiB, at least 1M")
        if self.kernel is None and (self.initrd is not None or self.cmdline):
            raise ValueError("initrd and cmdline need a kernel")
        if self.firmware_vars is not None and self.firmware is None:
            raise ValueError("firmware_vars needs the code that it belongs to, as firmware")
        if self.firmware and "_CODE" in self.firmware.name and self.firmware_vars is None:
            raise ValueError(
                f"{self.firmware.name} is the code of a firmware whose variables are in a file of "
                'their own; name that as well, for example firmware_vars = "'
                f'{self.firmware.with_name(self.firmware.name.replace("_CODE", "_VARS", 1))}"'
            )
        for what, names in (
            ("disks", [disk.name for disk in self.disks]),
            ("disks or devices", [one.name for one in (*self.disks, *self.passthrough)]),
            ("channels", [channel.socket_name for channel in self.channels]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f'two {what} are called "{min(twice)}"')
        if self.machine != "q35" and any(disk.keep == "latest" for disk in self.disks):
            raise ValueError('keep = "latest" needs machine = "q35", which has ports to plug into')
        channel = self.standby.channel if self.standby is not None else None
        if channel is not None and channel not in {one.name for one in self.channels}:
            raise ValueError(f'there is no channel "{channel}" to read marker on')
        images = [disk.image for disk in self.imaged if not disk.read_only]
        if len(set(images)) != len(images):
            raise ValueError("two disks write to the same image")
        functions = [one.pci for one in self.passthrough if isinstance(one, PciSpec)]
        if len(set(functions)) != len(functions):
            raise ValueError("two devices are the same PCI device of the host")
        if self.passthrough and self.machine != "q35":
            raise ValueError('passed-through devices need machine = "q35"')
        return self

    @property
    def imaged(self) -> tuple[DiskSpec | PassthroughSpec, ...]:
        """Everything that has an image: the disks, then the passed-through devices."""
        devices = [one for one in self.passthrough if isinstance(one, PassthroughSpec)]
        return (*self.disks, *devices)

    @property
    def guest_agent(self) -> ChannelSpec | None:
        """The channel of the QEMU guest agent, if the VM has one."""
        return next((c for c in self.channels if c.name == GUEST_AGENT_CHANNEL), None)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is named: images, kernel, firmware."""
        named = (self.kernel, self.initrd, self.firmware, self.firmware_vars)
        images = (disk.image for disk in self.imaged)
        return (*(path for path in named if path is not None), *images)

    def disk(self, name: str) -> DiskSpec:
        """The disk of that name; KeyError if there is none."""
        for disk in self.disks:
            if disk.name == name:
                return disk
        raise KeyError(name)

    def device(self, name: str) -> PassthroughSpec | PciSpec:
        """The passed-through device of that name; KeyError if there is none."""
        for device in self.passthrough:
            if device.name == name:
                return device
        raise KeyError(name)

    def begun(self, *, generations: bool) -> VmSpec:
        """The VM with its identity: the UUID that is given or derived from the name, and with
        `generations` a generation ID that no VM has had.
        """
        return self.model_copy(
            update={
                "uuid": self.uuid or uuid5(_MACHINES, self.name),
                "generation_id": uuid4() if generations else None,
            }
        )

    def mac(self, index: int) -> str:
        """The address of a card: as given, or derived, so that it is the same each time."""
        chosen = self.nics[index].mac
        if chosen is not None:
            return chosen
        digest = hashlib.sha256(f"{self.name}/{index}".encode()).digest()
        return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])
