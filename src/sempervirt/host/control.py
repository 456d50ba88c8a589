"""The control sockets of our programs: one JSON object a line, each request with an id.

> {"id": 1, "cmd": "status"}
< {"id": 1, "ok": {…}}   or   {"id": 1, "error": {"kind": "…", "message": "…"}}

What an answer holds is typed beside its reader (`host.answers`). The program at the other end is
not trusted: a guest may have taken it over. So whatever the program sends, or does not send, comes
out as one of the errors below, and as nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sempervirt.core.errors import (
    InvalidRequest,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
    reason,
)
from sempervirt.host.answers import Answer, AnswerT, read_answer
from sempervirt.host.peers import require_peer

LINE_MAX_BYTES = 4 << 20
DEADLINE_S = 5.0
PIECE_BYTES = 1 << 20


class Bytes(Answer):
    """An answer that so many bytes follow."""

    bytes: int


@dataclass(frozen=True)
class ControlSocket:
    """Where one process of `program`, for instance "semper-blkd", answers questions. With `pid` it
    has to be that process.
    """

    path: Path
    program: str
    pid: int | None = None

    async def ask(
        self, command: str, *, timeout_s: float = DEADLINE_S, **arguments: Any
    ) -> dict[str, Any]:
        """Asks one question on a connection of its own.

        Raises Unavailable when nobody listens, InvalidRequest, StateConflict or Unavailable as the
        program says,
        OutcomeUnknown when another process listens, or the program was asked and gave no answer
        that has a meaning.
        """
        async with self._asked(command, timeout_s, arguments) as (answer, _):
            return answer

    async def ask_for(
        self,
        model: type[AnswerT],
        command: str,
        *,
        timeout_s: float = DEADLINE_S,
        **arguments: Any,
    ) -> AnswerT:
        """As `ask`; the answer as `model`. Raises OutcomeUnknown when the answer is not one."""
        answer = await self.ask(command, timeout_s=timeout_s, **arguments)
        return read_answer(model, answer, self.program, command)

    async def download(
        self, command: str, *, timeout_s: float, **arguments: Any
    ) -> AsyncIterator[bytes]:
        """Asks for something whose answer is followed by as many bytes as the answer says; gives
        these in pieces. `timeout_s` is for the answer, and for each piece. Raises as `ask_for`.
        """
        async with self._asked(command, timeout_s, arguments) as (answer, reader):
            left = read_answer(Bytes, answer, self.program, command).bytes
            while left > 0:
                try:
                    async with asyncio.timeout(timeout_s):
                        piece = await reader.read(min(left, PIECE_BYTES))
                except (OSError, TimeoutError) as error:
                    raise OutcomeUnknown(
                        f"{self.program} did not finish {command}: {reason(error)}"
                    ) from error
                if not piece:
                    raise OutcomeUnknown(f"{self.program} ended in the middle of {command}")
                left -= len(piece)
                yield piece

    @asynccontextmanager
    async def _asked(
        self, command: str, timeout_s: float, arguments: dict[str, Any]
    ) -> AsyncIterator[tuple[dict[str, Any], asyncio.StreamReader]]:
        """A connection on which one question was asked and answered."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(self.path, limit=LINE_MAX_BYTES)
        except (OSError, TimeoutError) as error:
            raise Unavailable(
                f"{self.program} does not listen on {self.path}: {reason(error)}"
            ) from error
        request = {"id": 1, "cmd": command, **arguments}
        try:
            if self.pid is not None:
                require_peer(writer.get_extra_info("socket"), self.pid, self.path)
            try:
                async with asyncio.timeout(timeout_s):
                    writer.write(json.dumps(request).encode() + b"\n")
                    await writer.drain()
                    answer = self._answer(await reader.readline())
            except (OSError, TimeoutError, ValueError, RecursionError) as error:
                raise OutcomeUnknown(
                    f"{self.program} did not answer {command} on {self.path}: {reason(error)}"
                ) from error
            yield answer, reader
        finally:
            writer.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        if not line:
            raise OutcomeUnknown(f"{self.program} closed {self.path} without an answer")
        match json.loads(line):
            case {"ok": dict(ok)}:
                return ok
            case {"error": {"kind": str(kind), "message": str(text)}}:
                raise _error(kind, text)
            case _:
                raise OutcomeUnknown(
                    f"{self.program} sent an answer without meaning on {self.path}"
                )


def _error(kind: str, text: str) -> SempervirtError:
    match kind:
        case "invalid":
            return InvalidRequest(text)
        case "full" | "pinned":
            return StateConflict(text)
        case _:
            return Unavailable(text)
