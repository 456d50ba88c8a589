"""What the owner of a restart of QEMU knows, sees and asks for. `decide` decides on these values,
`driver` carries the effects out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sempervirt.core.failure import Failure
from sempervirt.host.procfs import ProcessId
from sempervirt.vm.work import Restarting


class Step(Enum):
    """How far a restart is; `decide` draws the way."""

    HOLD = "hold"
    START = "start"
    TRANSFER = "transfer"
    SWITCH = "switch"
    PART = "part"
    RUN = "run"
    MOVE_IN = "move in"
    LINK = "link"
    DISCARD = "discard"
    GO_BACK = "go back"
    LEAVE = "leave"
    OVER = "over"

    @property
    def is_switched(self) -> bool:
        """Whether the new QEMU is the VM, or is about to be."""
        return self in (Step.SWITCH, Step.PART, Step.RUN, Step.MOVE_IN)


# Effects. What an effect does depends on nothing but the effect and the world.


@dataclass(frozen=True)
class Hold:
    """Keep others from changing the VM."""


@dataclass(frozen=True)
class Start:
    """Start the new QEMU, which maps the same memory, beside the old one."""


@dataclass(frozen=True)
class Transfer:
    """Stop the guest (`pause`: it runs) and have the new QEMU load the state of the devices."""

    pause: bool


@dataclass(frozen=True)
class Switch:
    """Kill the old QEMU; from now on the new one is the VM."""


@dataclass(frozen=True)
class EndOld:
    """Wait until the old QEMU has ended."""


@dataclass(frozen=True)
class EndStandIns:
    """End the backends that stood in for those of the disks."""


@dataclass(frozen=True)
class FreeTaps:
    """Take away the taps that stood in for those of the VM."""


@dataclass(frozen=True)
class Run:
    """Lead the new QEMU to the disks and taps, and (`cont`) let the guest run."""

    cont: bool


@dataclass(frozen=True)
class MoveIn:
    """Put the sockets of the new QEMU where everybody looks for them."""


@dataclass(frozen=True)
class Link:
    """Let others change the VM again, and connect to the monitor of the new QEMU. `running`: the
    guest runs.
    """

    running: bool


@dataclass(frozen=True)
class Discard:
    """End the new QEMU, and all that was made for it."""


@dataclass(frozen=True)
class GoBack:
    """Let the guest run on (`cont`) in the old QEMU, which may have been told to give its state."""

    reset: bool
    cont: bool


@dataclass(frozen=True)
class Leave:
    """Let others change the VM again. `running`: the guest runs in the old QEMU."""

    running: bool


Parting = EndOld | EndStandIns | FreeTaps
Effect = Hold | Start | Transfer | Switch | Parting | Run | MoveIn | Link | Discard | GoBack | Leave

# Events


@dataclass(frozen=True)
class Held:
    """Nobody else changes the VM. `running`: the guest runs."""

    running: bool


@dataclass(frozen=True)
class Started:
    """The new QEMU waits for a state; `machine` is the versioned name of its machine."""

    qemu: ProcessId
    machine: str


@dataclass(frozen=True)
class Transferred:
    """The guest stands still, and both QEMUs have the state of its devices."""


@dataclass(frozen=True)
class Switched:
    """The old QEMU was killed."""


@dataclass(frozen=True)
class Parted:
    """One of the three effects of `Step.PART` is done."""

    effect: Parting


@dataclass(frozen=True)
class GuestRuns:
    """The new QEMU serves the VM, and runs the guest if it is to run."""


@dataclass(frozen=True)
class MovedIn:
    """The sockets are in their places."""


@dataclass(frozen=True)
class Linked:
    """The VM is an ordinary one again; `ended` says why it has ended, if it has."""

    ended: str = ""


@dataclass(frozen=True)
class Discarded:
    """Nothing of the new QEMU is left."""


@dataclass(frozen=True)
class WentBack:
    """The old QEMU goes on as before."""


@dataclass(frozen=True)
class Gone:
    """There is no old QEMU to go back to."""

    why: str


@dataclass(frozen=True)
class Left:
    """The VM is an ordinary one again."""


@dataclass(frozen=True)
class Failed:
    """An effect was not done, or not to its end."""

    effect: Effect
    failure: Failure


@dataclass(frozen=True)
class GiveUp:
    """The agent closes: the restart goes back, if it still can."""

    why: str


@dataclass(frozen=True)
class Unrecorded:
    """A step could not be put on record, and was not taken."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = (
    Held
    | Started
    | Transferred
    | Switched
    | Parted
    | GuestRuns
    | MovedIn
    | Linked
    | Discarded
    | WentBack
    | Gone
    | Left
    | Failed
    | GiveUp
    | Unrecorded
    | Tick
)


@dataclass(frozen=True)
class Restarted:
    """The new QEMU has the VM. Its `machine` is versioned; times in milliseconds."""

    qemu: ProcessId
    machine: str
    blackout_ms: float
    total_ms: float


@dataclass(frozen=True)
class Restart:
    """Everything that a decision depends on. Times are those of the owner's clock, in seconds.

    `vm` is the VM's name; `number` that of the new QEMU among the VM's. `running`: the guest ran
    before. `waits` is what `Step.PART` waits for; `again` what is done again at `again_at`.
    `failure` is why it did not go as asked, `answer` what the caller is told: it may be told before
    the restart is over, when that may take for ever.
    """

    vm: str
    number: int
    step: Step = Step.HOLD
    running: bool = False
    qemu: ProcessId | None = None
    machine: str = ""
    waits: frozenset[Parting] = frozenset()
    again: frozenset[Effect] = frozenset()
    again_at: float | None = None
    given_up: str = ""
    failure: Failure | None = None
    answer: Restarted | Failure | None = None
    started: float = 0.0
    stopped: float | None = None
    went: float | None = None


@dataclass(frozen=True)
class TookOver:
    """What is on record when the new QEMU has the VM for good."""

    qemu: ProcessId
    number: int


Entry = Restarting | TookOver | None
Decision = tuple[Restart, list[Effect]]
