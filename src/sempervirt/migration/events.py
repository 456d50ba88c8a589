"""What the two machines of a migration know, see and ask for: phases, events, effects.

`states` and `arrival` decide on these values; a driver on each host carries the effects out
and reports what came of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Side(Enum):
    """Whom evidence names as the VM's owner."""

    SOURCE = "source"
    DESTINATION = "destination"


# Events of the source


@dataclass(frozen=True)
class Prepared:
    """The destination has QEMU, backends and the stream ready."""


@dataclass(frozen=True)
class Refused:
    """The destination could not prepare, or did not answer. Nothing has begun."""

    reason: str


@dataclass(frozen=True)
class PostcopyChosen:
    """Precopy will not converge, and the policy allows postcopy."""


@dataclass(frozen=True)
class Hopeless:
    """Precopy will not converge, and nothing else is allowed (see `convergence`)."""

    reason: str


@dataclass(frozen=True)
class GuestStopped:
    """The source's processors stand still; what is left goes in one piece."""


@dataclass(frozen=True)
class Loaded:
    """The destination has everything, and promises to wait for the outcome."""


@dataclass(frozen=True)
class DisksReleased:
    """The source's backends have let go of the images."""


@dataclass(frozen=True)
class Committed:
    """The store has given the VM to the destination."""


@dataclass(frozen=True)
class NotCommitted:
    """The store has not, and never will have: the request was refused or never left."""

    reason: str


@dataclass(frozen=True)
class AnswerLost:
    """The store was asked, and its answer did not arrive."""

    reason: str


@dataclass(frozen=True)
class Withdrawn:
    """The store says that the move is over and the source owns the VM; no hand-over can follow."""


@dataclass(frozen=True)
class Superseded:
    """The store says that the source's claim is stale: the VM was handed over."""


@dataclass(frozen=True)
class StreamFailed:
    """The stream between the two QEMUs broke."""

    reason: str


@dataclass(frozen=True)
class DestinationGone:
    """The destination is silent: what became of it is not known."""

    reason: str


@dataclass(frozen=True)
class DestinationEnded:
    """The destination's agent says that its QEMU has ended."""

    reason: str


@dataclass(frozen=True)
class SourceEnded:
    """The source's QEMU has ended."""

    reason: str


@dataclass(frozen=True)
class Drained:
    """The destination has all memory; it needs the source no more."""


@dataclass(frozen=True)
class CancelAsked:
    """Somebody wants the VM to stay."""


@dataclass(frozen=True)
class Resolved:
    """An operator settles what was unknown; `evidence` is a sentence, and is kept."""

    owner: Side
    evidence: str


@dataclass(frozen=True)
class Tick:
    """Time passed."""


SourceEvent = (
    Prepared
    | Refused
    | PostcopyChosen
    | Hopeless
    | GuestStopped
    | Loaded
    | DisksReleased
    | Committed
    | NotCommitted
    | AnswerLost
    | Withdrawn
    | Superseded
    | StreamFailed
    | DestinationGone
    | DestinationEnded
    | SourceEnded
    | Drained
    | CancelAsked
    | Resolved
    | Tick
)

# Events of the destination; also Loaded, StreamFailed, Drained


@dataclass(frozen=True)
class Ready:
    """QEMU waits for the stream, the backends for the image locks."""


@dataclass(frozen=True)
class PromiseAsked:
    """The source is about to hand over before the stream ends (postcopy)."""


@dataclass(frozen=True)
class ToldToRun:
    """The source says that the VM was handed over to this host, with the claim."""


@dataclass(frozen=True)
class ToldToAbort:
    """The source says that it keeps the VM."""


@dataclass(frozen=True)
class SourceSilent:
    """The source's agent does not answer."""


@dataclass(frozen=True)
class OwnershipSeen:
    """The store says who owns the VM; `moving`: the source, and the move is not over."""

    owner: Side
    moving: bool = False


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
    | StreamFailed
    | QemuEnded
    | Tick
)


class Act(Enum):
    """An effect: what a machine asks its driver for."""

    # of the source
    PREPARE = "tell the destination to prepare"
    START_STREAM = "start the migration in QEMU; it pauses before switchover"
    SWITCH_TO_POSTCOPY = "stop the guest now; memory follows"
    FINISH_STREAM = "let QEMU send what is left"
    ASK_PROMISE = "ask the destination to wait for the outcome from now on"
    RELEASE_DISKS = "end the backends in order; their locks become free"
    HAND_OVER = "Registry.hand_over"
    WITHDRAW = "Registry.end_move: settles who owns the VM, whatever was lost"
    RESUME_GUEST = "take the disks again and let the guest run"
    ABORT_DESTINATION = "tell the destination that the source keeps the VM"
    LET_RUN = "tell the destination that it owns the VM, with the claim"
    RECOVER_STREAM = "connect the broken postcopy stream again"
    END_SOURCE = "end this host's QEMU; its guest must never run again"
    # of the destination
    SAY_READY = "answer Prepared"
    SAY_PROMISED = "answer Loaded"
    TAKE_AND_RUN = "advance the epoch at the images, take their locks, let the guest run"
    ASK_STORE = "Registry.find"
    END_QEMU = "end the QEMU that waits; it never ran"
