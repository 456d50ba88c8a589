"""Where a running VM keeps its sockets and logs: RUN/vm/NAME/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sempervirt.host.sockets import check_socket_path
from sempervirt.vm.spec import ChannelSpec, VmSpec


@dataclass(frozen=True)
class VmFiles:
    """Paths below one directory."""

    directory: Path

    @property
    def monitor(self) -> Path:
        """QEMU's monitor (QMP)."""
        return self.directory / "qmp.sock"

    @property
    def console(self) -> Path:
        """The guest's first serial port; one client at a time."""
        return self.directory / "console.sock"

    @property
    def console_log(self) -> Path:
        """Everything that port wrote, bounded."""
        return self.directory / "console.log"

    @property
    def log(self) -> Path:
        """What QEMU itself wrote."""
        return self.directory / "qemu.log"

    def channel(self, channel: ChannelSpec) -> Path:
        """The host end of a channel."""
        return self.directory / f"{channel.socket_name}.sock"

    def prepare(self, spec: VmSpec) -> None:
        """Makes the directory and removes sockets of an earlier run.

        Raises InvalidRequest when a socket's path would be too long.
        """
        sockets = [self.monitor, self.console, *(self.channel(c) for c in spec.channels)]
        for path in sockets:
            check_socket_path(path)
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sockets:
            path.unlink(missing_ok=True)
