"""What an evacuation knows, what it hears of, and what it asks for: values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from sempervirt.core.failure import Failure
from sempervirt.evacuation.plan import Survey
from sempervirt.evacuation.values import Cause, EvacuationOrder, Fate, Outcome, Reason, Report


class Step(Enum):
    """How far the evacuation as a whole is. The values stand in records."""

    MARK = "mark"
    SURVEY = "survey"
    MOVE = "move"
    OVER = "over"


@dataclass(frozen=True)
class Passage:
    """The way of one VM. `host` is where it goes; `tried` are the hosts of this round that did not
    take it, `rounds` the rounds over all hosts that have ended. `not_before`: no sooner is it tried
    again, on the evacuation's clock; 0: at once. `cancelled`: its move was told to end. `fell`: its
    warm standby has taken its place. `began_s` and `ended_s` as in `values.Outcome`.
    """

    vm: str
    fate: Fate = Fate.WAITS
    host: str = ""
    reason: Reason | None = None
    why: str = ""
    tried: tuple[str, ...] = ()
    rounds: int = 0
    not_before: float = 0.0
    cancelled: bool = False
    fell: bool = False
    began_s: float | None = None
    ended_s: float | None = None

    @property
    def outcome(self) -> Outcome:
        """What others are told."""
        return Outcome(
            self.vm, self.fate, self.host, self.reason, self.why, self.began_s, self.ended_s
        )


@dataclass(frozen=True)
class Evacuation:
    """`began` is in seconds since the epoch, `until` on the evacuation's clock. `passages` are in
    the order of the plan. `given_up`: an operator wants what is left to stay. `bounds` counts how
    many of the bounds in time have passed (`decide.BOUNDS`). `again_at`: when hosts and VMs are
    asked once more. `looks`: how often they had to be asked anew because a standby has taken a VM's
    place; an answer to an earlier question does not know that VM. `earlier` as in `values.Report`.
    `out_by`: who had this host taken out of service, if that was before the order; None: it was in
    service.
    """

    order: EvacuationOrder
    began: float
    until: float
    step: Step = Step.MARK
    survey: Survey = field(default_factory=Survey)
    passages: tuple[Passage, ...] = ()
    given_up: bool = False
    bounds: int = 0
    again_at: float | None = None
    looks: int = 0
    failure: str = ""
    ended: float | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    out_by: Cause | None = None

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self.step is Step.OVER

    @property
    def taken_out_by(self) -> Cause:
        """Who had this host taken out of service: this evacuation, or one before it."""
        return self.out_by or self.order.cause

    def passage(self, vm: str) -> Passage | None:
        """The way of that VM."""
        return next((one for one in self.passages if one.vm == vm), None)

    def report(self) -> Report:
        """What others are told."""
        outcomes = tuple(one.outcome for one in self.passages)
        return Report(self.order, self.began, self.ended, outcomes, self.failure, self.earlier)


# Events


@dataclass(frozen=True)
class Marked:
    """From now on no VM comes here, and none is started."""


@dataclass(frozen=True)
class Surveyed:
    """What hosts and VMs have said. `moving`: VMs that are on their way already, and where to.
    `look`: the number of the question.
    """

    survey: Survey
    moving: tuple[tuple[str, str], ...] = ()
    look: int = 0


class Way(Enum):
    """How a move has ended, as its source has it."""

    MOVED = "moved"
    STAYED = "stayed"
    LOST = "lost"
    ENDED = "ended"
    CRASHED = "crashed"


@dataclass(frozen=True)
class MoveOver:
    """A move has ended. `host` is where it went, if that is another one than was asked for: what is
    followed may be younger than its record.
    """

    vm: str
    way: Way
    why: str = ""
    host: str = ""


class Word(Enum):
    """Where a VM is, by the word of the store and of its destination together."""

    THERE = "there"
    HERE = "here"
    ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class Checked:
    """Store and destination have answered."""

    vm: str
    word: Word
    why: str = ""


@dataclass(frozen=True)
class StandbyRuns:
    """The warm standby of a VM runs, on that host. `here`: that is the host that is emptied, so the
    VM still has to leave.
    """

    vm: str
    host: str
    here: bool = False


@dataclass(frozen=True)
class NoStandby:
    """A VM has no warm standby that could run."""

    vm: str
    why: str


@dataclass(frozen=True)
class Failed:
    """An effect was not carried out."""

    effect: Effect
    failure: Failure


@dataclass(frozen=True)
class GiveUpAsked:
    """Somebody wants what is left to stay."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = (
    Marked | Surveyed | MoveOver | Checked | StandbyRuns | NoStandby | Failed | GiveUpAsked | Tick
)

# Effects


@dataclass(frozen=True)
class Mark:
    """Takes this host out of service."""

    why: str


@dataclass(frozen=True)
class Unmark:
    """Puts this host into service again: nothing of the evacuation was done."""


@dataclass(frozen=True)
class LookAround:
    """Asks hosts and VMs for all that a plan is made of. `look` is the number of the question."""

    destinations: tuple[str, ...]
    look: int = 0


@dataclass(frozen=True)
class MoveVm:
    """Moves a VM, and waits for the end of the move. `pressing`: the guest may stand still for
    longer than usual, for what stays is lost.
    """

    vm: str
    host: str
    deadline_s: float
    pressing: bool


@dataclass(frozen=True)
class FollowVm:
    """Waits for the end of a move that is under way."""

    vm: str
    host: str


@dataclass(frozen=True)
class CancelVm:
    """Has a VM stay, if that is still possible; the end of its move tells what came of that."""

    vm: str


@dataclass(frozen=True)
class CheckVm:
    """Asks the store and the destination where a VM is."""

    vm: str
    host: str


@dataclass(frozen=True)
class Fall:
    """Has the warm standby of a VM take its place."""

    vm: str


Effect = Mark | Unmark | LookAround | MoveVm | FollowVm | CancelVm | CheckVm | Fall

Decision = tuple[Evacuation, Sequence[Effect]]
