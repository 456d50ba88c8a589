"""What the driver of a restore reaches the world by; see `renewal.ports`.

A restore that another agent has left has no `attempt`: QEMU is ended, or the guest runs on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sempervirt.renewal import ports


class Attempt(Protocol):
    """QEMU, which waits for a state, and the program that reads saved states."""

    async def hold(self) -> bool:
        """Keeps others from changing the VM; whether the guest runs (it does not)."""

    async def unpacked(self) -> None:
        """Waits until the memory is as it was saved."""

    async def take(self) -> None:
        """Has QEMU load the state of the devices."""


class Back(ports.WayBack, Protocol):
    """QEMU, whatever becomes of the VM."""

    async def end(self) -> None:
        """Kills QEMU, and waits until the disks are free. Raises OutcomeUnknown."""


@dataclass(frozen=True)
class Ports:
    """All of them."""

    back: Back
    record: ports.Record
    attempt: Attempt | None = None
