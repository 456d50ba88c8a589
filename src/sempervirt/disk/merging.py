"""Layers merged into the image of a disk that nobody serves, by `semper-blkd --merge`.

The program takes the image's lock, and goes on with what another one has begun: the record beside
the image says how far that was (docs/design/snapshots.md).
"""

from __future__ import annotations

import json
from pathlib import Path

from sempervirt.core.errors import CommandFailed, ImageLocked, StateConflict, Unavailable
from sempervirt.disk.backend import PROGRAM, BackendCommand, ImageTitle
from sempervirt.disk.running import DiskFiles
from sempervirt.host import process
from sempervirt.host.answers import Answer, read_answer

# For copying a disk; whoever waits longer has a storage problem.
MERGE_DEADLINE_S = 12 * 3600.0
# What `how` is, but for the number of the newest snapshot that is given up.
ALL, UNWANTED = "all", "unwanted"
# Exit codes of semper-blkd.
_CONFLICT, _UNUSABLE = 3, 4


class Merged(Answer):
    """The last line of `semper-blkd --merge`: the layers that are in the image now, and how many
    are left above it.
    """

    merged: tuple[int, ...]
    layers: int


def has_layers(image: Path) -> bool:
    """Whether something stands where the record of the layers of `image` would. Raises OSError."""
    real = image.resolve()
    return real.with_name(f"{real.name}.layers").joinpath("record").exists()


async def merge_image(
    name: str,
    command: BackendCommand,
    image: Path,
    files: DiskFiles,
    title: ImageTitle | None,
    how: str,
) -> Merged:
    """Merges layers of the disk `name`, VM/DISK, whose image nobody serves.

    `how`: ALL, UNWANTED, or the number of a snapshot, which is given up with all before it. `files`
    are those that the disk was served with, `title` by what right its image is written.

    Raises ImageLocked when it is served, StateConflict when a snapshot is read or the image has
    another holder, Unavailable: what was not merged is there as before.
    """
    argv = [command.binary(), f"--blk-file={image}", f"--merge={how}"]
    argv += [f"--layer-map={files.layer_map}", *(title.argv() if title else [])]
    try:
        done = await process.run(argv, timeout_s=MERGE_DEADLINE_S)
    except CommandFailed as error:
        last = error.tail[-1] if error.tail else str(error)
        said, _, remedy = last.removeprefix(f"{PROGRAM}: error: ").rpartition("; ")
        message = f"the layers of disk {name} were not merged: {said or remedy}"
        kind = StateConflict if error.exit_code == _UNUSABLE else Unavailable
        kind = ImageLocked if error.exit_code == _CONFLICT else kind
        raise kind(message, remedy=remedy if said else "") from error
    lines = done.stdout.splitlines()
    try:
        told = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        told = None
    return read_answer(Merged, told, PROGRAM, "merge")
