"""What an agent leaves for the next one about a VM.

    {"version": 1, "spec": {…}, "accelerator": {"kind": "tcg", "reason": "…"},
     "started": 1795384877.9, "plans": {"disk-root": {"device": "vhost-user-blk",
        "binding": {"map": [0, 0], "source": "…"}, "engine": {"value": "…", "source": "…"},
        "poll_us": 20 | null, "poll_source": "…"}, …},
     "qemu": {"pid": 4711, "start_ticks": 1, "boot_id": "…"} | null,
     "restart": {"number": 2, "resume": true, "switched": false,
                 "qemu": {"pid": 4712, …} | null} | null,
     "number": 1, "restoring": false,
     "claim": {"vm": "…", "host": "a", "epoch": 7, "id": "…", "images": ["…"]} | null,
     "departure": {"id": "…", "destination": "b", "address": "10.0.0.2:7443", "phase": "precopy",
                   "mode": "precopy", "running": true} | null,
     "arrival": {"id": "…", "source": "a", "phase": "promised", "running": true, "epoch": 7,
                 "images": ["…"]} | null,
     "end": {"run": "stopped", "reason": "…", "exit_code": 0, "signal": null} | null}

`number` counts the QEMUs that this VM has had; `restart` is there while another one takes over,
or while the VM is paused for a save. `restoring`: its memory is not there yet. `claim` is what
the store gave this host, until it was given back; `departure` and `arrival` are there while the VM
moves, and say how far that was when it was written.

Neither `qemu` nor `end`: the agent ended between its intention and the start of QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sempervirt.core.queue_map import DevicePlan
from sempervirt.host.procfs import ProcessId
from sempervirt.host.records import RecordDamaged, read_record, write_record
from sempervirt.migration.events import Arrival, Mode, Phase
from sempervirt.store.registry import Claim
from sempervirt.vm.accel import Accelerator
from sempervirt.vm.spec import VmSpec
from sempervirt.vm.states import End, Runstate, VmState

VERSION = 1
_PLANS = TypeAdapter(dict[str, DevicePlan])


@dataclass(frozen=True)
class RestartRecord:
    """A QEMU that is to take over: its number, and whether the guest is to run on.

    Once `switched` it is the VM, and the one before is to be dead before the guest runs on.
    """

    number: int
    resume: bool
    switched: bool = False
    qemu: ProcessId | None = None


@dataclass(frozen=True)
class DepartureRecord:
    """A migration away, with the phase that it was in; `running`: the guest was not paused."""

    id: str
    destination: str
    address: str
    running: bool
    phase: Phase = Phase.PREPARE
    mode: Mode = Mode.PRECOPY

    @property
    def farewell(self) -> str:
        """Why the QEMU here ends when it has moved; "" while it has not."""
        return f"it runs on {self.destination} now" if self.phase is Phase.DONE else ""


@dataclass(frozen=True)
class ArrivalRecord:
    """A migration to this host, with the phase that it was in; `epoch` is that of the source's
    claim, `images` are the ids of what it covers.
    """

    id: str
    source: str
    running: bool
    epoch: int
    images: tuple[str, ...]
    phase: Arrival = Arrival.PREPARING


@dataclass(frozen=True)
class VmRecord:
    """The content of the record; `plans` is how the queues of each device were to be served."""

    spec: VmSpec
    accelerator: Accelerator
    started: float
    qemu: ProcessId | None = None
    end: VmState | None = None
    plans: Mapping[str, DevicePlan] = field(default_factory=dict)
    number: int = 1
    restart: RestartRecord | None = None
    restoring: bool = False
    claim: Claim | None = None
    departure: DepartureRecord | None = None
    arrival: ArrivalRecord | None = None

    def write(self, path: Path) -> None:
        """Replaces the record at `path`."""
        state = self.end
        end = state and state.end and {"run": state.run.value, **asdict(state.end)}
        content = {
            "spec": self.spec.model_dump(mode="json"),
            "accelerator": asdict(self.accelerator),
            "started": self.started,
            "plans": {name: asdict(plan) for name, plan in self.plans.items()},
            "qemu": asdict(self.qemu) if self.qemu else None,
            "number": self.number,
            "restoring": self.restoring,
            "restart": asdict(self.restart) if self.restart else None,
            "claim": asdict(self.claim) if self.claim else None,
            "departure": _moving(self.departure),
            "arrival": _moving(self.arrival),
            "end": end,
        }
        write_record(path, VERSION, content)

    def ended(self, state: VmState) -> VmRecord:
        """The record of the same VM after its end."""
        return replace(self, end=state)


def read_vm_record(path: Path) -> VmRecord | None:
    """The record at `path`, None when there is none. Raises RecordDamaged."""
    content = read_record(path, VERSION)
    if content is None:
        return None
    try:
        end = content["end"]
        state = None
        if end is not None:
            run = Runstate(end.pop("run"))
            state = VmState(run=run, why=end["reason"], end=End(**end))
        return VmRecord(
            spec=VmSpec.model_validate(content["spec"]),
            accelerator=Accelerator(**content["accelerator"]),
            started=float(content["started"]),
            qemu=content["qemu"] and ProcessId(**content["qemu"]),
            end=state,
            plans=_PLANS.validate_python(content.get("plans", {})),
            number=int(content.get("number", 1)),
            restoring=bool(content.get("restoring", False)),
            restart=_restart(content.get("restart")),
            claim=_claim(content.get("claim")),
            departure=_departure(content.get("departure")),
            arrival=_arrival(content.get("arrival")),
        )
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise RecordDamaged(
            f"{path} is not the record of a VM: {error}",
            remedy="move the file away and end the VM's processes by hand",
        ) from error


def _restart(content: dict[str, Any] | None) -> RestartRecord | None:
    if content is None:
        return None
    qemu = content.pop("qemu")
    return RestartRecord(**content, qemu=qemu and ProcessId(**qemu))


def _claim(content: dict[str, Any] | None) -> Claim | None:
    return None if content is None else Claim(**{**content, "images": tuple(content["images"])})


def _moving(record: DepartureRecord | ArrivalRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    content = asdict(record) | {"phase": record.phase.value}
    return content | ({"mode": record.mode.value} if isinstance(record, DepartureRecord) else {})


def _departure(content: dict[str, Any] | None) -> DepartureRecord | None:
    if content is None:
        return None
    phase, mode = Phase(content["phase"]), Mode(content["mode"])
    return DepartureRecord(**{**content, "phase": phase, "mode": mode})


def _arrival(content: dict[str, Any] | None) -> ArrivalRecord | None:
    if content is None:
        return None
    phase, images = Arrival(content["phase"]), tuple(content["images"])
    return ArrivalRecord(**{**content, "phase": phase, "images": images})
