"""The page/block map of a real Linux guest, against a scan of all its memory and its disk."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.open_files import open_files
from sempervirt.agent import Agent, Vm
from sempervirt.disk.driver import Disk
from sempervirt.guest import ProbeClient
from sempervirt.guest.reports import Ran
from sempervirt.qemu.spec import VmSpec

pytestmark = pytest.mark.guest
Spec = Callable[..., VmSpec]

MIB = 1 << 20
PAGE = 4096
BOOT_S = 180.0
READY_S = 90.0
ASSOCIATED, CONTENT = 2, 3


@dataclass
class Exported:
    """The binary form, read as docs/reference/map-format.md draws it."""

    regions: list[tuple[int, ...]]
    pages: list[tuple[int, int, int, int]]
    """Region, state, page, sector."""

    @classmethod
    def parse(cls, data: bytes) -> Exported:
        magic, version, header, total = struct.unpack_from("<8sIIQ", data)
        assert (magic, version, total) == (b"SEMPRMAP", 1, len(data))
        regions, pages, _ = struct.unpack_from("<QQQ", data, 80)
        at = header + regions * 40
        return cls(
            [struct.unpack_from("<QQQQQ", data, header + n * 40) for n in range(regions)],
            [struct.unpack_from("<IIQQ", data, at + n * 48) for n in range(pages)],
        )

    def by_offset(self) -> dict[int, tuple[int, int]]:
        """Offset in the file of the guest's memory -> byte on the disk, state."""
        return {
            self.regions[region][2] + page * PAGE: (sector * 512, state)
            for region, state, page, sector in self.pages
        }


async def exported(disk: Disk) -> Exported:
    return Exported.parse(b"".join([piece async for piece in disk.export_block_map(verify=True)]))


def memory_pages(qemu_pid: int, identity: tuple[int, int]) -> dict[int, bytes]:
    """Every page of the guest's memory that was ever used, by its offset in the memory's file, of
    which device and inode are given.
    """
    held = [
        descriptor
        for descriptor, _, found in open_files(qemu_pid)
        if (found.st_dev, found.st_ino) == identity
    ]
    found = {}
    file = os.open(held[0], os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        start = 0
        while start < size:
            try:
                start = os.lseek(file, start, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing more
                break
            end = os.lseek(file, start, os.SEEK_HOLE)
            for offset in range(start, end, PAGE):
                found[offset] = os.pread(file, PAGE, offset)
            start = end
    finally:
        os.close(file)
    return found


def equal_pages(vm: Vm, image: Path, export: Exported) -> dict[int, bytes]:
    """Pages that equal some block of the disk, by brute force."""
    data = image.read_bytes()
    blocks = {data[at : at + PAGE] for at in range(0, len(data), PAGE)}
    assert vm.pid is not None
    (identity,) = {(region[3], region[4]) for region in export.regions}
    return {at: page for at, page in memory_pages(vm.pid, identity).items() if page in blocks}


async def shell(client: ProbeClient, command: str) -> Ran:
    ran = await client.execute("sh", "-c", command)
    assert ran.status == 0, ran
    return ran


async def test_every_page_that_equals_a_block_is_found(
    agent: Agent, guest_spec: Spec, disk_image: Path
) -> None:
    # No block is zero, and no two are the same.
    disk_image.write_bytes(os.urandom(32 * MIB))  # noqa: ASYNC240
    vm = await agent.run_vm(guest_spec())
    disk = agent.disks["web/root"]
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        # As long as somebody has the device open, its page cache stays.
        await shell(client, "sleep 1000 </dev/vda >/dev/null 2>&1 &")
        await shell(client, "dd if=/dev/vda of=/dev/null bs=64k count=128")
        # Copies of what was read: the device never sees these pages.
        await shell(client, "dd if=/dev/vda of=/tmp-copy bs=1M count=2")
        # Written through the page cache, from pages that no read has filled.
        await shell(client, "dd if=/dev/urandom of=/dev/vda bs=4k seek=4096 count=512 conv=fsync")
        # Read, then changed in the cache only: an association that its content tells wrong.
        await shell(client, "dd if=/dev/urandom of=/dev/vda bs=4k seek=64 count=32 conv=notrunc")
        await vm.pause()
    export = await exported(disk)
    found = export.by_offset()
    expected = equal_pages(vm, disk_image, export)
    image = disk_image.read_bytes()  # noqa: ASYNC240
    for offset, (at, _) in found.items():
        assert expected[offset] == image[at : at + PAGE], f"a wrong pair: {offset:#x} and {at:#x}"
    assert found.keys() == expected.keys()
    states = [state for _, state in found.values()]
    assert states.count(ASSOCIATED) >= 2400, len(states)
    assert states.count(CONTENT) >= 500, len(states)
    stats = await disk.block_map()
    last = stats.verification
    assert last is not None
    assert last.verified_associated + last.verified_content == len(found)
    assert stats.memory.total <= stats.memory.bound

    # The next backend knows which blocks were used, and finds the same pages by content.
    await kill_active(disk)
    await vm.resume()
    await disk.wait_spare_ready(READY_S)
    await vm.pause()
    export = await exported(disk)
    again = export.by_offset()
    assert again.keys() == equal_pages(vm, disk_image, export).keys()
    assert sum(state == CONTENT for _, state in again.values()) >= 2400


async def kill_active(disk: Disk) -> None:
    await disk.wait_spare_ready(READY_S)
    assert disk.active_pid is not None
    count = disk.restart_count
    os.kill(disk.active_pid, signal.SIGKILL)
    await disk.changes.wait_until(
        lambda: disk.restart_count > count, timeout_s=READY_S, what="the take-over"
    )


async def test_a_running_guest_is_verified_with_progress(agent: Agent, guest_spec: Spec) -> None:
    vm = await agent.run_vm(guest_spec(serial="loaded", queues=2))
    disk = agent.disks["web/root"]
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        await client.write_start("serial:loaded", writers=8, span_bytes=8 * MIB)
        await client.wait_stats(lambda stats: stats.completions >= 500)
        await disk.verify_block_map()
        async with asyncio.timeout(BOOT_S):
            while (stats := await disk.block_map()).running is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # poll interval
        assert stats.recorded > 0
        assert stats.verification is not None
        assert stats.verification.pages > 1000
        stopped = await client.write_stop()
    assert stopped.wrong.total == 0
    assert stopped.io_error_count == 0
