"""A backend that runs for a measurement, and ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sempervirt.core.errors import CommandFailed, OutcomeUnknown, Unavailable
from sempervirt.disk import takeover
from sempervirt.disk.client import BackendClient
from sempervirt.disk.storage import StorageKey
from sempervirt.disk.tuning.candidates import Candidate
from sempervirt.host import process
from sempervirt.host.process import Exit, Process, said
from sempervirt.host.refusals import refusal

_START_S = 10.0
_GRACE_S = 10.0
_POLL_S = 0.001


@dataclass(frozen=True)
class Target:
    """What is served. A block device is the user's own, and read only."""

    image: Path
    storage: StorageKey
    queues: int
    read_only: bool = False


class Server(Protocol):
    """A program that serves an image as a candidate says."""

    def argv(self, candidate: Candidate, target: Target, socket: Path) -> list[str]:
        """Its command line."""


@dataclass(frozen=True)
class Blkd:
    """semper-blkd."""

    program: str

    def argv(self, candidate: Candidate, target: Target, socket: Path) -> list[str]:
        """Queues go to threads in turn, which is as good as any other even map."""
        return [
            self.program,
            f"--socket-path={socket}",
            f"--blk-file={target.image}",
            f"--num-queues={target.queues}",
            f"--threads={candidate.threads_for(target.queues)}",
            f"--engine={candidate.engine}",
            f"--poll-us={candidate.poll_us}",
            *(["--direct"] if target.storage.direct else []),
            *(["--read-only"] if target.read_only else []),
        ]


@dataclass(frozen=True)
class QemuStorageDaemon:
    """QEMU's block layer with an iothread: what serves a virtio-blk disk inside QEMU."""

    program: str = "qemu-storage-daemon"

    def argv(self, candidate: Candidate, target: Target, socket: Path) -> list[str]:
        """The node is the file itself, QEMU's shortest path."""
        image = str(target.image).replace(",", ",,")
        driver = "host_device" if target.storage.kind == "block" else "file"
        direct, read_only = (
            "on" if value else "off" for value in (target.storage.direct, target.read_only)
        )
        node = (
            f"driver={driver},filename={image},aio={candidate.engine},cache.direct={direct},"
            f"read-only={read_only},node-name=disk"
        )
        export = (
            f"type=vhost-user-blk,id=export,node-name=disk,num-queues={target.queues},"
            f"writable={'off' if target.read_only else 'on'},"
            f"iothread=thread0,addr.type=unix,addr.path={socket}"
        )
        return [
            self.program,
            *("--object", f"iothread,id=thread0,poll-max-ns={candidate.poll_us * 1000}"),
            *("--blockdev", node),
            *("--export", export),
        ]


@asynccontextmanager
async def serving(argv: list[str], socket: Path) -> AsyncIterator[int]:
    """Runs a backend for the duration of the block; gives the pid.

    Raises CommandFailed when the backend does not come to listen on `socket`.
    """

    async def listens() -> bool:
        return socket.exists()  # noqa: ASYNC240

    async with _running(argv, socket, listens) as pid:
        yield pid


async def check_unused(program: str, image: Path, folder: Path, *, read_only: bool) -> None:
    """Asks semper-blkd for the lock of an image, as a VM would; nothing is written.

    Raises ImageLocked, naming the holder, or InvalidRequest when the image cannot be used at all.
    """
    socket, control_socket = folder / "check.sock", folder / "check.ctl"
    argv = [
        program,
        f"--socket-path={socket}",
        f"--control-socket={control_socket}",
        f"--blk-file={image}",
        *(["--read-only"] if read_only else []),
    ]

    async def has_lock() -> bool:
        try:
            status = await BackendClient(control_socket).status()
        except (Unavailable, OutcomeUnknown):  # not yet, or never
            return False
        return takeover.serves(status, connection_expected=False)

    try:
        async with _running(argv, socket, has_lock):
            pass
    except CommandFailed as error:
        words = error.tail[-1] if error.tail else ""
        raise refusal(
            f"disk {image.name}", "the backend", Exit(code=error.exit_code), words
        ) from error


@asynccontextmanager
async def _running(
    argv: list[str], socket: Path, is_ready: Callable[[], Awaitable[bool]]
) -> AsyncIterator[int]:
    log = socket.with_suffix(".log")
    log.unlink(missing_ok=True)
    backend = process.spawn(_dying_with_us(argv), log=log, on_exit=lambda _end: None)
    try:
        try:
            async with asyncio.timeout(_START_S):
                while not await is_ready():
                    await _pause(backend)
                    if backend.exit is not None:
                        raise CommandFailed(shlex.join(argv), backend.exit.code, said(log))
        except TimeoutError as error:
            raise CommandFailed(shlex.join(argv), None, said(log)) from error
        yield backend.pid
    finally:
        try:
            await backend.end(_GRACE_S)
        except asyncio.CancelledError:  # a second Ctrl-C
            backend.send_signal(signal.SIGKILL)
            raise
        socket.unlink(missing_ok=True)  # noqa: ASYNC240


async def _pause(backend: Process) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_POLL_S):
            await backend.wait()


def _dying_with_us(argv: list[str]) -> list[str]:
    """A backend that nobody measures any more must not keep the scratch image alive."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *argv] if setpriv else argv
