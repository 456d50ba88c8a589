"""An owner that fails ends the agent, and the next one goes on with what runs.

The fault is put into a pure decision, by a script that is otherwise semperd. Before, such an owner
was only logged: whoever asked it for something waited for ever, and its last state was told.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from sempervirt.agent import AgentConfig
from sempervirt.api.client import Client
from sempervirt.core.errors import SempervirtError
from sempervirt.host.background import CRASHED
from sempervirt.host.procfs import start_ticks
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from tests.integration.test_agent_adoption import is_guarded, wait_disk, wait_state

Spec = Callable[..., VmSpec]

DEADLINE_S = 90.0
POLL_S = 0.05

SCRIPT = """
import sys
from sempervirt.daemon.main import main
from sempervirt.disk import driver as disk
from sempervirt.disk.state import Exited
from sempervirt.qemu import driver as qemu
from sempervirt.qemu.state import Asked, Request

def failing(real, when):
    def decide(state, event, *rest):
        if when(event):
            raise RuntimeError("a mistake in a decision")
        return real(state, event, *rest)
    return decide

fault = sys.argv.pop(1)
if fault == "qemu":
    is_pause = lambda event: isinstance(event, Asked) and event.request is Request.PAUSE
    qemu.decide = failing(qemu.decide, is_pause)
if fault == "disk":
    disk.decide = failing(disk.decide, lambda event: isinstance(event, Exited))
sys.exit(main())
"""


def started(config: AgentConfig, fault: str) -> subprocess.Popen[bytes]:
    directories = ("--state-dir", str(config.state_dir), "--run-dir", str(config.run_dir))
    log = config.state_dir.parent / f"semperd-{fault or 'sound'}.log"
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, fault, *directories], stderr=output, stdout=output
        )


@asynccontextmanager
async def semperd(config: AgentConfig, fault: str = "") -> AsyncIterator[subprocess.Popen[bytes]]:
    agent = started(config, fault)
    try:
        async with Client.connect(config.socket) as client, asyncio.timeout(DEADLINE_S):
            while True:
                with suppress(SempervirtError):
                    await client.agent()
                    break
                await asyncio.sleep(POLL_S)  # poll interval
        yield agent
    finally:
        agent.terminate()
        await asyncio.to_thread(agent.wait, DEADLINE_S)


def said(config: AgentConfig, fault: str) -> str:
    return Path(config.state_dir.parent / f"semperd-{fault}.log").read_text()


async def end_of(agent: subprocess.Popen[bytes]) -> int:
    return await asyncio.to_thread(agent.wait, DEADLINE_S)


async def test_a_vm_whose_owner_fails_is_the_next_agents(
    config: AgentConfig, firmware_spec: Spec
) -> None:
    async with Client.connect(config.socket) as client:
        async with semperd(config, "qemu") as agent:
            view = await client.run_vm(firmware_spec())
            with pytest.raises(SempervirtError):
                await client.pause_vm("web")
            assert await end_of(agent) == CRASHED
        assert "a mistake in a decision" in said(config, "qemu")
        assert "the next agent takes them over" in said(config, "qemu")
        assert view.pid is not None
        assert start_ticks(view.pid) is not None, "QEMU has ended with the agent"
        async with semperd(config):
            assert (await wait_state(client, Runstate.RUNNING)).pid == view.pid
            assert (await client.pause_vm("web")).state is Runstate.PAUSED
            assert (await client.kill_vm("web")).state is Runstate.STOPPED


async def test_a_disk_whose_owner_fails_is_the_next_agents(
    config: AgentConfig, firmware_spec: Spec
) -> None:
    async with Client.connect(config.socket) as client:
        async with semperd(config, "disk") as agent:
            await client.run_vm(firmware_spec())
            disk = await wait_disk(client, is_guarded)
            for pid in (disk.spare_pid, disk.active_pid):
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            assert await end_of(agent) == CRASHED
        assert "disk web/root has failed" in said(config, "disk")
        async with semperd(config):
            killed = {disk.active_pid, disk.spare_pid}
            await wait_disk(client, lambda view: is_guarded(view) and view.active_pid not in killed)
            await client.kill_vm("web")


async def test_without_a_fault_the_same_program_goes_on(
    config: AgentConfig, firmware_spec: Spec
) -> None:
    """The control of both."""
    async with Client.connect(config.socket) as client, semperd(config) as agent:
        await client.run_vm(firmware_spec())
        disk = await wait_disk(client, is_guarded)
        for pid in (disk.spare_pid, disk.active_pid):
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        killed = {disk.active_pid, disk.spare_pid}
        # A process that is dying may have closed its sockets, and not be seen to have ended yet.
        view = await wait_disk(
            client, lambda view: is_guarded(view) and view.active_pid not in killed
        )
        assert view.active_pid != disk.active_pid
        assert (await client.pause_vm("web")).state is Runstate.PAUSED
        await client.kill_vm("web")
        assert agent.poll() is None
