"""What happens to a VM that has ended: its removal, and the start of an agent in the same boot."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from threading import Event

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.core.errors import StateConflict
from sempervirt.daemon import main
from sempervirt.host.procfs import ProcessId, identify
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.driver import Machine
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import End, Runstate, VmState
from sempervirt.vm.ledger import Ledger
from sempervirt.vm.record import VmRecord, record_path
from sempervirt.vm.vm import Vm

ENDED = VmState(run=Runstate.STOPPED, why="done", end=End("done", 0))


async def ended(config: AgentConfig, name: str, qemu: ProcessId | None) -> Vm:
    """A VM that had that QEMU."""
    path, spec = record_path(config.vm_state_dir(name)), VmSpec(name=name, autostart=True)
    record = VmRecord(spec, Accelerator("tcg", ""), 0.0, qemu=qemu, end=ENDED)
    path.parent.mkdir(parents=True)
    record.write(path)

    async def released(_: object) -> bool:
        return True

    async def finished(_: object) -> str:
        return ""

    machine = Machine.remember(spec, VmFiles(config.vm_run_dir(name)), ENDED)
    vm = Vm(machine, {}, Ledger(record, path), released, finished)
    await vm.wait_freed()
    return vm


async def test_a_vm_that_is_being_removed_is_not_started_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would lose its records, its firmware's variables and its number."""
    agent = Agent(AgentConfig(tmp_path / "s", tmp_path / "r"))
    begun, go_on, rmtree = Event(), Event(), shutil.rmtree
    agent.vms["web"] = await ended(agent.config, "web", None)

    def slow(path: Path, *, ignore_errors: bool) -> None:
        begun.set()
        go_on.wait()
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", slow)
    removing = asyncio.ensure_future(agent.remove_vm("web"))
    await asyncio.to_thread(begun.wait)
    try:
        for act in (agent.run_vm(VmSpec(name="web")), agent.remove_vm("web")):
            with pytest.raises(StateConflict, match="being started or removed"):
                await act
    finally:
        go_on.set()
        await removing


async def test_what_has_run_since_the_boot_is_not_started_by_the_next_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what somebody ran, and stopped, after that agent had started all."""
    agent, own = Agent(AgentConfig(tmp_path / "s", tmp_path / "r")), identify(os.getpid())
    assert own is not None
    before = ProcessId(own.pid, own.start_ticks, "an earlier boot")
    agent.vms = {
        name: await ended(agent.config, name, qemu)
        for name, qemu in (("web", own), ("db", before), ("new", None))
    }
    started: list[str] = []

    async def start(name: str) -> None:
        started.append(name)

    monkeypatch.setattr(agent, "start_vm", start)
    await main._autostart(agent)
    assert sorted(started) == ["db", "new"]
