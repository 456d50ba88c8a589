"""A Linux guest on storage with large sectors, and one whose flush has failed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sempervirt.agent import Agent, Vm
from sempervirt.core.errors import StateConflict
from sempervirt.disk.driver import Disk
from sempervirt.guest import ProbeClient, ProbeRefused
from sempervirt.qemu.spec import VmSpec
from tests.faults import inject_fault

pytestmark = pytest.mark.guest
Spec = Callable[..., VmSpec]

MIB = 1 << 20
BOOT_S = 180.0
READY_S = 90.0
DEVICE = "serial:promises"


@asynccontextmanager
async def booted(vm: Vm) -> AsyncIterator[ProbeClient]:
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        yield client


async def kill_active(disk: Disk) -> None:
    await disk.wait_spare_ready(READY_S)
    pid, count = disk.active_pid, disk.restart_count
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await disk.changes.wait_until(
        lambda: disk.restart_count > count, timeout_s=READY_S, what="the take-over"
    )


async def test_a_failed_flush_stays_one_until_the_vm_was_stopped(
    faulty_agent: Agent, guest_spec: Spec, tmp_path: Path
) -> None:
    spec = guest_spec(serial="promises")
    vm = await faulty_agent.run_vm(spec)
    disk = faulty_agent.disks["web/root"]

    async def flush_fails(client: ProbeClient) -> None:
        with pytest.raises(ProbeRefused, match="errno 5"):
            await client.call("flush", device=DEVICE)

    async with booted(vm) as client:
        await client.call("flush", device=DEVICE)
        await inject_fault(disk, {"op": "flush", "errno": "EIO", "limit": 1})
        await flush_fails(client)
        await flush_fails(client)
        await kill_active(disk)
        await flush_fails(client)
        await client.write_raw(DEVICE, 0, bytes(4096))
        # A reset of the device: QEMU forgets what it keeps for the backend.
        await client.reboot(deadline_s=BOOT_S)
        await kill_active(disk)
        await flush_fails(client)
    status = await disk.status()
    assert status.flush_failed
    assert status.last_error is not None
    assert "until the VM was stopped and started" in status.last_error.message
    with pytest.raises(StateConflict, match="a flush of disk web/root has failed"):
        await faulty_agent.save_vm("web", tmp_path / "web.saved")
    await vm.kill()
    await vm.wait_freed()
    await faulty_agent.forget_vm("web")
    # The control: nothing else is wrong with the disk.
    vm = await faulty_agent.run_vm(spec)
    async with booted(vm) as client:
        await client.call("flush", device=DEVICE)


@pytest.fixture
def large_sectors(disk_image: Path) -> Iterator[Path]:
    """A block device with sectors of 4,096 bytes (needs root)."""
    image = disk_image.with_name("behind.raw")
    image.write_bytes(b"\x77" * (4 * MIB))
    command = ["losetup", "--find", "--show", "--sector-size=4096", str(image)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield Path(name)
    subprocess.run(["losetup", "--detach", name], check=True)


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
async def test_the_guest_has_sectors_of_512_bytes_on_a_device_with_larger_ones(
    agent: Agent, guest_spec: Spec, large_sectors: Path, *, direct: bool
) -> None:
    spec = guest_spec(image=str(large_sectors), serial="promises", direct=direct)
    vm = await agent.run_vm(spec)
    async with booted(vm) as client:
        (device,) = await client.list_devices()
        assert device.block_size == 512
        # As `blkdiscard -o 512` does, and fstrim with blocks of 1 KiB.
        await client.call("discard", device=DEVICE, offset=512, length=512)
        await client.call("discard", device=DEVICE, offset=8192 - 1024, length=8192)
        await client.call("write_zeroes", device=DEVICE, offset=65536 + 512, length=8192)
        await client.write_raw(DEVICE, 512, b"a" * 512)
        expected = bytearray(b"\x77" * (4 * MIB))
        expected[8192 : 8192 + 4096] = bytes(4096)
        expected[65536 + 512 : 65536 + 512 + 8192] = bytes(8192)
        expected[512:1024] = b"a" * 512
        assert await client.read_raw(DEVICE, 0, 131072) == bytes(expected[:131072])
        await client.call("flush", device=DEVICE)
        status = await agent.disks["web/root"].status()
    assert (status.counters.host_errors, status.block_size, status.direct) == (0, 512, direct)
    with large_sectors.open("rb") as device_file:
        assert device_file.read() == bytes(expected)
