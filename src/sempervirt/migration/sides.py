"""What both hosts of a migration find out before it: this host's part, as source or destination."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sempervirt.cluster.cluster import Cluster, Member
from sempervirt.core.errors import NotFound, SempervirtError, StateConflict, Unavailable
from sempervirt.core.names import suggest
from sempervirt.disk.volume import inspect
from sempervirt.host.storage_call import call_storage
from sempervirt.migration.obstacles import HostSide, ImageSeen, Obstacle
from sempervirt.qemu.facts import HostFacts
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.store import epoch

PROC = Path("/proc")


async def side_of(
    facts: HostFacts, name: str, spec: VmSpec, *, vm_state: Runstate | None, source: bool
) -> HostSide:
    """What this host, called `name`, is, has and sees of a VM. `vm_state` is the runstate of a VM
    of that name here, "" if there is none.

    At the source each image that has no id yet is given one, by a file beside it: only that
    tells whether the destination sees the same image.
    """
    model, flags = await asyncio.to_thread(_processor)
    return HostSide(
        name=name,
        accelerator=facts.accelerator.kind,
        qemu_version=facts.features.version,
        cpu_model=model,
        cpu_flags=flags,
        memory_available=await asyncio.to_thread(_memory_available),
        vm_state=vm_state,
        images={disk.name: await _seen(disk, give_id=source) for disk in spec.disks},
        missing=await asyncio.to_thread(_missing, spec),
    )


async def find_destination(cluster: Cluster, host: str) -> Member:
    """The host to move to. Raises NotFound, StateConflict."""
    members = {member.host.name: member for member in await cluster.members()}
    if host not in members:
        raise NotFound(
            f"there is no host {host}", remedy=suggest(host, members) or "semper host list"
        )
    if host == cluster.settings.host:
        raise StateConflict(f"{host} is this host", remedy="name another one: semper host list")
    return members[host]


def membership_obstacles(member: Member) -> Sequence[Obstacle]:
    """What the store says against a host."""
    name = member.host.name
    if member.revoked:
        return [Obstacle(f"{name} is revoked", f"take it back: semper host add {name}")]
    if member.presence is None:
        return [Obstacle(f"the agent of {name} is silent", f"start semperd on {name}")]
    return []


async def _seen(disk: DiskSpec, *, give_id: bool) -> ImageSeen:
    try:
        return await call_storage(disk.image, partial(_image, disk, give_id=give_id))
    except Unavailable as error:
        return ImageSeen(problem=error.message)


def _image(disk: DiskSpec, *, give_id: bool) -> ImageSeen:
    try:
        volume = inspect(disk.image, read_only=disk.read_only)
        if volume.block_device or disk.read_only:
            return ImageSeen(block_device=volume.block_device)
        path = epoch.record_path(disk.image)
        if give_id:
            return ImageSeen(id=epoch.identify(path))
        record = epoch.read_epoch(path)
    except SempervirtError as error:
        return ImageSeen(problem=error.message)
    return ImageSeen(id=record.image if record else "")


def _missing(spec: VmSpec) -> tuple[str, ...]:
    named = (spec.kernel, spec.initrd, spec.firmware, spec.firmware_vars)
    files = [path for path in named if path is not None]
    taps = [nic.tap for nic in spec.nics if nic.tap is not None]
    return (
        *(str(path) for path in files if not path.exists()),
        *(f"interface {tap}" for tap in taps if not Path("/sys/class/net", tap).exists()),
    )


def _memory_available() -> int:
    for line in (PROC / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _processor() -> tuple[str, frozenset[str]]:
    model, flags = "", frozenset[str]()
    with contextlib.suppress(OSError):
        for line in (PROC / "cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            match key.strip():
                case "model name":
                    model = value.strip()
                case "flags":
                    flags = frozenset(value.split())
                case _:
                    pass
    return model, flags
