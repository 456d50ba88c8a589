"""What an agent knows of a VM that has ended, when the VM does not start."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sempervirt.agent import Agent, AgentConfig, adoption
from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import End, Runstate, VmState
from sempervirt.vm.autostart import Settled, is_idle, kept_state, start_all
from sempervirt.vm.record import VmRecord, read_vm_record, record_path

ENDED = VmState(run=Runstate.STOPPED, why="done", end=End("done", 0))


@asynccontextmanager
async def knowing(tmp_path: Path, *, autostart: bool = False) -> AsyncIterator[Agent]:
    """An agent that knows of one VM, web, which has ended."""
    config = AgentConfig(tmp_path / "state", tmp_path / "run")
    path = record_path(config.vm_state_dir("web"))
    path.parent.mkdir(parents=True)
    spec = VmSpec(name="web", autostart=autostart)
    record = VmRecord(spec, Accelerator("tcg", ""), 0.0, end=ENDED)
    record.write(path)
    agent = Agent(config)
    agent.vms["web"] = adoption.remembered(config, record, path)
    await agent.vm("web").wait_freed()
    try:
        yield agent
    finally:
        await agent.vms["web"].detach()


class Store:
    """What a start needs, and what is away the first times; what was begun is undone then."""

    def __init__(self, agent: Agent, away: int) -> None:
        self.asked = 0
        self._agent = agent
        self._away = away

    async def launch(self, *_: object) -> object:
        self.asked += 1
        if self.asked <= self._away:
            shutil.rmtree(record_path(self._agent.config.vm_state_dir("web")).parent)
            raise Unavailable("the store does not answer")
        raise StateConflict("it was reached")

    async def facts(self) -> None:
        """None are needed."""


def put_in(store: Store, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sempervirt.agent.agent.launch", store.launch)
    monkeypatch.setattr(agent, "host", store.facts)


async def test_a_vm_that_does_not_start_is_known_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with knowing(tmp_path) as agent:
        put_in(Store(agent, 2), agent, monkeypatch)
        for _ in range(2):
            with pytest.raises(Unavailable, match="the store"):
                await agent.start_vm("web")
            assert agent.vm("web").freed
            assert agent.vm("web").shown == (Runstate.STOPPED, "done")
            on_record = read_vm_record(record_path(agent.config.vm_state_dir("web")))
            assert on_record is not None
            assert on_record.end == ENDED
        with pytest.raises(StateConflict, match="reached"):
            await agent.start_vm("web")


async def test_a_vm_whose_state_cannot_be_gone_on_with_is_known_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with knowing(tmp_path) as agent:
        kept = kept_state(agent.config.state_dir, "web")
        kept.parent.mkdir()
        kept.write_bytes(b"no state")
        with pytest.raises(StateConflict, match="rm "):
            await agent.start_vm("web")
        assert agent.vm("web").freed
        kept.unlink()  # as the remedy says
        store = Store(agent, 0)
        put_in(store, agent, monkeypatch)
        with pytest.raises(StateConflict, match="reached"):
            await agent.start_vm("web")


async def test_a_host_that_is_up_tries_again_while_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with knowing(tmp_path, autostart=True) as agent:
        store = Store(agent, 2)
        put_in(store, agent, monkeypatch)

        def known() -> list[tuple[VmSpec, bool]]:
            return [(vm.spec, is_idle(vm.record, freed=vm.freed)) for vm in agent.vms.values()]

        settled = Settled(agent.config.state_dir, "boot")
        failed = await start_all(known, agent.start_vm, settled, bound_s=2.0, again_s=0.01)
        assert store.asked > 3
        assert [*failed] == ["web"]
        assert "reached" in str(failed["web"])
