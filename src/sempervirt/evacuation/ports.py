"""What the driver of an evacuation reaches the world by. `adapters` has the real ones.

Each call raises SempervirtError, or OSError, when it fails. Each call ends by itself, but for
`move` and `follow`, which last as long as the move does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sempervirt.evacuation.state import Checked, Evacuation, MoveOver, StandbyRuns, Surveyed


class Service(Protocol):
    """Whether this host takes VMs."""

    async def mark(self, why: str) -> None:
        """From now on it takes none."""

    async def unmark(self) -> None:
        """It does again."""


class Fleet(Protocol):
    """The hosts of the cluster, and the VMs of this one."""

    async def look(self, destinations: tuple[str, ...]) -> Surveyed:
        """All that a plan is made of. With no `destinations`: of every other host."""


class Moves(Protocol):
    """Moves of VMs from this host."""

    async def move(self, vm: str, host: str, deadline_s: float, *, pressing: bool) -> MoveOver:
        """Moves a VM; returns when the move is over. Raises when it could not begin."""

    async def follow(self, vm: str, host: str) -> MoveOver:
        """Returns when a move is over that is under way."""

    async def cancel(self, vm: str) -> None:
        """Has a VM stay. Raises StateConflict when it is too late for that."""

    async def check(self, vm: str, host: str) -> Checked:
        """Where a VM is that is said to have moved to `host`. Raises when nobody can say."""


class Standby(Protocol):
    """Warm standbys of VMs."""

    async def fall(self, vm: str) -> StandbyRuns:
        """Has the standby of a VM take its place. What runs of the VM here is ended first, and is
        seen to have ended. May be repeated. Raises NotFound when the VM has no standby that would
        help, OutcomeUnknown when nobody knows whether it runs.
        """


class Record(Protocol):
    """What the next agent is told."""

    def write(self, state: Evacuation) -> bool:
        """Notes how far the evacuation is; whether that is on record."""


@dataclass(frozen=True)
class Ports:
    """All of them."""

    service: Service
    fleet: Fleet
    moves: Moves
    standby: Standby
    record: Record
