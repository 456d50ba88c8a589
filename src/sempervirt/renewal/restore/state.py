"""What the owner of a restore knows, sees and asks for. `decide` decides on these values, `driver`
carries the effects out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sempervirt.core.failure import Failure


class Step(Enum):
    """How far a restore is; `decide` draws the way."""

    HOLD = "hold"
    LOAD = "load"
    RUN = "run"
    LEAVE = "leave"
    END = "end"
    OVER = "over"


# Effects. What an effect does depends on nothing but the effect and the world.


@dataclass(frozen=True)
class Hold:
    """Keep others from changing the VM."""


@dataclass(frozen=True)
class Load:
    """Wait until the memory is unpacked and verified, and have QEMU load the devices' state."""


@dataclass(frozen=True)
class Run:
    """Let the guest run (`cont`), or leave it paused."""

    cont: bool


@dataclass(frozen=True)
class Leave:
    """Let others change the VM. `running`: the guest runs."""

    running: bool


@dataclass(frozen=True)
class End:
    """Kill QEMU, and wait until the disks are free."""


Effect = Hold | Load | Run | Leave | End

# Events


@dataclass(frozen=True)
class Held:
    """Nobody else changes the VM."""


@dataclass(frozen=True)
class Loaded:
    """QEMU has the guest, which stands still."""


@dataclass(frozen=True)
class GuestRuns:
    """The guest runs, if it is to run."""


@dataclass(frozen=True)
class Left:
    """The VM is an ordinary one; `ended` says why it has ended, if it has."""

    ended: str = ""


@dataclass(frozen=True)
class Ended:
    """Nothing of the VM is left running."""


@dataclass(frozen=True)
class Failed:
    """An effect was not done, or not to its end."""

    effect: Effect
    failure: Failure


@dataclass(frozen=True)
class GiveUp:
    """The agent closes: nothing is left running, if the guest does not run yet."""

    why: str


@dataclass(frozen=True)
class Unrecorded:
    """A step could not be put on record, and was not taken."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = Held | Loaded | GuestRuns | Left | Ended | Failed | GiveUp | Unrecorded | Tick


@dataclass(frozen=True)
class Restored:
    """The VM is there, as it was saved."""


@dataclass(frozen=True)
class Restore:
    """Everything that a decision depends on. `vm` is the VM's name; `running`: the guest is to run.

    `may_have_run`: a former agent may have let the guest run. `failure` is why it did not go as
    asked, `answer` what the caller is told.
    """

    vm: str
    running: bool
    step: Step = Step.HOLD
    may_have_run: bool = False
    given_up: str = ""
    failure: Failure | None = None
    answer: Restored | Failure | None = None


Decision = tuple[Restore, list[Effect]]
