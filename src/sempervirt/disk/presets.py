"""Presets: how the queues of a type of device are best served on one kind of storage.

Written by `semper disk tune`, used when a VM starts:

    store = PresetStore(config.state_dir)
    match store.find("vhost-user-blk", storage_key(image, direct=False), await fingerprint(blkd)):
        case Preset() as preset: …          # preset.engine, preset.threads_for(queues), …
        case Stale(reason=reason): …        # warn; use the built-in default
        case None: …                        # never tuned: the built-in default

STATE_DIR/presets.json, version 1, written atomically:

    {"version": 1, "presets": [{"device": "vhost-user-blk",
      "storage": {"kind": "ext4", "device": "vda", "direct": true},
      "engine": "uring", "queues_per_thread": 2, "poll_us": 0,
      "source": "measured", "why": "…", "figures": [{"load": "4k-d1", …}, …],
      "measured_at": "2026-11-23T00:41:00Z", "host": {"cpu": "…", …}}, …]}

Nothing that this release cannot read is ever lost: an entry that it does not understand is
carried along, a damaged file is moved aside before a new one is written, and a file of a later
release is not touched.

A preset that was measured on another machine, kernel or program is *stale*. It is not applied: it
was the best of candidates that may now behave differently, and the built-in default is safe. The
remedy is to tune again, which takes a minute.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sempervirt.core.errors import Unavailable
from sempervirt.core.queue_map import DeviceType
from sempervirt.disk.fingerprint import HostFingerprint
from sempervirt.disk.storage import StorageKey
from sempervirt.host.records import RecordDamaged, RecordNewer, read_record, write_record

log = logging.getLogger(__name__)

VERSION = 1
FILE = "presets.json"
REMEDY = "tune again: semper disk tune"

Engine = Literal[
    # of semper-blkd
    "sync", "nowait", "uring", "mmap",
    # of QEMU's block layer (aio=)
    "threads", "native", "io_uring",
    # of a network card: the kernel's vhost threads, or QEMU's main loop
    "vhost", "qemu",
]  # fmt: skip
Source = Literal["measured", "partly", "rule"]

_HOST = ("cpu", "cpus", "kernel")
_DEPENDS_ON: dict[DeviceType, tuple[str, ...]] = {
    "vhost-user-blk": (*_HOST, "blkd"),
    "virtio-blk": (*_HOST, "qemu"),
    "virtio-scsi": (*_HOST, "qemu"),
    "virtio-net": (*_HOST, "qemu"),
}


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoadFigures(_Entry):
    """Medians over the rounds of one load; CPU is the backend's."""

    load: str
    iops: float
    p99_us: float
    cpu_us_per_request: float


class Preset(_Entry):
    """`source` tells what was really measured: all of it, some ("partly"), or nothing ("rule").

    `why` is a sentence for people. `figures` are those of the choice, none of a rule.
    """

    device: DeviceType
    storage: StorageKey
    engine: Engine
    queues_per_thread: int = Field(ge=1)
    poll_us: int = Field(ge=0)
    source: Source
    why: str
    figures: tuple[LoadFigures, ...] = ()
    measured_at: datetime
    host: HostFingerprint

    def threads_for(self, queues: int) -> int:
        """How many threads serve that many queues."""
        return -(-queues // self.queues_per_thread)

    def stale_because(self, host: HostFingerprint) -> str:
        """What has changed since the preset was measured, or an empty string."""
        return "; ".join(self.host.differences(host, _DEPENDS_ON[self.device]))


@dataclass(frozen=True)
class Stale:
    """A preset that no longer holds; `reason` says what changed."""

    preset: Preset
    reason: str


@dataclass(frozen=True)
class Contents:
    """What a file held: what was understood, warnings about the rest, and the rest itself."""

    presets: tuple[Preset, ...] = ()
    warnings: tuple[str, ...] = ()
    foreign: tuple[Any, ...] = field(default=(), repr=False)


class PresetStore:
    """The presets of a state directory."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / FILE

    def read(self) -> Contents:
        """All that can be read. Never fails: what is wrong stands in the warnings."""
        try:
            return self._read()
        except RecordDamaged as error:
            return Contents(warnings=(f"no preset is used: {error}",))

    def find(
        self, device: DeviceType, storage: StorageKey, host: HostFingerprint
    ) -> Preset | Stale | None:
        """The preset for a device on a storage, if there is one and it holds on `host`.

        What could not be read, and a preset that is stale, is logged as a warning.
        """
        contents = self.read()
        for warning in contents.warnings:
            log.warning("presets %s", warning)
        for preset in contents.presets:
            if (preset.device, preset.storage) == (device, storage):
                reason = preset.stale_because(host)
                if not reason:
                    return preset
                log.warning(
                    "preset stale device=%s storage=%s reason=%s remedy=%s",
                    device, storage, reason, REMEDY,
                )  # fmt: skip
                return Stale(preset, reason)
        return None

    def check(self) -> None:
        """Whether `put` could work. Raises RecordNewer, RecordDamaged or Unavailable."""
        with self._locked(), contextlib.suppress(_Garbled):
            self._read()

    def put(self, presets: Sequence[Preset]) -> list[str]:
        """Adds presets, in place of those for the same device and storage; returns warnings.

        Raises RecordNewer for the file of a later release, RecordDamaged for one that may not be
        read, Unavailable when it cannot be written. The file is as it was then.
        """
        with self._locked():
            warnings: list[str] = []
            try:
                before = self._read()
            except _Garbled as error:
                aside = self._move_aside()
                warnings.append(f"{error.message}; it was moved to {aside}")
                before = Contents()
            new = {(preset.device, preset.storage) for preset in presets}
            kept = [p for p in before.presets if (p.device, p.storage) not in new]
            entries = [p.model_dump(mode="json") for p in (*kept, *presets)]
            try:
                write_record(
                    self.path, VERSION, {"presets": [*entries, *before.foreign]}, durable=True
                )
            except OSError as error:
                raise self._unwritable(error) from error
            return warnings

    def _read(self) -> Contents:
        try:
            record = read_record(self.path, VERSION)
        except RecordNewer:
            raise
        except RecordDamaged as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise _Garbled(error.message, remedy=REMEDY) from error
        if record is None:
            return Contents()
        entries = record.get("presets")
        if not isinstance(entries, list):
            raise _Garbled(f"{self.path} has no list of presets", remedy=REMEDY)
        presets: list[Preset] = []
        foreign: list[Any] = []
        for entry in entries:
            try:
                presets.append(Preset.model_validate(entry))
            except ValidationError:
                foreign.append(entry)
        warning = f"{len(foreign)} of {len(entries)} presets in {self.path} are not understood"
        return Contents(tuple(presets), (warning,) if foreign else (), tuple(foreign))

    def _move_aside(self) -> Path:
        number = 1
        while (aside := self.path.with_name(f"{FILE}.damaged-{number}")).exists():
            number += 1
        return self.path.rename(aside)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; released by the kernel when the process ends."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = self.path.with_name(f".{FILE}.lock").open("a")
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _unwritable(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"{self.path} cannot be written: {error.strerror}",
            remedy="make room, or choose another place by SEMPERVIRT_STATE_DIR",
        )


class _Garbled(RecordDamaged):
    """The file is no record at all: cut off, overwritten, or written by something else."""
