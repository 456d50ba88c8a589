"""What the owner of a disk knows, sees and asks for: states, events, effects.

`disk.decide` decides on these values; `disk.driver` carries the effects out. Times are those of the
owner's clock, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from sempervirt.core.durations import Backoff
from sempervirt.core.failure import Failure
from sempervirt.core.queue_map import Binding, ThreadMap

# A kill every now and then must cost nothing, so the first restarts are not delayed at all;
# eight starts of a backend are less work than one delay too many for a guest.
RESTARTS = Backoff(free=8, first_s=0.05, ceiling_s=5.0)
# A spare that cannot start hurts nobody at once: patience spares the processors.
SPARES = Backoff(free=1, first_s=0.5, ceiling_s=10.0)


# Ten times the longest request that a disk which works has taken here, and a sixth of the 30 s
# after which Linux gives up on a SCSI command. To be wrong costs a take-over.
STALL_S = 5.0


@dataclass(frozen=True)
class Policy:
    """How patient supervision is. All times in seconds.

    A spare starts `spare_after_s` after a take-over; who serves for `steady_s` is no crash loop. An
    upgrade has `prepare_s`, `drain_s` and `verify_s` for its phases. Queues have to be on other
    threads within `rebind_s`, longer than a take-over with its replay; meanwhile a backend that did
    not do it is asked again after `retell_s`. Who is silent, or completes nothing, for `stall_s`
    hangs.
    """

    spare: bool = True
    spare_after_s: float = 0.2
    steady_s: float = 1.0
    prepare_s: float = 15.0
    drain_s: float = 15.0
    verify_s: float = 15.0
    rebind_s: float = 15.0
    retell_s: float = 0.05
    stall_s: float = STALL_S
    active_backoff: Backoff = RESTARTS
    spare_backoff: Backoff = SPARES


class Blame(Enum):
    """Why a backend does not get on: see `disk.liveness`."""

    BACKEND = "the backend hangs"
    MEDIUM = "the medium hangs"
    UNCLEAR = "backend or medium, which cannot be told"


@dataclass(frozen=True)
class Stall:
    """A backend is silent or completes nothing, with the evidence, as seen since `since`."""

    blame: Blame
    evidence: str
    since: float


@dataclass(frozen=True)
class Backend:
    """One process. `ready`: prepared; `serving_since`: holds the image and serves; `stall`: it does
    neither get on nor end.
    """

    generation: int
    binary: str
    ready: bool = False
    serving_since: float | None = None
    progressed: bool = False
    stall: Stall | None = None


class Condition(Enum):
    """How a disk is served, and whether a spare stands by. The values stand in the API."""

    STARTING = "starting"
    GUARDED = "guarded"  # a spare is ready to take over
    UNGUARDED = "unguarded"  # served, and no spare is ready yet
    RECOVERING = "recovering"  # a backend is taking over
    STALLED = "stalled"  # the backend hangs, and is killed for it unless its disk is frozen
    MEDIUM_HANGS = "medium-hangs"  # what the image lies on does not answer: nothing is killed
    BACKING_OFF = "backing-off"  # backends ended again and again; the next one waits
    FAILING = "failing"  # … so often that the wait does not grow any more
    FROZEN = "frozen"
    STOPPING = "stopping"
    STOPPED = "stopped"
    QEMU = "qemu"  # served by QEMU itself: nothing here supervises it
    EJECTED = "ejected"  # its guest has unplugged it


# A guest's requests wait, for longer than a take-over takes.
NOT_SERVED = frozenset(
    {Condition.BACKING_OFF, Condition.FAILING, Condition.STALLED, Condition.MEDIUM_HANGS}
)


class Phase(Enum):
    """How far an upgrade has come."""

    PREPARING = "preparing"
    SWITCHING = "switching"
    VERIFYING = "verifying"


@dataclass(frozen=True)
class Upgrade:
    """An upgrade under way. `generation` is the process from the new binary, once started."""

    binary: str
    phase: Phase
    deadline: float
    generation: int | None = None
    ticket: int = 0


@dataclass(frozen=True)
class Rebinding:
    """A request to have the queues on other threads; given up at `deadline`."""

    binding: Binding
    ticket: int
    deadline: float


@dataclass(frozen=True)
class Telling:
    """A process is being told a map; `ticket` is that of the request, 0 when nobody has asked."""

    generation: int
    ticket: int = 0


@dataclass(frozen=True)
class State:
    """Everything that a decision depends on.

    `active` and `spare` are the processes that are counted on. `served`: a guest has been served,
    so from now on nobody may refuse. `connected`: QEMU has been connected once; never set back,
    for a backend that has just taken over is not connected *yet*. `last_end` is why the last active
    process ended, `refused` why the first one would not serve. `restarts` counts take-overs that
    nobody asked for.

    `binding` is which thread works on which queue. `rebindings` are the requests to change that, of
    which the first is under way; `telling` is the process that is told a map right now, `astray`
    are those that are known to have another one, `tell_due` is when the next try is due.
    """

    binary: str
    next_generation: int = 1
    active: Backend | None = None
    spare: Backend | None = None
    served: bool = False
    active_failures: int = 0
    spare_failures: int = 0
    start_due: float | None = None
    upgrade: Upgrade | None = None
    stopping: bool = False
    stop_deadline: float | None = None
    binding: Binding | None = None
    frozen: bool = False
    stopped: bool = False
    connected: bool = False
    last_end: str = ""
    refused: str = ""
    restarts: int = 0
    rebindings: tuple[Rebinding, ...] = ()
    telling: Telling | None = None
    astray: frozenset[int] = frozenset()
    tell_due: float | None = None


# Events


@dataclass(frozen=True)
class Begin:
    """Start serving."""


@dataclass(frozen=True)
class Ready:
    """A process has prepared everything."""

    generation: int


@dataclass(frozen=True)
class Serving:
    """A process holds the image and serves whoever was connected."""

    generation: int


@dataclass(frozen=True)
class Progressed:
    """A process completed a guest request."""

    generation: int


@dataclass(frozen=True)
class Stalled:
    """A process is silent, or completes nothing; told again as long as that is so."""

    generation: int
    blame: Blame
    evidence: str


@dataclass(frozen=True)
class GoesOn:
    """A process that was stalled works again."""

    generation: int


@dataclass(frozen=True)
class Exited:
    """A process ended."""

    generation: int
    reason: str


@dataclass(frozen=True)
class UpgradeAsked:
    """Serve from another binary. `ticket` is that of the request, and comes back with its end."""

    binary: str
    ticket: int = 0


@dataclass(frozen=True)
class Connected:
    """QEMU is connected to the active process."""


@dataclass(frozen=True)
class RebindAsked:
    """Have the queues on other threads. `ticket`, never 0, comes back with the end of it."""

    binding: Binding
    ticket: int


@dataclass(frozen=True)
class MapSeen:
    """The active process tells by which map it works."""

    generation: int
    map: ThreadMap


@dataclass(frozen=True)
class Told:
    """A process was told its map, and works by it unless there is a `failure`."""

    generation: int
    failure: Failure | None = None


@dataclass(frozen=True)
class Freeze:
    """Start nothing from now on: the image is to be had by another host.

    With a `ticket` it is a request, which an upgrade under way refuses; without one it is an order.
    """

    ticket: int = 0


@dataclass(frozen=True)
class Thaw:
    """Start again what is missing: the image is this host's."""


@dataclass(frozen=True)
class StopAsked:
    """End all processes."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""


# What was asked for, and time.
Asked = Begin | UpgradeAsked | RebindAsked | Freeze | Thaw | StopAsked | Tick
# What was seen of the processes.
Seen = Ready | Serving | Progressed | Stalled | GoesOn | Exited | Connected | MapSeen | Told
SupervisionEvent = Asked | Seen

# Effects


@dataclass(frozen=True)
class Start:
    """Start a process; with `wait_for_lock` as a spare, otherwise refusing a locked image."""

    generation: int
    binary: str
    wait_for_lock: bool


@dataclass(frozen=True)
class Tell:
    """Tell a process which thread works on which queue; report Told."""

    generation: int
    binding: Binding


@dataclass(frozen=True)
class Terminate:
    """SIGTERM: stop fetching, drain, exit."""

    generation: int


@dataclass(frozen=True)
class Kill:
    """SIGKILL."""

    generation: int


@dataclass(frozen=True)
class Noted:
    """For the journal: a process is stalled, or goes on."""

    generation: int
    text: str


@dataclass(frozen=True)
class TookOver:
    """The active process is another one now; None as `successor`: back-off, nobody serves."""

    predecessor: int
    successor: int | None
    planned: bool
    reason: str
    hung: bool = False

    @property
    def cause(self) -> Literal["ended", "hung", "upgrade"]:
        """In one word."""
        return "upgrade" if self.planned else "hung" if self.hung else "ended"


@dataclass(frozen=True)
class UpgradeEnded:
    """The upgrade is over; `failure` is empty when the new binary serves."""

    failure: str
    ticket: int = 0


@dataclass(frozen=True)
class RebindEnded:
    """The queues are on the threads of `binding`, or they are not and `failure` says why."""

    ticket: int
    binding: Binding
    failure: Failure | None = None


@dataclass(frozen=True)
class Accept:
    """The request was carried out, or its end is on the way."""

    ticket: int


@dataclass(frozen=True)
class Refuse:
    """Nothing was begun: the disk is not `done` ("upgraded", "frozen"), for that reason."""

    ticket: int
    done: str
    reason: str


Effect = (
    Start
    | Tell
    | Terminate
    | Kill
    | Noted
    | TookOver
    | UpgradeEnded
    | RebindEnded
    | Accept
    | Refuse
)
Decision = tuple[State, list[Effect]]
