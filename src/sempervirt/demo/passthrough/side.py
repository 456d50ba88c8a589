"""Two QEMUs of this host, each with a mediator: what the agents of two hosts do with a device, on
one.

The image goes from mediator to mediator by its lock, and memory by QEMU's own migration.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import Unavailable
from sempervirt.guest import CMDLINE
from sempervirt.guest import image as guest_image
from sempervirt.guest.probe import ProbeClient
from sempervirt.host import process
from sempervirt.migration import stream
from sempervirt.passthrough.arriving import ArrivingDevices
from sempervirt.passthrough.device import Device
from sempervirt.passthrough.leaving import LeavingDevices
from sempervirt.passthrough.mediator import DeviceFiles, DeviceOptions, DeviceSetup
from sempervirt.passthrough.ports import PortSpace
from sempervirt.qemu.command_line import (
    DeviceSockets,
    device_slot,
    passthrough_arguments,
    shim_slot,
)
from sempervirt.qemu.qmp import Monitor
from sempervirt.qemu.spec import PassthroughSpec

NAME = "nvme"
MEMORY_MIB = 192
MONITOR_S = 90.0
MOVE_S = 180.0
LOOK_S = 0.005
# Meant for the guest's blackout; TCG on a busy machine is slow.
BLACKOUT_S = 0.3


@dataclass
class Side:
    """A QEMU, its monitor, and the mediator of its device."""

    directory: Path
    monitor: Monitor
    device: Device

    @property
    def execute(self) -> stream.Execute:
        """Runs a command of the monitor."""
        return self.monitor.execute_within(MONITOR_S)

    @property
    def leaving(self) -> LeavingDevices:
        """The device, on its way away."""
        return LeavingDevices([self.device], self.execute)

    @property
    def arriving(self) -> ArrivingDevices:
        """The device, on its way here."""
        return ArrivingDevices([self.device], PortSpace(self.execute))

    async def probe(self, deadline_s: float) -> ProbeClient:
        """The guest's probe, when it has answered. Raises ProbeSilent, ProbeGone."""
        client = await ProbeClient.connect(self.directory / "probe.sock", deadline_s=deadline_s)
        await client.wait_hello(deadline_s=deadline_s)
        return client


def _argv(qemu: str, directory: Path, accelerator: str, device: list[str]) -> list[str]:
    """A machine with the small guest and a passed-through device; the device is its only disk."""
    guest = guest_image()
    size = f"{MEMORY_MIB}M"
    argv = [qemu, "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-machine", "q35,memory-backend=memory", "-m", size]
    argv += ["-object", f"memory-backend-memfd,id=memory,size={size},share=on"]
    argv += ["-accel", "tcg,thread=multi" if accelerator == "tcg" else accelerator]
    argv += ["-cpu", "host" if accelerator == "kvm" else "max"]
    argv += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", CMDLINE]
    argv += ["-serial", f"file:{directory / 'console.log'}"]
    argv += ["-qmp", f"unix:{directory / 'qmp.sock'},server=on,wait=off"]
    argv += ["-chardev", f"socket,id=probe,path={directory / 'probe.sock'},server=on,wait=off"]
    argv += ["-device", "virtio-serial-pci"]
    argv += ["-device", "virtserialport,chardev=probe,name=org.sempervirt.probe"]
    return [*argv, *device]


@asynccontextmanager
async def side(
    directory: Path, qemu: str, accelerator: str, image: Path, *, incoming: bool
) -> AsyncIterator[Side]:
    """One of the two, until the block is left; with `incoming` it waits for the other.

    Raises what `Device.start` raises, CommandFailed, Unavailable.
    """
    async with mediated(directory, image, incoming=incoming) as (device, arguments):
        started = process.spawn(
            _argv(qemu, directory, accelerator, arguments),
            log=directory / "qemu.log",
            on_exit=lambda _end: None,
        )
        try:
            monitor = await _connected(directory / "qmp.sock", started)
            try:
                yield Side(directory, monitor, device)
            finally:
                await monitor.close()
        finally:
            await started.end(0)


@asynccontextmanager
async def mediated(
    directory: Path, image: Path, *, incoming: bool
) -> AsyncIterator[tuple[Device, list[str]]]:
    """The mediator of an NVMe controller on `image`, until the block is left, and what QEMU is told
    to have that device; with `incoming`, also to wait. Makes `directory`. Raises what
    `Device.start` raises.
    """
    await asyncio.to_thread(directory.mkdir)
    setup = DeviceSetup(
        name=f"{directory.name}/{NAME}",
        files=DeviceFiles(directory, NAME),
        options=DeviceOptions(image),
        slot=device_slot(0),
        shim_slot=shim_slot(0),
        incoming=incoming,
    )
    sockets = DeviceSockets(setup.files.socket, setup.files.shim)
    arguments = passthrough_arguments(0, PassthroughSpec(name=NAME, image=image), sockets)
    if incoming:
        arguments += ["-S", "-incoming", "defer"]
    device = await Device.start(setup)
    try:
        yield device, arguments
    finally:
        await device.stop()


async def _connected(path: Path, started: process.Process) -> Monitor:
    deadline = time.monotonic() + MONITOR_S
    while True:
        try:
            return await Monitor.connect(path, "demo", MONITOR_S, started.pid)
        except Unavailable:  # not listening yet, or never
            if started.exit is not None or time.monotonic() > deadline:
                said = process.said(path.parent / "qemu.log", 3)
                raise Unavailable(f"QEMU does not start: {'; '.join(said)}") from None
            await asyncio.sleep(LOOK_S)


@dataclass(frozen=True)
class Blackout:
    """One move: when the guest stood still (CLOCK_MONOTONIC, nanoseconds), and for how long."""

    at_ns: int
    ms: float
    total_s: float
    doorbells: int


async def move(here: Side, there: Side) -> Blackout:
    """Moves the guest with its device. Raises Unavailable, OutcomeUnknown."""
    began = time.monotonic()
    way = here.directory / "stream.sock"
    await stream.prepare_destination(there.execute, way, postcopy=False)
    await there.arriving.prepare(await here.leaving.configurations())
    await here.leaving.arm()
    await stream.prepare_source(here.execute, postcopy=False)
    await stream.limit_blackout(here.execute, BLACKOUT_S)
    await stream.start(here.execute, way)
    await _reached(here, "pre-switchover")
    stopped_ns = time.monotonic_ns()
    captured = (await here.device.client.status()).counters.doorbells_captured
    await there.arriving.receive(await here.leaving.move())
    await stream.finish(here.execute)
    await _reached(there, "completed")
    await there.arriving.resume()
    await stream.let_run(there.execute)
    blackout_ms = (time.monotonic_ns() - stopped_ns) / 1e6
    return Blackout(stopped_ns, blackout_ms, time.monotonic() - began, captured)


async def _reached(of: Side, status: str) -> None:
    deadline = time.monotonic() + MOVE_S
    while (told := await stream.look(of.execute)).status != status:
        if told.status in stream.FAILED or time.monotonic() > deadline:
            raise Unavailable(f"QEMU's migration is {told.status} and not {status}: {told.error}")
        await asyncio.sleep(LOOK_S)
