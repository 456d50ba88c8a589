"""The spares of a device's mediator, as the agent keeps them. Who connects plays QEMU."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sempervirt.passthrough.answers import MediatorState
from sempervirt.passthrough.device import Device
from sempervirt.passthrough.mediator import DeviceFiles, DeviceOptions, DeviceSetup
from tests.passthrough.deaths import kill_all, wait_ready, wait_served
from tests.passthrough.pair import new_image

DEADLINE_S = 60.0


@asynccontextmanager
async def connected(place: Path) -> AsyncIterator[tuple[Device, asyncio.StreamReader]]:
    """A device whose QEMU is connected, and says nothing."""
    setup = DeviceSetup(
        name="web/nvme",
        files=DeviceFiles(place, "nvme"),
        options=DeviceOptions(new_image(place)),
        slot=30,
        shim_slot=31,
    )
    device = await Device.start(setup)
    try:
        reader, writer = await asyncio.open_unix_connection(setup.files.socket)
        try:
            yield device, reader
        finally:
            writer.close()
    finally:
        await device.stop()
    assert setup.files.find_processes() == []


async def gone(device: Device) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not device.ailment:  # noqa: ASYNC110 - a process's end, not ours
            await asyncio.sleep(0.01)  # poll interval


async def test_a_spare_goes_on_for_one_that_dies_or_hangs_and_has_a_spare_again(
    place: Path,
) -> None:
    async with connected(place) as (device, reader):
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL):
            await wait_ready(device)
            before = device.pid
            assert before is not None
            os.kill(before, number)
            await wait_served(device, before)
            assert device.ailment == ""
        assert device.takeovers == 3
        assert (await device.client.status()).state is MediatorState.RUNNING
        # Nobody has ended the connection.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await reader.read(1)


async def test_a_spare_that_dies_is_replaced_and_without_one_the_device_is_gone(
    place: Path,
) -> None:
    async with connected(place) as (device, reader):
        await wait_ready(device)
        spare, serving = device.spare_pid, device.pid
        assert spare is not None
        os.kill(spare, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            while device.spare_pid in (spare, None):  # noqa: ASYNC110 - a process, not ours
                await asyncio.sleep(0.01)  # poll interval
        await wait_ready(device)
        assert (device.pid, device.takeovers) == (serving, 0)
        kill_all(device)
        await gone(device)
        assert "killed by SIGKILL" in device.ailment
        assert await reader.read(1) == b""


async def test_the_next_agent_finds_both_and_the_right_one_serves(place: Path) -> None:
    async with connected(place) as (device, _):
        await wait_ready(device)
        for _ in range(2):
            adopted = await Device.adopt(device.setup)
            assert (adopted.pid, adopted.spare_pid) == (device.pid, device.spare_pid)
            adopted.detach()
            before = device.pid
            assert before is not None
            os.kill(before, signal.SIGKILL)
            await wait_served(device, before)
            await wait_ready(device)
