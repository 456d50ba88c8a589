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
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from sempervirt.core.names import check_name
from sempervirt.core.queue_map import check_map
from sempervirt.core.sizes import parse_size

MIB = 1 << 20
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)
# The kernel's IFNAMSIZ, less the NUL.
_INTERFACE = re.compile(r"[^\s/:]{1,15}")
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


class DiskSpec(_Table):
    """A disk: a raw image or a block device, served by a backend of its own or by QEMU."""

    name: Name = Field(description="name within the VM; the disk is called VM/NAME")
    image: Path = Field(description="raw image file or block device")
    format: Literal["raw"] | None = Field(
        default=None, description="raw: also when it begins as an image of another format does"
    )
    backend: Literal["blkd", "qemu"] = Field(
        default="blkd", description="blkd outlives its own death; qemu is QEMU itself"
    )
    bus: Literal["virtio-blk", "virtio-scsi"] = Field(
        default="virtio-blk", description="virtio-scsi needs backend = qemu"
    )
    read_only: bool = False
    queues: Count = Field(
        default="auto",
        description=f"virtqueues; auto: one for each vcpu, at most {AUTO_QUEUES_MAX}",
    )
    queue_size: Literal[32, 64, 128, 256, 512, 1024] = Field(
        default=256, description="requests that each queue can hold; a power of two"
    )
    queues_per_thread: Count = Field(
        default="auto", description="auto: as a preset of semper disk tune says, or 4"
    )
    thread_map: tuple[int, ...] | None = Field(
        default=None, description="the thread of each queue, for example [0, 0, 1, 1]"
    )
    poll_us: int | None = Field(
        default=None, ge=0, le=1000, description="how long a thread may poll; 0 = never"
    )
    engine: Engine = Field(default="auto", description="auto: as a preset says, or built in")
    direct: bool = Field(default=False, description="go around the host's page cache")
    block_size: Literal[512, 4096] | None = Field(
        default=None,
        description="logical block size that the guest sees; by default the one that the image was "
        "partitioned with, or else 512, whatever blocks its storage has",
    )
    serial: str = Field(default="", max_length=20, pattern=r"^[\x21-\x7e]*$")

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
        if len(thread_map) > QUEUES_MAX:
            raise ValueError(f"a disk has at most {QUEUES_MAX} queues")
        return check_map(thread_map, None if queues == "auto" else queues)


class NicSpec(_Table):
    """A network card."""

    type: Literal["user", "tap"] = "user"
    tap: str | None = Field(default=None, description="tap interface, for type = tap")
    queues: int = Field(
        default=1, ge=1, le=64, description="pairs of virtqueues; more than 1 for a multi-queue tap"
    )
    vhost: bool | None = Field(
        default=None, description="serve in kernel threads (tap); by default where it works"
    )
    mac: Mac | None = Field(default=None, description="by default derived from VM and position")

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

    name: str

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


# Of each kind. No machine has places for so many; looking at 20,000 takes the agent half a second.
DEVICES_MAX = 1024


def _few(devices: object) -> object:
    """Before any of them is looked at: errors of all would be told."""
    if isinstance(devices, list | tuple) and len(devices) > DEVICES_MAX:
        raise ValueError(f"{len(devices)} are too many: at most {DEVICES_MAX}")
    return devices


class VmSpec(_Table):
    """A virtual machine."""

    name: Name
    memory: Size = Field(default=512 * MIB, description='for example "512M" or "4G"')
    vcpus: int = Field(default=1, ge=1, le=1024)
    machine: Literal["q35", "pc"] = "q35"
    cpu: str | None = Field(default=None, pattern=r"^[\w.+=,-]+$", description="QEMU CPU model")
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    firmware: Path | None = Field(
        default=None, description="a whole firmware, or the code of one with firmware_vars"
    )
    firmware_vars: Path | None = Field(
        default=None,
        description="template of the firmware's variables; each VM has its own copy",
    )
    uuid: UUID | None = Field(
        default=None,
        description="the machine's UUID, by default derived from the name",
    )
    generation_id: UUID | None = Field(
        default=None,
        description="changes when the guest sees a time twice, so that it draws new random "
        "numbers; chosen at each start",
    )
    on_crash: Literal["poweroff", "pause"] = Field(
        default="pause", description="when the guest reports a panic"
    )
    on_reboot: Literal["reset", "poweroff"] = "reset"
    disks: Annotated[tuple[DiskSpec, ...], BeforeValidator(_few)] = Field(
        default=(), max_length=DEVICES_MAX
    )
    nics: Annotated[tuple[NicSpec, ...], BeforeValidator(_few)] = Field(
        default=(), max_length=DEVICES_MAX
    )
    channels: Annotated[tuple[ChannelSpec, ...], BeforeValidator(_few)] = Field(
        default=(), max_length=DEVICES_MAX
    )

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
            ("channels", [channel.socket_name for channel in self.channels]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f'two {what} are called "{min(twice)}"')
        images = [disk.image for disk in self.disks if not disk.read_only]
        if len(set(images)) != len(images):
            raise ValueError("two disks write to the same image")
        return self

    @property
    def guest_agent(self) -> ChannelSpec | None:
        """The channel of the QEMU guest agent, if the VM has one."""
        return next((c for c in self.channels if c.name == GUEST_AGENT_CHANNEL), None)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is named: images, kernel, firmware."""
        named = (self.kernel, self.initrd, self.firmware, self.firmware_vars)
        images = (disk.image for disk in self.disks)
        return (*(path for path in named if path is not None), *images)

    def disk(self, name: str) -> DiskSpec:
        """The disk of that name; KeyError if there is none."""
        for disk in self.disks:
            if disk.name == name:
                return disk
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
