"""A backend that tells a second QEMU what a disk is like, while the first one is still served.

QEMU does not start without its disks' backends, and a backend serves one QEMU at a time. A QEMU
that is to take over gets its answers from the stand-in, which never owns the image: a stand-in
refuses to run a queue as long as another process has the image's lock. The way to the disk is a
link:

    qN/disk-root.sock ──► standin-root.sock    until the switch
                      ──► ../disk-root.sock    afterwards, for good

When the stand-in ends, QEMU connects again by the same path, and finds the disk.
"""

from __future__ import annotations

import socket
from pathlib import Path

from sempervirt.core.errors import OutcomeUnknown, Unavailable
from sempervirt.disk.backend import Launch
from sempervirt.disk.setup import DiskSetup
from sempervirt.host import process
from sempervirt.host.lending import group_of
from sempervirt.host.process import Process
from sempervirt.host.sockets import check_socket_path, listen_unix


class StandIn:
    """Made by `start`; ends with `end`."""

    def __init__(self, setup: DiskSetup, image_fd: int, directory: Path) -> None:
        self._setup = setup
        self._image_fd = image_fd
        self._directory = directory
        self._process: Process | None = None
        self._listener: socket.socket | None = None

    @property
    def path(self) -> Path:
        """Where the new QEMU finds the disk, now and later."""
        return self._directory / self._setup.files.socket.name

    @property
    def _own(self) -> Path:
        return self._directory / f"standin-{self._setup.short_name}.sock"

    def start(self) -> None:
        """Starts the process; QEMU's connection waits until the process accepts.

        Raises CommandFailed, Unavailable, or InvalidRequest for a path that is too long.
        """
        setup = self._setup
        check_socket_path(self.path)
        self._listener = listen_unix(self._own, group_of(setup.files.directory))
        launch = Launch(
            binary=setup.command.binary(),
            options=setup.options,
            listen_fd=self._listener.fileno(),
            control=self._own.with_suffix(".ctl"),
            wait_for_lock=False,
            image_fd=self._image_fd,
        )
        self._process = process.spawn(
            [*setup.command.argv(launch), "--incoming", "--no-map"],
            log=self._own.with_suffix(".log"),
            on_exit=lambda _end: None,
            pass_fds=launch.inherited,
            environment=setup.command.environment,
        )
        _link(self.path, self._own)

    async def end(self) -> None:
        """Kills the process. Raises OutcomeUnknown when the process does not end."""
        if self._process is not None and await self._process.end(0) is None:
            raise OutcomeUnknown(f"the stand-in of disk {self._setup.name} does not end")
        if self._listener is not None:
            self._listener.close()
        self._own.unlink(missing_ok=True)

    def point_to_disk(self) -> None:
        """Makes QEMU's next connection go to the disk."""
        lead_to_disk(self._directory, self._setup.files.socket)

    def check(self) -> None:
        """Raises Unavailable, with the process's last words, when the process has ended."""
        if self._process is not None and self._process.exit is not None:
            said = process.said(self._own.with_suffix(".log"), 1)
            raise Unavailable(
                f"disk {self._setup.name} cannot be shown to a second QEMU: "
                f"{said[0] if said else self._process.exit}"
            )


def lead_to_disk(directory: Path, disk: Path) -> None:
    """Makes the next connection by way of `directory` go to the socket `disk`."""
    _link(directory / disk.name, disk)


def _link(path: Path, target: Path) -> None:
    scratch = path.with_suffix(".new")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    scratch.replace(path)
