"""A standby is booted beside a VM, frozen, and goes on when the first QEMU is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sempervirt.agent import Agent, AgentConfig, Vm
from sempervirt.api.client import Client
from sempervirt.cli.audit import audit
from sempervirt.core.errors import InvalidRequest, StateConflict, Unavailable
from sempervirt.guest import ProbeClient
from sempervirt.guest.errors import ProbeGone, ProbeSilent
from sempervirt.host.places import RUN_VARIABLE, STATE_VARIABLE
from sempervirt.qemu.spec import (
    DiskSpec,
    NicSpec,
    StandbySpec,
    VmSpec,
)
from sempervirt.qemu.state import Runstate
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.first import WatchedFirst
from sempervirt.standby.state import First, Life, Standby, Step
from sempervirt.standby.values import EVERY_MIN_S, Policy, Tier

pytestmark = pytest.mark.guest
Spec = Callable[..., VmSpec]
MIB, BLOCK = 1 << 20, 4096
BOOT_S, READY_S, OVER_S = 180.0, 400.0, 90.0
CHANNEL = "org.sempervirt.probe"
UP = StandbySpec(initialised="channel", channel=CHANNEL, marker="hello")
NEVER_S = 3600.0


@pytest.fixture
def spec(guest_spec: Spec, place: Path) -> VmSpec:
    """A guest with a system disk, a data disk that is handed over, and a network card."""
    data = place / "data.raw"
    data.touch()
    os.truncate(data, 32 * MIB)
    one = guest_spec(serial="root")
    other = DiskSpec(name="data", image=data, serial="data", keep="latest")
    return one.model_copy(
        update={"disks": (*one.disks, other), "nics": (NicSpec(),), "standby": UP}
    )


def there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


async def wait_ready(driver: StandbyDriver, number: int = 1) -> Standby:
    def ready() -> bool:
        state = driver.state
        return bool(state.trouble) or any(one.number >= number for one in state.ready)

    await driver.changes.wait_until(ready, timeout_s=READY_S, what="a standby")
    assert any(one.number >= number for one in driver.state.ready), driver.state.trouble
    return driver.state


async def wait_taken_over(agent: Agent, driver: StandbyDriver, first: Vm) -> Vm:
    """The VM that was a standby."""
    await driver.changes.wait_until(
        lambda: driver.state.past is not None and agent.vms["web"] is not first,
        timeout_s=OVER_S,
        what="the take-over",
    )
    assert driver.state.past is not None
    assert driver.state.past.step is Step.DONE, driver.state.past
    return agent.vms["web"]


async def connected(vm: Vm) -> ProbeClient:
    probe = await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S)
    await probe.wait_hello(deadline_s=BOOT_S)
    return probe


async def wait_device(probe: ProbeClient, serial: str) -> None:
    async with asyncio.timeout(BOOT_S):
        while True:
            if serial in {device.serial for device in await probe.list_devices()}:
                return
            await asyncio.sleep(0.05)  # poll interval


def numbered(row: int) -> bytes:
    return row.to_bytes(8, "little") * (BOOT_ROWS // 8)


BOOT_ROWS = BLOCK


async def write_rows(probe: ProbeClient, acknowledged: list[int]) -> None:
    """Writes one block after the other, until the guest is gone."""
    with contextlib.suppress(ProbeGone, ProbeSilent):
        for row in range(1, 4096):
            await probe.write_raw("serial:data", row * BLOCK, numbered(row))
            acknowledged.append(row)


async def kill_qemu(vm: Vm) -> float:
    assert vm.pid is not None
    os.kill(vm.pid, signal.SIGKILL)
    return time.monotonic()


async def test_a_killed_vm_goes_on_as_its_standby_and_its_data_disk_loses_nothing(
    agent: Agent, spec: VmSpec
) -> None:
    first = await agent.run_vm(spec)
    probe = await connected(first)
    await probe.write_raw("serial:root", 0, b"a" * BLOCK)
    driver = await agent.standbys.enable(first, Policy(NEVER_S, 1, Tier.READY))
    await wait_ready(driver)
    # After the snapshot: the system disk of the standby does not have it, as `show` says.
    await probe.write_raw("serial:root", 0, b"b" * BLOCK)
    acknowledged: list[int] = []
    writing = asyncio.create_task(write_rows(probe, acknowledged))
    async with asyncio.timeout(BOOT_S):
        while True:
            if len(acknowledged) >= 20:
                break
            await asyncio.sleep(0.01)  # poll interval
    uuid = (await first.machine.execute("query-uuid"))["UUID"]
    killed = await kill_qemu(first)
    vm = await wait_taken_over(agent, driver, first)
    assert driver.state.past is not None
    assert time.monotonic() - killed < OVER_S
    await writing
    await probe.close()
    probe = await connected(vm)
    assert (await vm.machine.execute("query-uuid"))["UUID"] == uuid
    assert vm.spec.mac(0) == first.spec.mac(0)
    await wait_device(probe, "data")
    rows = [await probe.read_raw("serial:data", row * BLOCK, BLOCK) for row in acknowledged]
    assert rows == [numbered(row) for row in acknowledged], "an acknowledged write was lost"
    assert await probe.read_raw("serial:root", 0, BLOCK) == b"a" * BLOCK
    # The VM goes on as any other: its disks are served, also by the next backend.
    disk = vm.disks["data"]
    await disk.wait_spare_ready(OVER_S)
    assert disk.active_pid is not None
    os.kill(disk.active_pid, signal.SIGKILL)
    await probe.write_raw("serial:data", 0, b"c" * BLOCK)
    assert await probe.read_raw("serial:data", 0, BLOCK) == b"c" * BLOCK
    await probe.close()


async def test_without_a_standby_nothing_goes_on_and_a_stopped_vm_is_left_alone(
    agent: Agent, spec: VmSpec
) -> None:
    """The negative control of the test above, and of false alarms."""
    first = await agent.run_vm(spec)
    await kill_qemu(first)
    await first.wait_ended(timeout_s=OVER_S)
    assert agent.vms["web"] is first
    first = await agent.run_vm(spec)
    driver = await agent.standbys.enable(first, Policy(NEVER_S, 1, Tier.FILE))
    await wait_ready(driver)
    with pytest.raises(StateConflict, match="runs"):
        await driver.failover(force=False)
    await first.kill()
    assert first.run is Runstate.STOPPED
    await driver.changes.wait_until(
        lambda: driver.state.first.value == "away", timeout_s=OVER_S, what="the end to be seen"
    )
    assert driver.state.take_over is None
    # An operator may say so.
    await driver.failover(force=False)
    vm = agent.vms["web"]
    assert vm is not first
    assert vm.run is Runstate.RUNNING
    await vm.kill()
    with pytest.raises(StateConflict, match="has taken over"):
        await agent.run_vm(spec)
    await agent.standbys.disable("web", forget=True)
    await agent.run_vm(spec)


async def test_what_waits_outlives_the_agent_and_nothing_is_left_once_it_is_disabled(
    spec: VmSpec, place: Path, config: AgentConfig
) -> None:
    keeping = replace(config, keep_vms=True)
    async with Agent.open(keeping) as agent:
        first = await agent.run_vm(spec)
        first.machine.spec = spec.model_copy(update={"standby": None})
        with pytest.raises(InvalidRequest, match="nothing would show"):
            await agent.standbys.enable(first, Policy())
        first.machine.spec = spec
        driver = await agent.standbys.enable(first, Policy(NEVER_S, 1, Tier.READY))
        await wait_ready(driver)
        pid = agent.standbys.kept["web"].generations.vms[1].pid
        roles = {one.pid: one.role for one in audit(config).processes}
        assert roles[pid or 0] == "QEMU of web (standby 1)"
        assert "backend of web (standby 1)/data" in roles.values()
    # Another agent: what waits is the same process, and takes over all the same.
    async with Agent.open(keeping) as agent:
        driver = agent.standbys.require("web")
        assert [one.life for one in driver.state.generations] == [Life.READY]
        first = agent.vms["web"]
        await first.wait_state(Runstate.RUNNING, timeout_s=READY_S)
        # Once it was heard of: an adopted QEMU is no child of this agent, and how it ended nobody
        # tells but its monitor.
        await driver.changes.wait_until(
            lambda: driver.state.first is First.RUNNING, timeout_s=OVER_S, what="it to be heard"
        )
        await kill_qemu(first)
        vm = await wait_taken_over(agent, driver, first)
        assert vm.pid == pid
        probe = await connected(vm)
        await wait_device(probe, "data")
        await probe.close()
    # And another one, which finds the VM that was a standby where it is; its standby is being made.
    async with Agent.open(replace(config, keep_vms=False)) as agent:
        vm = agent.vms["web"]
        assert vm.pid == pid
        await vm.wait_state(Runstate.RUNNING, timeout_s=READY_S)
        async with await ProbeClient.connect(vm.channel_path("probe")) as probe:
            await probe.wait_hello()
            await probe.write_raw("serial:data", 0, b"d" * BLOCK)
        await agent.standbys.disable("web")
        assert vm.run is Runstate.RUNNING
        await vm.kill()
        await agent.standbys.disable("web", forget=True)
        left = sorted(name for name in os.listdir(place) if ".standby-" in name)  # noqa: PTH208
        assert {name.split(".")[2] for name in left} == {"standby-1"}, left
        assert not there(config.run_dir / "standby" / "web")
        assert not there(config.state_dir / "standby" / "web.json")


@pytest.mark.parametrize("tier", [*Tier])
async def test_a_take_over_that_is_called_off_leaves_a_standby_that_takes_over_later(
    spec: VmSpec, config: AgentConfig, monkeypatch: pytest.MonkeyPatch, tier: Tier
) -> None:
    """The guest goes on from the memory that has been loaded once, and from no second boot."""

    async def unproved(_self: object, *, kill: bool, word: str = "") -> None:
        raise Unavailable(f"it may still write {kill} {word}")

    keeping = replace(config, keep_vms=True)
    async with Agent.open(keeping) as agent:
        first = await agent.run_vm(spec)
        driver = await agent.standbys.enable(first, Policy(NEVER_S, 1, tier))
        await wait_ready(driver)
        generations = agent.standbys.kept["web"].generations
        waited = generations.vms[1].pid if tier is Tier.READY else None
        with monkeypatch.context() as patched:
            patched.setattr(WatchedFirst, "fence", unproved)
            asked = asyncio.ensure_future(driver.failover(force=True))
            await driver.changes.wait_until(
                lambda: bool((over := driver.state.take_over) and over.loaded and over.trouble),
                timeout_s=OVER_S,
                what="the state to be loaded",
            )
            loaded = generations.vms[1].pid
            await driver.cancel()
            with pytest.raises(StateConflict, match="called it off"):
                await asked
        assert driver.state.past is not None
        assert any("not spent" in note for note in driver.state.past.notes)
        await driver.changes.wait_until(
            lambda: bool(driver.state.ready), timeout_s=OVER_S, what="it to wait once more"
        )
        assert driver.state.last == 1, "another one was made"
        assert first.run is Runstate.RUNNING
        if tier is Tier.READY:
            assert generations.vms[1].pid not in (waited, loaded)
        else:
            assert 1 not in generations.vms
    async with Agent.open(replace(config, keep_vms=False)) as agent:
        driver = agent.standbys.require("web")
        assert [(one.number, one.life) for one in driver.state.generations] == [(1, Life.READY)]
        first = agent.vms["web"]
        await driver.changes.wait_until(
            lambda: driver.state.first is First.RUNNING, timeout_s=OVER_S, what="it to be heard"
        )
        await driver.failover(force=True)
        vm = agent.vms["web"]
        assert vm is not first
        probe = await connected(vm)
        await wait_device(probe, "data")
        await probe.write_raw("serial:data", 0, b"e" * BLOCK)
        assert await probe.read_raw("serial:data", 0, BLOCK) == b"e" * BLOCK
        await probe.close()


async def test_a_rehearsal_leaves_everything_as_it_is_and_the_take_over_still_works(
    agent: Agent, spec: VmSpec, place: Path
) -> None:
    """The data disk has a layer after the snapshot for the rehearsal, and is handed over so."""
    first = await agent.run_vm(spec)
    probe = await connected(first)
    driver = await agent.standbys.enable(first, Policy(NEVER_S, 1, Tier.READY))
    await wait_ready(driver)
    await probe.write_raw("serial:data", BLOCK, numbered(1))
    before = driver.state
    done = await agent.standbys.rehearse("web")
    assert not done.failure, done
    assert [name for name, _ in done.steps][-1] == "answered"
    assert "the guest uses its disk data" in done.notes, done.notes
    assert driver.state.generations == before.generations
    left = [name for name in os.listdir(place) if ".standby-9" in name]  # noqa: PTH208
    assert not left
    assert await probe.read_raw("serial:data", BLOCK, BLOCK) == numbered(1)
    for row in (2, 3):
        await probe.write_raw("serial:data", row * BLOCK, numbered(row))
    await probe.close()
    await kill_qemu(first)
    vm = await wait_taken_over(agent, driver, first)
    probe = await connected(vm)
    await wait_device(probe, "data")
    for row in (1, 2, 3):
        assert await probe.read_raw("serial:data", row * BLOCK, BLOCK) == numbered(row)
    await probe.close()


async def test_a_refresh_leaves_one_standby_and_a_chain_that_does_not_grow(
    agent: Agent, spec: VmSpec, place: Path, config: AgentConfig
) -> None:
    first = await agent.run_vm(spec)
    driver = await agent.standbys.enable(first, Policy(EVERY_MIN_S, 1, Tier.FILE))
    state = await wait_ready(driver, number=3)
    assert not [note for one in state.generations for note in one.notes]
    driver.set_policy(Policy(NEVER_S, 1, Tier.FILE))
    await driver.changes.wait_until(
        lambda: len(driver.state.generations) == 1, timeout_s=READY_S, what="the older ones to go"
    )
    number = driver.state.generations[0].number
    images = sorted(name for name in os.listdir(place) if ".standby-" in name)  # noqa: PTH208
    assert {name.split(".")[2] for name in images} == {f"standby-{number}"}
    left = os.listdir(config.state_dir / "standby" / "web")  # noqa: PTH208
    assert [name for name in left if name.isdecimal()] == [str(number)]
    disk = first.disks["root"]
    async with asyncio.timeout(READY_S):
        while True:
            layers = await disk.active().layers()
            if len(layers.layers) == 1:
                break
            await asyncio.sleep(0.1)  # poll interval
    assert not layers.pins
    assert layers.last_error is None


async def test_two_take_overs_of_one_snapshot_have_different_generations(
    agent: Agent, spec: VmSpec, place: Path
) -> None:
    """The guest's kernel has no driver for that (Debian 12): what is looked at is the device."""
    first = await agent.run_vm(spec)
    driver = await agent.standbys.enable(first, Policy(NEVER_S, 1, Tier.FILE))
    state = await wait_ready(driver)
    generations, machine = agent.standbys.kept["web"].generations, state.ready[0].machine
    image, kept = place / "disk.raw.standby-1", generations.places(1).state_dir
    shutil.copy(image, place / "copy.raw")
    nonces, ids = [], [(await first.machine.execute("query-vm-generation-id"))["guid"]]
    for number in (11, 12):
        shutil.copytree(kept, generations.places(number).state_dir)
        os.makedirs(generations.places(number).run_dir)  # noqa: PTH103
        shutil.copy(place / "copy.raw", image)
        await generations.load(number, machine, Tier.FILE)
        vm = generations.vms[number]
        ids.append((await vm.machine.execute("query-vm-generation-id"))["guid"])
        await vm.machine.execute("cont")
        probe = await connected(vm)
        nonces.append(probe.nonce)
        await probe.close()
        await generations.remove(number)
    assert nonces[0] == nonces[1], "these are not two guests of one snapshot"
    assert len({*ids}) == 3, ids


async def test_a_guest_that_never_comes_up_is_told_and_leaves_nothing(
    config: AgentConfig,
    semperd: Callable[[], AbstractAsyncContextManager[Any]],
    firmware_spec: Spec,
    place: Path,
) -> None:
    """By the program, as an operator sees it; the VM gets no further than its firmware."""
    up = {"initialised": "console", "marker": "login:", "deadline_s": 1}
    async with semperd(), Client.connect(config.socket) as client:
        await client.run_vm(firmware_spec(standby=up))
        await asked(config, "list")
        status, said = await asked(config, "enable", "web", "--every", "10m", "--wait")
        assert status != 0
        assert '"login:" was not read on the console' in " ".join(said.split()), said
        status, said = await asked(config, "show", "web")
        assert status == 0
        assert "all: no standby is ready" in said
        status, said = await asked(config, "failover", "web")
        assert "no standby of VM web is ready" in " ".join(said.split()), said
        assert status != 0
        status, said = await asked(config, "disable", "web")
        assert status == 0, said
        status, said = await asked(config, "show", "web")
        assert status != 0
        assert "has no standbys" in said
        assert (await client.vm("web")).state is Runstate.RUNNING
        await client.kill_vm("web")
    assert not [name for name in os.listdir(place) if ".standby-" in name]  # noqa: PTH208


async def asked(config: AgentConfig, *words: str) -> tuple[int, str]:
    """The exit status of `semper standby …`, and what it said."""
    program = str(Path(sys.executable).with_name("semper"))
    places = {
        STATE_VARIABLE: str(config.state_dir),
        RUN_VARIABLE: str(config.run_dir),
        "COLUMNS": "200",
    }
    child = await asyncio.create_subprocess_exec(
        program,
        "standby",
        *words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **places},
    )
    said, _ = await child.communicate()
    assert child.returncode is not None
    return child.returncode, said.decode()
