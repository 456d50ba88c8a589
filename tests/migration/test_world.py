"""What the other tests here stand on: the links are as they are said to be, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lab.namespaces import inside, namespaces
from lab.network import FAR, GIGABIT, UNLIMITED, Link, Network

pytestmark = pytest.mark.root
PORT = 5000
CHUNK = 1 << 18
TRIES = 5
DEADLINE_S = 90.0


@contextmanager
def connection(network: Network) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection from host a to host b, both ends."""
    address = (network.address("b"), PORT)
    with inside(network.host("b"), lambda: socket.create_server(address)) as server:
        here = inside(network.host("a"), lambda: socket.create_connection(address, DEADLINE_S))
        there, _ = server.accept()
        with here, there:
            yield here, there


def megabits(network: Network, size: int) -> float:
    """The rate at which `size` bytes go from a to b."""
    with connection(network) as (here, there):
        started = time.monotonic()
        left = size
        there.setblocking(False)
        here.setblocking(False)
        unsent = size
        while left:
            assert time.monotonic() < started + DEADLINE_S
            with suppress(BlockingIOError):
                unsent -= here.send(bytes(min(CHUNK, unsent))) if unsent else 0
            with suppress(BlockingIOError):
                left -= len(there.recv(CHUNK))
        return size * 8 / (time.monotonic() - started) / 1e6


def round_trip_ms(network: Network) -> float:
    """The quickest of some bytes there and back, which none is while this machine is busy."""
    with connection(network) as (here, there):
        for end in (here, there):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(DEADLINE_S)
        times = []
        for _ in range(25):
            started = time.monotonic()
            here.sendall(b"?")
            there.sendall(there.recv(1))
            here.recv(1)
            times.append((time.monotonic() - started) * 1000)
        return min(times)


@pytest.mark.parametrize(
    ("link", "size", "fastest", "quickest_ms"),
    [
        (UNLIMITED, 100 << 20, float("inf"), 0.0),
        (GIGABIT, 100 << 20, 1000.0, 0.0),
        (FAR, 12 << 20, 100.0, 40.0),
    ],
    ids=lambda value: value.name if isinstance(value, Link) else "",
)
def test_a_link_is_as_fast_and_as_far_as_it_says(
    link: Link, size: int, fastest: float, quickest_ms: float
) -> None:
    network = Network(link)
    try:
        before = network.sent()
        # A fifth more: the bucket is full at first. On a busy machine it is slow now and then.
        rates = [megabits(network, size)]
        while len(rates) < TRIES and link is not UNLIMITED and rates[-1] <= fastest / 3:
            rates.append(megabits(network, size))
        assert fastest / 3 < max(rates) < fastest * 1.2 or link is UNLIMITED
        assert network.sent() - before >= size
        assert quickest_ms <= round_trip_ms(network) < quickest_ms + 30
    finally:
        network.close()


@pytest.mark.parametrize("link", [UNLIMITED, FAR], ids=["veth", "relay"])
def test_a_connection_outlives_a_cut(link: Link) -> None:
    network = Network(link)
    try:
        with connection(network) as (here, there):
            there.settimeout(0.3)
            network.cut("link")
            here.sendall(b"!")
            with pytest.raises(TimeoutError):
                there.recv(1)
            network.heal("link")
            there.settimeout(DEADLINE_S)
            assert there.recv(1) == b"!"
    finally:
        network.close()


def sleeps(pid: str) -> bool:
    """Whether that process is there, and not another one of its number."""
    try:
        return b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


async def test_a_test_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """Not its namespaces, not what runs in them, not its directory."""
    place = tmp_path / "place"
    place.mkdir()
    script = f"""
import subprocess, time
from pathlib import Path
from lab.network import FAR, Network
from lab.namespaces import within
network = Network(FAR, Path({str(place)!r}))
sleeper = within(network.host("a"), "sleep", "1000")
print(network.tag, subprocess.Popen(sleeper).pid, flush=True)
time.sleep(1000)
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    tag, sleeper = (await process.stdout.readline()).decode().split()
    assert len(namespaces(tag)) == 3
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    async with asyncio.timeout(DEADLINE_S):
        while namespaces(tag) or sleeps(sleeper) or place.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # poll interval
