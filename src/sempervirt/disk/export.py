"""A snapshot of a disk as one image of its own: raw, or qcow2 by qemu-img.

semper-blkd writes the raw image (crates/blkd/src/export.rs); the disk is served meanwhile, and its
guest notices nothing but the reads. The file is complete and durable, or not there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sempervirt.core.errors import (
    CommandFailed,
    InvalidRequest,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.disk.answers import Layer, LayerState
from sempervirt.disk.driver import Disk
from sempervirt.disk.image import ImageState
from sempervirt.disk.image_format import ImageFormat
from sempervirt.disk.target import put_in_place, require_free
from sempervirt.host import process
from sempervirt.host.answers import Answer, read_answer
from sempervirt.host.storage_call import call_storage

log = logging.getLogger(__name__)

# For copying a disk; whoever waits longer has a storage problem.
EXPORT_DEADLINE_S = 12 * 3600.0
_PROGRAM = "semper-blkd"


class Exported(Answer):
    """The last line of `semper-blkd --export`: bytes of the disk, and those that are not zeros."""

    size_bytes: int
    data_bytes: int


@dataclass(frozen=True)
class Made:
    """The image at `path`; `data_bytes` are not zeros."""

    path: Path
    format: ImageFormat
    size_bytes: int
    data_bytes: int


async def export(
    disk: Disk,
    snapshot: int,
    target: Path,
    image_format: ImageFormat,
    progress: Callable[[int, int], None],
) -> Made:
    """Writes a snapshot of `disk` to `target`, where nothing may be.

    `progress` is told the bytes that are done, of how many. Raises InvalidRequest, StateConflict,
    Unavailable: nothing is at `target` then. Raises OutcomeUnknown when the disk is not served.
    """
    await disk.look_at_image()
    finding = disk.image.finding
    if finding.state not in {ImageState.IN_PLACE, ImageState.GROWN}:
        raise StateConflict(finding.cause, remedy=finding.remedy)
    await _require_there(disk, snapshot)
    await call_storage(target, partial(require_free, target))
    reader = f"export-{secrets.token_hex(4)}"
    raw = target if image_format is ImageFormat.RAW else _beside(target, f"{reader}.raw")
    try:
        program = disk.setup.command.binary()
        source = Source(program, str(disk.image.path), disk.name)
        done = await write_snapshot(source, snapshot, reader, raw, progress)
        if image_format is ImageFormat.QCOW2:
            await _convert(raw, target, reader)
    finally:
        leftovers = [_beside(raw, f"{reader}.partial"), _beside(target, f"{reader}.qcow2")]
        leftovers += [raw] if raw != target else []
        for path in leftovers:
            with contextlib.suppress(OSError, Unavailable):
                await call_storage(path, partial(path.unlink, missing_ok=True))
        await _forget(disk, snapshot, reader)
    return Made(target, image_format, done.size_bytes, done.data_bytes)


async def _require_there(disk: Disk, snapshot: int) -> Layer:
    layers = (await disk.active().layers()).layers
    found = next((layer for layer in layers if layer.id == snapshot), None)
    if found is None or found.state is LayerState.OPENED:
        there = ", ".join(str(one.id) for one in layers if one.state is LayerState.SEALED)
        raise InvalidRequest(
            f"disk {disk.name} has no snapshot {snapshot}",
            remedy=f"there are: {there}"
            if there
            else f"take one: semper disk snapshot {disk.name.partition('/')[0]}",
        )
    return found


@dataclass(frozen=True)
class Source:
    """An image that this host or another one serves as the disk `name`; `program` reads it."""

    program: str
    image: str
    name: str


async def write_snapshot(
    source: Source,
    snapshot: int,
    reader: str,
    target: Path,
    progress: Callable[[int, int], None],
) -> Exported:
    """Has semper-blkd write a snapshot to a raw image. Raises Unavailable. A `reader` that died
    holds the snapshot.
    """
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            match json.loads(line):
                case {"done": int(done), "total": int(total)}:
                    progress(done, total)
                case _:
                    pass

    argv = [source.program, f"--blk-file={source.image}", f"--snapshot={snapshot}"]
    argv += [f"--reader={reader}", f"--export={target}"]
    try:
        await process.run(argv, timeout_s=EXPORT_DEADLINE_S, on_line=tell)
    except CommandFailed as error:
        last = error.tail[-1] if error.tail else str(error)
        raise Unavailable(
            f"snapshot {snapshot} of disk {source.name} was not exported: "
            f"{last.removeprefix(f'{_PROGRAM}: error: ')}"
        ) from error
    try:
        told = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        told = None
    return read_answer(Exported, told, _PROGRAM, "export")


async def _convert(raw: Path, target: Path, reader: str) -> None:
    program = shutil.which("qemu-img")
    if program is None:
        raise Unavailable("qemu-img is not installed", remedy="install qemu-utils, or export raw")
    made = _beside(target, f"{reader}.qcow2")
    argv = [program, "convert", "-f", "raw", "-O", "qcow2", str(raw), str(made)]
    await process.run(argv, timeout_s=EXPORT_DEADLINE_S)

    def put() -> None:
        with made.open("rb") as file:
            os.fsync(file.fileno())
        put_in_place(made, target)

    try:
        await call_storage(target, put, EXPORT_DEADLINE_S)
    except OSError as error:
        raise Unavailable(f"{target} cannot be made: {error.strerror}") from error


async def _forget(disk: Disk, snapshot: int, reader: str) -> None:
    """The reader of a process that died holds its snapshot."""
    try:
        await disk.active().unpin(snapshot, reader)
    except SempervirtError as error:
        log.warning(
            "export disk=%s the snapshot %d may be held by %s: %s; semper disk unpin frees it",
            disk.name,
            snapshot,
            reader,
            error,
        )


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")
