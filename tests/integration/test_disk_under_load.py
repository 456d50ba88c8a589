"""A guest that writes and verifies while its backends come and go: it must notice nothing."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from sempervirt.agent import Agent, Vm
from sempervirt.disk.driver import Disk
from sempervirt.guest import ProbeClient
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from tests.faults import inject_fault
from tests.unharmed import assert_unharmed

pytestmark = pytest.mark.guest
Spec = Callable[..., VmSpec]

MIB = 1 << 20
BOOT_S = 180.0
READY_S = 90.0
# Requests between two events: enough to have all writers at work again.
PAUSE = 200


@asynccontextmanager
async def loaded(vm: Vm) -> AsyncIterator[ProbeClient]:
    """The probe of a VM, with sixteen writers on its disk."""
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        await client.write_start("serial:loaded", writers=16, span_bytes=8 * MIB)
        await completed(client, PAUSE)
        yield client


async def completed(client: ProbeClient, more: int) -> None:
    """Waits until the writers have completed `more` requests."""
    before = (await client.stats()).completions
    await client.wait_stats(lambda stats: stats.completions >= before + more)


async def kill_active(disk: Disk) -> None:
    """SIGKILL to the active backend, once a spare is there; returns when its end was seen."""
    await disk.wait_spare_ready(READY_S)
    pid, count = disk.active_pid, disk.restart_count
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await disk.changes.wait_until(
        lambda: disk.restart_count > count, timeout_s=READY_S, what="the take-over"
    )


@pytest.mark.parametrize(
    "disk_keys",
    [{}, {"queues": 4, "engine": "uring", "direct": True}],
    ids=["one queue", "four queues, io_uring"],
)
async def test_kills_upgrades_and_pauses_are_not_noticed(
    agent: Agent, guest_spec: Spec, disk_keys: dict[str, object]
) -> None:
    vm = await agent.run_vm(guest_spec(serial="loaded", **disk_keys))
    disk = agent.disks["web/root"]
    async with loaded(vm) as client:
        for _ in range(4):
            await kill_active(disk)
            await completed(client, PAUSE)
        # Twice in a row, the second time perhaps in the middle of its replay.
        await kill_active(disk)
        assert disk.active_pid is not None
        os.kill(disk.active_pid, signal.SIGKILL)
        await completed(client, PAUSE)
        await disk.wait_spare_ready(READY_S)
        await disk.upgrade()
        await completed(client, PAUSE)
        for _ in range(2):
            await vm.pause()
            await vm.resume()
            await completed(client, PAUSE)
        await vm.pause()
        await kill_active(disk)
        await disk.wait_spare_ready(READY_S)
        await disk.upgrade()  # nothing is in flight, and the guest cannot react
        await vm.resume()
        await completed(client, PAUSE)
        assert_unharmed(await client.write_stop())
    assert disk.restart_count == 7
    assert disk.upgrade_count == 2
    await disk.changes.wait_until(
        lambda: disk.restarts[-1].milestones_ms.get("first_completion") is not None,
        timeout_s=READY_S,
        what="the timeline of the last take-over",
    )


async def test_host_errors_reach_the_guest_and_are_shown(
    faulty_agent: Agent, guest_spec: Spec
) -> None:
    vm = await faulty_agent.run_vm(guest_spec(serial="loaded"))
    disk = faulty_agent.disks["web/root"]
    async with loaded(vm) as client:
        await inject_fault(disk, {"op": "write", "errno": "ENOSPC", "every": 5, "limit": 3})
        await client.wait_stats(lambda stats: stats.io_error_count >= 3)
        await completed(client, PAUSE)
        await disk.changes.wait_until(
            lambda: disk.last_error is not None, timeout_s=READY_S, what="the error to be told"
        )
        assert disk.last_error is not None
        assert disk.last_error.errno == errno.ENOSPC
        assert disk.journal.last("io-error") is not None
        # The error is still known when the backend that met it is gone.
        await kill_active(disk)
        await completed(client, PAUSE)
        assert disk.last_error.errno == errno.ENOSPC
        stats = await client.write_stop()
        assert stats.hung == 0
    assert vm.run is Runstate.RUNNING
