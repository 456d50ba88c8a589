"""What both ends of a migration see."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Side(Enum):
    """Whom evidence names as the VM's owner."""

    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True)
class Loaded:
    """The destination has everything that QEMU sent; in precopy that is a promise to wait."""


@dataclass(frozen=True)
class StreamFailed:
    """The stream between the two QEMUs broke."""

    reason: str


@dataclass(frozen=True)
class NotRecorded:
    """The step that was to follow could not be written down, so it was not taken."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""
