"""A guest moves from one QEMU to another while its disk works: the disk's side of a migration.

Nothing of the agent is used: two plain QEMU processes, two backends on one image, QEMU's own
migration. What is shown is that semper-blkd logs every page that it writes (with a page left
out the guest would read wrong data), that the image changes hands at the switchover, and that
after a switch to postcopy the backend waits for pages instead of taking them for zeros.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lab.plain_qemu import DEADLINE_S, QMP_S, PlainHost, ask, wait_migration, wait_running
from sempervirt.core.errors import StateConflict
from sempervirt.qemu.qmp import Monitor

pytestmark = pytest.mark.guest
MIB = 1 << 20
QUEUES = 2
ENGINES = pytest.mark.parametrize("engine", ["mmap", "uring --direct"])
POSTCOPY = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}


def options(engine: str) -> list[str]:
    """The backend's."""
    return [f"--num-queues={QUEUES}", *f"--engine={engine}".split()]


def make_hosts(place: Path, image: Path, names: str) -> list[PlainHost]:
    """Hosts that share the image."""
    hosts = [PlainHost(place / name, image) for name in names]
    for host in hosts:
        host.directory.mkdir()
    return hosts


async def start_writers(host: PlainHost) -> str:
    """Starts the load; gives the nonce of the guest's boot."""
    async with host.probe() as (client, nonce):
        await client.write_start("serial:moved", writers=16, span_bytes=8 * MIB)
        return nonce


async def writes(host: PlainHost, more: int = 300) -> str:
    """Lets the guest write for a while; gives the nonce of its boot."""
    async with host.probe() as (client, nonce):
        before = (await client.stats()).completions
        await client.wait_stats(lambda stats: stats.completions >= before + more)
        return nonce


async def stop_writers(host: PlainHost) -> None:
    """Everything that was written is there, and nothing else."""
    async with host.probe() as (client, _):
        stats = await client.write_stop()
    assert stats.is_clean, stats
    assert stats.verified_final is not None
    assert stats.verified_final.wrong == 0, stats


@ENGINES
async def test_a_guest_moves_there_and_back_while_it_writes(
    place: Path, disk_image: Path, engine: str
) -> None:
    hosts = make_hosts(place, disk_image, "abc")
    with ExitStack() as stack:
        stack.enter_context(hosts[0].backend(*options(engine)))
        stack.enter_context(hosts[0].qemu(queues=QUEUES))
        nonce = await start_writers(hosts[0])
        for here, there in pairwise(hosts):
            assert await writes(here) == nonce
            stack.enter_context(there.backend(*options(engine), "--incoming"))
            stream = f"unix:{there.path('incoming')}"
            stack.enter_context(there.qemu("-incoming", stream, queues=QUEUES))
            await ask(here.control, "handover", armed=True)
            async with here.monitor() as source, there.monitor() as target:
                assert (await ask(there.control, "status"))["owns_image"] is False
                await source.execute("migrate", {"uri": stream}, timeout_s=QMP_S)
                await wait_migration(source, "completed")
                await wait_running(target)
                # The old end has let go, and cannot have the disk back.
                assert (await ask(here.control, "status"))["owns_image"] is False
            assert await writes(there) == nonce
            assert (await ask(there.control, "status"))["owns_image"] is True
        await stop_writers(hosts[-1])


@dataclass(frozen=True)
class Overtaken:
    """A guest that runs on the other host before its memory is there."""

    there: PlainHost
    nonce: str
    source: Monitor
    target: Monitor
    backend: ExitStack

    async def finish(self) -> dict[str, Any]:
        """Lets the rest of the memory come; gives what QEMU says of the migration."""
        fast = {"max-postcopy-bandwidth": 0}
        await self.source.execute("migrate-set-parameters", fast, timeout_s=QMP_S)
        return await wait_migration(self.source, "completed")


@asynccontextmanager
async def overtaken(place: Path, image: Path, engine: str) -> AsyncIterator[Overtaken]:
    """Moves a guest that writes, and lets it run there; its memory follows in minutes."""
    here, there = make_hosts(place, image, "ab")
    stream = f"unix:{there.path('incoming')}"
    with ExitStack() as stack:
        stack.enter_context(here.backend(*options(engine)))
        stack.enter_context(here.qemu(queues=QUEUES))
        nonce = await start_writers(here)
        assert await writes(here) == nonce
        backend = stack.enter_context(ExitStack())
        backend.enter_context(there.backend(*options(engine), "--incoming"))
        stack.enter_context(there.qemu("-incoming", "defer", queues=QUEUES))
        await ask(here.control, "handover", armed=True)
        async with here.monitor() as source, there.monitor() as target:
            for monitor in (source, target):
                await monitor.execute("migrate-set-capabilities", POSTCOPY, timeout_s=QMP_S)
            await target.execute("migrate-incoming", {"uri": stream}, timeout_s=QMP_S)
            slow = {"max-bandwidth": 4 * MIB, "max-postcopy-bandwidth": MIB // 2}
            await source.execute("migrate-set-parameters", slow, timeout_s=QMP_S)
            await source.execute("migrate", {"uri": stream}, timeout_s=QMP_S)
            await wait_migration(source, "active")
            await source.execute("migrate-start-postcopy", timeout_s=QMP_S)
            await wait_running(target)
            await there.wait_backend("memory", "listening")
            yield Overtaken(there, nonce, source, target, backend)


@ENGINES
async def test_the_disk_works_before_the_memory_is_there(
    place: Path, disk_image: Path, engine: str
) -> None:
    async with overtaken(place, disk_image, engine) as moved:
        assert await writes(moved.there, 100) == moved.nonce
        # That was while memory was missing, and not after it.
        assert (await ask(moved.there.control, "status"))["memory"] == "listening"
        info = await moved.finish()
        assert info["ram"]["postcopy-requests"] > 0, info
        await moved.there.wait_backend("memory", "complete")
        assert await writes(moved.there) == moved.nonce
        await stop_writers(moved.there)


@pytest.mark.parametrize("late", [False, True], ids=["in time", "after the end"])
async def test_a_backend_that_dies_before_the_memory_is_there(
    place: Path, disk_image: Path, late: bool
) -> None:
    async with overtaken(place, disk_image, "mmap") as moved:
        assert await writes(moved.there, 20) == moved.nonce
        moved.backend.close()
        if late:
            # QEMU tells the end of the postcopy to nobody.
            await moved.finish()
        with moved.there.backend(*options("mmap"), "--incoming"):
            await moved.there.wait_backend("memory", "inherited")
            await moved.finish()
            await moved.there.wait_backend("memory", "complete")
            assert await writes(moved.there) == moved.nonce
            await stop_writers(moved.there)


async def recover(target: Monitor, stream: dict[str, str]) -> None:
    """Has the target take up its stream, as soon as it has seen that it is broken. Its main loop
    may wait for a page until then, and answers nothing else.
    """
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await target.execute("migrate-recover", stream, timeout_s=QMP_S)
            except StateConflict:
                await asyncio.sleep(0.05)  # poll interval
            else:
                return


async def test_a_postcopy_that_breaks_is_taken_up_again(place: Path, disk_image: Path) -> None:
    async with overtaken(place, disk_image, "mmap") as moved:
        await moved.source.execute("migrate-pause", timeout_s=QMP_S)
        await wait_migration(moved.source, "postcopy-paused")
        stream = {"uri": f"unix:{moved.there.path('again')}"}
        await recover(moved.target, stream)
        assert (await ask(moved.there.control, "status"))["memory"] == "listening"
        await moved.source.execute("migrate", {**stream, "resume": True}, timeout_s=QMP_S)
        await moved.finish()
        await moved.there.wait_backend("memory", "complete")
        assert await writes(moved.there) == moved.nonce
        await stop_writers(moved.there)


async def test_without_an_inflight_region_qemu_is_told_that_postcopy_will_not_do(
    place: Path, disk_image: Path
) -> None:
    (host,) = make_hosts(place, disk_image, "a")
    backend = host.backend(*options("mmap"), "--incoming", "--no-inflight")
    with backend, host.qemu("-incoming", "defer", queues=QUEUES):
        async with host.monitor() as monitor:
            with pytest.raises(StateConflict, match="not capable of postcopy"):
                await monitor.execute("migrate-set-capabilities", POSTCOPY, timeout_s=QMP_S)
