"""What both hosts of a migration find out before it: this host's part, as source or destination."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sempervirt.cluster.cluster import Cluster, Member
from sempervirt.core.errors import NotFound, SempervirtError, StateConflict, Unavailable
from sempervirt.core.names import suggest
from sempervirt.disk.volume import inspect
from sempervirt.host.procfs import memory_available
from sempervirt.host.storage_call import call_storage
from sempervirt.migration.obstacles import HostSide, ImageSeen, Obstacle
from sempervirt.qemu.facts import HostFacts
from sempervirt.qemu.spec import DiskSpec, PassthroughSpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.store import epoch

PROC = Path("/proc")


async def side_of(
    facts: HostFacts,
    name: str,
    spec: VmSpec,
    *,
    vm_state: Runstate | None,
    source: bool,
    memory_left: int | None = None,
) -> HostSide:
    """What this host, called `name`, is, has and sees of a VM. `vm_state` is the runstate of a VM
    of that name here, "" if there is none. `memory_left` is what guests may still have, in bytes;
    None: what there is.

    At the source each image that has no id yet is given one, by a file beside it: only that
    tells whether the destination sees the same image. Storage that does not answer is waited for
    once, however much of the VM is there.
    """
    model, flags = await asyncio.to_thread(_processor)
    available = await asyncio.to_thread(memory_available)
    seen, missing = await asyncio.gather(
        asyncio.gather(*(_seen(disk, give_id=source) for disk in spec.imaged)), _missing(spec)
    )
    return HostSide(
        name=name,
        accelerator=facts.accelerator.kind,
        qemu_version=facts.features.version,
        cpu_model=model,
        cpu_flags=flags,
        memory_available=available if memory_left is None else min(available, memory_left),
        processors=os.cpu_count() or 0,
        vm_state=vm_state,
        images={disk.name: image for disk, image in zip(spec.imaged, seen, strict=True)},
        passes_through=facts.features.passes_through,
        missing=missing,
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
    if why := member.presence.out_of_service:
        return [Obstacle(f"{name} is out of service: {why}", f"on {name}: semper host return")]
    return []


async def _seen(disk: DiskSpec | PassthroughSpec, *, give_id: bool) -> ImageSeen:
    try:
        return await call_storage(disk.image, partial(_image, disk, give_id=give_id))
    except Unavailable as error:
        return ImageSeen(problem=error.message)


def _image(disk: DiskSpec | PassthroughSpec, *, give_id: bool) -> ImageSeen:
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


async def _missing(spec: VmSpec) -> tuple[str, ...]:
    named = (spec.kernel, spec.initrd, spec.firmware, spec.firmware_vars)
    files = await asyncio.gather(*(_absent(path) for path in named if path is not None))
    return *(text for text in files if text), *await asyncio.to_thread(_absent_taps, spec)


def _absent_taps(spec: VmSpec) -> list[str]:
    taps = [nic.tap for nic in spec.nics if nic.tap is not None]
    return [f"interface {tap}" for tap in taps if not Path("/sys/class/net", tap).exists()]


async def _absent(path: Path) -> str:
    """A file that is not there, in words; "" for one that is."""
    try:
        return "" if await call_storage(path, path.exists) else str(path)
    except (OSError, Unavailable) as error:
        return f"{path} ({error})"


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
