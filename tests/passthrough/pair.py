"""Two QEMUs on one host, each with a mediator: moves of a device without agents, to try its parts.

The image is handed over by the mediators' own locks; memory goes by QEMU's own migration.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.guest import NEWER_QEMU, NVME
from lab.plain_qemu import PlainHost, ask, wait_migration, wait_running
from sempervirt.demo.passthrough import side as demo
from sempervirt.guest import ProbeClient
from sempervirt.migration import stream

MIB = 1 << 20
IMAGE_SIZE = 32 * MIB
LOAD: dict[str, Any] = {"writers": 4, "span_bytes": 8 * MIB, "flush_every": 32}


@dataclass
class Side(demo.Side):
    """One of the two: `host` has its QEMU."""

    host: PlainHost

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """What the mediator answers to a command, also to one that no agent gives."""
        return await ask(self.device.setup.files.control, command, **arguments)


@asynccontextmanager
async def side(directory: Path, image: Path, *, incoming: bool) -> AsyncIterator[Side]:
    """One of the two; `incoming` waits for the other."""
    async with demo.mediated(directory, image, incoming=incoming) as (device, options):
        host = PlainHost(directory, image, program=str(NEWER_QEMU / "qemu-system-x86_64"))
        with host.qemu(*options, disk="-device virtio-rng-pci"):
            async with host.monitor() as monitor:
                yield Side(directory, monitor, device, host)


def new_image(directory: Path) -> Path:
    """An empty one."""
    image = directory / "nvme.raw"
    image.touch()
    os.truncate(image, IMAGE_SIZE)
    return image


@asynccontextmanager
async def loaded(here: Side) -> AsyncIterator[ProbeClient]:
    """The guest's probe, whose writers work on the device."""
    async with here.host.probe() as (probe, _):
        await probe.write_start(NVME, **LOAD)
        await probe.wait_stats(lambda stats: stats.completions > 200, device=NVME)
        yield probe


async def begin(here: Side, there: Side, *, unseen: bool = False) -> None:
    """The destination is prepared, the source is captured, and QEMU sends memory. `unseen`: QEMU
    sees nothing of what the device writes, which is a mistake.
    """
    way = here.host.path("stream")
    await stream.prepare_destination(there.execute, way, postcopy=False)
    await there.arriving.prepare(await here.leaving.configurations())
    if unseen:
        await here.ask("capture", on=True, dirty="none")
    else:
        await here.leaving.arm()
    await stream.prepare_source(here.execute, postcopy=False)
    await stream.limit_blackout(here.execute, 0.5)
    await stream.start(here.execute, way)


async def end(here: Side, there: Side) -> None:
    """QEMU sends the rest, and the guest goes on at the destination."""
    await stream.finish(here.execute)
    await wait_migration(there.monitor, "completed")
    await there.arriving.resume()
    await there.execute("cont")
    await wait_running(there.monitor)


async def move(here: Side, there: Side) -> None:
    """A whole move, as agents make it."""
    await begin(here, there)
    await wait_migration(here.monitor, "pre-switchover")
    moved = await here.leaving.move()
    await there.arriving.receive(moved)
    await end(here, there)
