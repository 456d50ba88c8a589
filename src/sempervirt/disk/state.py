"""What supervision of a disk's backends knows, sees and asks for: states, events, effects.

`decide` decides on these values; `driver` carries the effects out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sempervirt.core.durations import Backoff
from sempervirt.core.queue_map import Binding

# A kill every now and then must cost nothing, so the first restarts are not delayed at all;
# eight starts of a backend are less work than one delay too many for a guest.
RESTARTS = Backoff(free=8, first_s=0.05, ceiling_s=5.0)
# A spare that cannot start hurts nobody at once: patience spares the processors.
SPARES = Backoff(free=1, first_s=0.5, ceiling_s=10.0)


@dataclass(frozen=True)
class Policy:
    """How patient supervision is. All times in seconds."""

    spare: bool = True
    spare_after_s: float = 0.2
    steady_s: float = 1.0
    prepare_s: float = 15.0
    drain_s: float = 15.0
    verify_s: float = 15.0
    active_backoff: Backoff = RESTARTS
    spare_backoff: Backoff = SPARES


@dataclass(frozen=True)
class Backend:
    """One process. `ready`: prepared; `serving_since`: holds the image and serves."""

    generation: int
    binary: str
    ready: bool = False
    serving_since: float | None = None
    progressed: bool = False


class Condition(Enum):
    """How a disk is served, and whether a spare stands by. The values stand in the API."""

    STARTING = "starting"
    GUARDED = "guarded"  # a spare is ready to take over
    UNGUARDED = "unguarded"  # served, and no spare is ready yet
    RECOVERING = "recovering"  # a backend is taking over
    BACKING_OFF = "backing-off"  # backends ended again and again; the next one waits
    FAILING = "failing"  # … so often that the wait does not grow any more
    FROZEN = "frozen"
    STOPPING = "stopping"
    STOPPED = "stopped"
    QEMU = "qemu"  # served by QEMU itself: nothing here supervises it


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
class State:
    """Everything that a decision depends on."""

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
class Rebound:
    """The active process has moved its queues to other threads, as asked."""

    binding: Binding


@dataclass(frozen=True)
class Freeze:
    """Start nothing from now on: the image is to be had by another host."""


@dataclass(frozen=True)
class Thaw:
    """Start again what is missing: the image is this host's."""


@dataclass(frozen=True)
class StopAsked:
    """End all processes."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""


SupervisionEvent = (
    Begin
    | Ready
    | Serving
    | Progressed
    | Exited
    | UpgradeAsked
    | Rebound
    | Freeze
    | Thaw
    | StopAsked
    | Tick
)

# Effects


@dataclass(frozen=True)
class Start:
    """Start a process; with `wait_for_lock` as a spare, otherwise refusing a locked image."""

    generation: int
    binary: str
    wait_for_lock: bool


@dataclass(frozen=True)
class Rebind:
    """Tell a process which thread works on which queue."""

    generation: int


@dataclass(frozen=True)
class Terminate:
    """SIGTERM: stop fetching, drain, exit."""

    generation: int


@dataclass(frozen=True)
class Kill:
    """SIGKILL."""

    generation: int


@dataclass(frozen=True)
class TookOver:
    """The active process is another one now; None as `successor`: back-off, nobody serves."""

    predecessor: int
    successor: int | None
    planned: bool
    reason: str


@dataclass(frozen=True)
class Refused:
    """The very first process ended before it served: the disk cannot be started."""

    reason: str


@dataclass(frozen=True)
class UpgradeEnded:
    """The upgrade is over; `failure` is empty when the new binary serves."""

    failure: str
    ticket: int = 0


@dataclass(frozen=True)
class UpgradeRefused:
    """The upgrade was not begun."""

    reason: str
    ticket: int = 0


@dataclass(frozen=True)
class Stopped:
    """No process is left."""


Effect = (
    Start | Rebind | Terminate | Kill | TookOver | Refused | UpgradeEnded | UpgradeRefused | Stopped
)
Decision = tuple[State, list[Effect]]
