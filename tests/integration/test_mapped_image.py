"""The memory-mapped engine where a page cannot be had: the guest gets an error, nobody dies."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from sempervirt.agent import Agent
from sempervirt.disk.driver import Disk
from sempervirt.guest import ProbeClient, ProbeRefused
from sempervirt.qemu.spec import VmSpec

pytestmark = pytest.mark.guest
Spec = Callable[..., VmSpec]

MIB = 1 << 20
BOOT_S = 180.0
READY_S = 90.0
IMAGE_BYTES, ROOM_BYTES = 16 * MIB, 4 * MIB
CHUNK = bytes(range(256)) * 1024
DEVICE = "serial:mapped"


@pytest.fixture
def disk_image(place: Path) -> Iterator[Path]:
    """A sparse image on a tmpfs that has room for a quarter of it (mounting needs root)."""
    folder = place / "full"
    folder.mkdir()
    size = f"size={ROOM_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", folder], check=True, timeout=90)
    try:
        image = folder / "disk.raw"
        image.touch()
        os.truncate(image, IMAGE_BYTES)
        yield image
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, timeout=90)


@pytest.fixture
async def disk(agent: Agent, guest_spec: Spec) -> AsyncIterator[Disk]:
    """The disk of a guest that has booted; no backend of it may have died at the end."""
    await agent.run_vm(guest_spec(serial="mapped", engine="mmap"))
    disk = agent.disks["web/root"]
    await disk.wait_spare_ready(READY_S)
    pids = (disk.active_pid, disk.spare_pid)
    yield disk
    assert (disk.active_pid, disk.spare_pid) == pids
    assert disk.restart_count == 0
    status = await disk.status()
    assert status.engine == "mmap"


@pytest.fixture
async def probe(agent: Agent, disk: Disk) -> AsyncIterator[ProbeClient]:
    """The probe in that guest."""
    path = agent.vms["web"].channel_path("probe")
    async with await ProbeClient.connect(path, deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        yield client


async def fill(probe: ProbeClient) -> int:
    """Writes from the beginning until the guest is told of an error; how much was written."""
    for offset in range(0, IMAGE_BYTES, len(CHUNK)):
        try:
            await probe.write_raw(DEVICE, offset, CHUNK)
        except ProbeRefused:
            return offset
    return IMAGE_BYTES


async def test_a_full_tmpfs_is_an_error_of_the_request(disk: Disk, probe: ProbeClient) -> None:
    written = await fill(probe)
    assert ROOM_BYTES // 2 < written <= ROOM_BYTES
    error = (await disk.status()).last_error
    assert error is not None
    assert (error.op, error.errno) == ("write", errno.ENOSPC)
    # What was written before the end is there, and a hole is still a hole.
    assert await probe.read_raw(DEVICE, 0, len(CHUNK)) == CHUNK
    assert await probe.read_raw(DEVICE, IMAGE_BYTES - 4096, 4096) == bytes(4096)


async def test_a_truncated_image_is_an_error_of_the_request(
    disk: Disk, probe: ProbeClient, disk_image: Path
) -> None:
    await probe.write_raw(DEVICE, 0, CHUNK)
    await probe.write_raw(DEVICE, 2 * MIB, CHUNK)
    assert await probe.read_raw(DEVICE, 2 * MIB, len(CHUNK)) == CHUNK
    os.truncate(disk_image, MIB)
    with pytest.raises(ProbeRefused):
        await probe.read_raw(DEVICE, 2 * MIB, 4096)
    error = (await disk.status()).last_error
    assert error is not None
    assert (error.op, error.errno) == ("read", errno.EIO)
    assert await probe.read_raw(DEVICE, 0, len(CHUNK)) == CHUNK
