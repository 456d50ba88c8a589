"""What hangs is told as what it is, and holds up nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sempervirt.agent import Agent
from sempervirt.api import routes, views
from sempervirt.core.errors import Unavailable
from sempervirt.disk.driver import Disk
from sempervirt.host import storage_call
from sempervirt.host.storage_call import HANGING_MAX, call_storage
from sempervirt.qemu.spec import VmSpec
from tests.hanging_medium import HangingMedium, hanging_medium

pytestmark = pytest.mark.timeout(120)
Spec = Callable[..., VmSpec]

MIB = 1 << 20
READY_S = 15.0
# Longer than anything that is not held up takes on a busy machine.
PROMPT_S = 2.5


@pytest.fixture
def medium(place: Path) -> Iterator[HangingMedium]:
    """A file system that can be told to hang."""
    with hanging_medium(place, 8 * MIB) as made:
        yield made


async def worst_lag_s(until: asyncio.Event) -> float:
    """How late the event loop ever was, at worst."""
    worst = 0.0
    while not until.is_set():
        before = time.monotonic()
        await asyncio.sleep(0.01)  # poll interval
        worst = max(worst, time.monotonic() - before - 0.01)
    return worst


async def directly(_path: Path, call: Callable[[], Any], _timeout_s: float = 0) -> Any:
    """What must not be done: the call, in the event loop."""
    return call()


@pytest.mark.parametrize("in_loop", [False, True], ids=["in a thread of its own", "control"])
async def test_an_image_that_hangs_stops_neither_the_agent_nor_another_disk(
    agent: Agent,
    firmware_spec: Spec,
    medium: HangingMedium,
    monkeypatch: pytest.MonkeyPatch,
    in_loop: bool,
) -> None:
    if in_loop:
        monkeypatch.setattr(views, "call_storage", directly)
    own = {"name": "data", "image": str(medium.image), "backend": "qemu"}
    await agent.run_vm(firmware_spec(name="hangs", disks=[own]))
    await agent.run_vm(firmware_spec())
    disk = agent.disks["web/root"]
    await disk.wait_spare_ready(READY_S)
    done = asyncio.Event()
    lag = asyncio.create_task(worst_lag_s(done))
    medium.hang_for(5.0)
    asked = asyncio.create_task(routes.list_disks(agent))
    os.kill(active(disk), signal.SIGKILL)
    begun = time.monotonic()
    await disk.changes.wait_until(
        lambda: disk.restart_count == 1, timeout_s=READY_S, what="the take-over"
    )
    seen_s = time.monotonic() - begun
    found = {view.name: view for view in await asked}
    done.set()
    if in_loop:
        assert await lag > PROMPT_S
    else:
        assert await lag < PROMPT_S
        assert seen_s < PROMPT_S
        assert found["hangs/data"].size_bytes is None, "it was not told, and not waited for"


async def poll(reached: Callable[[], bool], timeout_s: float) -> None:
    """Returns when `reached()` holds."""
    for _ in range(round(timeout_s / 0.02)):
        if reached():
            return
        await asyncio.sleep(0.02)  # poll interval
    raise AssertionError(f"not within {timeout_s} s")


def active(disk: Disk) -> int:
    """The pid of the backend that serves."""
    assert disk.active_pid is not None
    return disk.active_pid


async def test_a_backend_that_is_silent_is_told_as_such_and_not_waited_for(
    agent: Agent, firmware_spec: Spec, disk_image: Path
) -> None:
    for number in range(3):
        image = disk_image.with_name(f"d{number}.raw")
        image.touch()
        os.truncate(image, MIB)
        await agent.run_vm(
            firmware_spec(name=f"v{number}", disks=[{"name": "d", "image": str(image)}])
        )
    stopped = [active(agent.disks[f"v{number}/d"]) for number in (0, 1)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        found = await routes.list_disks(agent)
        took_s = time.monotonic() - begun
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert took_s < views.ANSWER_S + PROMPT_S, "one deadline for all, and not one after the other"
    assert [bool(view.silence) for view in found] == [True, True, False]
    assert str(stopped[0]) in found[0].silence
    assert found[2].backend is not None


async def test_calls_that_hang_do_not_add_up(medium: HangingMedium) -> None:
    assert (await call_storage(medium.image, medium.image.stat)).st_size == 8 * MIB
    with pytest.raises(FileNotFoundError):
        await call_storage(medium.image, medium.image.with_name("absent").stat)
    medium.hang()
    for _ in range(HANGING_MAX):
        with pytest.raises(Unavailable, match=f"{medium.image} has not answered"):
            await call_storage(medium.image, medium.image.stat, 0.1)
    begun = time.monotonic()
    with pytest.raises(Unavailable, match="has not answered"):
        await call_storage(medium.image, medium.image.stat, 5.0)
    assert time.monotonic() - begun < PROMPT_S, "it was refused at once"
    medium.go_on()
    await poll(lambda: not storage_call._hanging, READY_S)
    assert (await call_storage(medium.image, medium.image.stat)).st_size == 8 * MIB
