"""What strangers and careless clients can do to the API, and what the agent notices of that."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import h11
import pytest

from sempervirt.agent.agent import Agent
from sempervirt.api import bounds
from sempervirt.api.bounds import BODY_MAX, Admission, Places
from sempervirt.api.client import Client
from sempervirt.api.server import serving
from sempervirt.core.errors import SempervirtError
from sempervirt.vm.config import AgentConfig

SOON_S = 0.4


@pytest.fixture
async def socket(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Path]:
    """Of an agent that gives little time."""
    monkeypatch.setattr(bounds, "REQUEST_S", SOON_S)
    with tempfile.TemporaryDirectory(prefix="sv-") as directory:
        config = AgentConfig(Path(directory) / "s", Path(directory) / "r")
        async with Agent.open(config) as agent, serving(agent, config.socket):
            yield config.socket


async def say(socket: Path, text: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(text)
    return reader, writer


async def answer_to(socket: Path, request: bytes) -> tuple[bytes, float]:
    """All that comes until the connection is closed, and after how many seconds."""
    begin = time.monotonic()
    reader, writer = await say(socket, request)
    try:
        async with asyncio.timeout(10):
            return await reader.read(), time.monotonic() - begin
    except ConnectionResetError:
        return b"", time.monotonic() - begin
    finally:
        writer.close()


async def works(socket: Path) -> bool:
    async with Client.connect(socket) as client:
        return await client.vms() == []


async def is_let_in(socket: Path) -> bool:
    try:
        return await works(socket)
    except SempervirtError:
        return False


async def longest_pause_s(until: asyncio.Event) -> float:
    """How long this loop, which is the agent's, stood still at most."""
    longest, last = 0.0, time.monotonic()
    while not until.is_set():
        await asyncio.sleep(0.005)  # poll interval
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest


async def test_hundreds_of_idle_connections_are_refused_and_those_that_came_in_are_cut(
    socket: Path,
) -> None:
    over = asyncio.Event()
    watch = asyncio.create_task(longest_pause_s(over))
    async with AsyncExitStack() as stack:
        for _ in range(300):
            _, writer = await asyncio.open_unix_connection(socket)
            stack.callback(writer.close)
        # They hold all places for a while, and no longer.
        async with asyncio.timeout(20 * SOON_S):
            while not await is_let_in(socket):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # poll interval
    over.set()
    assert await watch < 1.0


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"GET /v1/vms HTTP/1.1\r\nhost: a\r\n",
        b"POST /v1/vms HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n12345",
    ],
)
async def test_half_a_request_is_not_waited_for(socket: Path, half: bytes) -> None:
    _, took = await answer_to(socket, half)
    assert SOON_S / 2 < took < SOON_S + 2


async def test_half_of_a_second_request_is_not_waited_for_either(socket: Path) -> None:
    whole = b"GET /v1/vms HTTP/1.1\r\nhost: a\r\n\r\n"
    answer, took = await answer_to(socket, whole + whole[:10])
    assert answer.startswith(b"HTTP/1.1 200")
    assert took < SOON_S + 2


def body_of(length: str, body: bytes) -> bytes:
    return f"POST /v1/vms HTTP/1.1\r\nhost: a\r\n{length}\r\n\r\n".encode() + body


async def test_a_large_body_is_refused_before_it_is_read(socket: Path) -> None:
    answer, took = await answer_to(socket, body_of("content-length: 300000000", b"{"))
    assert answer.startswith(b"HTTP/1.1 422")
    assert b"more than 256 KiB" in answer
    assert took < SOON_S


async def flood(writer: asyncio.StreamWriter) -> int:
    """Sends a body without an end until the connection is cut; bytes that were sent."""
    sent = 0
    try:
        while True:
            writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            await writer.drain()
            sent += 0x10000
    except ConnectionError:
        return sent


async def test_a_body_that_does_not_end_is_not_read_to_its_end(socket: Path) -> None:
    _, writer = await say(socket, body_of("transfer-encoding: chunked", b""))
    assert await asyncio.wait_for(flood(writer), 10) < 20 * BODY_MAX
    assert await works(socket)


async def test_a_body_in_thousands_of_chunks_is_refused_at_the_first(socket: Path) -> None:
    """Each is an event of the parser: 30,000 kept every other client waiting for a second."""
    asked = body_of("transfer-encoding: chunked", b"1\r\n{\r\n" * 30_000 + b"0\r\n\r\n")
    answer, _ = await answer_to(socket, asked)
    assert answer[:12] in {b"HTTP/1.1 400", b""}  # cut while we still wrote
    assert await works(socket)
    parser = bounds._Lengths(h11.SERVER)
    parser.receive_data(asked)
    with pytest.raises(h11.RemoteProtocolError, match="without a length"):
        parser.next_event()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * (BODY_MAX - 1),
        b'{"name":' * 10_000 + b"1" + b"}" * 10_000,
        json.dumps({"name": "a", "disks": [{"name": "a"}] * 5_000}).encode(),
    ],
    ids=["deep", "deep objects", "many"],
)
async def test_a_strange_body_is_refused_at_once(socket: Path, body: bytes) -> None:
    begin = time.monotonic()
    reader, writer = await say(socket, body_of(f"content-length: {len(body)}", body))
    status = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    assert status.startswith(b"HTTP/1.1 4")
    assert time.monotonic() - begin < 2
    assert await works(socket)


def test_places() -> None:
    admission = Admission(Places(total=3, each=2))
    assert [admission.enter("a") for _ in range(3)] == [True, True, False]
    assert [admission.enter(peer) for peer in ("b", "c")] == [True, False]
    admission.leave("a")
    assert admission.enter("c")
