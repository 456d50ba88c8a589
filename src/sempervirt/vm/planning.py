"""How the queues of each device of a VM are served: asked from the VM file, presets and QEMU.

`disk.threads` decides for disks; for network cards there is little to decide: with vhost the
kernel has a thread for each pair of queues, without it QEMU's main loop does it all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sempervirt.core.errors import CommandFailed, Unavailable
from sempervirt.core.queue_map import Binding, Choice, DevicePlan, DeviceType, Engine
from sempervirt.disk.fingerprint import HostFingerprint, fingerprint, this_host
from sempervirt.disk.presets import Preset, PresetStore, Stale
from sempervirt.disk.storage import NO_STORAGE, StorageKey, storage_key
from sempervirt.disk.threads import BUILT_IN, VM_FILE, Wish, named, plan
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.command_line import MAPPING, Features, disk_id, nic_id
from sempervirt.qemu.spec import DiskSpec, NicSpec, VmSpec
from sempervirt.vm.config import AgentConfig

VHOST_NET = Path("/dev/vhost-net")
QEMU_AIO: dict[Engine, Engine] = {"sync": "threads", "uring": "io_uring"}
REMEDY_AIO = 'choose engine = "sync", or install a QEMU with io_uring'

Find = Callable[[DeviceType, StorageKey], Preset | Stale | None]


def storage_of(disk: DiskSpec) -> StorageKey:
    """What a disk's image lies on. Touches that storage."""
    return storage_key(disk.image, direct=disk.direct)


@dataclass(frozen=True)
class Offer:
    """What decides besides the VM file: presets, QEMU's features, the host's, and what the images
    lie on.
    """

    find: Find
    features: Features
    processors: int
    vhost_net: bool
    storage: Callable[[DiskSpec], StorageKey] = storage_of


async def offer_of(config: AgentConfig, spec: VmSpec, features: Features) -> Offer:
    """What this host offers to the devices of `spec` now.

    Raises InvalidRequest, and Unavailable for an image whose storage does not answer.
    """
    keys = await asyncio.gather(
        *(call_storage(disk.image, partial(storage_of, disk)) for disk in spec.disks)
    )
    storages = {disk.name: key for disk, key in zip(spec.disks, keys, strict=True)}
    store = PresetStore(config.state_dir)
    host = await _host(config, spec, features) if store.path.exists() else this_host()
    return Offer(
        find=lambda device, storage: store.find(device, storage, host),
        features=features,
        processors=len(os.sched_getaffinity(0)),
        vhost_net=_opens(VHOST_NET),
        storage=lambda disk: storages[disk.name],
    )


async def _host(config: AgentConfig, spec: VmSpec, features: Features) -> HostFingerprint:
    if any(disk.backend == "blkd" for disk in spec.disks):
        try:
            return await fingerprint(config.backend.binary(), features.version)
        except CommandFailed:
            pass  # no preset holds for such a program; its disk will say more when it starts
    return this_host().model_copy(update={"qemu": features.version})


def _opens(device: Path) -> bool:
    """Whether a device file is there and works; opening it loads the kernel's module."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def plan_devices(spec: VmSpec, offer: Offer) -> dict[str, DevicePlan]:
    """The plan of each device, by QEMU's id.

    Raises Unavailable when this QEMU or host lacks what the VM file asks for.
    """
    plans = {}
    for disk in spec.disks:
        serve = _plan_own if disk.backend == "qemu" else _plan_blkd
        plans[disk_id(disk)] = serve(disk, spec.vcpus, offer)
    for index, nic in enumerate(spec.nics):
        plans[nic_id(index)] = plan_nic(nic, offer)
    return plans


def plans_of_record(spec: VmSpec, plans: Mapping[str, DevicePlan]) -> Mapping[str, DevicePlan]:
    """`plans`, or how an earlier release, which recorded none, served the devices."""
    missing = (disk for disk in spec.disks if disk_id(disk) not in plans)
    return {disk_id(disk): plan(_wish(disk, spec.vcpus), None, 1) for disk in missing} | dict(plans)


def _wish(disk: DiskSpec, vcpus: int) -> Wish:
    per_thread = disk.queues_per_thread
    return Wish(
        device="vhost-user-blk" if disk.backend == "blkd" else disk.bus,
        queues=disk.queue_count(vcpus),
        thread_map=disk.thread_map,
        queues_per_thread=None if per_thread == "auto" else per_thread,
        engine=None if disk.engine == "auto" else disk.engine,
        poll_us=disk.poll_us,
    )


def _plan_blkd(disk: DiskSpec, vcpus: int, offer: Offer) -> DevicePlan:
    wish = _wish(disk, vcpus)
    found = offer.find(wish.device, offer.storage(disk))
    return plan(wish, found, offer.processors)


def _plan_own(disk: DiskSpec, vcpus: int, offer: Offer) -> DevicePlan:
    """A disk that QEMU itself serves."""
    aio = offer.features.aio
    engine = QEMU_AIO.get(disk.engine)
    if engine is not None and aio and engine not in aio:
        raise Unavailable(f"disk {disk.name}: this QEMU has no {engine}", remedy=REMEDY_AIO)
    # What Linux' own asynchronous I/O does beside the page cache is not asynchronous.
    usable = aio if disk.direct else aio - {"native"}
    wish = replace(
        _wish(disk, vcpus),
        engines=usable,
        default_engine="native" if "native" in usable else "threads",
        engine=engine,
    )
    found = offer.find(wish.device, offer.storage(disk))
    planned = plan(wish, found, offer.processors)
    if planned.binding.threads == 1 or disk.bus in offer.features.mapped_devices:
        return planned
    if planned.binding.source == VM_FILE:
        raise Unavailable(
            f"disk {disk.name}: this QEMU cannot bind the queues of a {disk.bus} device to "
            f"{planned.binding.threads} threads, it has no {MAPPING}",
            remedy="install QEMU 9.0 (virtio-blk) or 10.0 (virtio-scsi), or ask for one thread",
        )
    one = Binding((0,) * wish.queues, f"this QEMU has no {MAPPING} for {disk.bus}")
    return replace(planned, binding=one)


def plan_nic(nic: NicSpec, offer: Offer) -> DevicePlan:
    """A network card. Raises Unavailable when it is to have vhost and cannot."""
    engine = _nic_engine(nic, offer)
    if engine.value == "vhost":
        binding = Binding(tuple(range(nic.queues)), "the kernel's threads")
    else:
        binding = Binding((0,) * nic.queues, "QEMU's main loop")
    return DevicePlan("virtio-net", binding, engine)


def _nic_engine(nic: NicSpec, offer: Offer) -> Choice:
    if nic.type == "user":
        return Choice("qemu", "user-mode networking has no other")
    if nic.vhost is not None:
        if nic.vhost and not offer.vhost_net:
            raise Unavailable(
                f"network {nic.tap}: {VHOST_NET} cannot be opened",
                remedy="load the kernel module vhost_net, or leave vhost out",
            )
        return Choice("vhost" if nic.vhost else "qemu", VM_FILE)
    if not offer.vhost_net:
        return Choice("qemu", f"{VHOST_NET} cannot be opened")
    found = offer.find("virtio-net", NO_STORAGE)
    if isinstance(found, Preset) and found.engine in {"vhost", "qemu"}:
        return Choice(found.engine, named(found))
    return Choice("vhost", BUILT_IN)
