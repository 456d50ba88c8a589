"""What the owner of a QEMU knows, sees and asks for: runstates, events, effects.

`qemu.decide` decides on these values; `qemu.driver` carries the effects out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Runstate(Enum):
    """What a VM is doing; the transitions are drawn in `qemu.decide`."""

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
    """What can be asked of a VM. The values complete "cannot … VM NAME"."""

    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    KILL = "kill"
    RESTART = "restart QEMU of"
    SAVE = "save"
    RESTORE = "restore"
    RESCUE = "rescue a disk of"
    DEPART = "migrate"
    ARRIVE = "receive"
    SWITCH = "switch"


@dataclass(frozen=True)
class End:
    """How QEMU ended: a sentence, and the exit code or signal if they are known. `with_host`: it
    ran before the host was started anew, and nobody had asked for its end until then.
    """

    reason: str
    exit_code: int | None = None
    signal: int | None = None
    with_host: bool = False


@dataclass(frozen=True)
class VmState:
    """Everything that a decision depends on.

    `pending` is the request that waits for QEMU's answer; `held` is work on the whole VM that
    somebody else does and that ends with `Released`. `deadline` is a time of the owner's clock.
    `qemu` counts the QEMUs that this owner has had: what an earlier one tells is ignored. `gone`
    are the devices, by QEMU's id, that the guest has unplugged from the present one.
    """

    run: Runstate = Runstate.STARTING
    why: str = ""
    pending: Asked | None = None
    held: Request | None = None
    qemu: int = 1
    deadline: float | None = None
    told_to_quit: bool = False
    killed_because: str = ""
    shutdown_cause: str = ""
    resets: int = 0
    gone: frozenset[str] = frozenset()
    end: End | None = None


# Events

ON_REQUEST = "killed on request"
# Its QEMU is ended since a standby takes its place.
FOR_STANDBY = "a standby takes over"


@dataclass(frozen=True)
class Asked:
    """Somebody asks for something; `grace_s` belongs to STOP, `because` to KILL.

    `ticket` says whom to answer, and with SWITCH which QEMU is to follow.
    """

    request: Request
    grace_s: float = 0.0
    because: str = ON_REQUEST
    ticket: int = 0


@dataclass(frozen=True, kw_only=True)
class FromQemu:
    """What one QEMU told, or what was seen of that process. `qemu` is its number."""

    qemu: int = 1


@dataclass(frozen=True)
class Done(FromQemu):
    """QEMU carried out the pending request."""


@dataclass(frozen=True)
class NotDone(FromQemu):
    """QEMU refused the pending request, or never got it."""

    reason: str


@dataclass(frozen=True)
class Silent(FromQemu):
    """The monitor did not answer, or was lost."""

    reason: str


@dataclass(frozen=True)
class StatusTold(FromQemu):
    """The monitor told QEMU's runstate, by QEMU's own word for it."""

    status: str


@dataclass(frozen=True)
class QemuEvent(FromQemu):
    """An event of the monitor; `cause` is the event's reason, if there is one."""

    name: str
    cause: str = ""


@dataclass(frozen=True)
class DeviceGone(FromQemu):
    """QEMU has a device no more, by its id: the guest has unplugged the device."""

    device: str


@dataclass(frozen=True)
class Ended(FromQemu):
    """The process ended; both None when nobody could tell how. `with_host`: the host has been
    started anew since.
    """

    exit_code: int | None
    signal: int | None
    with_host: bool = False


@dataclass(frozen=True)
class Released:
    """The work that held the VM is over, and QEMU told its runstate."""

    status: str


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Heard = Silent | StatusTold | QemuEvent | DeviceGone
VmEvent = Asked | Done | NotDone | Heard | Ended | Released | Tick

# Effects


@dataclass(frozen=True)
class Execute:
    """Send a monitor command; report Done, NotDone or Silent, which answer the pending request."""

    command: str


@dataclass(frozen=True)
class KillProcess:
    """SIGKILL to QEMU."""


@dataclass(frozen=True)
class SwitchProcess:
    """SIGKILL to this QEMU; from now on the VM is the QEMU that waits and that `ticket` names."""

    ticket: int


@dataclass(frozen=True)
class Accept:
    """The request of that ticket was carried out, or its end is on the way."""

    ticket: int


class Refusal(Enum):
    """Why a request was not carried out."""

    CONFLICT = "conflict"
    NOT_DONE = "not-done"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Refuse:
    """The request of that ticket was not carried out, or nobody knows."""

    ticket: int
    request: Request
    kind: Refusal
    reason: str


VmEffect = Execute | KillProcess | SwitchProcess | Accept | Refuse
Decision = tuple[VmState, list[VmEffect]]
