"""A VM that does not start leaves nothing behind, at whatever step it fails or is given up."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.guest import FIRMWARE, FIRMWARE_VARS
from lab.open_files import open_files
from sempervirt.agent import Agent, AgentConfig
from sempervirt.core.errors import (
    CommandFailed,
    InvalidRequest,
    OutcomeUnknown,
    RollbackFailed,
    StateConflict,
    Unavailable,
)
from sempervirt.disk import lifecycle
from sempervirt.disk.driver import Disk
from sempervirt.disk.setup import DiskSetup
from sempervirt.host.procfs import find_by_argument
from sempervirt.qemu import command_line
from sempervirt.qemu.driver import Machine
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.store.registry import Claim
from sempervirt.vm import claims, launch
from sempervirt.vm.record import VmRecord

Spec = Callable[..., VmSpec]

READY_S = 90.0
CLAIM = Claim("web", "a", 7, "c" * 32)


class Store:
    """What was claimed and released; no store."""

    def __init__(self) -> None:
        self.claimed = 0
        self.released = 0
        self.silent = False
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()

    async def take(self, *_arguments: Any) -> Claim | None:
        self.asked.set()
        if self.silent:
            raise OutcomeUnknown("the store does not answer")
        await self.answers.wait()
        self.claimed += 1
        return CLAIM

    async def release(self, *_arguments: Any) -> bool:
        self.released += 1
        return True


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Claims that no backend is told of."""
    store = Store()
    monkeypatch.setattr(claims, "take", store.take)
    monkeypatch.setattr(claims, "release", store.release)
    monkeypatch.setattr(claims, "title_of", lambda *_arguments: None)
    yield store
    assert store.released == store.claimed, "a claim was left behind"


def nothing_is_left(agent: Agent) -> None:
    config = agent.config
    assert not agent.disks
    assert not (config.vm_state_dir("web") / "vm.json").exists()
    assert not find_by_argument(re.compile(rf".*{re.escape(str(config.run_dir))}/.*"), of_all=True)


@pytest.mark.parametrize("step", ["first record", "claim", "claim on record", "disk", "QEMU"])
async def test_what_fails_undoes_all_before_it(
    agent: Agent,
    firmware_spec: Spec,
    monkeypatch: pytest.MonkeyPatch,
    store: Store,
    step: str,
) -> None:
    real, writes = VmRecord.write, {"first record": 1, "claim on record": 2}

    def write(record: VmRecord, path: Path) -> None:
        writes[step] = writes.get(step, 0) - 1
        if writes[step] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(record, path)

    def fail(*_arguments: Any) -> Machine:
        raise CommandFailed("qemu", 127, ["struck"])

    async def fail_too(*_arguments: Any) -> Disk:
        raise Unavailable("struck")

    monkeypatch.setattr(VmRecord, "write", write)
    store.silent = step == "claim"
    if step == "disk":
        monkeypatch.setattr(launch, "start_disk", fail_too)
    if step == "QEMU":
        monkeypatch.setattr(Machine, "launch", fail)
    expected = OutcomeUnknown if step == "claim" else Unavailable
    with pytest.raises(expected):
        await agent.run_vm(firmware_spec())
    nothing_is_left(agent)
    monkeypatch.setattr(VmRecord, "write", real)
    store.silent = False
    if step not in ("disk", "QEMU"):
        await (await agent.run_vm(firmware_spec())).kill()


async def test_the_quoted_log_is_of_this_run(agent: Agent, firmware_spec: Spec) -> None:
    """The first run leaves an error in the logs of QEMU and of the backend; the second VM of that
    name is killed, and what is told of its end quotes nothing of the first.
    """
    broken = firmware_spec(cpu="no-such-model")
    with pytest.raises(Unavailable, match="no-such-model"):
        await agent.run_vm(broken)
    vm = await agent.run_vm(firmware_spec())
    old = agent.config.vm_run_dir("web") / "disk-root-1.log"
    assert old.read_text().count("semper-blkd started") == 2
    assert vm.pid is not None
    os.kill(vm.pid, signal.SIGKILL)
    await vm.wait_ended(READY_S)
    assert vm.run is Runstate.CRASHED
    assert not any("no-such-model" in line for line in vm.log_tail())
    assert "no-such-model" in vm.machine.files.log.read_text()


@pytest.mark.parametrize("machine", ["q35", "pc"])
async def test_as_many_devices_as_the_machine_has_slots(
    agent: Agent,
    firmware_spec: Spec,
    disk_image: Path,
    machine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """29 disks beside the generator of random numbers run; with one more QEMU itself gives up,
    which nobody sees because that is refused before.
    """
    disk = {"image": str(disk_image), "backend": "qemu", "read_only": True, "queues": 1}
    disks = [{"name": f"d{index}", **disk} for index in range(30)]
    vm = await agent.run_vm(firmware_spec(machine=machine, disks=disks[:29]))
    assert vm.run is Runstate.RUNNING
    await vm.kill()
    with pytest.raises(InvalidRequest, match="30 disks and 0 network cards; 29 fit"):
        await agent.run_vm(firmware_spec(machine=machine, disks=disks))
    monkeypatch.setattr(command_line, "PCI_SLOTS", 31)
    with pytest.raises(Unavailable, match="no slot/function available"):
        await agent.run_vm(firmware_spec(machine=machine, disks=disks))


async def wait_nothing_is_left(agent: Agent) -> None:
    async with asyncio.timeout(READY_S):
        while (agent.config.vm_state_dir("web") / "vm.json").exists():  # noqa: ASYNC110 a file
            await asyncio.sleep(0.01)  # poll interval
    nothing_is_left(agent)


async def test_a_claim_that_nobody_waits_for_any_more_is_released(
    agent: Agent, firmware_spec: Spec, store: Store
) -> None:
    store.answers.clear()
    run = asyncio.create_task(agent.run_vm(firmware_spec()))
    await asyncio.wait_for(store.asked.wait(), READY_S)
    run.cancel()
    store.answers.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    await wait_nothing_is_left(agent)
    assert store.claimed == 1


async def test_a_request_that_is_cancelled_twice_undoes_all(
    agent: Agent, firmware_spec: Spec, monkeypatch: pytest.MonkeyPatch, store: Store, place: Path
) -> None:
    """The second time while all is being undone."""
    other = place / "other.raw"
    other.write_bytes(bytes(1 << 20))
    spec = firmware_spec()
    second = spec.disks[0].model_copy(update={"name": "other", "image": other})
    spec = spec.model_copy(update={"disks": (spec.disks[0], second)})
    starts, stops, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
    real_start, real_stop = lifecycle.start_disk, Disk.stop

    async def start_disk(setup: DiskSetup) -> Disk:
        if setup.short_name == "other":
            starts.set()
            await asyncio.Event().wait()
        return await real_start(setup)

    async def stop(disk: Disk) -> None:
        stops.set()
        await go.wait()
        await real_stop(disk)

    monkeypatch.setattr(launch, "start_disk", start_disk)
    monkeypatch.setattr(Disk, "stop", stop)
    run = asyncio.create_task(agent.run_vm(spec))
    await asyncio.wait_for(starts.wait(), READY_S)
    run.cancel()
    await asyncio.wait_for(stops.wait(), READY_S)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    go.set()
    await wait_nothing_is_left(agent)


async def test_a_backend_that_does_not_end_keeps_the_name(
    config: AgentConfig, firmware_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop(disk: Disk) -> None:
        await disk.detach()
        raise OutcomeUnknown(f"disk {disk.name}: the backend does not end")

    def fail(*_arguments: Any) -> Machine:
        raise CommandFailed("qemu", 127, ["struck"])

    async with Agent.open(config) as agent:
        with monkeypatch.context() as patch:
            patch.setattr(Disk, "stop", stop)
            patch.setattr(Machine, "launch", fail)
            with pytest.raises(RollbackFailed, match="something of it may still run"):
                await agent.run_vm(firmware_spec())
        with pytest.raises(StateConflict, match="the backend does not end"):
            await agent.run_vm(firmware_spec())
    async with Agent.open(config) as agent:  # it has ended, and the next agent clears it up
        await agent.vm("web").wait_ended(READY_S)
        assert (await agent.run_vm(firmware_spec())).run is Runstate.RUNNING


def opened_by(pid: int | None) -> set[str]:
    return {name for _, name, _ in open_files(pid)}


async def wait_content(file: Path, wanted: Callable[[bytes], bool]) -> None:
    async with asyncio.timeout(READY_S):
        while not wanted(file.read_bytes()):  # noqa: ASYNC110, ASYNC240 a small file
            await asyncio.sleep(0.05)  # poll interval


def is_written_further(flash: bytes, before: bytes) -> bool:
    """Whether it is what it was before, but for bits that were cleared since, not many of them."""
    now, then = int.from_bytes(flash, "big"), int.from_bytes(before, "big")
    few = (now ^ then).bit_count() < len(before)
    return len(flash) == len(before) and now & then == now and few


async def test_a_firmware_keeps_its_variables(
    config: AgentConfig, firmware_spec: Spec, place: Path
) -> None:
    """They go along with a restart of QEMU, a saved state, and into the next run: the template,
    which stays as it is, is the control. When the VM is taken off the list they go.
    """
    template, own = FIRMWARE_VARS.read_bytes(), config.state_dir / "firmware/web.fd"
    file = place / "vars template.fd"
    file.write_bytes(template)
    spec = firmware_spec(firmware=str(FIRMWARE), firmware_vars=str(file))
    async with Agent.open(config) as agent:
        vm = await agent.run_vm(spec)
        await wait_content(own, lambda content: content != template)
        await agent.restart_qemu("web")
        assert str(own) in opened_by(vm.pid), "the new QEMU writes to the same file"
        await agent.save_vm("web", place / "web.saved")
        written = own.read_bytes()
        assert written != template
        own.unlink()
        restored = await agent.restore_vm(place / "web.saved")
        # The firmware goes on, so its flash may be written further: bits go from 1 to 0 there.
        await wait_content(own, lambda content: is_written_further(content, written))
        assert not is_written_further(template, written)
        assert not is_written_further(bytes(len(written)), written)
        await restored.kill()
        await agent.remove_vm("web")
        assert not own.exists()
        own.write_bytes(written)
        file.write_bytes(bytes(100))
        with pytest.raises(InvalidRequest, match=r"have 540672 bytes and their template .* 100\b"):
            await agent.run_vm(spec)
        file.unlink()
        with pytest.raises(InvalidRequest, match=r"vars template\.fd cannot be read"):
            await agent.run_vm(spec)
        assert own.read_bytes() == written
