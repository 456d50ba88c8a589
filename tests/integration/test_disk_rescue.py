"""A running disk's image, copied or put back to its path; one moment of it, and nothing else."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.disk import rescue
from sempervirt.disk.image import ImageState
from sempervirt.disk.rescue import How
from sempervirt.guest import ProbeClient
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.record import read_vm_record
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Rescuing

Spec = Callable[..., VmSpec]
MIB = 1 << 20
BOOT_S, READY_S = 180.0, 90.0


@pytest.mark.guest
async def test_a_removed_image_under_load_is_copied_as_of_one_moment(
    agent: Agent, guest_spec: Spec, disk_image: Path, place: Path
) -> None:
    vm = await agent.run_vm(guest_spec(serial="own"))
    disk = vm.disks["root"]
    copy = place / "copy.raw"
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
        await probe.wait_hello(deadline_s=BOOT_S)
        await probe.write_start("serial:own", writers=16, span_bytes=8 * MIB)
        await probe.wait_stats(lambda stats: stats.completions > 200)
        os.unlink(disk_image)  # noqa: PTH108
        with pytest.raises(StateConflict, match="is there already"):
            await agent.rescue_disk("web/root", place / "s")
        done = await agent.rescue_disk("web/root", copy)
        assert done.made.size_bytes == 32 * MIB
        assert done.paused_ms is not None
        assert runs(vm) is Runstate.RUNNING
        # The guest has written on since, so that the copy is another state by now.
        before = (await probe.stats()).completions
        await probe.wait_stats(lambda stats: stats.completions > before + 200)
        assert not same(disk.image.require().argument(), copy)
        # Paused by its owner it stays paused, and the copy is the image, byte for byte.
        await vm.pause()
        final = await agent.rescue_disk("web/root", place / "final.raw")
        assert final.paused_ms is None
        assert runs(vm) is Runstate.PAUSED
        assert same(disk.image.require().argument(), place / "final.raw")
        await vm.resume()
        stats = await probe.write_stop()
        assert (stats.io_error_count, stats.hung, stats.wrong.total) == (0, 0, 0), stats
    await vm.kill()
    # What was copied under load is a disk that can be verified: no block is torn or another's.
    again = await agent.run_vm(guest_spec(serial="own", image=str(copy)))
    async with await ProbeClient.connect(again.channel_path("probe"), deadline_s=BOOT_S) as probe:
        await probe.wait_hello(deadline_s=BOOT_S)
        assert len(await probe.read_raw("serial:own", 0, 4096)) == 4096


def inode_of(path: Path) -> int:
    return path.stat().st_ino


def runs(vm: Vm) -> Runstate:
    return vm.run


def same(image: str, copy: Path) -> bool:
    with open(image, "rb") as one, copy.open("rb") as other:  # noqa: PTH123
        return one.read() == other.read()


async def test_a_renamed_image_is_put_back_and_the_guest_does_not_stand_still(
    agent: Agent, firmware_spec: Spec, disk_image: Path, place: Path
) -> None:
    vm = await agent.run_vm(firmware_spec())
    disk = vm.disks["root"]
    inode = inode_of(disk_image)
    os.rename(disk_image, place / "old.raw")  # noqa: PTH104
    await disk.look_at_image()
    finding = disk.image.finding
    assert finding.state is ImageState.REMOVED
    done = await agent.rescue_disk("web/root", disk_image)
    assert (done.made.how, done.paused_ms) == (How.LINKED, None)
    assert inode_of(disk_image) == inode
    assert disk.image.finding.state is ImageState.IN_PLACE


async def test_a_copy_that_fails_leaves_nothing_and_the_guest_runs_on(
    agent: Agent, firmware_spec: Spec, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await agent.run_vm(firmware_spec())

    def full(*_arguments: object) -> rescue.Made:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rescue, "_fill", full)
        with pytest.raises(Unavailable, match="No space left"):
            await agent.rescue_disk("web/root", place / "copy.raw")
    assert vm.run is Runstate.RUNNING
    assert vm.work is None
    assert not [name for name in os.listdir(place) if "copy.raw" in name]  # noqa: PTH208
    await agent.rescue_disk("web/root", place / "copy.raw")


async def test_an_agent_that_is_gone_in_the_middle_leaves_no_guest_paused(
    config: AgentConfig, firmware_spec: Spec, place: Path
) -> None:
    config = replace(config, keep_vms=True)
    async with Agent.open(config) as agent:
        vm = await agent.run_vm(firmware_spec())
        await vm.machine.execute("stop")
        # As if the agent had been killed while it copied: this is what stands on record then.
        vm.begin(Rescuing("root", resume=True))
    record = read_vm_record(config.vm_state_dir("web") / "vm.json")
    assert record is not None
    assert record.work == Rescuing("root", resume=True)
    async with Agent.open(replace(config, keep_vms=False)) as agent:
        await agent.vm("web").wait_state(Runstate.RUNNING, timeout_s=READY_S)
        assert agent.vm("web").work is None


async def test_a_vm_that_is_copied_is_busy_and_its_end_ends_the_copy(
    agent: Agent, firmware_spec: Spec, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await agent.run_vm(firmware_spec())
    moving, looked = rescue._move, threading.Event()

    def held(source: int, sink: int, at: int, length: int) -> int:
        if at:  # the first sector is told of
            looked.wait(READY_S)
        return moving(source, sink, at, min(length, 512))

    # All of it is data, a sector at a time.
    monkeypatch.setattr(rescue, "_move", held)
    monkeypatch.setattr(rescue, "_data", lambda _source, size: iter([(0, size)]))
    monkeypatch.setattr(rescue, "_FICLONE", 0)
    copying = asyncio.ensure_future(agent.rescue_disk("web/root", place / "copy.raw"))
    await vm.machine.changes.wait_until(
        lambda: vm.work is not None, timeout_s=READY_S, what="the copy"
    )
    async with asyncio.timeout(READY_S):
        while True:
            if vm.progress is not None:
                break
            await asyncio.sleep(0.01)  # poll interval
    assert vm.shown[0] is Runstate.PAUSED
    with pytest.raises(StateConflict, match="a copy of its disk root"):
        await agent.resize_disk("web/root", 64 * MIB)
    with pytest.raises(StateConflict, match="busy"):
        await vm.resume()
    ending = asyncio.ensure_future(vm.kill())
    await vm.machine.changes.wait_until(
        lambda: vm.end is not None, timeout_s=READY_S, what="the end of QEMU"
    )
    looked.set()
    await ending
    with pytest.raises((Unavailable, StateConflict)):
        await copying
    assert "copy.raw" not in os.listdir(place)  # noqa: PTH208
