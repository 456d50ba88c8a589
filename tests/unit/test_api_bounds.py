"""What strangers and careless clients can do to the API, and what the agent notices of that."""

from __future__ import annotations

import asyncio
import json
import resource
import socket as socket_module
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
# Whoever waits for longer waits for what never comes. Of the agent's loop: far below the minute
# for which it once stood still.
DEADLINE_S, STILL_S = 90.0, 10.0


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that gives little time."""
    monkeypatch.setattr(bounds, "REQUEST_S", SOON_S)


@pytest.fixture
async def socket() -> AsyncIterator[Path]:
    """Of an agent."""
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
        async with asyncio.timeout(DEADLINE_S):
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


async def longest_pause_s(until: asyncio.Event) -> tuple[float, float]:
    """How long this loop, which is the agent's, stood still at most; and how long at work."""
    longest, last = (0.0, 0.0), (time.monotonic(), time.thread_time())
    while not until.is_set():
        await asyncio.sleep(0.005)  # poll interval
        now = (time.monotonic(), time.thread_time())
        longest = (max(longest[0], now[0] - last[0]), max(longest[1], now[1] - last[1]))
        last = now
    return longest


def idle(path: Path) -> socket_module.socket:
    """One who connects, and says nothing; as soon as there is room in the queue."""
    connection = socket_module.socket(socket_module.AF_UNIX)
    connection.connect(str(path))
    return connection


@pytest.mark.usefixtures("hasty")
async def test_hundreds_of_idle_connections_are_refused_and_those_that_came_in_are_cut(
    socket: Path,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    over = asyncio.Event()
    async with AsyncExitStack() as stack:
        for _ in range(1_100):
            stack.enter_context(idle(socket))
        watch = asyncio.create_task(longest_pause_s(over))
        # They hold all places for a while, and no longer.
        async with asyncio.timeout(DEADLINE_S):
            while not await is_let_in(socket):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # poll interval
    over.set()
    still_s, at_work_s = await watch
    assert still_s < STILL_S
    assert at_work_s < 1.0


@pytest.mark.usefixtures("hasty")
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
    assert SOON_S / 2 < took < STILL_S


@pytest.mark.usefixtures("hasty")
async def test_half_of_a_second_request_is_not_waited_for_either(socket: Path) -> None:
    whole = b"GET /v1/vms HTTP/1.1\r\nhost: a\r\n\r\n"
    answer, took = await answer_to(socket, whole + whole[:10])
    assert answer.startswith(b"HTTP/1.1 200")
    assert took < STILL_S


def body_of(length: str, body: bytes) -> bytes:
    return f"POST /v1/vms HTTP/1.1\r\nhost: a\r\n{length}\r\n\r\n".encode() + body


async def test_a_large_body_is_refused_before_it_is_read(socket: Path) -> None:
    answer, took = await answer_to(socket, body_of("content-length: 300000000", b"{"))
    assert answer.startswith(b"HTTP/1.1 422")
    assert b"more than 256 KiB" in answer
    assert took < bounds.REQUEST_S


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
    assert await asyncio.wait_for(flood(writer), DEADLINE_S) < 20 * BODY_MAX
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
        # Python reads so deep a text, and has little left to look through it.
        b'{"name": "a", "x": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
        json.dumps({"name": "a", "disks": [{"name": "a"}] * 5_000}).encode(),
        # To look through all threads up to this one took a minute.
        json.dumps(
            {
                "name": "a",
                "disks": [{"name": "a", "image": "/a", "queues": 1, "thread_map": [4_000_000_000]}],
            }
        ).encode(),
    ],
    ids=["deep", "deep objects", "less deep objects", "many", "thread map"],
)
async def test_a_strange_body_is_refused_at_once(socket: Path, body: bytes) -> None:
    begin = time.monotonic()
    reader, writer = await say(socket, body_of(f"content-length: {len(body)}", body))
    status = await asyncio.wait_for(reader.readline(), DEADLINE_S)
    writer.close()
    assert status.startswith(b"HTTP/1.1 4")
    assert time.monotonic() - begin < STILL_S
    assert await works(socket)


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "\\ud800"}'.encode("utf-16"),
        '{"name": "\\ud800"}'.encode("utf-32-be"),
        '{"name": "\ud800"}'.encode("utf-8", "surrogatepass"),
        b'{"name": "\\ud800"}',
        b'{"name": "\xff"}',
        b'{"name": "web", "kernel": "/a\\u0000b"}',
        b'{"name": "web", "disks": [{"name": "a", "\\u0000": "b"}]}',
        b'{"x": ' + b"[" * 500 + b"]" * 500 + b', "kernel": "/a\\u0000b"}',
    ],
)
async def test_a_body_that_is_no_text_is_refused(socket: Path, body: bytes) -> None:
    """Each was a status 500, but for two; a NUL in a path left the VM's name taken as well."""
    reader, writer = await say(socket, body_of(f"content-length: {len(body)}", body))
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), DEADLINE_S)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 422")
    assert b"not UTF-8" in answer


async def test_a_backslash_is_text(socket: Path) -> None:
    """The control: it is not the escape of a NUL."""
    body = b'{"name": "web", "kernel": "/a\\\\u0000b"}'
    reader, writer = await say(socket, body_of(f"content-length: {len(body)}", body))
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
    writer.close()
    assert b"not UTF-8" not in answer


@pytest.mark.parametrize("name", ["a" * 5_000, "%00", "..", "-"])
async def test_losses_of_what_is_no_vm_are_not_looked_for(socket: Path, name: str) -> None:
    """They were a status 500: no such file can be."""
    asked = f"GET /v1/vms/{name}/standby/lost HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    answer, _ = await answer_to(socket, asked.encode())
    assert answer.startswith(b"HTTP/1.1 404")


def test_places() -> None:
    admission = Admission(Places(total=3, each=2))
    assert [admission.enter("a") for _ in range(3)] == [True, True, False]
    assert [admission.enter(peer) for peer in ("b", "c")] == [True, False]
    admission.leave("a")
    assert admission.enter("c")
