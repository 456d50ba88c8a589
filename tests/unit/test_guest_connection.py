"""The probe's client against a probe that misbehaves."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import Unavailable
from sempervirt.guest import ProbeClient, ProbeGone, ProbeRebooted, ProbeRefused, ProbeSilent

FIRST, SECOND = "1" * 32, "2" * 32


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="semper", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@dataclass
class FakeProbe:
    """The guest's end, driven by the test."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def say(self, message: dict[str, Any]) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")

    def greet(self, nonce: str) -> None:
        self.say(
            {"event": "hello", "nonce": nonce, "version": "0", "kernel": "6", "monotonic_ns": 1}
        )

    async def hear(self) -> dict[str, Any]:
        async with asyncio.timeout(90):
            message: dict[str, Any] = json.loads(await self.reader.readline())
            return message


@asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[tuple[ProbeClient, FakeProbe]]:
    accepted: asyncio.Queue[FakeProbe] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accepted.put(FakeProbe(reader, writer))

    server = await asyncio.start_unix_server(accept, folder / "probe")
    async with server, await ProbeClient.connect(folder / "probe") as client:
        probe = await accepted.get()
        assert await probe.hear() == {"id": 0, "cmd": "hello"}
        yield client, probe
        probe.writer.close()


async def test_a_call_is_answered(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        call = asyncio.create_task(client.call("flush", device="vda", other=None))
        request = await probe.hear()
        assert (request["cmd"], request["device"], "other" in request) == ("flush", "vda", False)
        probe.say({"id": request["id"], "ok": {"x": 1}})
        assert await call == {"x": 1}


async def test_a_refusal_says_what_and_why(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        call = asyncio.create_task(client.call("flush"))
        request = await probe.hear()
        error = {"kind": "invalid", "message": "no such device"}
        probe.say({"id": request["id"], "error": error})
        with pytest.raises(ProbeRefused, match="no such device") as caught:
            await call
        assert caught.value.kind == "invalid"


async def test_a_probe_that_greets_when_asked(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        hello = {"nonce": FIRST, "version": "0", "kernel": "6", "monotonic_ns": 1}
        probe.say({"id": 0, "ok": hello})
        assert (await client.wait_hello(deadline_s=10)).nonce == FIRST


async def test_a_reboot_ends_what_was_under_way(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        probe.greet(FIRST)
        await client.wait_hello(deadline_s=10)
        call = asyncio.create_task(client.call("stats"))
        request = await probe.hear()
        # The guest dies in the middle of a line; the next boot ends that line before it greets.
        probe.writer.write(b'{"id": 3, "ok": {"wri\n')
        probe.greet(SECOND)
        with pytest.raises(ProbeRebooted):
            await call
        assert client.nonce == SECOND
        # An answer to a call that is over is nobody's.
        probe.say({"id": request["id"], "ok": {}})
        hello = await client.wait_hello(other_than=FIRST, deadline_s=10)
        assert hello.nonce == SECOND


async def test_the_same_nonce_again_is_no_reboot(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        probe.greet(FIRST)
        call = asyncio.create_task(client.call("ping"))
        request = await probe.hear()
        probe.greet(FIRST)
        probe.say({"id": request["id"], "ok": {"monotonic_ns": 5}})
        assert await call == {"monotonic_ns": 5}
        with pytest.raises(ProbeSilent, match="no guest greeted"):
            await client.wait_hello(other_than=FIRST, deadline_s=0.05)


async def test_silence_has_a_deadline(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        with pytest.raises(ProbeSilent, match="no answer to ping within"):
            await client.call("ping", deadline_s=0.05)
        assert (await probe.hear())["cmd"] == "ping"


async def test_a_connection_that_ends_fails_everything(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        events = client.events()
        call = asyncio.create_task(client.call("ping"))
        waiting = asyncio.create_task(client.wait_hello(deadline_s=10))
        await probe.hear()
        probe.writer.close()
        for failing in (call, waiting):
            with pytest.raises(ProbeGone):
                await failing
        with pytest.raises(ProbeGone):
            await client.call("ping")
        assert [event async for event in events] == []
        assert [event async for event in client.events()] == []


async def test_nonsense_is_skipped(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        probe.writer.write(b"\n[1]\n\xff\xfe\n{}\n")
        probe.greet(FIRST)
        assert (await client.wait_hello(deadline_s=10)).nonce == FIRST


async def test_events_go_to_each_listener(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        one, two = client.events(), client.events()
        probe.say({"event": "beat", "seq": 1})
        for stream in (one, two):
            event = await asyncio.wait_for(anext(stream), 10)
            assert (event.name, event.members) == ("beat", {"seq": 1})
        one.close()


async def test_nobody_listens(folder: Path) -> None:
    with pytest.raises(Unavailable, match="nobody listens"):
        await ProbeClient.connect(folder / "absent", deadline_s=0.05)


async def test_the_clock_with_the_quickest_ping_counts(folder: Path) -> None:
    async with connected(folder) as (client, probe):
        measuring = asyncio.create_task(client.measure_clock(samples=3))
        for _ in range(3):
            request = await probe.hear()
            now = asyncio.get_running_loop().time()
            probe.say({"id": request["id"], "ok": {"monotonic_ns": int((now - 100) * 1e9)}})
        clock = await measuring
        assert abs(clock.offset_ns - 100 * 10**9) <= clock.uncertainty_ns + 1_000_000
        assert clock.to_guest(clock.to_host(7)) == 7
