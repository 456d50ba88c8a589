"""What the driver of a source reaches the world by. `adapters` has the real ones.

Each call raises SempervirtError when it fails; a claim that counts no more is StaleClaim, an answer
that was lost OutcomeUnknown. Each call ends by itself: none may hang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sempervirt.store.registry import Claim
from sempervirt.vm.phases import Mode, Phase


class Destination(Protocol):
    """The agent of the host that the VM goes to."""

    async def prepare(self) -> str:
        """Has it prepare; gives the address that its wire listens at."""

    async def promise(self) -> None:
        """Has it wait for the outcome from now on."""

    async def run(self, claim: Claim) -> None:
        """Tells it that the VM is its own; returns when the guest runs there."""

    async def abort(self, why: str) -> None:
        """Tells it that the VM does not come."""

    async def recover(self) -> str:
        """Has it wait for a stream that broke; gives the new address of its wire."""


class Ownership(Protocol):
    """The store, asked about this VM."""

    async def hand_over(self) -> Claim:
        """Gives the VM to the destination; gives the destination's claim."""

    async def withdraw(self) -> None:
        """Says that the move is over, and the VM the source's."""

    async def make_certain(self) -> Claim | None:
        """Gives the VM to the destination, unless it is the source's no more: then None."""


class Guest(Protocol):
    """QEMU here, and this end of the wire."""

    async def start(self, address: str) -> None:
        """Starts the wire and QEMU's migration."""

    async def switch_to_postcopy(self) -> None:
        """Has QEMU stop the guest; memory follows."""

    async def finish_stream(self) -> None:
        """Has QEMU send what is left."""

    async def recover(self, address: str) -> None:
        """Has QEMU go on with a postcopy stream that broke, by a new wire."""

    async def runs(self) -> bool:
        """Whether the guest runs, as QEMU says."""

    def suspend(self) -> None:
        """Keeps QEMU from running, with all that it might do by itself."""

    async def go_back(self, *, stopped: bool) -> bool:
        """Ends QEMU's migration and lets the guest run, if it ran before; whether it runs."""

    async def end(self, because: str) -> None:
        """Ends QEMU, and waits until the disks are free."""

    async def end_wire(self) -> None:
        """Ends this end of the wire, whatever it does."""


class Disks(Protocol):
    """The VM's writable disks."""

    async def arm(self) -> None:
        """From now on no spare waits, and each backend lets go of its image when QEMU stops."""

    async def released(self) -> None:
        """Returns when the images are free, and nothing of a request was left behind."""

    async def take_back(self) -> None:
        """Undoes `arm`."""


class Devices(Protocol):
    """The VM's passed-through devices; of a VM without any, each call does nothing."""

    async def capture(self) -> None:
        """Before QEMU sends its first page: QEMU sees from now on what the devices write."""

    async def move(self) -> None:
        """Has the devices stand still, and gives their state to the destination, which keeps it."""

    async def go_on(self) -> None:
        """Undoes `capture` and `move`: the devices go on here."""


class Record(Protocol):
    """What the next agent is told."""

    def write(self, phase: Phase, mode: Mode) -> bool:
        """Notes how far the VM is; whether that is on record."""

    def end(self) -> None:
        """The VM does not move any more."""


@dataclass(frozen=True)
class Ports:
    """All of them."""

    destination: Destination
    ownership: Ownership
    guest: Guest
    disks: Disks
    devices: Devices
    record: Record
