"""What the owner of a save knows, sees and asks for. `decide` decides on these values, `driver`
carries the effects out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sempervirt.core.failure import Failure
from sempervirt.qemu.saved import Figures


class Step(Enum):
    """How far a save is; `decide` draws the way."""

    HOLD = "hold"
    PACK = "pack"
    END = "end"
    FREE = "free"
    GO_BACK = "go back"
    LEAVE = "leave"
    OVER = "over"


# Effects. What an effect does depends on nothing but the effect and the world.


@dataclass(frozen=True)
class Hold:
    """Keep others from changing the VM."""


@dataclass(frozen=True)
class Pack:
    """Stop the guest (`pause`: it runs) and write its state to the file, which is durable then."""

    pause: bool


@dataclass(frozen=True)
class StopPacking:
    """Have `Pack` fail soon."""


@dataclass(frozen=True)
class End:
    """Kill QEMU, and wait for its end."""


@dataclass(frozen=True)
class Free:
    """Wait until the disks are free."""


@dataclass(frozen=True)
class GoBack:
    """Let the guest run on (`cont`) in QEMU, which may have been told to give its state."""

    cont: bool


@dataclass(frozen=True)
class Leave:
    """Let others change the VM again. `running`: the guest runs."""

    running: bool


Effect = Hold | Pack | StopPacking | End | Free | GoBack | Leave

# Events


@dataclass(frozen=True)
class Held:
    """Nobody else changes the VM. `running`: the guest runs."""

    running: bool


@dataclass(frozen=True)
class Packed:
    """The file is complete and durable."""

    figures: Figures


@dataclass(frozen=True)
class Ended:
    """QEMU has ended."""


@dataclass(frozen=True)
class Freed:
    """The disks are free."""


@dataclass(frozen=True)
class WentBack:
    """QEMU goes on as before."""


@dataclass(frozen=True)
class Gone:
    """There is no QEMU to go back to."""

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
    """The agent closes: the save goes back, if it still can."""

    why: str


@dataclass(frozen=True)
class Unrecorded:
    """A step could not be put on record, and was not taken."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = Held | Packed | Ended | Freed | WentBack | Gone | Left | Failed | GiveUp | Unrecorded | Tick


@dataclass(frozen=True)
class Saved:
    """The VM is in the file, and has ended. The guest stood still for `paused_ms` before that."""

    figures: Figures
    paused_ms: float


@dataclass(frozen=True)
class Save:
    """Everything that a decision depends on. Times are those of the owner's clock, in seconds.

    `vm` is the VM's name; `running`: the guest ran before. `failure` is why it did not go as
    asked, `answer` what the caller is told: it may be told before the save is over, when that may
    take for ever. `again_at`: when QEMU is killed once more.
    """

    vm: str
    step: Step = Step.HOLD
    running: bool = False
    figures: Figures | None = None
    given_up: str = ""
    again_at: float | None = None
    failure: Failure | None = None
    answer: Saved | Failure | None = None
    stopped: float = 0.0
    packed: float = 0.0


Decision = tuple[Save, list[Effect]]
