"""What the driver of a restart reaches the world by; see `renewal.ports`.

A restart that another agent has left has no `attempt`: such a restart goes back or forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sempervirt.host.procfs import ProcessId
from sempervirt.renewal import ports


class Attempt(ports.Guest, Protocol):
    """What is done before the switch, with the old QEMU and the new one."""

    async def start(self) -> tuple[ProcessId, str]:
        """Starts the new QEMU, with stand-ins for disks and taps; gives its process, and the
        versioned name of its machine.
        """

    async def keep_packets(self) -> None:
        """Keeps what is sent to the guest from now on."""

    async def take(self) -> None:
        """Has the new QEMU load the state that the old one gave."""

    async def switch(self) -> None:
        """Kills the old QEMU; the new one is the VM. Raises StateConflict: nothing was done."""


class WayBack(ports.WayBack, Protocol):
    """The old QEMU, once the restart has failed."""

    async def discard(self) -> None:
        """Ends the new QEMU, and the stand-ins. Raises OutcomeUnknown when QEMU does not end."""

    def tidy(self) -> None:
        """Removes what is left of other QEMUs than the VM's."""


class WayForward(Protocol):
    """The new QEMU, once it is the VM."""

    async def end_old(self) -> None:
        """Waits until the old QEMU has ended. Raises OutcomeUnknown when it does not."""

    async def end_stand_ins(self) -> None:
        """Ends the backends that stood in. Raises OutcomeUnknown when one does not end."""

    async def free_taps(self) -> None:
        """Takes away the taps that stood in."""

    async def connect(self) -> None:
        """Leads the new QEMU to the disks and taps, and sends the packets that were kept."""

    async def cont_new(self) -> None:
        """Lets the guest run in the new QEMU."""

    async def move_in(self) -> None:
        """Puts the sockets into their places."""

    async def link(self) -> None:
        """Connects to the monitor of the new QEMU, in its place."""


@dataclass(frozen=True)
class Ports:
    """All of them."""

    back: WayBack
    forward: WayForward
    record: ports.Record
    attempt: Attempt | None = None
