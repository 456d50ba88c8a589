"""This host's claims on VMs and their images: taken before a VM starts, released after its end.

A host that belongs to no cluster claims nothing: the images' locks are all that its VMs need. In a
cluster no VM is started before the store has given it to this host (docs/design/ownership.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from sempervirt.cluster.cluster import Cluster, read_settings
from sempervirt.core.errors import SempervirtError, StateConflict
from sempervirt.disk.backend import ImageTitle
from sempervirt.disk.volume import Volume
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.spec import DiskSpec, PassthroughSpec, VmSpec
from sempervirt.store import epoch
from sempervirt.store.records import Ownership
from sempervirt.store.registry import Claim, Registry, StaleClaim
from sempervirt.vm.config import AgentConfig

log = logging.getLogger(__name__)

# A record is flushed; a disk with much to write takes its time for that.
RECORD_DEADLINE_S = 60.0
LEFT_S = 5.0
# So many epochs a store that was restored from a backup may be behind its images.
CATCH_UP_MAX = 64


async def claimed_images(spec: VmSpec) -> list[Path]:
    """The images of a VM that a claim covers: files that it may write.

    A block device has nothing beside it that several hosts could read. Raises Unavailable.
    """
    writable = [disk.image for disk in spec.imaged if not disk.read_only]
    devices = await asyncio.gather(
        *(call_storage(image, image.is_block_device) for image in writable)
    )
    return [image for image, device in zip(writable, devices, strict=True) if not device]


def title_of(
    claim: Claim | None, disk: DiskSpec | PassthroughSpec, volume: Volume | None
) -> ImageTitle | None:
    """By what right the backend of a disk, or the mediator of a device, writes; None where nothing
    is claimed.

    An image that cannot be looked at, without a `volume`, is taken for a file.
    """
    if claim is None or disk.read_only or (volume is not None and volume.block_device):
        return None
    return ImageTitle(epoch.record_path(disk.image), claim.host, claim.epoch, claim.id)


def awaited_title(host: str, disk: DiskSpec | PassthroughSpec) -> ImageTitle | None:
    """By what right the backend or the mediator will write, once it gets its claim."""
    if disk.read_only:
        return None
    return ImageTitle(epoch.record_path(disk.image), host)


def claim_of(owned: Ownership) -> Claim:
    """The claim that an entry of the store stands for."""
    return Claim(owned.vm, owned.owner, owned.epoch, owned.claim, owned.images)


async def take(config: AgentConfig, spec: VmSpec) -> Claim | None:
    """Claims a VM for this host, and puts the claim on record at its images.

    Raises StateConflict, which names the owner, Unavailable, and OutcomeUnknown: the VM must not
    be started then.
    """
    if await asyncio.to_thread(read_settings, config) is None:
        return None
    records = await _records(spec)
    async with Cluster.opened(config) as cluster:
        registry, host = Registry(cluster.store), cluster.settings.host
        await _require_known(registry, spec.name, host, records)
        images = [record.image for record in records.values()]
        claim = await registry.claim(spec.name, host, images)
        # Epochs of this host, or of one that has ended it in order, of which the store knows not.
        newest = max((record.epoch for record in records.values()), default=0)
        for _ in range(CATCH_UP_MAX):
            if claim.epoch > newest:
                break
            claim = await registry.claim(spec.name, host, images)
        try:
            await put_on_record(claim, spec)
        except SempervirtError:
            await _release(registry, claim)
            raise
    return claim


async def _require_known(
    registry: Registry, vm: str, host: str, records: Mapping[Path, epoch.EpochRecord]
) -> None:
    """Another host has not got the VM by its images, of which the store does not know yet: a claim
    of the store would come to be newer than that host's, if it was tried often enough. And no
    standby has left one of them behind. Raises StateConflict, with the paths of the images, and
    where `Registry.claim` would.
    """
    left = await registry.left(vm, host)
    for image, record in records.items():
        if record.image in left:
            raise StateConflict(
                f"a standby of VM {vm} has taken over, and {image} lacks what was written since",
                remedy="run it with its newest images, where it ran last; or give up what was "
                f"written since: semper standby disable {vm} --forget",
            )
        if record.epoch == 0 or record.released or record.holder == host:
            continue
        if not await registry.knows(vm, record.image, record.epoch, record.claim):
            raise StateConflict(
                f"VM {vm} may run on host {record.holder}: {image} is held there under epoch "
                f"{record.epoch}, of which the store does not know",
                remedy="end it there, or wait until that host has had the store know; where it is "
                f"off for good, and no host uses the image: remove {epoch.record_path(image)}",
            )


async def take_over(
    config: AgentConfig,
    spec: VmSpec,
    seen: Ownership | None,
    evidence: str,
    left: VmSpec | None = None,
) -> Claim:
    """Claims a VM that a standby of this host takes over, and puts the claim on record at its
    images: nobody with an older one may write them from now on. `seen` is the owner of which
    `evidence` was had; None: this host itself. `left` is what the VM had on another host: by those
    images nobody may give it away any more.

    Raises StaleClaim, StateConflict, Unavailable, OutcomeUnknown: it may be repeated.
    """
    images = [record.image for record in (await _records(spec)).values()]
    async with Cluster.opened(config) as cluster:
        registry, host = Registry(cluster.store), cluster.settings.host
        if seen is None or seen.owner == host:
            claim = await registry.claim(spec.name, host, images, leaving=True)
        else:
            claim = await registry.take_over(seen, host, images, evidence)
        try:
            await put_on_record(claim, spec)
            if left is not None:
                await _leave_images(claim, left)
        except StaleClaim:  # another host has the VM by its images, and has it entered here
            await _release(registry, claim)
            raise
    return claim


async def _leave_images(claim: Claim, left: VmSpec) -> None:
    """Raises StaleClaim. A storage that is silent keeps no standby with copies of its own."""
    bare = replace(claim, images=())  # they are not the VM's any more
    for image in await claimed_images(left):
        try:
            await call_storage(image, partial(_advance, image, bare), LEFT_S)
        except StaleClaim:
            raise
        except SempervirtError as error:
            log.warning("claim vm=%s is not on record at %s: %s", claim.vm, image, error)


async def put_on_record(claim: Claim, spec: VmSpec) -> None:
    """From now on no backend with an older claim may write the images.

    Raises StaleClaim when a newer one is on record, Unavailable.
    """
    for image in await claimed_images(spec):
        # One that comes too late does no harm: no claim that follows has an epoch as low.
        await call_storage(image, partial(_advance, image, claim), RECORD_DEADLINE_S)


async def _records(spec: VmSpec) -> dict[Path, epoch.EpochRecord]:
    """Those of the images that a claim covers; each image is given an id if it has none."""
    return {
        image: await call_storage(
            image, partial(epoch.present, epoch.record_path(image)), RECORD_DEADLINE_S
        )
        for image in await claimed_images(spec)
    }


def _advance(image: Path, claim: Claim) -> None:
    epoch.advance(epoch.record_path(image), claim)


async def forget_left(config: AgentConfig, vm: str) -> bool:
    """From now on the VM may be run with images that a standby has left behind; whether the
    cluster's store, if there is one, knew of any. Raises as `Registry.forget_left`.
    """
    if await asyncio.to_thread(read_settings, config) is None:
        return False
    async with Cluster.opened(config) as cluster:
        return await Registry(cluster.store).forget_left(vm, cluster.settings.host)


async def release_own(config: AgentConfig, vm: str) -> None:
    """Frees a VM of this host of which nothing runs, whichever claim this host has on it. Raises
    Unavailable, OutcomeUnknown.
    """
    async with Cluster.opened(config) as cluster:
        registry = Registry(cluster.store)
        owned = await registry.find(vm)
        if owned.owner == cluster.settings.host:
            await registry.release(claim_of(owned))


async def release(config: AgentConfig, claim: Claim) -> bool:
    """Frees a VM that has ended, in the store; whether nothing is left to do. A claim that is stale
    needs nothing.
    """
    try:
        async with Cluster.opened(config) as cluster:
            return await _release(Registry(cluster.store), claim)
    except SempervirtError as error:
        log.warning("release vm=%s is tried again later: %s", claim.vm, error)
        return False


async def _release(registry: Registry, claim: Claim) -> bool:
    try:
        await registry.release(claim)
    except StaleClaim as error:
        log.info("release vm=%s %s", claim.vm, error)
    except SempervirtError as error:
        log.warning("release vm=%s is tried again later: %s", claim.vm, error)
        return False
    return True
