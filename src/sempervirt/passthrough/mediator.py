"""How a mediator is started: files, options and command line of semper-vfiod."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sempervirt.host.procfs import ProcessId, find_processes
from sempervirt.host.programs import find_program
from sempervirt.host.sockets import check_socket_path
from sempervirt.passthrough.client import PROGRAM

INCOMING = "--incoming"
SPARE = "--spare"
SESSION = "--session-socket="
# Sockets that one process is given to listen at; its spare gets them from that process.
_LISTENERS = ("--fd=", "--shim-fd=")


@dataclass(frozen=True)
class DeviceFiles:
    """Where a device keeps its sockets and its log: RUN/vm/<vm>/device-<device>…"""

    directory: Path
    device: str

    @property
    def socket(self) -> Path:
        """What QEMU connects to, for the device."""
        return self.directory / f"device-{self.device}.sock"

    @property
    def shim(self) -> Path:
        """What QEMU connects to, for the shim."""
        return self.directory / f"shim-{self.device}.sock"

    @property
    def control(self) -> Path:
        """Where the mediator answers questions."""
        return self.directory / f"device-{self.device}.ctl"

    @property
    def session(self) -> Path:
        """Where the mediator tells its spare what that has to know."""
        return self.directory / f"device-{self.device}.session"

    @property
    def waiting(self) -> tuple[Path, ...]:
        """Where a spare has the sockets that it moves to `control` and `session` when it serves."""
        return tuple(path.with_name(f"{path.name}.next") for path in (self.control, self.session))

    @property
    def log(self) -> Path:
        """What the mediator wrote."""
        return self.directory / f"device-{self.device}.log"

    def check(self) -> None:
        """Raises InvalidRequest when a path is too long for a socket."""
        for path in (self.socket, self.shim, *self.waiting):
            check_socket_path(path)

    def find_processes(self) -> list[ProcessId]:
        """The mediators of this device that live, recorded or not: the one that serves, which is
        the oldest, and its spare.
        """
        pattern = re.compile(rf"--control-socket={re.escape(str(self.control))}")
        found = [found.identity for found in find_processes(pattern)]
        return sorted(found, key=lambda identity: (identity.start_ticks, identity.pid))


@dataclass(frozen=True)
class DeviceOptions:
    """What the owner of a device chose for it."""

    image: Path
    kind: Literal["nvme"] = "nvme"
    read_only: bool = False
    queues: int = 4
    engine: str = "auto"
    direct: bool = False
    serial: str = ""

    def argv(self) -> list[str]:
        """Its part of the command line."""
        argv = [
            f"--kind={self.kind}",
            f"--blk-file={self.image}",
            f"--queues={self.queues}",
            f"--engine={self.engine}",
        ]
        if self.serial:
            argv.append(f"--serial={self.serial}")
        if self.direct:
            argv.append("--direct")
        if self.read_only:
            argv.append("--read-only")
        return argv


@dataclass(frozen=True)
class PciOptions:
    """A real PCI device of the host: its address there, and what is known of its registers."""

    pci: str
    profile: Literal["nvme", "plain"] = "nvme"
    kind: Literal["pci"] = "pci"
    read_only: Literal[False] = False

    def argv(self, group_fd: int, container_fd: int) -> list[str]:
        """Its part of the command line."""
        return [
            "--kind=pci",
            f"--pci={self.pci}",
            f"--profile={self.profile}",
            f"--vfio-group-fd={group_fd}",
            f"--vfio-container-fd={container_fd}",
        ]


@dataclass(frozen=True)
class DeviceSetup:
    """One device of a VM: how it is called (VM/NAME), its files, its options, and its slots on PCI
    bus 0. `title` are the options that say by what right the image is written. `incoming`: its
    registers come from another host.
    """

    name: str
    files: DeviceFiles
    options: DeviceOptions | PciOptions
    slot: int
    shim_slot: int
    title: tuple[str, ...] = ()
    incoming: bool = False

    @property
    def short_name(self) -> str:
        """The name within the VM."""
        return self.files.device

    def argv(self, listen_fd: int, shim_fd: int, handles: Sequence[int] = ()) -> list[str]:
        """The command line; `handles` are the group and the container of a PCI device. Raises
        Unavailable when the program is not installed.
        """
        options = self.options
        argv = [
            find_program(PROGRAM),
            f"--fd={listen_fd}",
            f"--shim-fd={shim_fd}",
            f"--control-socket={self.files.control}",
        ]
        if isinstance(options, PciOptions):
            group_fd, container_fd = handles
            argv += options.argv(group_fd, container_fd)
        else:
            # A device in hardware dies with its process.
            argv += [f"{SESSION}{self.files.session}", *options.argv()]
        argv += self.title
        if self.incoming and INCOMING not in self.title:
            argv.append(INCOMING)
        return argv


def spare_argv(serving: Sequence[str]) -> list[str] | None:
    """The command line of a spare of the mediator with that command line; None for a mediator that
    no spare can follow. Raises Unavailable when the program is not installed.
    """
    options = [one for one in serving[1:] if one != SPARE and not one.startswith(_LISTENERS)]
    if not any(one.startswith(SESSION) for one in options):
        return None
    return [find_program(PROGRAM), SPARE, *options]
