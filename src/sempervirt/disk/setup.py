"""What a disk is made from; none of it changes while the disk exists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sempervirt.disk.backend import BackendCommand, DiskOptions
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.supervised import Policy
from sempervirt.disk.volume import Volume


@dataclass(frozen=True)
class DiskSetup:
    """`name` is VM/DISK; `record` is the file that the next agent adopts the disk from."""

    name: str
    volume: Volume
    options: DiskOptions
    command: BackendCommand
    policy: Policy
    files: DiskFiles
    record: Path
