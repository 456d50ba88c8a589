"""Snapshots of a guest's disks while it writes: at one instant, through deaths, merged unseen."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sempervirt.agent import Agent
from sempervirt.core.errors import InvalidRequest, StateConflict
from sempervirt.disk.answers import Layers, LayerState
from sempervirt.disk.driver import Disk
from sempervirt.disk.image_format import ImageFormat
from sempervirt.disk.merging import Merged, has_layers, merge_image
from sempervirt.guest import ProbeClient
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.renewal.snapshot import Consistency, Freezing
from sempervirt.vm import ending

pytestmark = pytest.mark.guest
Spec = Callable[..., VmSpec]
MIB, BLOCK = 1 << 20, 4096
BOOT_S, READY_S, MERGE_S = 180.0, 90.0, 180.0
# Where nobody's writers are.
MARK = 24 * MIB


@pytest.fixture
def spec(guest_spec: Spec, place: Path) -> VmSpec:
    """A guest with two disks."""
    data = place / "data.raw"
    data.touch()
    os.truncate(data, 32 * MIB)
    one = guest_spec(serial="root")
    other = DiskSpec(name="data", image=data, serial="data")
    return one.model_copy(update={"disks": (*one.disks, other)})


async def kill_active(disk: Disk) -> None:
    """Returns when the disk is guarded again."""
    await disk.wait_spare_ready(READY_S)
    pid, before = disk.active_pid, disk.restart_count
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await disk.changes.wait_until(
        lambda: disk.restart_count > before, timeout_s=READY_S, what="the take-over"
    )
    await disk.wait_spare_ready(READY_S)


async def merge(disk: Disk, through: int) -> Layers:
    """The layers, when the merge is over."""
    merging = set((await disk.active().merge(through, None)).merging)
    assert merging
    async with asyncio.timeout(MERGE_S):
        while True:
            layers = await disk.active().layers()
            assert layers.last_error is None
            if not merging.intersection(layer.id for layer in layers.layers):
                return layers
            await asyncio.sleep(0.05)  # poll interval


async def test_a_guest_writes_on_through_snapshots_deaths_and_merges(
    agent: Agent, spec: VmSpec
) -> None:
    vm = await agent.run_vm(spec)
    names = ("root", "data")
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
        await probe.wait_hello(deadline_s=BOOT_S)
        for name in names:
            await probe.write_raw(f"serial:{name}", MARK, b"1" * BLOCK)
            await probe.write_start(f"serial:{name}", writers=4, span_bytes=8 * MIB, flush_every=16)
        for number in (1, 2, 3):
            done = await agent.snapshot_vm("web", [], Freezing.AUTO)
            assert [(one.disk, one.snapshot) for one in done.disks] == [
                ("web/root", number),
                ("web/data", number),
            ]
            assert done.consistency is Consistency.CRASH
            for name in names:
                await probe.write_raw(f"serial:{name}", MARK + number * BLOCK, b"x" * BLOCK)
                layers = await vm.disks[name].active().layers()
                assert layers.state_of(number) is LayerState.SEALED
                assert [layer.id for layer in layers.layers if layer.writes] == [number]
            await asyncio.gather(*(kill_active(vm.disks[name]) for name in names))
        for name in names:
            layers = await merge(vm.disks[name], through=2)
            assert [layer.id for layer in layers.layers] == [3], layers
        for name in names:
            stats = await probe.write_stop(device=f"serial:{name}")
            assert stats.writes > 0
            assert stats.is_clean, stats
            assert await probe.read_raw(f"serial:{name}", MARK, BLOCK) == b"1" * BLOCK
    # The layer that is left belongs to the image, for the next run as well.
    await vm.kill()
    vm = await agent.run_vm(spec)
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
        await probe.wait_hello(deadline_s=BOOT_S)
        for name in names:
            for number in (1, 2, 3):
                there = await probe.read_raw(f"serial:{name}", MARK + number * BLOCK, BLOCK)
                assert there == b"x" * BLOCK, (name, number)


async def test_a_snapshot_is_exported_as_it_was_while_the_guest_writes_on(
    agent: Agent, guest_spec: Spec, place: Path
) -> None:
    vm = await agent.run_vm(guest_spec(serial="root"))
    disk = vm.disks["root"]
    blocks = {0: b"a", 5 * MIB: b"b", MARK: b"c", 32 * MIB - BLOCK: b"d"}
    raw, qcow2 = place / "one.raw", place / "one.qcow2"
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
        await probe.wait_hello(deadline_s=BOOT_S)
        for at, byte in blocks.items():
            await probe.write_raw("serial:root", at, byte * BLOCK)
        await agent.snapshot_vm("web", ["root"], Freezing.NEVER)
        # In the second there are zeros where the first had data, and data in a layer.
        await probe.call("write_zeroes", device="serial:root", offset=MARK, length=BLOCK)
        await probe.write_raw("serial:root", 5 * MIB, b"B" * BLOCK)
        await agent.snapshot_vm("web", ["root"], Freezing.NEVER)
        for at in blocks:
            await probe.write_raw("serial:root", at, b"later" + bytes(BLOCK - 5))
        await agent.export_snapshot("web/root", 1, raw, ImageFormat.RAW)
        made = await agent.export_snapshot("web/root", 2, qcow2, ImageFormat.QCOW2)
        assert made.data_bytes == 3 * BLOCK
        with pytest.raises(StateConflict, match="is there already"):
            await agent.export_snapshot("web/root", 1, raw, ImageFormat.RAW)
        with pytest.raises(InvalidRequest, match="has no snapshot 7") as raised:
            await agent.export_snapshot("web/root", 7, place / "seven", ImageFormat.RAW)
        assert raised.value.remedy == "there are: 1, 2"
        layers = await disk.active().layers()
        assert not layers.pins
    expected = bytearray(32 * MIB)
    for at, byte in blocks.items():
        expected[at : at + BLOCK] = byte * BLOCK
    assert raw.read_bytes() == expected
    assert raw.stat().st_blocks * 512 <= 64 * BLOCK
    expected[MARK : MARK + BLOCK] = bytes(BLOCK)
    expected[5 * MIB : 5 * MIB + BLOCK] = b"B" * BLOCK
    other = place / "two.raw"
    convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(other)]
    subprocess.run(convert, check=True)  # noqa: ASYNC221
    assert other.read_bytes() == expected
    assert sorted(os.listdir(place)) == [  # noqa: PTH208
        "disk.raw", "disk.raw.epoch", "disk.raw.layers", "one.qcow2", "one.raw", "r", "s", "two.raw"
    ]  # fmt: skip


async def test_a_chain_is_full_and_a_qemu_without_us_is_kept_from_an_image_with_layers(
    agent: Agent, firmware_spec: Spec
) -> None:
    vm = await agent.run_vm(firmware_spec())
    for _ in range(4):
        await agent.snapshot_vm("web", [], Freezing.NEVER)
    with pytest.raises(StateConflict, match="web/root"):
        await agent.snapshot_vm("web", [], Freezing.NEVER)
    # The control: room is made, and the next one is taken.
    disk = vm.disks["root"]
    assert len((await merge(disk, through=3)).layers) == 1
    await agent.snapshot_vm("web", ["root"], Freezing.NEVER)
    await vm.kill()
    own = [{"name": "root", "image": str(vm.spec.disks[0].image), "backend": "qemu"}]
    own_spec = VmSpec.model_validate({"name": "own", "memory": "64M", "disks": own})
    with pytest.raises(StateConflict, match="layers"):
        await agent.run_vm(own_spec)


async def layered(agent: Agent, spec: VmSpec, *, snapshots: str) -> tuple[Path, VmSpec]:
    """A VM that has ended after two snapshots, with its image, and one that QEMU would serve."""
    disk = spec.disks[0].model_copy(update={"snapshots": snapshots})
    vm = await agent.run_vm(spec.model_copy(update={"disks": (disk,)}))
    for _ in range(2):
        await agent.snapshot_vm("web", [], Freezing.NEVER)
    await vm.kill()
    own = [{"name": "root", "image": str(disk.image), "backend": "qemu"}]
    return disk.image, VmSpec.model_validate({"name": "own", "memory": "64M", "disks": own})


async def test_layers_of_an_ended_vm_go_into_the_image_on_request(
    agent: Agent, firmware_spec: Spec
) -> None:
    image, own_spec = await layered(agent, firmware_spec(), snapshots="keep")
    assert has_layers(image)
    assert await agent.merge_layers("web/root", None, None) == ((), True)
    assert await agent.merge_layers("web/root", 1, None) == ((1,), True)
    with pytest.raises(StateConflict, match="layers"):
        await agent.run_vm(own_spec)
    assert await agent.merge_layers("web/root", 2, None) == ((2,), True)
    await (await agent.run_vm(own_spec)).kill()
    # It has snapshots again, with numbers of their own.
    vm = await agent.run_vm(firmware_spec())
    taken = await agent.snapshot_vm("web", [], Freezing.NEVER)
    assert [one.snapshot for one in taken.disks] == [3]
    await vm.kill()


async def test_layers_are_merged_at_the_end_of_a_vm_whose_file_says_so(
    agent: Agent, firmware_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, own_spec = await layered(agent, firmware_spec(), snapshots="merge")
    assert agent.vm("web").work is None
    own = await agent.run_vm(own_spec)
    await own.kill()

    # The control: somebody has the image, so the layers stay, are told of, and go later.
    async def locked(*arguments: Any) -> Merged:
        with image.open("r+b") as file:
            lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
            return await merge_image(*arguments)

    monkeypatch.setattr(ending, "merge_image", locked)
    monkeypatch.setattr(ending, "LOCK_PATIENCE_S", 0.0)
    await layered(agent, firmware_spec(), snapshots="merge")
    messages = [event.message for event in agent.vm("web").machine.journal.events]
    assert any("merge them later" in message for message in messages), messages
    with pytest.raises(StateConflict, match="layers"):
        await agent.run_vm(own_spec)
    monkeypatch.setattr(ending, "merge_image", merge_image)
    merged, done = await agent.merge_layers("web/root", 99, None)
    assert done
    assert len(merged) == 2


async def test_programs_that_know_no_layers_are_kept_from_a_disk_that_is_served(
    agent: Agent, firmware_spec: Spec
) -> None:
    vm = await agent.run_vm(firmware_spec())
    await agent.snapshot_vm("web", [], Freezing.NEVER)
    image = str(vm.spec.disks[0].image)
    qemu = (await agent.host()).qemu
    drive = ["-drive", f"file={image},format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d"]
    strangers = [
        ["qemu-img", "convert", "-f", "raw", "-O", "raw", image, f"{image}.copy"],
        ["qemu-io", "-f", "raw", "-c", "write 0 512", image],
        [qemu, "-M", "q35", "-accel", "tcg", "-display", "none", "-S", "-nodefaults", *drive],
    ]

    def said(argv: list[str]) -> tuple[int, str]:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=READY_S, check=False)
        return done.returncode, done.stderr

    for argv in strangers:
        code, words = await asyncio.to_thread(said, argv)
        assert code != 0, argv
        assert "lock" in words, words
    await vm.kill()
    await agent.merge_layers("web/root", 1, None)
    # The control: an image without layers that nobody serves is theirs.
    for argv in strangers[:2]:
        assert await asyncio.to_thread(said, argv) == (0, ""), argv
