"""Puts VM descriptions, directories and programs together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from sempervirt.cluster.cluster import read_settings
from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.queue_map import DevicePlan
from sempervirt.disk.backend import DiskOptions, ImageTitle
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.setup import DiskSetup, supervised
from sempervirt.disk.volume import Volume, inspect, require_raw
from sempervirt.host.directories import make_private
from sempervirt.host.exposure import finding, readers
from sempervirt.host.places import RUN_VARIABLE, STATE_VARIABLE
from sempervirt.host.sockets import check_socket_path
from sempervirt.host.storage_call import DEADLINE_S, call_storage
from sempervirt.passthrough.mediator import DeviceFiles, DeviceOptions, DeviceSetup, PciOptions
from sempervirt.qemu.command_line import device_slot, disk_id, shim_slot
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import DiskSpec, PassthroughSpec, PciSpec, VmSpec
from sempervirt.store.whole import require_whole
from sempervirt.vm.claims import awaited_title, title_of
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.planning import plans_of_record
from sempervirt.vm.record import VmRecord
from sempervirt.vm.work import Arriving, Standing

# While an agent looks at an image nobody supervises the backends of its VM.
ADOPTION_DEADLINE_S = 1.0
EXPOSURE_DEADLINE_S = 1.0


def prepare_directories(config: AgentConfig) -> None:
    """Makes the state and run directories, for the owner only, or checks those that are there.
    Raises Unavailable.
    """
    make_private(config.state_dir, STATE_VARIABLE, linked=True)
    make_private(config.run_dir, RUN_VARIABLE, linked=False)


async def inspect_images(spec: VmSpec, *, used: bool) -> dict[str, Volume]:
    """The images of a VM's disks and passed-through devices, by name. Raises InvalidRequest,
    StateConflict for one that has layers and that QEMU itself or a mediator is to serve, and
    Unavailable for an image whose storage does not answer.

    `used`: the guest has run with these images, so they are raw whatever the guest wrote.
    """
    volumes = await asyncio.gather(*(_inspected(disk) for disk in spec.imaged))
    for disk in spec.imaged:
        if disk.format is None and not used:
            await call_storage(disk.image, partial(require_raw, disk.image))
        if isinstance(disk, PassthroughSpec):
            await require_whole(disk.image, "passed through")
        elif disk.backend == "qemu":
            await require_whole(disk.image, "served by QEMU itself")
    return {disk.name: volume for disk, volume in zip(spec.imaged, volumes, strict=True)}


async def exposed_images(spec: VmSpec) -> list[str]:
    """What others than their owners could do to images that the VM writes, and the remedy. Nothing
    depends on it, so nobody waits for storage that does not answer.
    """

    def look(image: Path) -> str:
        who = readers(image)
        return f"image {image}: {finding(image, who)}" if who else ""

    written = [disk.image for disk in spec.imaged if not disk.read_only]
    looks = (call_storage(image, partial(look, image), EXPOSURE_DEADLINE_S) for image in written)
    said = await asyncio.gather(*looks, return_exceptions=True)
    return [text for text in said if isinstance(text, str) and text]


async def block_devices(spec: VmSpec) -> set[Path]:
    """Those images of a VM that are no files. Raises Unavailable."""
    images = [disk.image for disk in spec.disks]
    found = await asyncio.gather(*(call_storage(image, image.is_block_device) for image in images))
    return {image for image, device in zip(images, found, strict=True) if device}


async def _inspected(disk: DiskSpec | PassthroughSpec, timeout_s: float = DEADLINE_S) -> Volume:
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
        options=served_as(disk, plan),
        command=command,
        policy=supervised(config.policy, command, read_only=disk.read_only),
        files=files,
        record=config.vm_state_dir(spec.name) / f"disk-{disk.name}.json",
        title=title,
        peers=VmFiles(config.vm_run_dir(spec.name)).peers,
    )


def served_as(disk: DiskSpec, plan: DevicePlan) -> DiskOptions:
    """What the backend of a disk is started with: by the VM file, and by its queues' plan."""
    return DiskOptions(
        image=disk.image,
        read_only=disk.read_only,
        queues=plan.binding.queues,
        engine=plan.engine.value,
        direct=disk.direct,
        block_size=disk.block_size,
        serial=disk.serial,
        poll_us=plan.poll_us,
    )


def _device_options(device: PassthroughSpec | PciSpec) -> DeviceOptions | PciOptions:
    if isinstance(device, PciSpec):
        return PciOptions(pci=device.pci, profile=device.profile)
    return DeviceOptions(
        image=device.image,
        kind=device.kind,
        read_only=device.read_only,
        queues=device.queues,
        engine=device.engine,
        direct=device.direct,
        serial=device.serial,
    )


def device_setups(
    config: AgentConfig,
    spec: VmSpec,
    titles: Mapping[str, ImageTitle | None],
    *,
    incoming: bool,
) -> list[DeviceSetup]:
    """How the passed-through devices of a VM are mediated; `titles` are by the device's name."""
    setups = []
    for index, device in enumerate(spec.passthrough):
        title = titles.get(device.name)
        setups.append(
            DeviceSetup(
                name=f"{spec.name}/{device.name}",
                files=DeviceFiles(config.vm_run_dir(spec.name), device.name),
                options=_device_options(device),
                slot=device_slot(index),
                shim_slot=shim_slot(index),
                title=tuple(title.argv()) if title else (),
                incoming=incoming,
            )
        )
    return setups


async def adopted_setups(config: AgentConfig, record: VmRecord) -> list[DiskSetup]:
    """The setups of the disks that an earlier agent served by backends.

    An image whose storage does not answer must not keep the others from being served.
    """
    spec = record.spec
    work = record.work
    settings = read_settings(config) if isinstance(work, Arriving | Standing) else None
    plans = plans_of_record(spec, record.plans)

    def title(disk: DiskSpec, volume: Volume | None) -> ImageTitle | None:
        # In a cluster a standby gets all of its disks by the one claim of its take-over.
        if isinstance(work, Standing) and (settings is not None or disk.keep == "latest"):
            return awaited_title(work.holder, disk)
        if isinstance(work, Arriving) and settings is not None:
            return awaited_title(settings.host, disk)
        return title_of(record.claim, disk, volume)

    served = [disk for disk in spec.disks if disk.backend == "blkd"]
    volumes = await asyncio.gather(*(_volume_left(disk) for disk in served))
    return [
        disk_setup(
            config,
            spec,
            disk,
            plans[disk_id(disk)],
            volume,
            title(disk, volume),
        )
        for disk, volume in zip(served, volumes, strict=True)
    ]


async def _volume_left(disk: DiskSpec) -> Volume | None:
    try:
        return await _inspected(disk, ADOPTION_DEADLINE_S)
    except (InvalidRequest, Unavailable):
        return None
