"""What a VM's state machine knows, sees and asks for: runstates, events, effects.

`runstate` decides on these values; `machine` carries the effects out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Runstate(Enum):
    """See the module."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"
    STOPPING = "stopping"
    UNKNOWN = "unknown"
    STOPPED = "stopped"
    CRASHED = "crashed"

    @property
    def is_end(self) -> bool:
        """Whether QEMU has ended."""
        return self in (Runstate.STOPPED, Runstate.CRASHED)


class Request(Enum):
    """What can be asked of a VM."""

    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    KILL = "kill"
    RESTART = "restart QEMU of"
    SAVE = "save"
    RESTORE = "restore"
    DEPART = "migrate"
    ARRIVE = "receive"
    SWITCH = "switch"


@dataclass(frozen=True)
class End:
    """How QEMU ended: a sentence, and the exit code or signal if they are known."""

    reason: str
    exit_code: int | None = None
    signal: int | None = None


@dataclass(frozen=True)
class VmState:
    """Everything that a decision depends on.

    `pending` waits for QEMU's answer; `held` is work on the whole VM that somebody else does
    and ends with `Released`.
    """

    run: Runstate = Runstate.STARTING
    why: str = ""
    pending: Request | None = None
    held: Request | None = None
    deadline: float | None = None
    told_to_quit: bool = False
    killed_because: str = ""
    shutdown_cause: str = ""
    resets: int = 0
    end: End | None = None


# Events

ON_REQUEST = "killed on request"


@dataclass(frozen=True)
class Asked:
    """Somebody asks for something; `grace_s` belongs to STOP, `because` to KILL."""

    request: Request
    grace_s: float = 0.0
    because: str = ON_REQUEST


@dataclass(frozen=True)
class Done:
    """QEMU carried out the pending request."""


@dataclass(frozen=True)
class NotDone:
    """QEMU refused the pending request, or never got it."""

    reason: str


@dataclass(frozen=True)
class Silent:
    """The monitor did not answer, or was lost."""

    reason: str


@dataclass(frozen=True)
class StatusTold:
    """The monitor told QEMU's runstate."""

    status: str


@dataclass(frozen=True)
class QemuEvent:
    """An event of the monitor; `cause` is its reason, if it has one."""

    name: str
    cause: str = ""


@dataclass(frozen=True)
class Ended:
    """The process ended; both None when nobody could tell how."""

    exit_code: int | None
    signal: int | None


@dataclass(frozen=True)
class Released:
    """The work that held the VM is over, and QEMU told its runstate."""

    status: str


@dataclass(frozen=True)
class Tick:
    """Time passed."""


VmEvent = Asked | Done | NotDone | Silent | StatusTold | QemuEvent | Ended | Released | Tick

# Effects


@dataclass(frozen=True)
class Execute:
    """Send a monitor command; report Done, NotDone or Silent if it is the pending request."""

    command: str


@dataclass(frozen=True)
class KillProcess:
    """SIGKILL to QEMU."""


@dataclass(frozen=True)
class SwitchProcess:
    """SIGKILL to this QEMU; from now on the other one, which waits, is the VM."""


@dataclass(frozen=True)
class Accept:
    """The request was carried out, or its end is on the way."""

    request: Request


class Refusal(Enum):
    """Why a request was not carried out."""

    CONFLICT = "conflict"
    NOT_DONE = "not-done"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Refuse:
    """The request was not carried out, or nobody knows."""

    request: Request
    kind: Refusal
    reason: str


VmEffect = Execute | KillProcess | SwitchProcess | Accept | Refuse
Step = tuple[VmState, list[VmEffect]]
