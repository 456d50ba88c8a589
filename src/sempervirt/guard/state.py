"""What the guard knows, hears and asks for. `decide` decides on these values, `driver` carries the
effects out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from sempervirt.guard.presets import Meaning
from sempervirt.guard.signs import Sign, SignId
from sempervirt.guard.sources.module import ModuleCommand


class Phase(Enum):
    """How the host stands; `decide` draws the way."""

    WATCHING = "watching"
    EVACUATING = "evacuating"
    WAITING = "waiting"
    """VMs were left; the next attempt comes at `retry_at`."""
    STAYING = "staying"
    """VMs were left, and every attempt was made: the host is kept, and an operator is needed."""
    EMPTY = "empty"
    LET_DIE = "let-die"


class Action(Enum):
    """What was decided upon a sign, or upon what came of an earlier decision."""

    WATCHED = "watched"
    COUNTED = "counted"
    """The sign takes effect when it was seen more often."""
    EVACUATES = "evacuates"
    GOES_ON = "goes-on"
    """What the sign asks for is under way, or nothing is left to do."""
    LETS_DIE = "lets-die"
    LOADS_MODULE = "loads-module"
    EVACUATED = "evacuated"
    LEFT_BEHIND = "left-behind"
    LETS_SHUT_DOWN = "lets-shut-down"


# Effects


@dataclass(frozen=True)
class BeginEvacuation:
    """Move the VMs to other hosts, within so many seconds. VMs of the processes `broken` cannot be
    moved. `shutdown`: an orderly shutdown waits for it.
    """

    evidence: tuple[str, ...]
    deadline_s: float
    broken: frozenset[int]
    shutdown: bool


@dataclass(frozen=True)
class TellModule:
    """Tell the module something, if it is loaded."""

    command: ModuleCommand


@dataclass(frozen=True)
class LoadModule:
    """Load the module."""


@dataclass(frozen=True)
class ReleaseShutdown:
    """Let an orderly shutdown go on that waits."""


@dataclass(frozen=True)
class KeepHeard:
    """Keep for the next agent of this boot that the module's events up to then are dealt with."""

    ns: int


Effect = BeginEvacuation | TellModule | LoadModule | ReleaseShutdown | KeepHeard

# Events


@dataclass(frozen=True)
class Seen:
    """A source has seen a sign."""

    sign: Sign


@dataclass(frozen=True)
class EvacuationEnded:
    """Every VM's outcome is known, or is known to be unknown. By name of the VM.

    `moved` run elsewhere; `left` are still here, and could be tried again; `lost` cannot be saved
    by moving them: their own QEMU has a dead thread. `why` is for people.
    """

    moved: tuple[str, ...]
    left: tuple[str, ...]
    lost: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class ModuleIsThere:
    """The module's device was opened, or is gone."""

    there: bool


@dataclass(frozen=True)
class LoadingEnded:
    """The module was loaded, or was not, and why."""

    failure: str = ""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Seen | EvacuationEnded | ModuleIsThere | LoadingEnded | Tick


@dataclass(frozen=True)
class Decision:
    """What was decided, and on which evidence. `time` is on the owner's clock."""

    time: float
    action: Action
    evidence: tuple[str, ...]
    sign: SignId | None = None
    meaning: Meaning | None = None
    simulated: bool = False
    repeated: int = 0
    """So many like it came since the one before, and were not told each."""


@dataclass(frozen=True)
class Tally:
    """How often a sign was seen: the times that still count, all of them as a number, and since
    when nothing was told of it.
    """

    times: tuple[float, ...] = ()
    total: int = 0
    told: float | None = None
    untold: int = 0


@dataclass(frozen=True)
class GuardState:
    """All that a decision depends on, beside the presets.

    `cause` is the evidence of the evacuation under way, or of the last one. `put_off`: the module
    has put a death off, which may go ahead once nothing is left to be saved.
    """

    phase: Phase = Phase.WATCHING
    tallies: Mapping[SignId, Tally] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    cause: tuple[str, ...] = ()
    simulated: bool = False
    broken: frozenset[int] = frozenset()
    attempts: int = 0
    retry_at: float | None = None
    release_at: float | None = None
    """When a shutdown that waits goes on, whatever is left; None: no shutdown waits."""
    module: bool = False
    loading: bool = False
    load_after: float = 0.0
    """Before that the module is not loaded again after a failure."""
    load_failure: str = ""
    put_off: bool = False
    heard_ns: int = 0
    """The time of the newest event of the module."""
    settled_ns: int = 0
    """Up to then events are dealt with, by this agent or one before it in this boot."""


Decided = tuple[GuardState, list[Effect]]
