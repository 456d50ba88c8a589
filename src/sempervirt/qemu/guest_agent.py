r"""The client of qemu-ga, the agent that runs inside a guest: freezes file systems, sets the clock.

> \xff{"execute": "guest-sync-delimited", "arguments": {"id": 4711}}
< \xff{"return": 4711}
> {"execute": "guest-fsfreeze-freeze"}
< {"return": 2}   or   {"error": {"class": "…", "desc": "…"}}

The port keeps what a guest wrote for an earlier client. So each connection begins with a number of
its own, sent and awaited behind a byte that no JSON contains: what stands before that answer is
somebody else's (source: docs/interop/qemu-ga.rst of QEMU, `guest-sync-delimited`). The guest is not
trusted: whatever it sends, or does not send, comes out as one of the errors below.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sempervirt.core.errors import OutcomeUnknown, StateConflict, Unavailable, reason
from sempervirt.core.printable import printable
from sempervirt.host.peers import require_peer

log = logging.getLogger(__name__)

DELIMITER = b"\xff"
ANSWER_MAX_BYTES = 1 << 20
# What a guest may write for others before it answers: a port of QEMU keeps far less.
STALE_MAX_BYTES = 4 << 20
SYNC_S = 2.0
# A clock that is further off has not been set.
WRONG_MAX_S = 2.0
THAW_S = 10.0
THAW_TRIES = 3
RUN_POLL_S = 0.02
# Programs of Linux guests that ask the kernel for RNDADDENTROPY and RNDRESEEDCRNG (random(4)) with
# the bytes that they are given. Every Debian has perl, and most others have one of the two.
_PERL = (
    "local $/; my $b = <STDIN>; open(my $f, '+<', '/dev/urandom') or exit 2; "
    "ioctl($f, 0x40085203, pack('ll', 8 * length $b, length $b) . $b) or exit 3; "
    "ioctl($f, 0x5207, 0) or exit 4;"
)
_PYTHON = (
    "import fcntl, struct, sys; b = sys.stdin.buffer.read(); f = open('/dev/urandom', 'rb'); "
    "fcntl.ioctl(f, 0x40085203, struct.pack('ii', 8 * len(b), len(b)) + b); fcntl.ioctl(f, 0x5207)"
)
RESEEDERS = (("perl", ("-e", _PERL)), ("python3", ("-c", _PYTHON)))
# What a time in nanoseconds has room for, also at the guest: the end of 2262.
TIME_MAX_NS = (1 << 63) - 1


@dataclass(frozen=True)
class GuestAgent:
    """The agent inside the guest of `vm`, at QEMU's socket `path`. With `pid` it has to be that
    process which listens there.
    """

    path: Path
    vm: str
    pid: int | None = None

    async def ask(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = SYNC_S
    ) -> Any:
        """One command on a connection of its own; `timeout_s` is for all of it.

        Raises Unavailable when nothing was asked (no agent answers in the guest, or another program
        has the port), StateConflict when the agent refused, OutcomeUnknown when the command was
        sent and no answer came.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        async with self._connected(deadline) as port:
            await port.sync(deadline)
            return await port.ask(command, arguments, deadline)

    async def ping(self, timeout_s: float = SYNC_S) -> None:
        """Returns when the agent has answered. Raises as `ask`."""
        await self.ask("guest-ping", timeout_s=timeout_s)

    async def freeze(self, timeout_s: float) -> int:
        """Freezes the guest's file systems: what was written before is on the disks, and nothing is
        written until `thaw`. Returns how many were frozen. Raises as `ask`; the file systems may
        be frozen when OutcomeUnknown is raised.
        """
        answer = await self.ask("guest-fsfreeze-freeze", timeout_s=timeout_s)
        if not isinstance(answer, int) or isinstance(answer, bool):
            raise OutcomeUnknown(f"the guest agent of {self.vm} did not say what it has frozen")
        return answer

    async def frozen(self, timeout_s: float = SYNC_S) -> bool:
        """Whether the guest's file systems are frozen. Raises as `ask`."""
        return bool(await self.ask("guest-fsfreeze-status", timeout_s=timeout_s) == "frozen")

    async def thaw(self, timeout_s: float = THAW_S) -> None:
        """Undoes `freeze`; file systems that are not frozen stay as they are.

        Raises OutcomeUnknown when nobody knows whether they are thawed.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        for left in reversed(range(THAW_TRIES)):
            try:
                await self.ask("guest-fsfreeze-thaw", timeout_s=timeout_s / THAW_TRIES)
            except (Unavailable, OutcomeUnknown, StateConflict) as error:
                if left == 0 or asyncio.get_running_loop().time() >= deadline:
                    raise OutcomeUnknown(
                        f"the file systems of {self.vm} may still be frozen: {error.message}",
                        remedy="thaw them in the guest, each mounted one: fsfreeze -u DIRECTORY",
                    ) from error
                log.warning("thaw vm=%s again: %s", self.vm, error.message)
            else:
                return

    async def set_time(self, timeout_s: float = SYNC_S) -> float:
        """Sets the guest's clock to this host's, and reads it back: by how many seconds it is
        wrong afterwards. Raises as `ask`.

        An agent says that it failed when only the hardware's clock could not be set, as in a guest
        without the program `hwclock`: what counts is what the guest's clock says.
        """
        refusal = ""
        try:
            await self.ask("guest-set-time", {"time": time.time_ns()}, timeout_s=timeout_s)
        except StateConflict as error:
            refusal = error.message
        begun = time.time()
        told = await self.ask("guest-get-time", timeout_s=timeout_s)
        if not isinstance(told, int) or isinstance(told, bool) or abs(told) > TIME_MAX_NS:
            raise OutcomeUnknown(f"the guest agent of {self.vm} did not say what time it is")
        wrong = told / 1e9 - (begun + time.time()) / 2
        if refusal and abs(wrong) > WRONG_MAX_S:
            raise StateConflict(refusal)
        return wrong

    async def exists(self, path: str, timeout_s: float = SYNC_S) -> bool:
        """Whether the guest has a file or a directory of that name. Raises Unavailable and
        OutcomeUnknown as `ask`.
        """
        try:
            handle = await self._open(path, "r", timeout_s)
        except StateConflict:
            return False
        await self.ask("guest-file-close", {"handle": handle}, timeout_s=timeout_s)
        return True

    async def give_random_bytes(self, content: bytes, timeout_s: float = SYNC_S) -> None:
        """Gives the guest's kernel random bytes, which the kernel mixes in when it next draws a new
        seed by itself, within a minute: an agent cannot have that done at once. Raises as `ask`.
        """
        handle = await self._open("/dev/urandom", "w", timeout_s)
        try:
            given = base64.b64encode(content).decode()
            arguments = {"handle": handle, "buf-b64": given}
            await self.ask("guest-file-write", arguments, timeout_s=timeout_s)
        finally:
            await self.ask("guest-file-close", {"handle": handle}, timeout_s=timeout_s)

    async def reseed(self, content: bytes, timeout_s: float = SYNC_S) -> bool:
        """Has the guest's kernel take random bytes and draw a new seed of them at once, by a
        program of the guest that can ask for that; False when there is none, or the agent starts
        none. Raises Unavailable and OutcomeUnknown as `ask`.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        for program, arguments in RESEEDERS:
            with contextlib.suppress(StateConflict):
                if await self._run(program, arguments, content, deadline) == 0:
                    return True
        return False

    async def _run(
        self, program: str, arguments: Sequence[str], given: bytes, deadline: float
    ) -> int | None:
        """The exit status of a program of the guest; None when it was ended by a signal."""

        def left_s() -> float:
            return max(0.0, deadline - asyncio.get_running_loop().time())

        asked = {
            "path": program,
            "arg": list(arguments),
            "input-data": base64.b64encode(given).decode(),
        }
        told = await self.ask("guest-exec", asked, timeout_s=left_s())
        match told:
            case {"pid": int(pid)}:
                pass
            case _:
                raise OutcomeUnknown(f"the guest agent of {self.vm} started {program} as nothing")
        while True:
            match await self.ask("guest-exec-status", {"pid": pid}, timeout_s=left_s()):
                case {"exited": True, "exitcode": int(status)}:
                    return status
                case {"exited": True}:
                    return None
                case _:
                    await asyncio.sleep(RUN_POLL_S)

    async def _open(self, path: str, mode: str, timeout_s: float) -> int:
        handle = await self.ask(
            "guest-file-open", {"path": path, "mode": mode}, timeout_s=timeout_s
        )
        if not isinstance(handle, int) or isinstance(handle, bool):
            raise OutcomeUnknown(f"the guest agent of {self.vm} opened {path} and gave no handle")
        return handle

    @asynccontextmanager
    async def _connected(self, deadline: float) -> AsyncIterator[_Port]:
        try:
            async with asyncio.timeout_at(deadline):
                reader, writer = await asyncio.open_unix_connection(
                    self.path, limit=ANSWER_MAX_BYTES
                )
        except (OSError, TimeoutError) as error:
            raise Unavailable(
                f"the guest agent's port of {self.vm}, {self.path}, cannot be reached: "
                f"{reason(error)}"
            ) from error
        try:
            if self.pid is not None:
                require_peer(writer.get_extra_info("socket"), self.pid, self.path)
            yield _Port(reader, writer, self.vm)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@dataclass(frozen=True)
class _Port:
    """One connection to the agent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    vm: str

    async def sync(self, deadline: float) -> None:
        """Leaves behind what the guest wrote for others. Raises Unavailable."""
        number = secrets.randbelow(1 << 50)
        request = _request("guest-sync-delimited", {"id": number})
        try:
            async with asyncio.timeout_at(deadline):
                self.writer.write(DELIMITER + request)
                await self.writer.drain()
                await self._await_number(number)
        except TimeoutError as error:
            raise Unavailable(
                f"no guest agent answers in {self.vm}",
                remedy="install qemu-guest-agent in the guest and start it; one program at a time "
                "can be connected to its port",
            ) from error
        except (OSError, ValueError, EOFError) as error:
            raise Unavailable(
                f"the guest agent of {self.vm} cannot be asked: {reason(error)}"
            ) from error

    async def _await_number(self, number: int) -> None:
        """Reads until the answer with that number. Raises EOFError, ValueError, OSError."""
        read = 0
        while read < STALE_MAX_BYTES:
            line = await self.reader.readline()
            if not line:
                raise EOFError("QEMU closed the port")
            read += len(line)
            _, delimiter, text = line.rpartition(DELIMITER)
            if not delimiter:
                continue
            with contextlib.suppress(ValueError, RecursionError):
                match json.loads(text):
                    case {"return": answer} if answer == number:
                        return
        raise ValueError("the guest writes without end, and no answer among it")

    async def ask(self, command: str, arguments: Mapping[str, Any] | None, deadline: float) -> Any:
        """Sends the command and gives its answer. Raises StateConflict, OutcomeUnknown."""
        try:
            async with asyncio.timeout_at(deadline):
                self.writer.write(_request(command, arguments))
                await self.writer.drain()
                line = await self.reader.readline()
            answer = json.loads(line) if line else None
        except TimeoutError as error:
            raise OutcomeUnknown(
                f"the guest agent of {self.vm} did not answer {command} in time"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise OutcomeUnknown(
                f"the guest agent of {self.vm} gave no answer to {command}: {error}"
            ) from error
        match answer:
            case {"return": told}:
                return told
            case {"error": {"desc": str(why)}}:
                said = printable(why[:300])
                raise StateConflict(f"the guest agent of {self.vm} refused {command}: {said}")
            case _:
                raise OutcomeUnknown(
                    f"the guest agent of {self.vm} answered {command} without a meaning"
                )


def _request(command: str, arguments: Mapping[str, Any] | None) -> bytes:
    request: dict[str, Any] = {"execute": command}
    if arguments:
        request["arguments"] = dict(arguments)
    return json.dumps(request).encode() + b"\n"
