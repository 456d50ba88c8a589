"""Where a running VM keeps its sockets and logs: RUN/vm/NAME/.

A QEMU that is to take over from another one makes its sockets in a directory below, qN/ (the
N-th QEMU of this VM), and so does the first one where the VM has a user of its own (`vm.user`).
They are moved to their places later; what stays in qN/ is the way to the disks.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from sempervirt.host.sockets import check_socket_path
from sempervirt.qemu.spec import ChannelSpec, VmSpec


@dataclass(frozen=True)
class VmFiles:
    """Paths below one directory; the logs may stand in another one."""

    directory: Path
    logs: Path | None = None

    @property
    def monitor(self) -> Path:
        """QEMU's monitor (QMP)."""
        return self.directory / "qmp.sock"

    @property
    def console(self) -> Path:
        """The guest's first serial port; one client at a time."""
        return self.directory / "console.sock"

    def all_logs(self) -> list[Path]:
        """Of everything that runs for the VM: what a guest does may be told in any of them."""
        return list((self.logs or self.directory).glob("*.log"))

    @property
    def console_log(self) -> Path:
        """Everything that port wrote, bounded."""
        return (self.logs or self.directory) / "console.log"

    @property
    def log(self) -> Path:
        """What QEMU itself wrote."""
        return (self.logs or self.directory) / "qemu.log"

    @property
    def vars(self) -> Path:
        """The way to the variables of the firmware, for every QEMU of the VM."""
        return (self.logs or self.directory) / "vars.fd"

    @property
    def peers(self) -> Path:
        """Which processes the VM's backends serve (`host.peers`)."""
        return self.directory / "qemu.peers"

    def channel(self, channel: ChannelSpec) -> Path:
        """The host end of a channel."""
        return self.directory / f"{channel.socket_name}.sock"

    def prepare(self, spec: VmSpec) -> None:
        """Makes the directory and removes sockets of an earlier run.

        Raises InvalidRequest when a socket's path would be too long.
        """
        sockets = self.sockets(spec)
        for path in sockets:
            check_socket_path(path)
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sockets:
            path.unlink(missing_ok=True)
        self.remove_successors(keep=None)

    def sockets(self, spec: VmSpec) -> list[Path]:
        """What QEMU itself listens on."""
        return [self.monitor, self.console, *(self.channel(c) for c in spec.channels)]

    def take_sockets(self, made: VmFiles, spec: VmSpec) -> None:
        """Puts the sockets that a QEMU has made where everybody looks for them; what it has made
        in their place, such as a link, leads nobody elsewhere. Raises OSError.
        """
        for old, new in zip(made.sockets(spec), self.sockets(spec), strict=True):
            with contextlib.suppress(FileNotFoundError):
                old.replace(new)
                if not stat.S_ISSOCK(new.lstat().st_mode):  # only now nobody replaces it
                    new.unlink()

    def successor(self, number: int) -> VmFiles:
        """Where the QEMU of that number, which is to take over, has its sockets."""
        return VmFiles(self.directory / f"q{number}", self.directory)

    def remove_successors(self, *, keep: int | None) -> None:
        """Removes the directories of all QEMUs but one."""
        for directory in self.directory.glob("q[0-9]*"):
            if directory.name != f"q{keep}":
                shutil.rmtree(directory, ignore_errors=True)
