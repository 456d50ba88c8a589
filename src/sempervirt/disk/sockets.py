"""The sockets of a disk: where QEMU connects, where its backends answer. One that somebody removes
under a running VM, as cleaners of temporary files do, is noticed and made again.

A socket lives on without its name, and nobody finds it: a QEMU that has to connect again would wait
for good, and a backend that cannot be asked any more would be taken for one that is silent. A name
cannot be given back to a socket. So QEMU gets a new listening socket, and the backends are replaced
by ones that listen on it, from the same program and in order, as in an upgrade: the spare first,
which then goes on with QEMU's connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.disk.driver import Disk
from sempervirt.disk.setup import DiskSetup
from sempervirt.host.lending import group_of
from sempervirt.host.sockets import discard, listen_unix, turn_away

log = logging.getLogger(__name__)

LOOK_S = 3.0
# Opening a block device over a network can take seconds.
START_DEADLINE_S = 30.0


def listen(setup: DiskSetup) -> socket.socket:
    """The socket that QEMU connects to. Raises InvalidRequest, Unavailable."""
    listener = listen_unix(setup.files.socket, group_of(setup.files.directory))
    try:
        if setup.access is not None:
            setup.access.give(setup.files.socket)
    except SempervirtError:
        listener.close()
        discard(setup.files.socket)
        raise
    return listener


async def replace_backends(disk: Disk) -> None:
    """Has the disk served by processes that are started from now on; the guest goes on.

    Raises StateConflict while the disk is frozen, upgraded or not served, Unavailable when the new
    ones failed.
    """
    state = disk.state
    if not disk.setup.policy.spare:  # the next one begins when this one has ended
        control = disk.setup.files.control(disk.generation)
        if not await asyncio.to_thread(os.path.lexists, control):
            disk.retire()
    elif state.active is not None and state.active.serving_since is None and not state.frozen:
        await _replace_unheard(disk)
    else:
        await disk.renew()


async def _replace_unheard(disk: Disk) -> None:
    """Where the active process was adopted and cannot be asked: it may serve. It is told to end
    once a new spare is ready: it drains, and lets go of the image.
    """
    generation, spare_pid = disk.generation, disk.spare_pid
    if disk.state.spare is not None:
        disk.backends.send_signal(disk.state.spare.generation, signal.SIGKILL)
    await disk.changes.wait_until(
        lambda: disk.spare_ready and disk.spare_pid != spare_pid,
        timeout_s=START_DEADLINE_S,
        what="a spare",
    )
    disk.retire()
    try:
        await disk.changes.wait_until(
            lambda: disk.generation != generation,
            timeout_s=disk.setup.policy.drain_s,
            what="the end of the backend",
        )
    except Unavailable:
        disk.backends.send_signal(generation, signal.SIGKILL)


class Sockets:
    """Those of one disk. What is `expected` was there once: what a process has not made yet is not
    gone, nor is what it may have removed itself, at its end, between two looks.
    """

    def __init__(self, disk: Disk, expected: Iterable[Path] = ()) -> None:
        self._disk = disk
        self._seen = {disk.setup.files.socket, *expected}
        self._missed: set[Path] = set()
        # Whether QEMU has a new socket that the active backend has not.
        self._behind = False
        self._told = ""

    async def keep(self) -> None:
        """Looks after them until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Looks now, and makes again what was not there at the last look either."""
        disk = self._disk
        paths = self._paths()
        there = await asyncio.to_thread(lambda: {path for path in paths if os.path.lexists(path)})
        answered = {path for path, heard in disk.backends.control_sockets.items() if heard}
        missing = ((self._seen | answered) & paths) - there
        gone = missing & self._missed & self._paths()
        self._seen = (self._seen | answered | there) & paths
        self._missed = missing
        if gone or self._behind:
            await self._renew(gone)
        else:
            self._told = ""

    def _paths(self) -> set[Path]:
        """Of the processes that live, and of the disk."""
        files = self._disk.setup.files
        return {files.socket, files.session, *self._disk.backends.control_sockets}

    async def _renew(self, gone: set[Path]) -> None:
        disk = self._disk
        names = ", ".join(sorted(map(str, gone or {disk.setup.files.socket})))
        try:
            if disk.setup.files.socket in gone:
                # Fails where the directory is gone as well, which is for others to make.
                listener = await asyncio.to_thread(listen, disk.setup)
                turn_away(listener)  # until there is a process that accepts
                disk.backends.listen_at(listener)
                self._behind = True
            if not self._told:
                disk.history.sockets(f"{names} was removed; other backends take its place")
            await replace_backends(disk)
        except SempervirtError as error:
            if self._told != str(error):
                log.error("disk name=%s lacks %s: %s", disk.name, names, error)  # noqa: TRY400
            self._told = str(error)
        else:
            self._told, self._behind, self._missed = "", False, set()
            # What the new processes do not make is not expected of them for ever.
            self._seen = {disk.setup.files.socket, *(self._seen - gone)}
