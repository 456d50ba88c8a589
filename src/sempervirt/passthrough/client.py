"""What can be asked of one mediator, over its control socket.

Each method raises Unavailable when the process does not listen (any more), OutcomeUnknown when it
was asked and did not answer, and InvalidRequest or Unavailable as the process says. None does harm
when it is asked twice.
"""

from __future__ import annotations

from pathlib import Path

from sempervirt.host.control import DEADLINE_S, ControlSocket
from sempervirt.passthrough.answers import (
    Captured,
    Configured,
    Drained,
    Exported,
    Imported,
    MediatorClaimed,
    MediatorStatus,
    Released,
    Replayed,
    Resumed,
    Round,
    TableWritten,
    Touched,
)

PROGRAM = "semper-vfiod"
# What is under way has to end on the medium first.
DRAIN_S = 10.0


class MediatorClient:
    """Of the process that listens on `path`, which has to be `pid`."""

    def __init__(self, path: Path, pid: int | None = None) -> None:
        self._socket = ControlSocket(path, PROGRAM, pid)

    async def status(self, timeout_s: float = DEADLINE_S) -> MediatorStatus:
        """What the process does, and its counters."""
        return await self._socket.ask_for(MediatorStatus, "status", timeout_s=timeout_s)

    async def configuration(self) -> Configured:
        """The device's configuration, as the guest has set it."""
        return await self._socket.ask_for(Configured, "configuration")

    async def write_table(self, address: int, table: str) -> TableWritten:
        """Writes the MSI-X table, which only DMA of the device itself reaches."""
        return await self._socket.ask_for(TableWritten, "msix", address=address, table=table)

    async def capture(self, *, on: bool) -> Captured:
        """From now on QEMU does the device's DMA, and sees what is written; doorbells that come by
        the shim are noted. Answers when no DMA goes past QEMU any more.
        """
        return await self._socket.ask_for(Captured, "capture", on=on, timeout_s=DRAIN_S)

    async def round(self) -> Round:
        """Takes the register writes since the last round."""
        return await self._socket.ask_for(Round, "round")

    async def replay(self, writes: str) -> Replayed:
        """Sets the registers as a round of the source says; nothing is carried out."""
        return await self._socket.ask_for(Replayed, "replay", writes=writes)

    async def quiesce(self) -> Drained:
        """Takes no more requests; those that were taken are done when this answers."""
        return await self._socket.ask_for(Drained, "quiesce", timeout_s=DRAIN_S)

    async def touch(self) -> Touched:
        """Has QEMU see the pages that were written past it. The guest has to stand still."""
        return await self._socket.ask_for(Touched, "touch", timeout_s=DRAIN_S)

    async def export(self) -> Exported:
        """All registers, queues and phases of a device that stands still."""
        return await self._socket.ask_for(Exported, "export")

    async def import_state(self, state: str) -> Imported:
        """Keeps what another mediator has exported, until `resume`."""
        return await self._socket.ask_for(Imported, "import", state=state)

    async def release(self) -> Released:
        """Lets the image go."""
        return await self._socket.ask_for(Released, "release", timeout_s=DRAIN_S)

    async def give_claim(self, epoch: int, claim: str) -> None:
        """Gives the process the claim that it awaits."""
        await self._socket.ask_for(MediatorClaimed, "claim", epoch=epoch, claim=claim)

    async def resume(self) -> Resumed:
        """Takes the image, goes on with the guest's requests, and raises the interrupts that the
        guest has yet to see.
        """
        return await self._socket.ask_for(Resumed, "resume", timeout_s=DRAIN_S)
