"""Puts VM descriptions, directories and programs together."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

from sempervirt.cluster.cluster import read_settings
from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.queue_map import DevicePlan
from sempervirt.disk.backend import DiskOptions, ImageTitle
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.volume import Volume, inspect, require_raw
from sempervirt.host.directories import make_private
from sempervirt.host.places import RUN_VARIABLE, STATE_VARIABLE
from sempervirt.host.sockets import check_socket_path
from sempervirt.host.storage_call import DEADLINE_S, call_storage
from sempervirt.qemu.command_line import disk_id
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.store.whole import require_whole
from sempervirt.vm.claims import awaited_title, title_of
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.planning import plans_of_record
from sempervirt.vm.record import VmRecord
from sempervirt.vm.work import Arriving

# While an agent looks at an image nobody supervises the backends of its VM.
ADOPTION_DEADLINE_S = 1.0


def prepare_directories(config: AgentConfig) -> None:
    """Makes the state and run directories, for the owner only, or checks those that are there.
    Raises Unavailable.
    """
    make_private(config.state_dir, STATE_VARIABLE, linked=True)
    make_private(config.run_dir, RUN_VARIABLE, linked=False)


async def inspect_images(spec: VmSpec, *, used: bool) -> dict[str, Volume]:
    """The images of a VM's disks, by the disk's name. Raises InvalidRequest, StateConflict for one
    that QEMU itself is to serve and that has layers, and Unavailable for an image whose storage
    does not answer.

    `used`: the guest has run with these images, so they are raw whatever the guest wrote.
    """
    volumes = await asyncio.gather(*(_inspected(disk) for disk in spec.disks))
    for disk in spec.disks:
        if disk.format is None and not used:
            await call_storage(disk.image, partial(require_raw, disk.image))
        if disk.backend == "qemu":
            await require_whole(disk.image, "served by QEMU itself")
    return {disk.name: volume for disk, volume in zip(spec.disks, volumes, strict=True)}


async def block_devices(spec: VmSpec) -> set[Path]:
    """Those images of a VM that are no files. Raises Unavailable."""
    images = [disk.image for disk in spec.disks]
    found = await asyncio.gather(*(call_storage(image, image.is_block_device) for image in images))
    return {image for image, device in zip(images, found, strict=True) if device}


async def _inspected(disk: DiskSpec, timeout_s: float = DEADLINE_S) -> Volume:
    look = partial(inspect, disk.image, read_only=disk.read_only)
    return await call_storage(disk.image, look, timeout_s)


def disk_setup(
    config: AgentConfig,
    spec: VmSpec,
    disk: DiskSpec,
    plan: DevicePlan,
    volume: Volume | None,
    title: ImageTitle | None,
) -> DiskSetup:
    """How a disk is served. Raises InvalidRequest when a path is too long.

    `volume` is None for an adopted disk whose image cannot be looked at any more: its guest
    runs already.
    """
    command = config.backend
    files = DiskFiles(config.vm_run_dir(spec.name), disk.name)
    check_socket_path(files.control(10**9))
    return DiskSetup(
        name=f"{spec.name}/{disk.name}",
        volume=volume,
        plan=plan,
        options=DiskOptions(
            image=disk.image,
            read_only=disk.read_only,
            queues=plan.binding.queues,
            engine=plan.engine.value,
            direct=disk.direct,
            block_size=disk.block_size,
            serial=disk.serial,
            poll_us=plan.poll_us,
        ),
        command=command,
        policy=replace(config.policy, spare=config.policy.spare and command.has_spare),
        files=files,
        record=config.vm_state_dir(spec.name) / f"disk-{disk.name}.json",
        title=title,
        peers=VmFiles(config.vm_run_dir(spec.name)).peers,
    )


async def adopted_setups(config: AgentConfig, record: VmRecord) -> list[DiskSetup]:
    """The setups of the disks that an earlier agent served by backends.

    An image whose storage does not answer must not keep the others from being served.
    """
    spec = record.spec
    settings = read_settings(config) if isinstance(record.work, Arriving) else None
    plans = plans_of_record(spec, record.plans)
    served = [disk for disk in spec.disks if disk.backend == "blkd"]
    volumes = await asyncio.gather(*(_volume_left(disk) for disk in served))
    return [
        disk_setup(
            config,
            spec,
            disk,
            plans[disk_id(disk)],
            volume,
            awaited_title(settings.host, disk)
            if settings
            else title_of(record.claim, disk, volume),
        )
        for disk, volume in zip(served, volumes, strict=True)
    ]


async def _volume_left(disk: DiskSpec) -> Volume | None:
    try:
        return await _inspected(disk, ADOPTION_DEADLINE_S)
    except (InvalidRequest, Unavailable):
        return None
