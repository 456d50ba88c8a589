"""The control socket of semper-blkd: one JSON object a line, each request with an id.

> {"id": 1, "cmd": "status"}
< {"id": 1, "ok": {…}}   or   {"id": 1, "error": {"kind": "…", "message": "…"}}
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sempervirt.core.errors import InvalidRequest, OutcomeUnknown, SempervirtError, Unavailable

LINE_MAX_BYTES = 4 << 20
DEADLINE_S = 5.0
PIECE_BYTES = 1 << 20


async def ask(
    path: Path, command: str, *, timeout_s: float = DEADLINE_S, **arguments: Any
) -> dict[str, Any]:
    """Asks one question on a connection of its own.

    Raises Unavailable when nobody listens, InvalidRequest or Unavailable as the backend says,
    OutcomeUnknown when it was asked and did not answer.
    """
    async with _asked(path, command, timeout_s, arguments) as (answer, _):
        return answer


async def download(
    path: Path, command: str, *, timeout_s: float, **arguments: Any
) -> AsyncIterator[bytes]:
    """Asks for something whose answer is followed by as many bytes as it says; gives these in
    pieces. `timeout_s` is for the answer, and for each piece. Raises what `ask` raises.
    """
    async with _asked(path, command, timeout_s, arguments) as (answer, reader):
        left = answer.get("bytes")
        while isinstance(left, int) and left > 0:
            try:
                async with asyncio.timeout(timeout_s):
                    piece = await reader.read(min(left, PIECE_BYTES))
            except (OSError, TimeoutError) as error:
                raise OutcomeUnknown(f"the backend did not finish {command}: {error}") from error
            if not piece:
                raise OutcomeUnknown(f"the backend ended in the middle of {command}")
            left -= len(piece)
            yield piece


@asynccontextmanager
async def _asked(
    path: Path, command: str, timeout_s: float, arguments: dict[str, Any]
) -> AsyncIterator[tuple[dict[str, Any], asyncio.StreamReader]]:
    """A connection on which one question was asked and answered."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(path, limit=LINE_MAX_BYTES)
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"the backend does not listen on {path}: {error}") from error
    try:
        yield await _exchange(path, command, timeout_s, arguments, reader, writer), reader
    finally:
        writer.close()


async def _exchange(
    path: Path,
    command: str,
    timeout_s: float,
    arguments: dict[str, Any],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> dict[str, Any]:
    try:
        async with asyncio.timeout(timeout_s):
            request = {"id": 1, "cmd": command, **arguments}
            writer.write(json.dumps(request).encode() + b"\n")
            await writer.drain()
            line = await reader.readline()
            if not line:
                raise OutcomeUnknown(f"the backend closed {path} without an answer")
            return _answer(json.loads(line), path)
    except (OSError, TimeoutError, ValueError) as error:
        raise OutcomeUnknown(f"the backend did not answer {command} on {path}: {error}") from error


def _answer(message: Any, path: Path) -> dict[str, Any]:
    match message:
        case {"ok": dict(ok)}:
            return ok
        case {"error": {"kind": str(kind), "message": str(text)}}:
            raise _error(kind, text)
        case _:
            raise OutcomeUnknown(f"the backend sent an answer without meaning on {path}")


def _error(kind: str, text: str) -> SempervirtError:
    return InvalidRequest(text) if kind == "invalid" else Unavailable(text)
