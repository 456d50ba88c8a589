"""A disk that grows under its guest, which is told, and one that grew behind everybody's back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sempervirt.agent import Agent
from sempervirt.core.errors import InvalidRequest
from sempervirt.disk.image import ImageState
from sempervirt.guest import ProbeClient
from sempervirt.qemu.spec import VmSpec
from tests.ended import kill_and_see
from tests.integration.test_image_identity import kill_both

pytestmark = pytest.mark.guest
Spec = Callable[..., VmSpec]
MIB, BLOCK = 1 << 20, 4096
READY_S, BOOT_S, TOLD_S = 90.0, 180.0, 90.0


async def size_in_guest(probe: ProbeClient) -> int:
    return next(d.size_bytes for d in await probe.list_devices() if d.serial == "grows")


async def wait_size(probe: ProbeClient, size_bytes: int) -> None:
    async with asyncio.timeout(TOLD_S):
        while True:
            if await size_in_guest(probe) == size_bytes:
                return
            await asyncio.sleep(0.05)  # poll interval


async def test_a_guest_sees_its_disk_grow(agent: Agent, guest_spec: Spec, disk_image: Path) -> None:
    vm = await agent.run_vm(guest_spec(serial="grows"))
    disk = vm.disks["root"]
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
        await probe.wait_hello(deadline_s=BOOT_S)
        await disk.wait_spare_ready(READY_S)
        assert await size_in_guest(probe) == 32 * MIB
        with pytest.raises(InvalidRequest, match="never made smaller"):
            await agent.resize_disk("web/root", 16 * MIB)
        # The control: a file that grows is not told to the guest, but to whoever asks us.
        os.truncate(disk_image, 48 * MIB)
        await disk.look_at_image()
        assert disk.image.finding.state is ImageState.GROWN
        assert await size_in_guest(probe) == 32 * MIB

        done = await agent.resize_disk("web/root", 64 * MIB)
        assert (done.size_bytes, done.told) == (64 * MIB, True)
        assert os.stat(disk_image).st_size == 64 * MIB  # noqa: PTH116
        finding = disk.image.finding
        assert finding.state is ImageState.IN_PLACE
        await wait_size(probe, 64 * MIB)
        end = 64 * MIB - BLOCK
        await probe.write_raw("serial:grows", end, b"E" * BLOCK)

        before = disk.restart_count
        kill_and_see(disk.active_pid)
        assert await probe.read_raw("serial:grows", end, BLOCK) == b"E" * BLOCK
        await disk.changes.wait_until(
            lambda: disk.restart_count > before, timeout_s=READY_S, what="the take-over"
        )
        await kill_both(disk)
        assert await size_in_guest(probe) == 64 * MIB
        assert await probe.read_raw("serial:grows", end, BLOCK) == b"E" * BLOCK
        await probe.reboot(deadline_s=BOOT_S)
        assert await size_in_guest(probe) == 64 * MIB
        assert await probe.read_raw("serial:grows", end, BLOCK) == b"E" * BLOCK

        # Behind our back, and then a take-over: all of it is served, and the guest is told.
        os.truncate(disk_image, 96 * MIB)
        await kill_both(disk)
        await wait_size(probe, 96 * MIB)
        assert (await disk.status()).size_bytes == 96 * MIB
