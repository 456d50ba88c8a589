"""Queues on threads with real backends: at their start, moved while they serve, and remembered."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.api.client import Client
from sempervirt.api.schemas import DiskView
from sempervirt.core.errors import InvalidRequest
from sempervirt.core.queue_map import Binding, Choice, DevicePlan, ThreadMap
from sempervirt.disk.backend import Blkd, DiskOptions
from sempervirt.disk.client import BackendClient
from sempervirt.disk.driver import Disk
from sempervirt.disk.fingerprint import fingerprint
from sempervirt.disk.lifecycle import adopt_disk, start_disk
from sempervirt.disk.presets import Preset, PresetStore
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.state import Condition, Policy
from sempervirt.disk.storage import storage_key
from sempervirt.disk.volume import inspect
from sempervirt.guest import ProbeClient
from sempervirt.qemu.spec import VmSpec

Spec = Callable[..., VmSpec]
Semperd = Callable[[], AbstractAsyncContextManager["subprocess.Popen[bytes]"]]

MIB = 1 << 20
BOOT_S = 180.0
READY_S = 90.0
POLL_S = 0.05
PAUSE = 150
AT_FIRST = (0, 1, 0, 1)


@pytest.fixture
def setup(place: Path, disk_image: Path) -> DiskSetup:
    binding = Binding(AT_FIRST, "VM file")
    return DiskSetup(
        name="web/root",
        volume=inspect(disk_image, read_only=False),
        options=DiskOptions(disk_image, queues=4),
        command=Blkd(),
        policy=Policy(),
        files=DiskFiles(place, "root"),
        record=place / "disk.json",
        plan=DevicePlan("vhost-user-blk", binding, Choice("auto", "built-in default")),
    )


@pytest.fixture
async def disk(setup: DiskSetup) -> AsyncIterator[Disk]:
    """A disk of four queues that nobody uses, with its spare."""
    started = await start_disk(setup)
    await started.wait_spare_ready(READY_S)
    yield started
    await started.stop()


async def eventually(what: str, condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits for a condition that has to be asked for."""
    try:
        async with asyncio.timeout(READY_S):
            while True:
                if await condition():
                    return
                await asyncio.sleep(POLL_S)  # poll interval
    except TimeoutError as error:
        raise AssertionError(f"waited {READY_S:g} s for {what}") from error


async def map_of_active(disk: Disk) -> ThreadMap:
    return (await disk.status()).thread_map


async def map_of_spare(disk: Disk) -> ThreadMap:
    assert disk.state.spare is not None
    client = BackendClient(disk.setup.files.control(disk.state.spare.generation))
    return (await client.status()).thread_map


def arguments_of(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


async def take_over(disk: Disk) -> None:
    """Kills the active backend and waits for the next spare."""
    assert disk.active_pid is not None
    count = disk.restart_count
    os.kill(disk.active_pid, signal.SIGKILL)
    await disk.changes.wait_until(
        lambda: disk.restart_count > count, timeout_s=READY_S, what="the take-over"
    )
    await disk.wait_spare_ready(READY_S)


async def test_every_process_of_a_disk_has_its_map(disk: Disk) -> None:
    assert await map_of_active(disk) == await map_of_spare(disk) == AT_FIRST
    await disk.rebind(Binding((0, 0, 1, 2), "test"))
    assert await map_of_active(disk) == (0, 0, 1, 2)
    await eventually("the spare", lambda: is_on(map_of_spare(disk), (0, 0, 1, 2)))
    assert "--thread-map=0,1,0,1" in arguments_of(disk.spare_pid)  # it was told, not restarted
    await take_over(disk)
    assert await map_of_active(disk) == (0, 0, 1, 2)
    assert "--thread-map=0,0,1,2" in arguments_of(disk.spare_pid)
    await disk.upgrade()
    assert await map_of_active(disk) == (0, 0, 1, 2)
    note = disk.journal.last("threads")
    assert note is not None
    assert note.message == "0,0,1,2 (test)"


async def is_on(asked: Awaitable[ThreadMap], wanted: ThreadMap) -> bool:
    return await asked == wanted


async def test_a_map_survives_the_agent_and_whatever_it_did_not_get_to(setup: DiskSetup) -> None:
    disk = await start_disk(setup)
    await disk.wait_spare_ready(READY_S)
    await disk.rebind(Binding((0, 0, 0, 0), "test"))
    # An agent that died after it had told the active process, and before it wrote that down.
    assert disk.state.active is not None
    client = BackendClient(setup.files.control(disk.state.active.generation))
    await client.move_queues((0, 1, 2, 3))
    await disk.detach()
    adopted = await adopt_disk(setup)
    try:
        assert adopted.plan is not None
        assert adopted.plan.binding == Binding((0, 0, 0, 0), "test")
        await eventually("the recorded map", lambda: is_on(map_of_active(adopted), (0, 0, 0, 0)))
        await adopted.wait_spare_ready(READY_S)
        await take_over(adopted)
        assert await map_of_active(adopted) == (0, 0, 0, 0)
    finally:
        await adopted.stop()


async def test_a_spare_that_was_not_told_is_told_once_it_serves(disk: Disk) -> None:
    await disk.rebind(Binding((0, 0, 0, 1), "test"))
    await eventually("the spare", lambda: is_on(map_of_spare(disk), (0, 0, 0, 1)))
    assert disk.state.spare is not None
    client = BackendClient(disk.setup.files.control(disk.state.spare.generation))
    await client.move_queues((0, 1, 2, 3))  # as if it had not been
    await take_over(disk)
    await eventually("the successor", lambda: is_on(map_of_active(disk), (0, 0, 0, 1)))


@pytest.mark.parametrize("wrong", [(0,), (0, 0, 0, 2), (), (0, 1, 2, 3, 4), (-1, 0, 0, 0)])
async def test_a_map_that_does_not_fit_changes_nothing(disk: Disk, wrong: ThreadMap) -> None:
    with pytest.raises(InvalidRequest, match="disk web/root: "):
        await disk.rebind(Binding(wrong, "test"))
    assert disk.state.binding == Binding(AT_FIRST, "VM file")
    assert await map_of_active(disk) == AT_FIRST


async def test_rebinding_waits_for_the_successor_of_a_dead_backend(disk: Disk) -> None:
    assert disk.active_pid is not None
    os.kill(disk.active_pid, signal.SIGKILL)
    await disk.rebind(Binding((0, 1, 2, 3), "test"))
    await eventually("the successor", lambda: is_on(map_of_active(disk), (0, 1, 2, 3)))


async def test_a_backend_that_cannot_start_a_moved_queue_gives_up_its_place(
    agent: Agent, firmware_spec: Spec, disk_image: Path
) -> None:
    root = {"name": "root", "image": str(disk_image), "thread_map": [0, 1]}
    await agent.run_vm(firmware_spec(disks=[root]))
    disk = agent.disks["web/root"]

    async def used() -> bool:
        return (await disk.status()).queues[0].enabled

    await eventually("the firmware to use the first queue", used)
    await disk.wait_spare_ready(READY_S)
    before = disk.active_pid
    assert before is not None
    member = disk.backends.get(disk.generation)
    assert member is not None
    reader, writer = await asyncio.open_unix_connection(str(member.control))
    writer.write(b'{"id":1,"cmd":"status"}\n')
    await reader.readline()  # the connection is accepted
    # It can open nothing more, and a queue that starts needs descriptors of its own.
    resource.prlimit(before, resource.RLIMIT_NOFILE, (3, 3))
    writer.write(b'{"id":2,"cmd":"threads","map":[1,0]}\n')
    assert await reader.readline() == b"", "it answered, and went on"
    writer.close()
    async with asyncio.timeout(READY_S):
        await disk.changes.wait_until(
            lambda: disk.active_pid not in (None, before), timeout_s=READY_S, what="the successor"
        )
    await disk.wait_spare_ready(READY_S)
    await disk.rebind(Binding((1, 0), "test"))
    assert disk.restart_count == 1
    status = await disk.status()
    assert status.thread_map == (1, 0)
    assert status.queues[0].enabled


MAPS: tuple[ThreadMap, ...] = ((0, 0, 0, 0), (0, 1, 2, 3), (1, 0, 0, 1), (0, 1, 0, 1))


@pytest.mark.guest
@pytest.mark.parametrize(
    "disk_keys",
    [{}, {"engine": "mmap"}, {"engine": "uring", "direct": True}],
    ids=["auto", "mmap", "io_uring"],
)
async def test_rebinding_and_kills_under_load_are_not_noticed(
    agent: Agent, guest_spec: Spec, disk_keys: dict[str, object]
) -> None:
    spec = guest_spec(serial="loaded", queues=4, queues_per_thread=2, **disk_keys)
    vm = await agent.run_vm(spec.model_copy(update={"vcpus": 4}))
    disk = agent.disks["web/root"]
    assert disk.state.binding == Binding((0, 1, 0, 1), "VM file")
    maps = cycle(MAPS)
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        await client.write_start("serial:loaded", writers=16, span_bytes=8 * MIB)

        async def completed(more: int) -> None:
            before = (await client.stats()).completions
            await client.wait_stats(lambda stats: stats.completions >= before + more)

        await completed(PAUSE)
        for _ in range(3):
            for _ in range(4):
                await disk.rebind(Binding(next(maps), "test"))
                assert await map_of_active(disk) == disk.state.binding.map
                await completed(20)
            await disk.wait_spare_ready(READY_S)
            # A kill while the queues are being moved.
            moving = asyncio.create_task(disk.rebind(Binding(next(maps), "test")))
            assert disk.active_pid is not None
            os.kill(disk.active_pid, signal.SIGKILL)
            await moving
            await completed(PAUSE)
            await disk.wait_spare_ready(READY_S)
        moving = asyncio.create_task(disk.rebind(Binding(next(maps), "test")))
        await disk.upgrade()
        await moving
        await completed(PAUSE)
        await vm.pause()
        await disk.rebind(Binding(next(maps), "test"))
        await vm.resume()
        await completed(PAUSE)
        wanted = disk.state.binding
        await eventually("the last map", lambda: is_on(map_of_active(disk), wanted.map))
        status = await disk.status()
        assert all(queue.writes > 0 for queue in status.queues), status.queues
        stats = await client.write_stop()
    assert stats.io_error_count == 0, stats
    assert stats.hung == 0, stats
    assert stats.wrong.total == 0, stats
    assert stats.verified_final is not None
    assert stats.verified_final.complete, stats
    assert stats.verified_final.wrong == 0, stats
    assert disk.restart_count == 3


async def wait_disk(client: Client, condition: Callable[[DiskView], bool]) -> DiskView:
    async with asyncio.timeout(READY_S):
        while True:
            view = await client.disk("web/root")
            if condition(view):
                return view
            await asyncio.sleep(POLL_S)  # poll interval


async def test_a_vm_runs_with_the_preset_of_its_storage(
    agent: Agent, config: AgentConfig, firmware_spec: Spec, disk_image: Path
) -> None:
    host = await fingerprint(Blkd().binary(), (await agent.host()).features.version)
    preset = Preset(
        device="vhost-user-blk",
        storage=storage_key(disk_image, direct=False),
        engine="mmap",
        queues_per_thread=1,
        poll_us=7,
        source="measured",
        why="a test says so",
        measured_at=datetime(2026, 11, 23, tzinfo=UTC),
        host=host,
    )
    PresetStore(config.state_dir).put([preset])
    root = {"name": "root", "image": str(disk_image)}
    vm = await agent.run_vm(firmware_spec(vcpus=2, disks=[root]))
    words = str(vm.plans["disk-root"])
    assert words == "2 queues on 2 threads, engine mmap (preset of 2026-11-23)"
    disk = agent.disks["web/root"]
    await disk.wait_spare_ready(READY_S)
    for _ in range(2):
        status = await disk.status()
        assert (status.engine, status.poll_us) == ("mmap", 7)
        assert status.thread_map == (0, 1)
        await take_over(disk)


async def test_by_the_api_and_across_a_restart_of_the_agent(
    config: AgentConfig, firmware_spec: Spec, disk_image: Path, semperd: Semperd
) -> None:
    root = {"name": "root", "image": str(disk_image), "queues": 3, "poll_us": 5}
    async with Client.connect(config.socket) as client:
        async with semperd():
            vm = await client.run_vm(firmware_spec(disks=[root]))
            assert vm.queues["disk-root"].map == [0, 0, 0]
            assert vm.queues["disk-root"].map_source == "built-in default"
            for thread_map in ([0, 0], [0, 2, 0], []):
                with pytest.raises(InvalidRequest):
                    await client.move_queues("web/root", thread_map=thread_map)
            moved = await client.move_queues("web/root", queues_per_thread=2)
            assert moved.queues is not None
            assert (moved.queues.map, moved.queues.threads) == ([0, 1, 0], 2)
            assert moved.backend is not None
            assert [queue["thread"] for queue in moved.backend["queues"]] == [0, 1, 0]
            assert moved.backend["poll_us"] == 5
            moved = await client.move_queues("web/root", thread_map=(2, 1, 0))
            first = await wait_disk(client, lambda view: view.condition is Condition.GUARDED)
        async with semperd():
            again = await wait_disk(client, lambda view: view.condition is Condition.GUARDED)
            assert again.active_pid == first.active_pid
            assert again.queues == moved.queues
            assert again.queues is not None
            assert again.queues.map_source == "semper disk threads"
            assert (await client.vm("web")).queues["disk-root"] == again.queues
            assert again.active_pid is not None
            os.kill(again.active_pid, signal.SIGKILL)
            last = await wait_disk(
                client, lambda view: view.condition is Condition.GUARDED and view.restart_count > 0
            )
            assert last.backend is not None
            assert [queue["thread"] for queue in last.backend["queues"]] == [2, 1, 0]
            await client.kill_vm("web")
