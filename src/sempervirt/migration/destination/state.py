"""What the destination of a migration knows, sees and asks for: state, events, effects.

`decide` decides on these values; `driver` carries the effects out and posts what came of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sempervirt.migration.events import Loaded, NotRecorded, Side, StreamFailed, Tick
from sempervirt.store.registry import Claim
from sempervirt.vm.phases import Arrival

# Effects


@dataclass(frozen=True)
class TakeAndRun:
    """Advance the epoch at the images, give the claim to the backends, let the guest run.

    Nothing of it does harm twice. Leads to GuestRuns, Stale or Failed.
    """

    claim: Claim


@dataclass(frozen=True)
class AskStore:
    """Look up who owns the VM. Leads to OwnershipSeen, or to nothing: it is asked again."""


@dataclass(frozen=True)
class EndQemu:
    """End the QEMU that waits here; it never ran, or must not run any more. A failure is Failed."""

    because: str


@dataclass(frozen=True)
class GiveBack:
    """The VM was this host's and has ended: whoever runs it next may claim it."""

    claim: Claim | None


@dataclass(frozen=True)
class Finish:
    """Nothing follows: end the wire, stop watching. `forget`: the VM never was this host's."""

    forget: bool


DestinationEffect = TakeAndRun | AskStore | EndQemu | GiveBack | Finish


# Events


@dataclass(frozen=True)
class Ready:
    """QEMU waits for the stream, the backends for the image locks."""


@dataclass(frozen=True)
class PromiseAsked:
    """The source is about to hand over before the stream ends (postcopy)."""


@dataclass(frozen=True)
class ToldToRun:
    """The source says that the VM was handed over to this host, by `claim`."""

    claim: Claim


@dataclass(frozen=True)
class ToldToAbort:
    """The source says that it keeps the VM."""


@dataclass(frozen=True)
class SourceSilent:
    """The source's agent has not asked for long."""


@dataclass(frozen=True)
class OwnershipSeen:
    """The store says who owns the VM. `claim` is this host's, if this host is the owner;
    `moving`: the source is the owner, and the move is not over.
    """

    owner: Side
    moving: bool = False
    claim: Claim | None = None


@dataclass(frozen=True)
class GuestRuns:
    """The guest runs here, or is paused as it was at the source."""


@dataclass(frozen=True)
class Stale:
    """A newer claim stands at the images: the VM was given to another host meanwhile."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """An effect that has to be carried out was not; it is tried again."""

    effect: DestinationEffect
    reason: str


@dataclass(frozen=True)
class QemuEnded:
    """The destination's own QEMU has ended."""

    reason: str


DestinationEvent = (
    Ready
    | PromiseAsked
    | Loaded
    | ToldToRun
    | ToldToAbort
    | SourceSilent
    | OwnershipSeen
    | GuestRuns
    | Stale
    | Failed
    | StreamFailed
    | NotRecorded
    | QemuEnded
    | Tick
)


# State


@dataclass(frozen=True)
class Again:
    """An effect that failed, and when it is tried again, on the driver's clock."""

    at: float
    effect: DestinationEffect


@dataclass(frozen=True)
class Incoming:
    """Everything that a decision depends on. Times are on the driver's clock.

    `ask_at`: when the store is asked next. `claim` is this host's, once it knows it; `drained`: all
    memory is here; `runs`: so does the guest. `qemu_ended` is why QEMU ended, "" until then.
    """

    phase: Arrival = Arrival.PREPARING
    why: str = ""
    ask_at: float = 0.0
    qemu_ended: str = ""
    claim: Claim | None = None
    drained: bool = False
    runs: bool = False
    again: frozenset[Again] = frozenset()
    finished: bool = False


Step = tuple[Incoming, list[DestinationEffect]]
