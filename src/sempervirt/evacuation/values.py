"""What an evacuation is asked for, and what came of it. Values only; nothing here does anything.

Who wants a host emptied makes an `EvacuationOrder` and gives the order to
`orders.evacuate(house, order)`, which answers with a `Report` when every VM of the host has an
outcome, or when the deadline has passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

DEADLINE_S = 300.0
# One move sends while the next one prepares. More at once would share the same link, and fewer
# would have ended by the deadline.
CONCURRENCY = 2
CONCURRENCY_MAX = 16


class Cause(Enum):
    """Who wants the host emptied. The values stand in records and in the API.

    OPERATOR: somebody asked; a VM that cannot move stays and runs on. GUARD: the host's kernel is
    about to die. SHUTDOWN: the host goes down in order. What stays under the last two is lost, so
    under these a VM that cannot move falls to its warm standby.
    """

    OPERATOR = "operator"
    GUARD = "guard"
    SHUTDOWN = "shutdown"

    @property
    def ends_host(self) -> bool:
        """Whether what stays on the host is lost."""
        return self is not Cause.OPERATOR


@dataclass(frozen=True)
class EvacuationOrder:
    """Asks for a host to be emptied.

    `why` is one sentence of evidence: the log, the store and `semper host list` show it.
    `destinations` are names of hosts; none: every host of the cluster that is in service.
    `deadline_s` counts from the order; after it no move begins. `concurrency` is how many moves go
    on at once, from 1 to CONCURRENCY_MAX. `without_records`: the storage of the state directory may
    not answer, or be full; a record that cannot be written then stops nothing. So it is for a host
    that ends, whatever is asked for. `broken`: VMs of which a thread of QEMU never runs again.
    """

    cause: Cause
    why: str
    destinations: tuple[str, ...] = ()
    deadline_s: float = DEADLINE_S
    concurrency: int = CONCURRENCY
    without_records: bool = False
    broken: tuple[str, ...] = ()


class Fate(Enum):
    """What becomes of one VM. The values stand in records and in the API.

    WAITS ──► MOVES ──► CHECKS ──► MOVED      the store and the destination say that it is there
      ▲         │         └──────► UNKNOWN    nobody could say where it is
      ├─────────┤ refused: another host
      │         ├────────► LOST               nobody has all of its memory
      │         ├────────► ENDED              its guest has powered off meanwhile
      │         └─► FALLS ─► STANDBY          its warm standby runs, with the loss that implies
      │               ├────► STAYS            it is still here; `reason` and `why` say why
      └───────────────┘ the standby runs on this host as well: it leaves as the VM
    """

    WAITS = "waits"
    MOVES = "moves"
    CHECKS = "checks"
    FALLS = "falls"
    MOVED = "moved"
    STANDBY = "standby"
    STAYS = "stays"
    UNKNOWN = "unknown"
    LOST = "lost"
    ENDED = "ended"

    @property
    def is_end(self) -> bool:
        """Whether nothing follows any more."""
        return self not in (Fate.WAITS, Fate.MOVES, Fate.CHECKS, Fate.FALLS)


class Reason(Enum):
    """Why a VM stays. The values stand in records and in the API."""

    NO_HOST = "no host can take VMs"
    OBSTACLES = "something stands in the way on every host"
    NO_MEMORY = "no host that fits has enough memory left"
    NOT_MOVABLE = "it cannot move now"
    REFUSED = "every host that fits has refused it, or the move failed"
    TOO_LATE = "the deadline has passed"
    GIVEN_UP = "the evacuation was given up"


@dataclass(frozen=True)
class Outcome:
    """One VM. `host` is where the VM goes, or where it is; "" where that means nothing. `why` tells
    the details of a `reason`, of an unknown place or of a loss. `began_s` and `ended_s`: when its
    first move began and when its fate was certain, in seconds after the order.
    """

    vm: str
    fate: Fate
    host: str = ""
    reason: Reason | None = None
    why: str = ""
    began_s: float | None = None
    ended_s: float | None = None


@dataclass(frozen=True)
class Report:
    """How far an evacuation is, or what came of it. `began` and `ended` are in seconds since the
    epoch; `ended` is None while it goes on. `failure`: why the evacuation itself could not be
    carried out; "" otherwise. The outcomes are in the order of the plan. `earlier`: VMs, and where
    to, that evacuations before this one have moved since the host went out of service.
    """

    order: EvacuationOrder
    began: float
    ended: float | None
    outcomes: tuple[Outcome, ...]
    failure: str = ""
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def away(self) -> dict[str, str]:
        """VMs that were moved since the host went out of service, and where to."""
        moved = {one.vm: one.host for one in self.outcomes if one.fate is Fate.MOVED}
        return {**dict(self.earlier), **moved}

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self.ended is not None

    @property
    def emptied(self) -> bool:
        """Whether it is known that no VM is left here, and that none was lost."""
        safe = (Fate.MOVED, Fate.STANDBY, Fate.ENDED)
        return self.over and not self.failure and all(one.fate in safe for one in self.outcomes)
