"""This host's claims on VMs and their images: taken before a VM starts, released after its end.

A host that belongs to no cluster claims nothing: the images' locks are all that its VMs need. In a
cluster no VM is started before the store has given it to this host (docs/design/ownership.md).
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path

from sempervirt.cluster.cluster import Cluster, read_settings
from sempervirt.core.errors import SempervirtError
from sempervirt.disk.backend import ImageTitle
from sempervirt.disk.volume import Volume
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.store import epoch
from sempervirt.store.records import Ownership
from sempervirt.store.registry import Claim, Registry, StaleClaim
from sempervirt.vm.config import AgentConfig

log = logging.getLogger(__name__)

# A record is flushed; a disk with much to write takes its time for that.
RECORD_DEADLINE_S = 60.0


async def claimed_images(spec: VmSpec) -> list[Path]:
    """The images of a VM that a claim covers: files that it may write.

    A block device has nothing beside it that several hosts could read. Raises Unavailable.
    """
    writable = [disk.image for disk in spec.disks if not disk.read_only]
    devices = await asyncio.gather(
        *(call_storage(image, image.is_block_device) for image in writable)
    )
    return [image for image, device in zip(writable, devices, strict=True) if not device]


def title_of(claim: Claim | None, disk: DiskSpec, volume: Volume | None) -> ImageTitle | None:
    """By what right the backend of a disk writes; None where nothing is claimed.

    An image that cannot be looked at, without a `volume`, is taken for a file.
    """
    if claim is None or disk.read_only or (volume is not None and volume.block_device):
        return None
    return ImageTitle(epoch.record_path(disk.image), claim.host, claim.epoch, claim.id)


def awaited_title(host: str, disk: DiskSpec) -> ImageTitle | None:
    """By what right the backend of a disk will write, once it gets its claim."""
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
    images = [
        await call_storage(image, partial(_identify, image), RECORD_DEADLINE_S)
        for image in await claimed_images(spec)
    ]
    async with Cluster.opened(config) as cluster:
        registry = Registry(cluster.store)
        claim = await registry.claim(spec.name, cluster.settings.host, images)
        try:
            await put_on_record(claim, spec)
        except SempervirtError:
            await _release(registry, claim)
            raise
    return claim


async def put_on_record(claim: Claim, spec: VmSpec) -> None:
    """From now on no backend with an older claim may write the images.

    Raises StaleClaim when a newer one is on record, Unavailable.
    """
    for image in await claimed_images(spec):
        # One that comes too late does no harm: no claim that follows has an epoch as low.
        await call_storage(image, partial(_advance, image, claim), RECORD_DEADLINE_S)


def _identify(image: Path) -> str:
    return epoch.identify(epoch.record_path(image))


def _advance(image: Path, claim: Claim) -> None:
    epoch.advance(epoch.record_path(image), claim)


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
