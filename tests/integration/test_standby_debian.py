"""A Debian with systemd and a guest agent: its standby goes on when its QEMU is killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sempervirt.agent import Agent
from sempervirt.guest import ProbeClient, debian
from sempervirt.qemu.spec import GUEST_AGENT_CHANNEL, VmSpec
from sempervirt.standby.values import Policy, Tier
from tests.integration.test_standby import (
    CHANNEL,
    NEVER_S,
    READY_S,
    connected,
    kill_qemu,
    wait_device,
    wait_ready,
    wait_taken_over,
)

pytestmark = pytest.mark.guest


def program(name: str) -> str:
    """One of the administrator's programs, wherever PATH leads."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found is not None
    return found


async def unmounted(probe: ProbeClient, place: str) -> None:
    """Its agent has the place open while it freezes the file systems for the next standby."""
    async with asyncio.timeout(READY_S):
        while (told := await probe.execute("umount", place)).status != 0:
            assert "busy" in told.stderr
            await asyncio.sleep(0.1)  # poll interval


async def test_a_debian_goes_on_with_its_clock_right_and_its_data_disk_clean(
    agent: Agent, place: Path, disk_image: Path
) -> None:
    """Its agent shows that it is up, sets its clock, and gives it random bytes."""
    guest = debian()
    root = place / "root.raw"
    subprocess.run(["cp", "--sparse=always", str(guest.root), str(root)], check=True)  # noqa: ASYNC221
    subprocess.run([program("mkfs.ext4"), "-q", "-F", str(disk_image)], check=True)  # noqa: ASYNC221
    spec = VmSpec.model_validate(
        {
            "name": "web",
            "memory": "512M",
            "kernel": str(guest.kernel),
            "initrd": str(guest.initrd),
            "cmdline": guest.cmdline,
            "disks": [
                {"name": "root", "image": str(root)},
                {"name": "data", "image": str(disk_image), "serial": "data", "keep": "latest"},
            ],
            "nics": [{}],
            "channels": [{"name": CHANNEL}, {"name": GUEST_AGENT_CHANNEL}],
        }
    )
    first = await agent.run_vm(spec)
    probe = await connected(first)
    assert (await probe.execute("mount", "-t", "ext4", "/dev/vdb", "/mnt")).status == 0
    driver = await agent.standbys.enable(first, Policy(NEVER_S, 1, Tier.READY))
    state = await wait_ready(driver)
    assert state.ready[0].consistency == "file-systems"
    for row in range(10):
        line = f"echo {row} >>/mnt/rows && sync"
        assert (await probe.execute("sh", "-c", line)).status == 0
    await kill_qemu(first)
    vm = await wait_taken_over(agent, driver, first)
    assert driver.state.past is not None
    notes = driver.state.past.notes
    assert "its clock is right within" in notes[0], notes
    assert "no driver for generation IDs" in notes[1], notes
    await probe.close()
    probe = await connected(vm)
    told = float((await probe.execute("date", "+%s")).stdout)
    assert abs(told - time.time()) < READY_S / 10
    await wait_device(probe, "data")
    assert (await probe.execute("mount", "-t", "ext4", "/dev/vdb", "/mnt")).status == 0
    rows = (await probe.execute("cat", "/mnt/rows")).stdout.split()
    assert rows == [str(row) for row in range(10)]
    await unmounted(probe, "/mnt")
    await probe.close()
    await vm.kill()
    checked = subprocess.run([program("e2fsck"), "-fn", str(disk_image)], check=False)  # noqa: ASYNC221
    assert checked.returncode == 0
