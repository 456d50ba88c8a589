"""What an agent that is hostile, hangs, or has another release can answer to us."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import NotFound, OutcomeUnknown
from sempervirt.host import http
from sempervirt.host.http import Connection, Unanswered
from sempervirt.migration.peer import DestinationPeer, host_side
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.phases import Arrival


@asynccontextmanager
async def answering(
    folder: Path, *pieces: bytes, endless: bool = False
) -> AsyncIterator[Connection]:
    """A connection with somebody who answers each request with these bytes; `endless`: the last
    piece comes again and again.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            for piece in pieces:
                writer.write(piece)
            while endless:
                writer.write(pieces[-1])
                await writer.drain()
                await asyncio.sleep(0.01)  # poll interval
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, folder / "socket")
    async with server, Connection.to_socket(folder / "socket", "") as connection:
        yield connection


def response(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def test_an_answer_and_an_error_are_read(tmp_path: Path) -> None:
    async with answering(tmp_path, response(b'{"a": 1}')) as connection:
        assert await connection.call("GET", "/x") == {"a": 1}
    (tmp_path / "socket").unlink(missing_ok=True)
    error = b'{"error": {"kind": "not-found", "message": "no such VM"}}'
    async with answering(tmp_path, response(error, "404 Not Found")) as connection:
        with pytest.raises(NotFound, match="no such VM"):
            await connection.call("GET", "/x")


@pytest.mark.parametrize("body", [b"<html>", b"{", b"\xff", b"[" * 200_000])
async def test_what_is_no_json_is_an_unknown_outcome(tmp_path: Path, body: bytes) -> None:
    async with answering(tmp_path, response(body)) as connection:
        with pytest.raises(OutcomeUnknown, match="cannot be understood"):
            await connection.call("GET", "/x")


async def test_an_answer_without_an_end_has_one(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"
    async with answering(tmp_path, head, b" ", endless=True) as connection:
        async with asyncio.timeout(90):
            with pytest.raises(Unanswered):
                await connection.call("GET", "/x", timeout_s=1.0)


async def test_an_answer_that_is_too_long_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "ANSWER_BYTES_MAX", 100)
    for status in ("200 OK", "500 Internal Server Error"):
        async with answering(tmp_path, response(b" " * 101, status)) as connection:
            with pytest.raises(OutcomeUnknown, match="longer than"):
                await connection.call("GET", "/x")
        (tmp_path / "socket").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "body", [b"[]", b"null", b'{"name": 1}', b'{"name": "b", "accelerator": "steam"}', b"1e999"]
)
async def test_a_host_of_another_release_is_not_understood_and_ends_no_agent(
    tmp_path: Path, body: bytes
) -> None:
    spec: Any = VmSpec.model_validate({"name": "web", "memory": "64M"})
    async with answering(tmp_path, response(body)) as connection:
        with pytest.raises(OutcomeUnknown, match="cannot be understood"):
            await host_side(connection, spec)
        with pytest.raises(OutcomeUnknown, match="cannot be understood"):
            await DestinationPeer(connection, "1").look(Arrival.RUNNING, 0)
