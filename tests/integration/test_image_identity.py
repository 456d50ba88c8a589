"""A disk is the file that it was when its VM started, whatever its path leads to later."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lab.open_files import open_files
from sempervirt.agent import Agent, AgentConfig
from sempervirt.core.errors import StateConflict
from sempervirt.disk.backend import Blkd, DiskOptions, Launch
from sempervirt.disk.driver import Disk
from sempervirt.disk.image import ImageState, identity_at
from sempervirt.disk.lifecycle import adopt_disk, start_disk
from sempervirt.disk.record import read_disk_record
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.state import Condition, Policy
from sempervirt.disk.volume import inspect
from sempervirt.guest import ProbeClient
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.vm import Vm
from tests.ended import kill_and_see

Spec = Callable[..., VmSpec]
MIB, BLOCK = 1 << 20, 4096
READY_S, BOOT_S = 90.0, 180.0
OURS, OTHERS = b"A" * BLOCK, b"B" * BLOCK


class ByPath(Blkd):
    """As it was: every backend opens what is at the path by then. The control of these tests."""

    def argv(self, launch: Launch) -> list[str]:
        return super().argv(replace(launch, image_fd=None))


def state_of(disk: Disk) -> ImageState:
    return disk.image.finding.state


def fill(path: Path, block: bytes) -> None:
    path.write_bytes(block * (32 * MIB // BLOCK))


def kill(disk: Disk) -> None:
    """The spare first, so that it does not take over in between."""
    kill_and_see(disk.spare_pid, disk.active_pid)


async def kill_both(disk: Disk) -> None:
    await disk.wait_spare_ready(READY_S)
    killed = {disk.spare_pid, disk.active_pid}
    kill(disk)
    await disk.changes.wait_until(
        lambda: (
            disk.condition is Condition.GUARDED
            and not killed.intersection({disk.spare_pid, disk.active_pid})
        ),
        timeout_s=READY_S,
        what="new backends",
    )


@dataclass
class Guest:
    """A guest that reads and writes its disk, and the agent of the moment."""

    vm: Vm
    probe: ProbeClient

    @property
    def disk(self) -> Disk:
        return self.vm.disks["root"]

    async def reads(self) -> set[bytes]:
        """What is found at the disk's begin, in its middle and at its end."""
        offsets = (0, 16 * MIB, 32 * MIB - BLOCK)
        return {await self.probe.read_raw("serial:own", offset, BLOCK) for offset in offsets}


@asynccontextmanager
async def guest_of(vm: Vm) -> AsyncIterator[Guest]:
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
        await probe.wait_hello(deadline_s=BOOT_S)
        yield Guest(vm, probe)


@pytest.mark.guest
async def test_another_file_at_the_path_is_never_served(
    config: AgentConfig, guest_spec: Spec, disk_image: Path, place: Path
) -> None:
    fill(disk_image, OURS)
    fill(place / "new.raw", OTHERS)
    config = replace(config, keep_vms=True)
    async with Agent.open(config) as agent:
        vm = await agent.run_vm(guest_spec(serial="own"))
        async with guest_of(vm) as guest:
            disk = guest.disk
            await disk.wait_spare_ready(READY_S)
            (place / "new.raw").rename(disk_image)
            await disk.look_at_image()
            assert state_of(disk) is ImageState.REPLACED
            assert "semper disk rescue web/root" in disk.image.finding.remedy
            await disk.upgrade()
            assert await guest.reads() == {OURS}
            await kill_both(disk)
            assert await guest.reads() == {OURS}
            await guest.probe.write_raw("serial:own", MIB, b"C" * BLOCK)
            # A host or a QEMU that goes on with this VM would open the path.
            with pytest.raises(StateConflict, match="leads to another file"):
                await agent.save_vm("web", place / "saved")
    # The next agent finds the image where it still is: open in the backends.
    async with Agent.open(replace(config, keep_vms=False)) as agent:
        async with guest_of_adopted(agent) as guest:
            await guest.disk.wait_spare_ready(READY_S)
            assert state_of(guest.disk) is ImageState.REPLACED
            await kill_both(guest.disk)
            assert await guest.reads() == {OURS}
            assert await guest.probe.read_raw("serial:own", MIB, BLOCK) == b"C" * BLOCK
        assert set(blocks(disk_image)) == {OTHERS}
        await agent.vm("web").kill()
        # A start has what is at the path, as ever.
        again = await agent.run_vm(guest_spec(serial="own"))
        async with guest_of(again) as guest:
            assert await guest.reads() == {OTHERS}
            assert state_of(guest.disk) is ImageState.IN_PLACE


def blocks(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]


@asynccontextmanager
async def guest_of_adopted(agent: Agent) -> AsyncIterator[Guest]:
    """The probe of a guest that runs already: it greets nobody."""
    vm = agent.vm("web")
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
        yield Guest(vm, probe)


@pytest.mark.guest
async def test_control_backends_that_open_the_path_serve_another_file(
    config: AgentConfig, guest_spec: Spec, disk_image: Path, place: Path
) -> None:
    fill(disk_image, OURS)
    fill(place / "new.raw", OTHERS)
    async with Agent.open(replace(config, backend=ByPath())) as agent:
        vm = await agent.run_vm(guest_spec(serial="own"))
        async with guest_of(vm) as guest:
            await guest.disk.wait_spare_ready(READY_S)
            (place / "new.raw").rename(disk_image)
            kill(guest.disk)
            assert await guest.reads() == {OTHERS}


# Without a guest: what the agent finds again.


@pytest.fixture
def setup(place: Path, disk_image: Path) -> DiskSetup:
    return DiskSetup(
        name="web/root",
        volume=inspect(disk_image, read_only=False),
        options=DiskOptions(disk_image),
        command=Blkd(),
        policy=Policy(),
        files=DiskFiles(place, "root"),
        record=place / "disk.json",
    )


def served(disk: Disk) -> set[int]:
    """The inodes of the images that the backends have open."""
    return {
        found.st_ino
        for pid in (disk.active_pid, disk.spare_pid)
        for _, name, found in open_files(pid)
        if ".raw" in name
    }


async def test_a_renamed_image_is_found_when_nobody_has_it_open(setup: DiskSetup) -> None:
    image = setup.options.image
    mine = image.stat().st_ino
    disk = await start_disk(setup)
    await disk.wait_spare_ready(READY_S)
    record = read_disk_record(setup.record)
    assert record is not None
    assert record.image == identity_at(image)
    await disk.detach()
    image.rename(image.with_name("old.raw"))
    fill(image, OTHERS)
    kill_recorded(setup)
    disk = await adopt_disk(setup)
    try:
        await disk.wait_spare_ready(READY_S)
        assert served(disk) == {mine}
        await disk.look_at_image()
        finding = disk.image.finding
        assert finding.state is ImageState.REPLACED
        assert finding.remedy.endswith(f"mv {image.with_name('old.raw')} {image}")
    finally:
        await disk.stop()


def kill_recorded(setup: DiskSetup) -> None:
    record = read_disk_record(setup.record)
    assert record is not None
    kill_and_see(*(process.identity.pid for process in reversed(record.processes)))


async def test_an_image_that_is_gone_is_told_and_nothing_is_served_in_its_place(
    setup: DiskSetup, place: Path
) -> None:
    image = setup.options.image
    aside = place / "aside"
    aside.mkdir()
    disk = await start_disk(setup)
    await disk.wait_spare_ready(READY_S)
    await disk.detach()
    mine = image.stat().st_ino
    image.rename(aside / "d.raw")
    fill(image, OTHERS)
    kill_recorded(setup)
    disk = await adopt_disk(setup)
    try:
        assert state_of(disk) is ImageState.GONE
        await disk.changes.wait_until(
            lambda: "nothing is served from another file" in disk.reason,
            timeout_s=READY_S,
            what="the reason",
        )
        assert disk.active_pid is None
        (aside / "d.raw").rename(image)
        await disk.look_at_image()
        await disk.wait_spare_ready(READY_S)
        assert served(disk) == {mine}
        assert state_of(disk) is ImageState.IN_PLACE
    finally:
        await disk.stop()


async def test_an_inode_that_is_used_again_is_not_the_image(setup: DiskSetup) -> None:
    image = setup.options.image
    disk = await start_disk(setup)
    await disk.wait_spare_ready(READY_S)
    record = read_disk_record(setup.record)
    await disk.detach()
    kill_recorded(setup)
    image.unlink()
    fill(image, OTHERS)
    assert record is not None
    assert record.image is not None
    # As if the file system had given the number to the new file.
    again = replace(record.image, inode=image.stat().st_ino)
    replace(record, image=again).write(setup.record)
    assert again.birth_ns > 0
    disk = await adopt_disk(setup)
    try:
        assert state_of(disk) is ImageState.GONE
        # The control: without the time of birth it would be taken for the image.
        assert replace(again, birth_ns=0).is_of(identity_at(image))
    finally:
        await disk.stop()


async def test_a_record_without_an_image_gets_it_from_the_backend(setup: DiskSetup) -> None:
    image = setup.options.image
    mine = image.stat().st_ino
    disk = await start_disk(setup)
    await disk.wait_spare_ready(READY_S)
    await disk.detach()
    record = read_disk_record(setup.record)
    assert record is not None
    replace(record, image=None).write(setup.record)
    image.rename(image.with_name("old.raw"))
    fill(image, OTHERS)
    disk = await adopt_disk(setup)
    try:
        await kill_both(disk)
        assert served(disk) == {mine}
    finally:
        await disk.stop()


async def test_an_image_of_another_size_is_told(setup: DiskSetup) -> None:
    image = setup.options.image
    disk = await start_disk(setup)
    try:
        await disk.wait_spare_ready(READY_S)
        os.truncate(image, 64 * MIB)
        await disk.look_at_image()
        assert state_of(disk) is ImageState.GROWN
        assert f"semper disk resize web/root {64 * MIB}" in disk.image.finding.remedy
        os.truncate(image, 16 * MIB)
        await disk.look_at_image()
        assert state_of(disk) is ImageState.SHRUNK
        assert f"truncate --size={32 * MIB}" in disk.image.finding.remedy
        os.truncate(image, 32 * MIB)
        await disk.look_at_image()
        assert state_of(disk) is ImageState.IN_PLACE
        image.unlink()
        await disk.look_at_image()
        assert state_of(disk) is ImageState.REMOVED
        await asyncio.sleep(0)
        assert [event.message for event in disk.journal.events if event.kind == "image"][-1] == str(
            disk.image.finding
        )
    finally:
        await disk.stop()
