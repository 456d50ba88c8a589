"""The agent is killed under load; the next one adopts what runs. The guest must notice nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.api.client import Client
from sempervirt.api.schemas import DiskView, VmView
from sempervirt.core.errors import AgentUnavailable, StateConflict
from sempervirt.disk.state import Condition
from sempervirt.guest import ProbeClient
from sempervirt.host.procfs import start_ticks
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.record import read_vm_record
from tests.ended import kill_and_see

Spec = Callable[..., VmSpec]
Semperd = Callable[[], AbstractAsyncContextManager["subprocess.Popen[bytes]"]]

MIB = 1 << 20
DEADLINE_S = 90.0
BOOT_S = 180.0
POLL_S = 0.05


async def wait_disk(client: Client, condition: Callable[[DiskView], bool]) -> DiskView:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            view = await client.disk("web/root")
            if condition(view):
                return view
            await asyncio.sleep(POLL_S)  # poll interval


async def wait_state(client: Client, state: Runstate) -> VmView:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            view = await client.vm("web")
            if view.state is state:
                return view
            await asyncio.sleep(POLL_S)  # poll interval


def is_guarded(view: DiskView) -> bool:
    return view.condition is Condition.GUARDED


@pytest.mark.guest
async def test_a_killed_agent_is_not_noticed_by_the_guest(
    config: AgentConfig, guest_spec: Spec, semperd: Semperd
) -> None:
    async with Client.connect(config.socket) as client:
        async with semperd() as first:
            view = await client.run_vm(guest_spec(serial="loaded"))
            probe = await ProbeClient.connect(
                view.channels["org.sempervirt.probe"], deadline_s=BOOT_S
            )
            await probe.wait_hello(deadline_s=BOOT_S)
            await probe.write_start("serial:loaded", writers=16, span_bytes=8 * MIB)
            disk = await wait_disk(client, is_guarded)
            first.kill()
        # No agent: the spare takes over by itself.
        assert disk.active_pid is not None
        os.kill(disk.active_pid, signal.SIGKILL)
        before = (await probe.stats()).completions
        await probe.wait_stats(lambda stats: stats.completions > before + 100)
        with pytest.raises(AgentUnavailable):
            await client.agent()
        async with semperd():
            adopted = await wait_disk(client, is_guarded)
            assert adopted.active_pid == disk.spare_pid
            again = await client.vm("web")
            assert (again.state, again.pid) == (Runstate.RUNNING, view.pid)
            assert adopted.active_pid is not None
            os.kill(adopted.active_pid, signal.SIGKILL)
            await wait_disk(client, lambda now: is_guarded(now) and now.restart_count > 0)
            stats = await probe.write_stop()
            assert (stats.io_error_count, stats.hung, stats.wrong.total) == (0, 0, 0), stats
            assert stats.verified_final is not None
            assert stats.verified_final.wrong == 0
            await probe.close()
            ended = await client.kill_vm("web")
            assert ended.end is not None
            assert ended.end.reason == "killed on request"


async def test_sigterm_leaves_vms_running_for_the_next_agent(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd
) -> None:
    async with Client.connect(config.socket) as client:
        async with semperd() as first:
            view = await client.run_vm(firmware_spec())
            await client.pause_vm("web")
            first.terminate()
            assert await asyncio.to_thread(first.wait, DEADLINE_S) == 0
        async with semperd():
            adopted = await wait_disk(client, is_guarded)
            assert adopted.name == "web/root"
            now = await wait_state(client, Runstate.PAUSED)
            assert now.pid == view.pid
            await client.kill_vm("web")


async def test_an_end_that_no_agent_saw_is_told_as_such(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd
) -> None:
    async with Client.connect(config.socket) as client:
        async with semperd():
            view = await client.run_vm(firmware_spec())
        kill_and_see(view.pid)
        async with semperd():
            ended = await client.vm("web")
            assert ended.state is Runstate.CRASHED
            assert ended.end is not None
            assert "while no agent ran" in ended.end.reason
            assert await client.disks() == []
            # Its backends were ended: the image is free.
            await client.run_vm(firmware_spec())
        async with semperd():  # and that one is adopted and ended here
            await client.kill_vm("web")
        async with semperd():  # an end on record is still told
            assert (await client.vm("web")).why == "killed on request"
            await client.forget_vm("web")
            assert await client.vms() == []


async def test_a_qemu_that_was_not_recorded_yet_is_found(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd
) -> None:
    """The agent was killed between the start of QEMU and writing its pid down."""
    async with Client.connect(config.socket) as client:
        async with semperd():
            view = await client.run_vm(firmware_spec())
        path = config.vm_state_dir("web") / "vm.json"
        record = read_vm_record(path)
        assert record is not None
        replace(record, qemu=None).write(path)
        async with semperd():
            assert (await wait_state(client, Runstate.RUNNING)).pid == view.pid
            await client.kill_vm("web")


async def test_an_agent_that_keeps_vms_and_one_that_does_not(
    config: AgentConfig, firmware_spec: Spec
) -> None:
    async with Agent.open(replace(config, keep_vms=True)) as agent:
        vm = await agent.run_vm(firmware_spec())
        await agent.disks["web/root"].wait_spare_ready(DEADLINE_S)
        pid = vm.pid
    async with Agent.open(config) as agent:
        assert agent.vm("web").pid == pid
        await agent.vm("web").wait_state(Runstate.RUNNING, timeout_s=DEADLINE_S)
    assert pid is not None
    assert start_ticks(pid) is None


async def test_one_agent_for_each_state_directory(config: AgentConfig) -> None:
    async with Agent.open(config):
        with pytest.raises(StateConflict, match=rf"pid {os.getpid()}"):
            async with Agent.open(config):
                pass
    async with Agent.open(config):
        pass


async def test_a_damaged_record_harms_only_its_vm_whose_name_is_not_free(
    config: AgentConfig, firmware_spec: Spec, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = config.vm_state_dir("old") / "vm.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"version": 99}')
    async with Agent.open(config) as agent:
        assert "has version 99" in caplog.text
        await agent.run_vm(firmware_spec())
        other = firmware_spec().model_copy(update={"name": "old"})
        for name in (lambda: agent.run_vm(other), lambda: agent.restart_qemu("old")):
            with pytest.raises(StateConflict, match=r"VM old is unknown: .* version 99"):
                await name()
    assert damaged.exists()
