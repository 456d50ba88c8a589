"""What an agent leaves for the next one about a disk's processes.

{"version": 1, "next_generation": 7, "binary": "…", "restarts": 3,
 "binding": {"map": [0, 0, 1], "source": "…"} | null,
 "image": {"block_device": false, "device": 65025, "inode": 12, "birth_ns": 1795384877123456789,
           "sequence": 0} | null, "epoch_file": "…" | null,
 "processes": [{"role": "active", "generation": 5, "binary": "…", "listen_fd": 9,
                "pid": 4711, "start_ticks": 123456, "boot_id": "…"}, …]}
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from sempervirt.core.queue_map import Binding, check_map
from sempervirt.disk.image import Identity
from sempervirt.host.procfs import ProcessId
from sempervirt.host.records import RecordDamaged, read_record, write_record

VERSION = 1
# Clock ticks since boot, the greatest of the numbers, get there after 348 years.
COUNT_MAX = 1 << 40


class Role(Enum):
    """What a process was for, when the record was written."""

    ACTIVE = "active"
    SPARE = "spare"


@dataclass(frozen=True)
class RecordedProcess:
    """One process of a disk, started from the program `binary` (a token of `disk.program`)."""

    role: Role
    generation: int
    binary: str
    listen_fd: int
    identity: ProcessId


@dataclass(frozen=True)
class DiskRecord:
    """The content of the record. `binding` is what the queues' threads are to be; `image` is which
    file the disk is, and `epoch_file` what stood beside the image when the VM was started.
    """

    next_generation: int
    binary: str
    restarts: int
    processes: tuple[RecordedProcess, ...]
    binding: Binding | None = None
    image: Identity | None = None
    epoch_file: Path | None = None

    def write(self, path: Path) -> None:
        """Replaces the record at `path`."""
        content = asdict(self)
        for item in content["processes"]:
            item.update(item.pop("identity"))
            item["role"] = item["role"].value
        content["epoch_file"] = str(self.epoch_file) if self.epoch_file else None
        write_record(path, VERSION, content)


def read_disk_record(path: Path) -> DiskRecord | None:
    """The record at `path`, None when there is none. Raises RecordDamaged."""
    content = read_record(path, VERSION)
    if content is None:
        return None
    try:
        processes = _processes(content["processes"])
        last = max((one.generation for one in processes), default=0)
        return DiskRecord(
            next_generation=_count(content["next_generation"], last + 1),
            binary=_path(content["binary"]),
            restarts=_count(content["restarts"]),
            processes=processes,
            binding=_binding(content.get("binding")),
            image=_image(content.get("image")),
            epoch_file=Path(_path(kept)) if (kept := content.get("epoch_file")) else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RecordDamaged(
            f"{path} is not the record of a disk: {error!r:.200}",
            remedy="move the file away and start the VM again",
        ) from error


def _binding(item: dict[str, Any] | None) -> Binding | None:
    if item is None:
        return None
    return Binding(check_map([_count(thread) for thread in item["map"]]), str(item["source"]))


def _processes(items: list[dict[str, Any]]) -> tuple[RecordedProcess, ...]:
    found = tuple(_recorded(item) for item in items)
    for what in ("role", "generation", "identity"):
        if len({getattr(item, what) for item in found}) != len(found):
            raise ValueError(f"two processes have the same {what}")
    return found


def _image(item: dict[str, Any] | None) -> Identity | None:
    if item is None:
        return None
    numbers = {key: item[key] for key in ("device", "inode", "birth_ns", "sequence")}
    for key, value in numbers.items():
        if type(value) is not int or not 0 <= value < 1 << 64:
            raise ValueError(f"{key} {value!r:.40} tells of no file")
    if type(item["block_device"]) is not bool:
        raise ValueError("a file or a device?")
    return Identity(item["block_device"], **numbers)


def _recorded(item: dict[str, Any]) -> RecordedProcess:
    return RecordedProcess(
        role=Role(item["role"]),
        generation=_count(item["generation"], 1),
        binary=_path(item["binary"]),
        listen_fd=_count(item["listen_fd"]),
        identity=ProcessId(_count(item["pid"]), _count(item["start_ticks"]), str(item["boot_id"])),
    )


def _count(value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= COUNT_MAX:
        raise ValueError(f"{value!r:.40} is no number from {least} to {COUNT_MAX}")
    return value


def _path(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{value!r:.40} names no file")
    os.fsencode(value)
    return value
