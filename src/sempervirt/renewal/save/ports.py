"""What the driver of a save reaches the world by; see `renewal.ports`.

A save that another agent has left has no `attempt`: such a save goes back or forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sempervirt.qemu.saved import Figures
from sempervirt.renewal import ports


class Attempt(ports.Guest, Protocol):
    """The guest, and the program that writes saved states."""

    async def pack(self) -> Figures:
        """Writes memory, devices and description to the file, which is durable then."""

    def stop_packing(self) -> None:
        """Has `pack` fail soon, with Unavailable."""


class Back(ports.WayBack, Protocol):
    """QEMU, once the save has failed or the file is durable."""

    async def end(self) -> None:
        """Kills QEMU, and waits for its end. Raises OutcomeUnknown."""

    async def free(self) -> None:
        """Waits until the disks are free. Raises OutcomeUnknown when a backend does not end."""


@dataclass(frozen=True)
class Ports:
    """All of them."""

    back: Back
    record: ports.Record
    attempt: Attempt | None = None
