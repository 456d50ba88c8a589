"""What take-overs have lost: writes of the VM before, after the snapshot of the standby.

    STATE/lost/NAME.json
    {"version": 1, "losses": [{"standby": 3, "ended": 1795384877.9, "since": 1795384300.1,
                               "disks": [{"disk": "root", "image": "/srv/web.raw.standby-2"}]}, …]}

The images are left as they are, layers and all, for KEPT_S: nobody writes them any more, and what
they hold can be read (`semper-blkd --export`). After that what a standby had of its own is
removed; an image that was the VM's own before any standby took over is its owner's, and stays. A
disk that was handed over has lost nothing, and is not among them. The newest LOSSES_MAX are
remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sempervirt.core.errors import SempervirtError
from sempervirt.host.records import (
    RecordDamaged,
    make_directory,
    read_record,
    remove_record,
    write_record,
)
from sempervirt.host.storage_call import call_storage

log = logging.getLogger(__name__)

VERSION = 1
KEPT_S = 7 * 86400.0
LOSSES_MAX = 64
# A clock that has jumped so far removes nothing.
WRONG_CLOCK_S = 10 * 365 * 86400.0
# So long after the end of a VM the last of it may be written to its images.
AGAIN_S = 600.0
# What an image of a standby is called, and no other one is.
OF_A_STANDBY = re.compile(r"\.standby-\d+$")


@dataclass(frozen=True)
class LostDisk:
    """A disk as the VM before has left it."""

    disk: str
    image: Path


@dataclass(frozen=True)
class Loss:
    """Of one take-over, by the standby of number `standby`: what was written from `since` to
    `ended`, both in seconds since the epoch.
    """

    standby: int
    since: float
    ended: float
    disks: tuple[LostDisk, ...]

    @property
    def kept_until(self) -> float:
        """When what is left may be removed."""
        return self.ended + KEPT_S


_LOSSES = TypeAdapter(tuple[Loss, ...])


@dataclass(frozen=True)
class LossRecord:
    """The record of one VM's losses at `path`."""

    path: Path

    def read(self) -> tuple[Loss, ...]:
        """The losses, the oldest first. Raises RecordDamaged."""
        content = read_record(self.path, VERSION)
        if content is None:
            return ()
        try:
            return _LOSSES.validate_python(content["losses"])
        except (KeyError, ValidationError, RecursionError) as error:
            raise RecordDamaged(
                f"{self.path} is not the record of what take-overs have lost: {error}"[:300],
                remedy="move the file away; the images that it names are left as they are",
            ) from error

    def add(self, loss: Loss) -> None:
        """Notes one more, once; it outlives the host. Raises RecordDamaged, OSError."""
        losses = self.read()
        if loss not in losses:
            self._write((*losses, loss)[-LOSSES_MAX:])

    def drop(self, gone: Sequence[Loss]) -> None:
        """Forgets those. Raises RecordDamaged, OSError."""
        self._write(tuple(loss for loss in self.read() if loss not in gone))

    def _write(self, losses: Sequence[Loss]) -> None:
        if not losses:
            remove_record(self.path)
            return
        make_directory(self.path.parent, 0o700)
        content = {"losses": _LOSSES.dump_python(tuple(losses), mode="json")}
        write_record(self.path, VERSION, content, durable=True)


async def drop_lost(state_dir: Path, used: Container[Path], now: float) -> None:
    """Forgets what take-overs of all VMs have lost when it has been kept long enough, and removes
    what standbys had of their own, also those that were forgotten; no image that is `used`. A clock
    that has jumped removes nothing, and what cannot be removed stays until the next time.
    """
    for path in await asyncio.to_thread(lambda: sorted((state_dir / "lost").glob("*.json"))):
        record = LossRecord(path)
        try:
            losses = await asyncio.to_thread(record.read)
        except RecordDamaged as error:
            log.error("standby %s", error)  # noqa: TRY400
            continue
        old = [loss for loss in losses if KEPT_S <= now - loss.ended < WRONG_CLOCK_S]
        try:
            for image, ended in [(disk.image, loss.ended) for loss in old for disk in loss.disks]:
                if image not in used:
                    await call_storage(image, partial(_remove_old, image, ended))
            if old:
                await asyncio.to_thread(record.drop, old)
        except (OSError, SempervirtError) as error:
            log.warning("standby lost=%s is not removed: %s", path.stem, error)


def _remove_old(image: Path, ended: float) -> None:
    """Not one that somebody has begun to use again after that: it may be a VM's that is not known
    here.
    """
    if not OF_A_STANDBY.search(image.name):  # a record that is damaged may name anything
        return
    for file in (image, *image.with_name(f"{image.name}.layers").glob("*")):
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime > ended + AGAIN_S:
                log.warning("standby lost=%s was written to since: it stays", image)
                return
    remove_image(image)


def remove_image(image: Path) -> None:
    """Removes an image that a standby had, with what stands beside it; no other one. Raises
    OSError.
    """
    if not OF_A_STANDBY.search(image.name):
        return
    # Beside the image itself: a link that somebody has put in its place leads to another one's.
    for path in (image, image.with_name(f"{image.name}.epoch")):
        path.unlink(missing_ok=True)
    shutil.rmtree(image.with_name(f"{image.name}.layers"), ignore_errors=True)


def losses_of(state_dir: Path, vm: str) -> LossRecord:
    """The record of a VM."""
    return LossRecord(state_dir / "lost" / f"{vm}.json")
