"""What a calibration has to do, found out before anything is written."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sempervirt.core.errors import InvalidRequest
from sempervirt.core.queue_map import DeviceType
from sempervirt.disk.fingerprint import HostFingerprint, fingerprint
from sempervirt.disk.presets import PresetStore
from sempervirt.disk.storage import StorageKey, storage_key
from sempervirt.disk.tuning import driver, plan
from sempervirt.disk.tuning.bounds import SECONDS, Bounds
from sempervirt.disk.tuning.candidates import Candidate, blkd_candidates, qemu_candidates
from sempervirt.disk.tuning.load import PROGRAM, Load, loads
from sempervirt.disk.tuning.report import (
    PlannedRace,
    PlannedStorage,
    PresetList,
    PresetView,
    TunePlan,
)
from sempervirt.disk.tuning.scratch import check_room
from sempervirt.disk.tuning.served import Blkd, QemuStorageDaemon, Server, check_unused
from sempervirt.host import process
from sempervirt.host.programs import find_program

DEVICES: tuple[DeviceType, ...] = ("vhost-user-blk", "virtio-blk", "virtio-scsi", "virtio-net")
STORAGE_DAEMON = "qemu-storage-daemon"
SIZE_BYTES = 256 << 20
SIZE_LEAST, SIZE_MOST = 8 << 20, 16 << 30
_QUEUES = 4
_VERSION = re.compile(r"version (\d+\.\d+\.\d+)")
_DEADLINE_S = 10.0


@dataclass(frozen=True)
class Request:
    """What was asked for. `direct` None: both ways where there are two.

    `seconds` is for each storage. `queues` None: as many as there are processors, 2 to 4.
    `limit` is for tests: keeps the candidates that it approves of.
    """

    targets: Sequence[Path]
    blkd: str
    qemu: str | None
    state_dir: Path
    devices: Sequence[DeviceType] = DEVICES
    direct: bool | None = None
    queues: int | None = None
    seconds: float = SECONDS
    size_bytes: int = SIZE_BYTES
    bounds: Bounds = field(default_factory=Bounds)
    limit: Callable[[Candidate], bool] = lambda _candidate: True


@dataclass(frozen=True)
class Heat:
    """A race to come."""

    device: DeviceType
    server: Server
    candidates: Sequence[Candidate]

    def turns(self) -> int:
        count = len(self.candidates)
        return plan.turns(count, plan.stages(count))


@dataclass(frozen=True)
class Site:
    """A storage to come."""

    storage: StorageKey
    where: Path
    block_device: bool
    loads: Sequence[Load]
    heats: Sequence[Heat]
    obstacle: str

    def seconds(self, heat: Heat, budget_s: float) -> float:
        """The share of the time that a race gets; no more than it can use."""
        share = budget_s * heat.turns() / sum(each.turns() for each in self.heats)
        longest = len(self.loads) * plan.LONGEST_S + driver.OVERHEAD_S
        return min(share, heat.turns() * longest)


@dataclass(frozen=True)
class Prepared:
    """A calibration that may begin."""

    request: Request
    host: HostFingerprint
    queues: int
    load_program: str
    sites: Sequence[Site]

    def plan(self) -> TunePlan:
        """What would be measured."""
        planned = tuple(self._planned(site) for site in self.sites)
        return TunePlan(
            host=self.host,
            storages=planned,
            seconds=round(sum(race.seconds for site in planned for race in site.races), 1),
        )

    def _planned(self, site: Site) -> PlannedStorage:
        races = []
        for device in self.request.devices:
            heat = next((heat for heat in site.heats if heat.device == device), None)
            races.append(
                PlannedRace(
                    device=device,
                    candidates=tuple(str(c) for c in heat.candidates) if heat else (),
                    loads=tuple(load.name for load in site.loads) if heat else (),
                    seconds=round(site.seconds(heat, self.request.seconds), 1) if heat else 0,
                    note="" if heat else "by rule",
                )
            )
        scratch = 0 if site.block_device or not site.heats else self.request.size_bytes
        return PlannedStorage(
            storage=site.storage,
            where=site.where,
            read_only=site.block_device,
            scratch_bytes=scratch,
            races=tuple(races),
        )


async def show(state_dir: Path, blkd: str, qemu: str | None) -> PresetList:
    """The stored presets, and whether they hold on this host."""
    store = PresetStore(state_dir)
    contents = store.read()
    host = await fingerprint(blkd, await qemu_version(qemu))
    return PresetList(
        path=store.path,
        host=host,
        presets=tuple(
            PresetView(preset=preset, stale=preset.stale_because(host))
            for preset in contents.presets
        ),
        warnings=contents.warnings,
    )


async def qemu_version(qemu: str | None) -> str:
    """The version as QEMU's monitor gives it ("10.0.2"); empty if there is no QEMU."""
    if qemu is None:
        return ""
    answer = await process.run([qemu, "--version"], timeout_s=_DEADLINE_S)
    found = _VERSION.search(answer.stdout)
    return found[1] if found else ""


async def prepare(request: Request) -> Prepared:
    """Looks at everything, and writes nothing.

    Raises what would make a calibration pointless: an image in use or that is none, too little
    room, a program that is missing.
    """
    if not request.targets:
        raise InvalidRequest(
            "no storage is named", remedy="name an image, or the directory that images lie in"
        )
    load_program = find_program(PROGRAM)
    host = await fingerprint(request.blkd, await qemu_version(request.qemu))
    queues = request.queues or min(_QUEUES, max(2, host.cpus))
    obstacle = "" if shutil.which(STORAGE_DAEMON) else f"{STORAGE_DAEMON} is not installed"
    sites: dict[StorageKey, Site] = {}
    with tempfile.TemporaryDirectory(prefix="semper-tune-") as folder:
        for target in request.targets:
            where, is_device = await _look(request, target, Path(folder))
            for storage in _storages(target, request.direct):
                site = _site(request, storage, where, queues, host, obstacle, is_device=is_device)
                sites.setdefault(storage, site)
    for site in sites.values():
        if site.heats and not site.block_device:
            check_room(site.where, request.size_bytes)
    return Prepared(request, host, queues, load_program, list(sites.values()))


async def _look(request: Request, target: Path, folder: Path) -> tuple[Path, bool]:
    """(directory or block device to measure on, whether it is the latter)."""
    try:
        mode = os.stat(target).st_mode  # noqa: PTH116
    except OSError as error:
        raise InvalidRequest(
            f"{target} cannot be looked at: {error.strerror}",
            remedy="name an image or a directory that exists",
        ) from error
    if stat.S_ISDIR(mode):
        return target, False
    await check_unused(request.blkd, target, folder, read_only=not os.access(target, os.W_OK))
    return (target, True) if stat.S_ISBLK(mode) else (target.parent, False)


def _storages(target: Path, direct: bool | None) -> list[StorageKey]:
    cached = storage_key(target, direct=False)
    if cached.in_memory:
        if direct:
            raise InvalidRequest(
                f"{target} lies in memory: there is no page cache to go around",
                remedy="leave out --direct",
            )
        return [cached]
    both = [cached, cached.model_copy(update={"direct": True})]
    return both if direct is None else [both[int(direct)]]


def _site(
    request: Request,
    storage: StorageKey,
    where: Path,
    queues: int,
    host: HostFingerprint,
    obstacle: str,
    *,
    is_device: bool,
) -> Site:
    heats = []
    if "vhost-user-blk" in request.devices:
        candidates = [c for c in blkd_candidates(storage, queues, host.cpus) if request.limit(c)]
        heats.append(Heat("vhost-user-blk", Blkd(request.blkd), candidates))
    if {"virtio-blk", "virtio-scsi"} & set(request.devices) and not obstacle:
        candidates = [c for c in qemu_candidates(storage, queues) if request.limit(c)]
        heats.append(Heat("virtio-blk", QemuStorageDaemon(STORAGE_DAEMON), candidates))
    cached_on_disk = not storage.in_memory and not storage.direct
    return Site(
        storage=storage,
        where=where,
        block_device=is_device,
        loads=loads(cached_on_disk=cached_on_disk, read_only=is_device),
        heats=heats,
        obstacle=obstacle,
    )
