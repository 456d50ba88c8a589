"""What the owner of a VM's standbys knows, sees and asks for. `decide` decides on these values,
`driver` carries the effects out.

A *generation* is one standby, from its snapshot to its end; generations of a VM are numbered. The
*first* VM is the one that runs, also when it was a standby once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sempervirt.core.failure import Failure
from sempervirt.standby.values import Policy, Tier


class Life(Enum):
    """How far a generation is; `decide` draws the way."""

    TAKING = "taking"  # its snapshot is taken
    COPYING = "copying"
    BOOTING = "booting"
    SETTLING = "settling"
    FREEZING = "freezing"
    STANDING = "standing"  # the QEMU that waits is started
    READY = "ready"
    RETURNING = "returning"  # its take-over was called off, and it is made to wait once more
    SERVING = "serving"  # it is the VM
    LOST = "lost"  # it was the VM until a newer one took over; its disks are kept
    RETIRING = "retiring"  # its processes and files go

    @property
    def being_made(self) -> bool:
        """Whether it is on its way to READY."""
        return self in _MAKING


_MAKING = (
    Life.TAKING,
    Life.COPYING,
    Life.BOOTING,
    Life.SETTLING,
    Life.FREEZING,
    Life.STANDING,
)


class First(Enum):
    """What is known of the VM that the standbys are for."""

    RUNNING = "running"
    AWAY = "away"  # not started, paused, stopped in order, or nobody knows
    DEAD = "dead"  # its QEMU was seen to have ended, and nobody had asked for that


class Step(Enum):
    """How far a take-over is."""

    DECLARED = "declared"  # the state is loaded; the first VM is being proven dead, its disks free
    CLAIMING = "claiming"
    RUNNING = "running"  # the guest was told to run
    PROBING = "probing"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Generation:
    """One standby. `taken` is when its snapshot was, in seconds since the epoch, 0 before that;
    `snapshots` are the numbers of its snapshots by disk, until they were given up. `machine` is
    the versioned name of the machine whose state is kept, `memory_bytes` what the guest's memory
    takes in this tier, `made_s` how long its OS took until it was up. `again_at`: when its removal
    is tried again. `notes` are for people.
    """

    number: int
    life: Life
    tier: Tier = Tier.READY
    taken: float = 0.0
    ended: float = 0.0
    snapshots: tuple[tuple[str, int], ...] = ()
    consistency: str = ""
    machine: str = ""
    memory_bytes: int = 0
    made_s: float = 0.0
    again_at: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TakeOver:
    """A take-over by generation `number`. `began` is when it was declared, in seconds since the
    epoch, `since` the same on the owner's clock; `steps` are the milliseconds from then to the end
    of each step. `trouble` is what it waits for, or why it failed. `forced`: the first VM is ended;
    `word` is what an operator says of its end.
    """

    number: int
    cause: str
    began: float
    since: float
    step: Step = Step.DECLARED
    loaded: bool = False
    fenced: bool = False
    forced: bool = False
    word: str = ""
    ticket: int = 0
    again_at: float | None = None
    trouble: str = ""
    steps: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Standby:
    """Everything that a decision depends on. Times are those of the owner's clock, in seconds, but
    for those of `Generation` and `TakeOver.began`.

    `last` is the number of the last generation, `due` when the next one is begun. `trouble` is why
    the last one was not made, `failures` how many were not in a row. `past` is the last take-over.
    Once `closing` nothing is begun any more, and the standbys go; `ticket` waits for that.
    `declined`: an operator has called a take-over off, and nothing that is seen of this death of
    the first VM declares another one. `tested` is when the last rehearsal was, in seconds since the
    epoch. `unwanted` are snapshots of which no copy is made any more, until they were given up.
    """

    vm: str
    policy: Policy
    first: First = First.AWAY
    why: str = ""
    generations: tuple[Generation, ...] = ()
    last: int = 0
    due: float = 0.0
    failures: int = 0
    trouble: str = ""
    take_over: TakeOver | None = None
    past: TakeOver | None = None
    closing: bool = False
    ticket: int = 0
    declined: bool = False
    tested: float = 0.0
    unwanted: tuple[tuple[str, int], ...] = ()

    @property
    def ready(self) -> tuple[Generation, ...]:
        """Those that can take over, the oldest first."""
        return tuple(one for one in self.generations if one.life is Life.READY)

    @property
    def making(self) -> Generation | None:
        """The one that is being made."""
        return next((one for one in self.generations if one.life.being_made), None)

    @property
    def serving(self) -> Generation | None:
        """The one that is the VM now."""
        return next((one for one in self.generations if one.life is Life.SERVING), None)

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        left = [one for one in self.generations if one.life not in (Life.SERVING, Life.LOST)]
        return self.closing and not left and self.take_over is None

    def generation(self, number: int) -> Generation | None:
        """The one of that number."""
        return next((one for one in self.generations if one.number == number), None)


# Effects. What an effect does depends on nothing but the effect and the world.


@dataclass(frozen=True)
class Take:
    """Take a snapshot of the disks, all at one instant."""

    number: int


@dataclass(frozen=True)
class Copy:
    """Copy the snapshots to images of the generation's own, and give them up. `ours` are all
    snapshots, by disk, that were taken for standbys.
    """

    number: int
    snapshots: tuple[tuple[str, int], ...]
    ours: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Boot:
    """Boot a guest from the copies, isolated, until its OS is initialised."""

    number: int


@dataclass(frozen=True)
class Settle:
    """See that its network spoke, and plug in the disks that both VMs have."""

    number: int


@dataclass(frozen=True)
class Freeze:
    """Stop the guest, keep its memory and the state of its devices, and end its QEMU."""

    number: int
    tier: Tier


@dataclass(frozen=True)
class Stand:
    """Start what waits, with a generation ID that no VM has had. In tier FILE nothing does."""

    number: int
    machine: str
    tier: Tier


@dataclass(frozen=True)
class StandAgain:
    """Have a generation of which the take-over was called off wait for its state once more, by a
    QEMU of its own with another generation ID. In tier FILE nothing of it runs then.
    """

    number: int
    machine: str
    tier: Tier


@dataclass(frozen=True)
class Remove:
    """End the processes of a generation, and remove its files."""

    number: int


@dataclass(frozen=True)
class GiveUp:
    """Give up snapshots of which no copy is made any more. `ours` as in `Copy`."""

    snapshots: tuple[tuple[str, int], ...]
    ours: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Load:
    """Have the QEMU of a generation load its state; the guest stands still."""

    number: int
    machine: str
    tier: Tier


@dataclass(frozen=True)
class Fence:
    """See that the first VM has ended and its disks are free; with `kill` end it. `word`: an
    operator says that it has ended, and how that is known.
    """

    kill: bool
    word: str = ""


@dataclass(frozen=True)
class Claim:
    """Take the disks that both VMs have, and let the generation be the VM."""

    number: int


@dataclass(frozen=True)
class Run:
    """Lead the network to the guest, and let it run."""

    number: int


@dataclass(frozen=True)
class Probe:
    """Set the guest's clock, and see that the guest answers."""

    number: int


@dataclass(frozen=True)
class Accept:
    """The request of that ticket was carried out."""

    ticket: int


@dataclass(frozen=True)
class Refuse:
    """The request of that ticket was not carried out."""

    ticket: int
    failure: Failure


Making = Take | Copy | Boot | Settle | Freeze | Stand
TakingOver = Load | Fence | Claim | Run | Probe
Effect = Making | StandAgain | Remove | GiveUp | TakingOver | Accept | Refuse


# Events


@dataclass(frozen=True)
class FirstSeen:
    """What the first VM is now; `why` is how QEMU ended. `time` is in seconds since the epoch."""

    first: First
    why: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class Taken:
    """The snapshots are there."""

    number: int
    time: float
    snapshots: tuple[tuple[str, int], ...]
    consistency: str


@dataclass(frozen=True)
class Copied:
    """The generation has images of its own."""

    number: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Booted:
    """The guest's OS is initialised, after so long."""

    number: int
    seconds: float


@dataclass(frozen=True)
class Settled:
    """The guest can be frozen."""

    number: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frozen:
    """Memory and state are kept; what booted has ended."""

    number: int
    machine: str
    memory_bytes: int


@dataclass(frozen=True)
class Stood:
    """The generation can take over since `time`, in seconds since the epoch."""

    number: int
    time: float = 0.0


@dataclass(frozen=True)
class Lost:
    """What waited has ended, or is silent."""

    number: int
    why: str


@dataclass(frozen=True)
class Removed:
    """Nothing is left of the generation."""

    number: int


@dataclass(frozen=True)
class GivenUp:
    """The snapshots are not kept any more; notes tell of those that stay."""

    snapshots: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """The guest's state is loaded."""

    number: int


@dataclass(frozen=True)
class Fenced:
    """The first VM has ended, and its disks are free."""


@dataclass(frozen=True)
class Claimed:
    """The generation is the VM, and has all disks."""

    number: int


@dataclass(frozen=True)
class Runs:
    """The guest runs."""

    number: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probed:
    """The guest was looked at."""

    number: int
    time: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """An effect was not done, or not to its end."""

    effect: Making | StandAgain | Remove | GiveUp | TakingOver
    failure: Failure


@dataclass(frozen=True)
class FailoverAsked:
    """Somebody has a standby take over, as `cause` says; `force`: also while the first VM runs.
    `word` as in `Fence`.
    """

    ticket: int
    force: bool
    time: float
    word: str = ""
    cause: str = "an operator asked for it"


@dataclass(frozen=True)
class CancelAsked:
    """An operator calls the take-over off."""

    ticket: int


@dataclass(frozen=True)
class Rehearsed:
    """A rehearsal has come to its end; `time` is in seconds since the epoch."""

    time: float


@dataclass(frozen=True)
class PolicyAsked:
    """From now on standbys are kept so."""

    policy: Policy


@dataclass(frozen=True)
class DisableAsked:
    """No standbys any more."""

    ticket: int


@dataclass(frozen=True)
class Unrecorded:
    """The step to which `event` would have led could not be put on record, and was not taken."""

    event: Event


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = (
    FirstSeen
    | Taken
    | Copied
    | Booted
    | Settled
    | Frozen
    | Stood
    | Lost
    | Removed
    | GivenUp
    | Loaded
    | Fenced
    | Claimed
    | Runs
    | Probed
    | Failed
    | FailoverAsked
    | CancelAsked
    | Rehearsed
    | PolicyAsked
    | DisableAsked
    | Unrecorded
    | Tick
)


class Found(Enum):
    """What a new agent finds of a generation."""

    NOTHING = "nothing"  # or not enough to take over with
    KEPT = "kept"  # memory and state in a file
    WAITS = "waits"  # QEMU waits for its state
    LOADED = "loaded"  # QEMU has the state, and the guest never ran on
    RUNS = "runs"


Decision = tuple[Standby, list[Effect]]
