"""What becomes of the layers of a VM's disks when the VM has ended, and of those of an ended VM."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from sempervirt.core.errors import ImageLocked, InvalidRequest, SempervirtError
from sempervirt.disk.merging import ALL, UNWANTED, Merged, has_layers, merge_image
from sempervirt.disk.running import DiskFiles
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.store.registry import Claim
from sempervirt.vm import claims
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.record import VmRecord

# For a merge that an agent has left behind, which has the image.
LOCK_PATIENCE_S = 600.0
LOCK_POLL_S = 0.5


def merges_at_end(disk: DiskSpec) -> bool:
    """Whether the VM file says that no layer is to be left when the VM has ended."""
    return disk.snapshots == "merge" and disk.backend == "blkd" and not disk.read_only


async def merge_at_end(config: AgentConfig, record: VmRecord) -> str:
    """Merges all layers of those disks of an ended VM of which its file says so; its claim still
    counts. Why layers are left, "" when none are.
    """
    wanted = [disk for disk in record.spec.disks if merges_at_end(disk)]
    failed = []
    for disk in wanted:
        try:
            if await call_storage(disk.image, partial(has_layers, disk.image)):
                await _patiently(config, record.spec, disk, record.claim)
        except (SempervirtError, OSError) as error:
            failed.append(
                f"{error}; merge them later: semper disk merge {record.spec.name}/{disk.name}"
            )
    return "; ".join(failed)


async def merge_ended(
    config: AgentConfig, record: VmRecord, disk: DiskSpec, through: int | None
) -> Merged:
    """Merges layers of a disk of a VM that has ended, under a claim of its own. `through`: the
    newest snapshot that is given up.

    Raises InvalidRequest, ImageLocked, StateConflict, Unavailable, OutcomeUnknown.
    """
    name = f"{record.spec.name}/{disk.name}"
    if disk.read_only or disk.backend != "blkd":
        raise InvalidRequest(f"disk {name} has no snapshots: it is read-only, or served by QEMU")
    if not await call_storage(disk.image, partial(has_layers, disk.image)):
        return Merged(merged=(), layers=0)
    how = UNWANTED if through is None else str(through)
    claim = await claims.take(config, record.spec.model_copy(update={"disks": (disk,)}))
    try:
        return await _merge(config, record.spec, disk, claim, how)
    finally:
        if claim is not None:
            await claims.release(config, claim)


async def _patiently(
    config: AgentConfig, spec: VmSpec, disk: DiskSpec, claim: Claim | None
) -> Merged:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            return await _merge(config, spec, disk, claim, ALL)
        except ImageLocked:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(LOCK_POLL_S)


async def _merge(
    config: AgentConfig, spec: VmSpec, disk: DiskSpec, claim: Claim | None, how: str
) -> Merged:
    files = DiskFiles(config.vm_run_dir(spec.name), disk.name)
    title = claims.title_of(claim, disk, None)
    name = f"{spec.name}/{disk.name}"
    return await merge_image(name, config.backend, disk.image, files, title, how)
