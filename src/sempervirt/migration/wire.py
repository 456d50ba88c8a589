"""One end of the wire: a process of semper-wired, and what it tells (docs/design/wire.md)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from sempervirt.core.errors import CommandFailed, SempervirtError, Unavailable
from sempervirt.host import process
from sempervirt.host.answers import AnswerNotUnderstood
from sempervirt.host.control import ControlSocket
from sempervirt.host.lending import group_of, lend
from sempervirt.host.process import Process
from sempervirt.host.procfs import ProcessId, find_by_argument, identify
from sempervirt.host.programs import find_program
from sempervirt.host.records import RecordDamaged, read_record, write_record
from sempervirt.host.reserve import Reserve
from sempervirt.migration.wire_status import WireStatus
from sempervirt.trust.authority import CERTIFICATE_FILE as AUTHORITY_FILE
from sempervirt.trust.identity import Identity

log = logging.getLogger(__name__)

PROGRAM = "semper-wired"
VERSION = 1
# What there is when no program can be started (`fall_back_on`).
_reserve: Reserve | None = None
POLL_S = 0.02
END_GRACE_S = 2.0

FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class WireFiles:
    """Where an end keeps its sockets, beside those of the VM. QEMU makes files in `workplace`."""

    directory: Path
    workplace: Path

    @property
    def stream(self) -> Path:
        """Between QEMU and this end."""
        return self.workplace / "stream.sock"

    def share_stream(self) -> None:
        """Lets the other one of QEMU and this end connect to it. Raises Unavailable."""
        try:
            lend(self.stream, group_of(self.directory))
        except OSError as error:
            raise Unavailable(
                f"the stream {self.stream} cannot be shared with QEMU: {error.strerror}"
            ) from error

    @property
    def control(self) -> Path:
        """Tells state and counters."""
        return self.directory / "wired.ctl"

    @property
    def process(self) -> Path:
        """Which process it is: {"version": 1, "pid": 1, "start_ticks": 1, "boot_id": "…"}."""
        return self.directory / "wired.json"

    @property
    def log(self) -> Path:
        """What it wrote."""
        return self.directory / "wired.log"


@dataclass(frozen=True)
class WireDisk:
    """A disk that both ends can read. `backend` is the control socket of this host's backend: at
    the source it knows what was touched, at the destination it is told.
    """

    name: str
    image: Path
    direct: bool = False
    backend: Path | None = None

    def argument(self) -> str:
        """As --disk takes it."""
        direct = ",direct" if self.direct else ""
        backend = f",backend={self.backend}" if self.backend else ""
        return f"--disk={self.name}={self.image}{direct}{backend}"


class Wire:
    """Made by `source` or `destination`; ends with `end`, or by itself when all is carried."""

    def __init__(self, files: WireFiles) -> None:
        self.files = files
        self.status: WireStatus | None = None
        self._complaint = ""
        self._socket = ControlSocket(files.control, PROGRAM)
        self._process: Process | None = None

    @classmethod
    def source(
        cls,
        files: WireFiles,
        trust: Path,
        migration: str,
        peer: str,
        address: str,
        disks: Sequence[WireDisk],
    ) -> Wire:
        """Beside the QEMU that the VM leaves. Raises Unavailable when it cannot be started."""
        return cls._spawn(files, "source", trust, migration, peer, [f"--connect={address}"], disks)

    @classmethod
    def destination(
        cls,
        files: WireFiles,
        trust: Path,
        migration: str,
        peer: str,
        listen: str,
        disks: Sequence[WireDisk],
    ) -> Wire:
        """Beside the QEMU that the VM goes to. Raises Unavailable when it cannot be started."""
        return cls._spawn(
            files, "destination", trust, migration, peer, [f"--listen={listen}"], disks
        )

    @classmethod
    def _spawn(
        cls,
        files: WireFiles,
        end: str,
        trust: Path,
        migration: str,
        peer: str,
        options: Sequence[str],
        disks: Sequence[WireDisk],
    ) -> Wire:
        wire = cls(files)
        files.control.unlink(missing_ok=True)
        pair = Identity(trust).settle()
        argv = [
            find_program(PROGRAM),
            end,
            f"--migration={migration}",
            f"--ca={trust / AUTHORITY_FILE}",
            f"--cert={pair}",
            f"--key={pair}",
            f"--peer-name={peer}",
            f"--qemu-socket={files.stream}",
            f"--control-socket={files.control}",
            *options,
            *(disk.argument() for disk in disks),
        ]
        wire._process = _started(argv, files.log)
        with contextlib.suppress(OSError):  # no room: then it is looked for (`_left`)
            write_record(files.process, VERSION, asdict(wire._process.identity))
        return wire

    @property
    def failure(self) -> str:
        """Why it ended without having carried everything; "" while it works, or when it has."""
        end = self._process.exit if self._process else None
        if end is None or end.code == 0:
            return ""
        said = process.said(self.files.log, 1)
        return f"semper-wired ended ({end}): {said[0] if said else 'it said nothing'}"

    async def ask(self) -> WireStatus | None:
        """State and counters of the process, kept in `status`; the last ones when the process does
        not answer, None when it never did.
        """
        try:
            self.status = await self._socket.ask_for(WireStatus, "status")
        except AnswerNotUnderstood as error:
            self._complaint = error.message
        except SempervirtError:
            pass  # not listening yet, or it has ended
        return self.status

    async def wait(
        self, reached: Callable[[WireStatus], FoundT | None], timeout_s: float
    ) -> FoundT:
        """Waits until `reached` finds something in the status, and returns that.

        Raises Unavailable when the process ends before that, when its answers cannot be
        understood, and at the deadline.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            status = await self.ask()
            if status is not None and (found := reached(status)) is not None:
                return found
            if self.failure or self._complaint:
                raise Unavailable(self.failure or self._complaint)
            if time.monotonic() > deadline:
                state = status.state.value if status else "silent"
                raise Unavailable(f"semper-wired is {state} after {timeout_s:g} s")
            await asyncio.sleep(POLL_S)

    async def end(self) -> None:
        """Ends it, whatever it does."""
        await self.ask()
        if self._process is not None:
            await self._process.end(END_GRACE_S)
        _remove(self.files)

    def forget(self) -> None:
        """Leaves it running."""
        if self._process is not None:
            self._process.forget()


def fall_back_on(reserve: Reserve | None) -> None:
    """From now on a process of `reserve` is taken when none can be started."""
    global _reserve  # noqa: PLW0603 - there is one agent in a process
    _reserve = reserve


def waiting(log_file: Path) -> Reserve:
    """Processes of semper-wired that wait. Raises Unavailable when it is not installed."""
    return Reserve([find_program(PROGRAM), "wait"], log_file)


def _started(argv: Sequence[str], log_file: Path) -> Process:
    """Raises CommandFailed."""
    try:
        return process.spawn(argv, log=log_file, on_exit=lambda _end: None)
    except CommandFailed as error:
        taken = _reserve.take(argv[1:], log_file) if _reserve is not None else None
        if taken is None:
            raise
        log.warning("wire: %s; one that waited takes its place", error)
        return taken


async def sweep(files: WireFiles) -> None:
    """Kills an end that an earlier agent left."""
    for identity in _left(files):
        left = process.adopt(identity, lambda _end: None)
        if left:
            await left.end(0)
    _remove(files)


def _left(files: WireFiles) -> list[ProcessId]:
    """The end that an earlier agent left, by its note. All processes are looked at only when there
    are sockets without a note: on a host whose kernel is about to die the arguments of some never
    come.
    """
    try:
        note = read_record(files.process, VERSION)
        if note is not None:
            return [ProcessId(note["pid"], note["start_ticks"], note["boot_id"])]
    except (RecordDamaged, KeyError, TypeError, ValueError) as error:
        log.warning("wire note=%s cannot be used: %s", files.process, error)
    if not any(path.exists() for path in (files.stream, files.control)):
        return []
    pattern = re.compile(rf"--control-socket={re.escape(str(files.control))}")
    found = (identify(pid) for pid in find_by_argument(pattern))
    return [identity for identity in found if identity is not None]


def _remove(files: WireFiles) -> None:
    for path in (files.stream, files.control, files.process):
        path.unlink(missing_ok=True)
