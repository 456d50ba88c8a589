"""What the living backends of a disk tell by themselves, where its record is damaged or gone.

Their arguments say how they were started, and each answers whether it has the image. A backend
that does not answer is not taken for the active one while another one is.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sempervirt.core.errors import NotFound, SempervirtError
from sempervirt.core.queue_map import Binding
from sempervirt.disk.backend import BackendCommand, Launch
from sempervirt.disk.client import BackendClient
from sempervirt.disk.record import DiskRecord, RecordedProcess, Role, read_disk_record
from sempervirt.disk.running import DiskFiles
from sempervirt.host.procfs import PROC, ProcessId, arguments_of
from sempervirt.host.records import RecordDamaged, RecordNewer, move_aside

log = logging.getLogger(__name__)

_GENERATION = re.compile(r"disk-.*-(\d{1,12})\.(?:ctl|log)")
_DESCRIPTOR = re.compile(r"/proc/self/fd/(\d+)")
SOURCE = "as its processes were started"


@dataclass(frozen=True)
class _Witness:
    identity: ProcessId
    generation: int
    launch: Launch
    holds_image: bool | None = None


async def record_of(
    path: Path, files: DiskFiles, command: BackendCommand
) -> tuple[DiskRecord | None, str]:
    """The record of a disk, and why it was made anew from what lives; "" when it is sound.

    A damaged record is moved aside. Raises RecordNewer for the record of a later release.
    """
    try:
        record = await asyncio.to_thread(read_disk_record, path)
    except RecordNewer:
        raise
    except RecordDamaged as error:
        aside = await asyncio.to_thread(move_aside, path)
        why = error.message + (f" (now {aside.name})" if aside else "")
    else:
        if record is not None:
            return record, ""
        why = f"{path} is gone"
    log.warning("adopt disk=%s its record is made anew: %s", files.disk, why)
    return await testimony(files, command), why


async def launch_of(files: DiskFiles, command: BackendCommand) -> Launch:
    """How the disk's backends were started. Raises NotFound when none lives."""
    witnesses = await asyncio.to_thread(_witnesses, files, command)
    if not witnesses:
        raise NotFound(f"no backend of disk {files.disk} lives that tells how it was started")
    return witnesses[-1].launch


def _with_image(launch: Launch, pid: int) -> Launch:
    """With the image's own path, in place of that of a descriptor of the process."""
    number = _DESCRIPTOR.fullmatch(str(launch.options.image))
    if number is None:
        return launch
    try:
        image = (PROC / str(pid) / "fd" / number[1]).readlink()
    except OSError as error:
        raise ValueError(f"its image cannot be told: {error.strerror}") from error
    path = Path(str(image).removesuffix(" (deleted)"))
    return replace(launch, options=replace(launch.options, image=path))


async def testimony(files: DiskFiles, command: BackendCommand) -> DiskRecord | None:
    """A record of what lives; None when nothing does and nothing ever did."""
    found = await asyncio.to_thread(_witnesses, files, command)
    found = list(await asyncio.gather(*(_asked(files, witness) for witness in found)))
    last = max([*(one.generation for one in found), *_generations(files.logs())], default=0)
    if last == 0:
        return None
    # Who has the image comes first, then who does not tell, the eldest of these before others.
    order = {True: 0, None: 1, False: 2}
    found.sort(key=lambda one: (order[one.holds_image], one.launch.wait_for_lock, one.generation))
    roles = (Role.ACTIVE, Role.SPARE)
    newest = found[0].launch if found else None
    thread_map = newest.thread_map if newest else None
    return DiskRecord(
        next_generation=last + 1,
        binary=(newest.binary if newest else command.binary()) + "#",
        restarts=0,
        processes=tuple(_recorded(role, one) for role, one in zip(roles, found, strict=False)),
        binding=Binding(thread_map, SOURCE) if thread_map else None,
        epoch_file=newest.title.epoch_file if newest and newest.title else None,
    )


def _recorded(role: Role, one: _Witness) -> RecordedProcess:
    launch = one.launch
    return RecordedProcess(
        role, one.generation, f"{launch.binary}#", launch.listen_fd, one.identity
    )


def _witnesses(files: DiskFiles, command: BackendCommand) -> list[_Witness]:
    found = []
    for identity in files.find_identities():
        try:
            launch = command.read_argv(arguments_of(identity.pid))
            launch = _with_image(launch, identity.pid)
        except ValueError as error:
            log.warning("adopt disk=%s pid=%d %s", files.disk, identity.pid, error)
            continue
        generations = _generations([launch.control])
        if generations and identity.is_alive():
            found.append(_Witness(identity, generations[0], launch))
    return sorted(found, key=lambda one: one.generation)


async def _asked(files: DiskFiles, one: _Witness) -> _Witness:
    try:
        status = await BackendClient(files.control(one.generation), one.identity.pid).status()
    except SempervirtError as error:
        log.warning("adopt disk=%s pid=%d %s", files.disk, one.identity.pid, error)
        return one
    return _Witness(one.identity, one.generation, one.launch, status.owns_image)


def _generations(paths: Sequence[Path]) -> list[int]:
    return [int(match[1]) for path in paths if (match := _GENERATION.fullmatch(path.name))]
