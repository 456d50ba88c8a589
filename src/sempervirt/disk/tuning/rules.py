"""Presets for devices that QEMU serves itself, as far as they cannot be measured without a guest.

A rule is no measurement, and each preset says which it is:

- virtio-blk: engine (aio) and polling are measured, with qemu-storage-daemon: the same block layer
  and the same iothread. Its export has one thread, so queues_per_thread is taken from what was
  measured with semper-blkd on this storage: how much a further thread gains is the same question.
- virtio-scsi: the same block layer and iothreads; what holds for virtio-blk is taken over.
- virtio-net: the kernel's vhost gives each pair of queues a thread of its own and does not poll.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sempervirt.core.queue_map import DeviceType
from sempervirt.disk.fingerprint import HostFingerprint
from sempervirt.disk.presets import Engine, Preset
from sempervirt.disk.storage import NO_STORAGE, StorageKey

VHOST_NET = Path("/dev/vhost-net")


def queues_per_thread(measured: Preset | None, queues: int, cpus: int) -> tuple[int, str]:
    """How many queues an iothread of QEMU gets, and why."""
    if measured is not None:
        return measured.queues_per_thread, "queues per thread as measured with semper-blkd"
    return -(
        -queues // min(queues, cpus)
    ), "a thread for each processor, as far as there are queues"


def block_engine(storage: StorageKey) -> tuple[Engine, str]:
    """QEMU's aio where it was not measured."""
    if storage.direct and not storage.in_memory:
        return "native", "aio=native, the usual choice with O_DIRECT"
    return "threads", "aio=threads, QEMU's default for cached images"


def virtio_blk(
    storage: StorageKey,
    measured: Preset | None,
    queues: int,
    host: HostFingerprint,
    now: datetime,
    obstacle: str,
) -> Preset:
    """What to do when `obstacle` keeps QEMU's block layer from being measured."""
    spread, why_spread = queues_per_thread(measured, queues, host.cpus)
    engine, why_engine = block_engine(storage)
    return Preset(
        device="virtio-blk",
        storage=storage,
        engine=engine,
        queues_per_thread=spread,
        poll_us=0,
        source="rule",
        why=f"not measured ({obstacle}): {why_engine}; {why_spread}",
        measured_at=now,
        host=host,
    )


def virtio_scsi(blk: Preset) -> Preset:
    """From that of virtio-blk on the same storage."""
    return blk.model_copy(
        update={
            "device": "virtio-scsi",
            "source": "rule",
            "why": "not measured: as virtio-blk, which has the same block layer and iothreads",
            "figures": (),
        }
    )


def virtio_net(host: HostFingerprint, now: datetime, *, vhost: bool | None = None) -> Preset:
    """Depends on nothing but whether the kernel has vhost."""
    available = VHOST_NET.exists() if vhost is None else vhost
    why = (
        "not measured: the kernel's vhost has a thread for each pair of queues"
        if available
        else "not measured: without vhost, QEMU's main loop serves all queues of all cards"
    )
    device: DeviceType = "virtio-net"
    return Preset(
        device=device,
        storage=NO_STORAGE,
        engine="vhost" if available else "qemu",
        queues_per_thread=1,
        poll_us=0,
        source="rule",
        why=why,
        measured_at=now,
        host=host,
    )
