"""A VM with a passed-through device, as the agent keeps it: started, looked at, adopted, ended."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lab.guest import NEWER_QEMU
from sempervirt.agent import Agent, AgentConfig
from sempervirt.api.client import Client
from sempervirt.api.schemas import DeviceView
from sempervirt.api.server import serving
from sempervirt.core.errors import (
    ImageLocked,
    InvalidRequest,
    NotFound,
    StateConflict,
    Unavailable,
)
from sempervirt.passthrough.answers import MediatorState
from sempervirt.qemu.spec import PassthroughSpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.processes import living_of
from tests.passthrough.deaths import kill_all, wait_ready, wait_served
from tests.passthrough.pair import new_image

pytestmark = pytest.mark.guest
DEADLINE_S = 90.0


@pytest.fixture
def newer(config: AgentConfig) -> AgentConfig:
    """With a QEMU that can hand devices to its guest."""
    return replace(config, qemu=str(NEWER_QEMU / "qemu-system-x86_64"))


def spec(place: Path, name: str = "web") -> VmSpec:
    """A VM that gets no further than its firmware."""
    image = place / "nvme.raw"
    if not image.exists():
        new_image(place)
    device = {"name": "nvme", "image": str(image)}
    return VmSpec.model_validate({"name": name, "memory": "64M", "passthrough": [device]})


@asynccontextmanager
async def asked(agent: Agent, config: AgentConfig) -> AsyncIterator[Client]:
    async with serving(agent, config.socket), Client.connect(config.socket) as client:
        yield client


async def until_gone(client: Client) -> DeviceView:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            view = await client.device("web/nvme")
            if view.ailment:
                return view
            await asyncio.sleep(0.02)  # poll interval


async def test_a_vm_lives_and_ends_with_the_mediator_of_its_device(
    newer: AgentConfig, place: Path
) -> None:
    async with Agent.open(newer) as agent, asked(agent, newer) as client:
        vm = await agent.run_vm(spec(place))
        (view,) = await client.devices()
        assert (view.name, view.state, view.slot) == ("web/nvme", MediatorState.RUNNING, 30)
        assert view.mediator is not None
        assert view.mediator["connected"]
        assert "belongs to no cluster" in view.obstacles[0]
        # The guest's firmware uses the device between the two questions, and its counters go on.
        alone = await client.device("web/nvme")
        without_counters = {"mediator", "spare"}
        assert alone.model_dump(exclude=without_counters) == view.model_dump(
            exclude=without_counters
        )
        with pytest.raises(NotFound, match="no passed-through device gpu"):
            await client.device("web/gpu")
        living = living_of(newer, "web")
        mediators = [one.pid for one in living.mediators]
        assert view.pid in mediators
        assert set(mediators) <= {view.pid, vm.devices["nvme"].spare_pid}
        assert "mediator" in str(living)
        for refused in (agent.restart_qemu("web"), agent.save_vm("web", place / "web.save")):
            with pytest.raises(StateConflict, match=r"passed-through devices \(nvme\)"):
                await refused
        with pytest.raises(ImageLocked):
            await agent.run_vm(spec(place, "other"))
        assert "other" not in agent.vms
        await vm.kill()
        assert living_of(newer, "web").all == ()
        assert await client.devices() == []


async def test_the_next_agent_finds_the_device_and_tells_when_it_is_gone(
    newer: AgentConfig, place: Path
) -> None:
    keeps = replace(newer, keep_vms=True)
    async with Agent.open(keeps) as agent:
        before = (await agent.run_vm(spec(place))).devices["nvme"].pid
    assert before is not None
    async with Agent.open(keeps) as agent, asked(agent, keeps) as client:
        view = await client.device("web/nvme")
        assert (view.pid, view.state, view.ailment) == (before, MediatorState.RUNNING, "")
        device = agent.vm("web").devices["nvme"]
        await wait_ready(device)
        os.kill(before, signal.SIGKILL)
        await wait_served(device, before)
        view = await client.device("web/nvme")
        assert (view.takeovers, view.ailment) == (1, "")
    async with Agent.open(keeps) as agent, asked(agent, keeps) as client:
        device = agent.vm("web").devices["nvme"]
        await wait_ready(device)
        assert (device.pid, device.takeovers) == (view.pid, 0)
        kill_all(device)
        view = await until_gone(client)
        assert (view.pid, view.state) == (None, None)
        vm = agent.vm("web")
        assert "device web/nvme is gone" in (await client.vm("web")).why
        assert vm.run is not Runstate.CRASHED
    async with Agent.open(newer) as agent, asked(agent, newer) as client:
        view = await client.device("web/nvme")
        assert "gone when the agent here began" in view.ailment
        await agent.vm("web").kill()
        assert living_of(newer, "web").all == ()


async def test_an_older_qemu_and_a_bad_image_leave_nothing_behind(
    config: AgentConfig, newer: AgentConfig, place: Path
) -> None:
    async with Agent.open(config) as agent:
        if not (await agent.host()).features.passes_through:  # the QEMU of this machine
            with pytest.raises(Unavailable, match="cannot hand the device nvme"):
                await agent.run_vm(spec(place))
        assert living_of(config, "web").all == ()
    async with Agent.open(newer) as agent:
        described = spec(place)
        (device,) = described.passthrough
        assert isinstance(device, PassthroughSpec)
        device.image.unlink()
        with pytest.raises(InvalidRequest):
            await agent.run_vm(described)
        assert living_of(newer, "web").all == ()
        assert agent.vms == {}
