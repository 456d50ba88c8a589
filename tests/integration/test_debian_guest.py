"""A Debian with systemd, its root and another disk served by blkd, through the death of both."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from sempervirt.agent import Agent, Vm
from sempervirt.disk.image_format import ImageFormat
from sempervirt.guest import ProbeClient, ProbeGone, ProbeSilent, debian
from sempervirt.guest.reports import Ran
from sempervirt.host.programs import find_program
from sempervirt.qemu.guest_agent import GuestAgent
from sempervirt.qemu.spec import GUEST_AGENT_CHANNEL, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.renewal.snapshot import Consistency, Freezing

pytestmark = pytest.mark.guest
MIB = 1 << 20
BOOT_S = 240.0
OFF_S = 120.0
READY_S = 90.0
ADDRESS = "10.0.2.77"
# What systemd is given of the network: the first card by hand, the second by DHCP.
STATIC = f"ip={ADDRESS}::10.0.2.2:255.255.255.0::eth0:none"
# Writes through the file system, and reads back what the disk has.
COPY = (
    "/usr/bin/tar -C /usr/sbin -cf /var/tmp/copy.tar . && sync && echo 3 >/proc/sys/vm/drop_caches"
)
COMPARE = "/usr/bin/tar -C /usr/sbin --compare -f /var/tmp/copy.tar"


@pytest.fixture
def spec(place: Path, disk_image: Path) -> VmSpec:
    """A VM with a Debian of its own, a data disk and two network cards."""
    guest = debian()
    root = place / "root.raw"
    subprocess.run(["cp", "--sparse=always", str(guest.root), str(root)], check=True)
    return VmSpec.model_validate(
        {
            "name": "debian",
            "memory": "512M",
            "kernel": str(guest.kernel),
            "initrd": str(guest.initrd),
            "cmdline": f"{guest.cmdline} {STATIC}",
            "disks": [
                {"name": "root", "image": str(root)},
                {"name": "data", "image": str(disk_image), "serial": "data"},
            ],
            "nics": [{}, {}],
            "channels": [{"name": "org.sempervirt.probe"}, {"name": GUEST_AGENT_CHANNEL}],
        }
    )


async def run(client: ProbeClient, *argv: str) -> Ran:
    """A program of the guest that has to succeed."""
    ran = await client.execute(*argv)
    assert ran.status == 0, ran
    return ran


async def kill_backend(agent: Agent, name: str) -> None:
    """SIGKILL to the backend of a disk; returns when another one serves."""
    disk = agent.disks[f"debian/{name}"]
    await disk.wait_spare_ready(READY_S)
    pid, count = disk.active_pid, disk.restart_count
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await disk.changes.wait_until(
        lambda: disk.restart_count > count and disk.state.connected,
        timeout_s=READY_S,
        what="the take-over",
    )


async def wait_address(client: ProbeClient, card: str, expected: str) -> None:
    """Waits until a network card has an address."""
    async with asyncio.timeout(READY_S):
        while True:
            if expected in (await run(client, "ip", "-4", "addr", "show", card)).stdout:
                return
            await asyncio.sleep(0.1)  # poll interval


async def assert_is_up(client: ProbeClient) -> None:
    """Systemd has nothing to complain of, and the network is as it was told."""
    state = await client.execute("/usr/bin/systemctl", "is-system-running", "--wait")
    failed = await client.execute("/usr/bin/systemctl", "--failed", "--no-legend")
    assert (state.stdout.strip(), failed.stdout) == ("running", "")
    for card, expected in [("eth0", f"inet {ADDRESS}/24"), ("eth1", "inet 10.0.2.15/24")]:
        await wait_address(client, card, expected)


def assert_unmounted(image: Path) -> None:
    """The file system is whole, and needs its journal for nothing."""
    checker = shutil.which("e2fsck", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert checker is not None
    checked = subprocess.run(
        [checker, "-fn", str(image)], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    assert "recovering journal" not in checked.stdout


async def assert_freezes_and_thaws(agent: Agent, vm: Vm, client: ProbeClient, place: Path) -> None:
    """The guest agent freezes the file systems, so that a write waits, and thaws them again. So a
    snapshot has them as after they were unmounted.
    """
    guest = GuestAgent(vm.channel_path(GUEST_AGENT_CHANNEL), vm.name, vm.pid)
    await run(client, "sh", "-c", "echo before >/root/file && sync")
    assert not await guest.frozen()
    assert await guest.freeze(READY_S) == 1
    try:
        assert await guest.frozen()
        writing = asyncio.create_task(run(client, "sh", "-c", "echo after >/root/file && sync"))
        done, _ = await asyncio.wait((writing,), timeout=1)
        assert not done
    finally:
        await guest.thaw()
    await writing
    assert not await guest.frozen()
    taken = await agent.snapshot_vm(vm.name, [], Freezing.REQUIRED)
    assert taken.consistency is Consistency.FILE_SYSTEMS
    assert len(taken.disks) == 2
    assert not await guest.frozen()
    copy = place / "copy.raw"
    made = await agent.export_snapshot("debian/root", 1, copy, ImageFormat.RAW)
    assert 0 < made.data_bytes < made.size_bytes
    assert_unmounted(copy)
    assert abs(await guest.set_time(READY_S)) < READY_S


async def wait_off(vm: Vm) -> None:
    await vm.machine.changes.wait_until(
        lambda: vm.run is Runstate.STOPPED, timeout_s=OFF_S, what="the end of the guest"
    )


async def test_debian_boots_and_lives_through_the_death_of_its_disks(
    agent: Agent, spec: VmSpec, place: Path
) -> None:
    vm = await agent.run_vm(spec)
    channel = vm.channel_path("probe")
    async with await ProbeClient.connect(channel, deadline_s=BOOT_S) as client:
        nonce = (await client.wait_hello(deadline_s=BOOT_S)).nonce
        await assert_is_up(client)
        await assert_freezes_and_thaws(agent, vm, client, place)
        copying = asyncio.create_task(run(client, "sh", "-c", COPY))
        await kill_backend(agent, "root")
        await copying
        await client.write_start("serial:data", writers=8, span_bytes=8 * MIB)
        await client.wait_stats(lambda stats: stats.completions > 200)
        await kill_backend(agent, "data")
        seen = (await client.stats()).completions
        await client.wait_stats(lambda stats: stats.completions > seen + 200)
        stats = await client.write_stop()
        assert stats.is_clean, stats
        await run(client, "sh", "-c", COMPARE)
        assert client.nonce == nonce
        with suppress(ProbeGone, ProbeSilent):  # it ends with all the others
            await client.execute("/usr/bin/systemctl", "poweroff", "--no-block", deadline_s=5)
        await wait_off(vm)
    await vm.wait_freed()
    # As the guest left it: the image, and the layer above it.
    left = place / "left.raw"
    export = [find_program("semper-blkd"), f"--blk-file={place / 'root.raw'}", f"--export={left}"]
    subprocess.run(export, check=True)  # noqa: ASYNC221
    assert_unmounted(left)
