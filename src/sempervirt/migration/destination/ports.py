"""What the driver of a destination reaches the world by. `adapters` has the real ones.

Each call raises SempervirtError when it fails, and ends by itself: none may hang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sempervirt.migration.destination.state import OwnershipSeen
from sempervirt.store.registry import Claim
from sempervirt.vm.phases import Arrival


class Ownership(Protocol):
    """The store, asked about this VM."""

    async def look(self) -> OwnershipSeen:
        """Who owns the VM."""

    async def give_back(self, claim: Claim | None) -> None:
        """Frees the VM: it has ended here."""


class Guest(Protocol):
    """QEMU here, its disks and this end of the wire."""

    async def take_images(self, claim: Claim) -> None:
        """Puts the claim on record at the images and gives it to the backends. Raises StaleClaim
        when the images know of a newer one.
        """

    async def run(self) -> None:
        """Lets the guest run, or leaves it paused as it was at the source."""

    async def end(self, because: str) -> None:
        """Ends QEMU, and waits until the disks are free."""

    async def end_wire(self) -> None:
        """Ends this end of the wire, whatever it does."""

    async def forget(self) -> None:
        """Drops the VM, with its logs."""


class Record(Protocol):
    """What the next agent is told."""

    def write(self, phase: Arrival) -> bool:
        """Notes how far the VM is; whether that is on record."""

    def end(self) -> None:
        """The VM is here, or has ended here: it does not come any more."""


@dataclass(frozen=True)
class Ports:
    """All of them."""

    ownership: Ownership
    guest: Guest
    record: Record
