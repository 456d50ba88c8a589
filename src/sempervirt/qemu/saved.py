"""Saved states: the program semper-saved, which writes and reads the files, and what it answers.

{"version": 1, "spec": {…}, "accelerator": "tcg", "machine": "pc-q35-10.0", "qemu": "10.0.2",
 "plans": {…}, "running": true, "saved": 1795384877.9} is what the agent puts into one about its
VM; the rest, with the states of the disks, is in docs/reference/saved-format.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sempervirt.core.errors import (
    CommandFailed,
    InvalidRequest,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.host import process
from sempervirt.host.answers import Answer, AnswerT, read_answer
from sempervirt.host.programs import find_program

PROGRAM = "semper-saved"
WORK_DEADLINE_S = 600.0
# Exit codes of semper-saved.
_DISK, _UNUSABLE = 3, 4


OnProgress = Callable[[int, int], None]


class Done(Answer):
    """A line while the program works: bytes of memory that are done, `of` how many."""

    done: int
    of: int


class Figures(Answer):
    """The last line of a save: bytes of memory and of the file, pages by how they are kept."""

    memory: int
    file: int
    zero_pages: int
    block_pages: int
    data_pages: int


class Restored(Answer):
    """The last line of a restore: bytes of memory."""

    memory: int


class ShownImage(Answer):
    """A disk of a saved state: its name in the VM, and where its image was."""

    name: str
    path: Path


class ShownState(Answer):
    """What `show` prints: bytes of memory, of the file and of the state of the devices; `vm` is
    what the agent had put there.
    """

    memory: int
    file: int
    state: int
    vm: dict[str, Any]
    images: tuple[ShownImage, ...]


@dataclass(frozen=True)
class Shown:
    """What a saved state says about itself; `images` are the disks' images by name."""

    memory: int
    file: int
    vm: dict[str, Any]
    images: dict[str, Path]


async def save(
    memory_fd: int,
    state: Path,
    vm: Path,
    images: Mapping[str, Path],
    output: Path,
    progress: OnProgress,
) -> Figures:
    """Writes the memory of a paused VM, its devices and its description to `output`.

    `progress` is told the bytes that are done, and of how many. Raises InvalidRequest or
    Unavailable; nothing was changed then.
    """
    return await _run(
        Figures,
        "save",
        f"--memory={_mine(memory_fd)}",
        f"--state={state}",
        f"--vm={vm}",
        f"--output={output}",
        *_images(images),
        progress=progress,
    )


async def restore(
    file: Path,
    memory_fd: int,
    state: Path,
    images: Mapping[str, Path],
    progress: OnProgress,
) -> None:
    """Reads `file` into memory and a file for QEMU; `images` are used in place of its own.

    Raises StateConflict when a disk is in another state, InvalidRequest when the file cannot be
    used, Unavailable.
    """
    await _run(
        Restored,
        "restore",
        f"--file={file}",
        f"--memory={_mine(memory_fd)}",
        f"--state={state}",
        *_images(images),
        progress=progress,
    )


async def show(file: Path) -> Shown:
    """What a saved state says. Raises InvalidRequest when it cannot be used, Unavailable."""
    shown = await _run(ShownState, "show", str(file))
    images = {image.name: image.path for image in shown.images}
    return Shown(shown.memory, shown.file, shown.vm, images)


def _mine(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _images(images: Mapping[str, Path]) -> list[str]:
    return [f"--image={name}={path}" for name, path in images.items()]


async def _run(
    model: type[AnswerT], command: str, *arguments: str, progress: OnProgress | None = None
) -> AnswerT:
    """Runs the program; the last line as `model`, the ones before are progress."""
    lines: list[Any] = []

    def tell(line: str) -> None:
        lines.append(_decoded(line, command))
        if progress is not None and isinstance(lines[-1], dict) and "done" in lines[-1]:
            said = read_answer(Done, lines[-1], PROGRAM, command)
            progress(said.done, said.of)

    try:
        await process.run(
            [find_program(PROGRAM), command, *arguments], timeout_s=WORK_DEADLINE_S, on_line=tell
        )
    except CommandFailed as error:
        raise _told(error) from error
    if not lines:
        raise OutcomeUnknown(f"{PROGRAM} says nothing to {command}")
    return read_answer(model, lines[-1], PROGRAM, command)


def _decoded(line: str, command: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OutcomeUnknown(f"{PROGRAM} says to {command} what is no JSON: {line[:80]}") from error


def _told(error: CommandFailed) -> SempervirtError:
    """What the program said, with its remedy."""
    last = error.tail[-1] if error.tail else ""
    said = last.removeprefix("semper-saved: error: ")
    if error.exit_code == _DISK:
        return StateConflict(
            said, remedy="put the image back that the VM was saved with, or a copy of it"
        )
    if error.exit_code == _UNUSABLE:
        return InvalidRequest(said, remedy="use another saved state")
    if said == last:
        return error
    return Unavailable(said, remedy="name a file that is there, and that the agent may use")
