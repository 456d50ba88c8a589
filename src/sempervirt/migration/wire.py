"""One end of the wire: a process of semper-wired, and what it tells (docs/design/wire.md)."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.host import process
from sempervirt.host.answers import AnswerNotUnderstood
from sempervirt.host.control import ControlSocket
from sempervirt.host.process import Process
from sempervirt.host.procfs import find_by_argument, identify
from sempervirt.host.programs import find_program
from sempervirt.migration.wire_status import WireStatus
from sempervirt.trust.authority import CERTIFICATE_FILE as AUTHORITY_FILE
from sempervirt.trust.identity import Identity

PROGRAM = "semper-wired"
POLL_S = 0.02
END_GRACE_S = 2.0

FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class WireFiles:
    """Where an end keeps its sockets, beside those of the VM."""

    directory: Path

    @property
    def stream(self) -> Path:
        """Between QEMU and this end."""
        return self.directory / "stream.sock"

    @property
    def control(self) -> Path:
        """Tells state and counters."""
        return self.directory / "wired.ctl"

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
        wire._process = process.spawn(argv, log=files.log, on_exit=lambda _end: None)
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
        for path in (self.files.stream, self.files.control):
            path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Leaves it running."""
        if self._process is not None:
            self._process.forget()


async def sweep(files: WireFiles) -> None:
    """Kills an end that an earlier agent left."""
    pattern = re.compile(rf"--control-socket={re.escape(str(files.control))}")
    for pid in find_by_argument(pattern):
        identity = identify(pid)
        left = identity and process.adopt(identity, lambda _end: None)
        if left:
            await left.end(0)
    for path in (files.stream, files.control):
        path.unlink(missing_ok=True)
