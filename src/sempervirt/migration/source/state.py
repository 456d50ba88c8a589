"""What the source of a migration knows, sees and asks for: state, events, effects.

`decide` decides on these values; `driver` carries the effects out and posts what came of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sempervirt.migration.events import Loaded, NotRecorded, Side, StreamFailed, Tick
from sempervirt.store.registry import Claim
from sempervirt.vm.phases import Mode, Phase

# Effects: each is carried out by one piece of work, which depends on nothing but the effect.


@dataclass(frozen=True)
class Prepare:
    """Have the destination prepare. Leads to Prepared or Refused."""


@dataclass(frozen=True)
class StartStream:
    """Start the migration in QEMU, to the destination's wire at `address`; it pauses before the
    switchover. From then on QEMU is watched; a failure is StreamFailed.
    """

    address: str


@dataclass(frozen=True)
class SwitchToPostcopy:
    """Have QEMU stop the guest now; memory follows. A failure is StreamFailed."""


@dataclass(frozen=True)
class FinishStream:
    """Have QEMU send what is left. A failure is StreamFailed."""


@dataclass(frozen=True)
class AskPromise:
    """Have the destination wait for the outcome from now on. A failure is StreamFailed."""


@dataclass(frozen=True)
class MoveDevices:
    """Have the passed-through devices stand still, and give their state to the destination, which
    keeps it. Before QEMU sends the rest, for the devices' last pages belong to that. Leads to
    DevicesMoved or StreamFailed.
    """


@dataclass(frozen=True)
class ReleaseDisks:
    """Wait until the backends have let go of the images. Leads to DisksReleased or StreamFailed."""


@dataclass(frozen=True)
class HandOver:
    """Ask the store, once, to give the VM to the destination.

    Leads to Committed, Superseded, NotCommitted or AnswerLost.
    """

    mode: Mode


@dataclass(frozen=True)
class Withdraw:
    """Have the store say that the move is over: it settles who owns the VM, whatever was lost.

    Leads to Withdrawn, Superseded or Failed.
    """


@dataclass(frozen=True)
class MakeCertain:
    """Have the store know that the destination owns the VM. Leads to Certain or Failed."""


@dataclass(frozen=True)
class GoBack:
    """Take the disks again and let the guest run. `stopped`: the guest stood still.

    Leads to WentBack or Failed.
    """

    stopped: bool


@dataclass(frozen=True)
class AbortDestination:
    """Tell the destination that the source keeps the VM. Best effort: the destination reads it in
    the store as well.
    """

    why: str


@dataclass(frozen=True)
class LetRun:
    """Tell the destination that the VM is its own, by which claim. Leads to Told or Failed."""

    claim: Claim


@dataclass(frozen=True)
class RecoverStream:
    """Connect a postcopy stream that broke. Leads to Recovered or Failed."""


@dataclass(frozen=True)
class EndSource:
    """End this host's QEMU: its guest must never run again. A failure is Failed."""

    because: str


@dataclass(frozen=True)
class Finish:
    """Nothing follows: end the wire, stop watching. `stays`: the VM is this host's as before."""

    stays: bool


SourceEffect = (
    Prepare
    | StartStream
    | SwitchToPostcopy
    | FinishStream
    | AskPromise
    | MoveDevices
    | ReleaseDisks
    | HandOver
    | Withdraw
    | MakeCertain
    | GoBack
    | AbortDestination
    | LetRun
    | RecoverStream
    | EndSource
    | Finish
)


# Events


@dataclass(frozen=True)
class Prepared:
    """The destination has QEMU, backends and the wire ready; its wire listens at `address`."""

    address: str


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
class DevicesMoved:
    """The destination has the state of every passed-through device, and here they stand still."""


@dataclass(frozen=True)
class DisksReleased:
    """The source's backends have let go of the images."""


@dataclass(frozen=True)
class Committed:
    """The store has given the VM to the destination, by `claim`."""

    claim: Claim


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
class Certain:
    """The store knows that the VM is not the source's. `claim` is the destination's, if this host
    has seen it; otherwise the destination reads it in the store.
    """

    claim: Claim | None


@dataclass(frozen=True)
class Told:
    """The destination has answered that the guest runs there."""


@dataclass(frozen=True)
class WentBack:
    """The disks are this host's again, QEMU's migration is over; `running`: so the guest runs."""

    running: bool


@dataclass(frozen=True)
class Recovered:
    """QEMU goes on with a postcopy stream that had broken."""


@dataclass(frozen=True)
class Failed:
    """An effect that has to be carried out was not; it is tried again."""

    effect: SourceEffect
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


SourceEvent = (
    Prepared
    | Refused
    | PostcopyChosen
    | Hopeless
    | GuestStopped
    | Loaded
    | DevicesMoved
    | DisksReleased
    | Committed
    | NotCommitted
    | AnswerLost
    | Withdrawn
    | Superseded
    | Certain
    | Told
    | WentBack
    | Recovered
    | Failed
    | StreamFailed
    | NotRecorded
    | DestinationGone
    | DestinationEnded
    | SourceEnded
    | Drained
    | CancelAsked
    | Resolved
    | Tick
)


# State


@dataclass(frozen=True)
class Bounds:
    """For how long, in seconds: the whole until the guest stands still, and its blackout."""

    deadline_s: float = 600.0
    blackout_s: float = 2.0


@dataclass(frozen=True)
class Again:
    """An effect that failed, and when it is tried again, on the driver's clock."""

    at: float
    effect: SourceEffect


@dataclass(frozen=True)
class Migration:
    """Everything that a decision depends on. Times are on the driver's clock.

    `until` bounds the phase; `tell_until`: how long the destination is told, once the VM is its
    own. `claim` is the destination's, once the store has given it. `back`: the guest is this
    host's as before; `settled`: the store says so. `source_ended` is why QEMU ended, "" until then.
    `devices`: the VM has passed-through devices.
    """

    bounds: Bounds
    until: float
    phase: Phase = Phase.PREPARE
    mode: Mode = Mode.PRECOPY
    why: str = ""
    devices: bool = False
    guest_stopped: bool = False
    devices_moved: bool = False
    loaded: bool = False
    disks_released: bool = False
    source_ended: str = ""
    settled: bool = False
    back: bool = False
    told: bool = False
    tell_until: float = 0.0
    recovering: bool = False
    claim: Claim | None = None
    evidence: str = ""
    again: frozenset[Again] = frozenset()
    finished: bool = False

    @property
    def may_cancel(self) -> bool:
        """Whether the VM can still be kept here by deciding so."""
        return self.phase in (Phase.PREPARE, Phase.PRECOPY, Phase.SWITCHOVER)


Step = tuple[Migration, list[SourceEffect]]
