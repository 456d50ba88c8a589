"""What an agent leaves for the next one about a VM.

    {"version": 2, "spec": {…}, "accelerator": {"kind": "tcg", "reason": "…"},
     "started": 1795384877.9, "plans": {"disk-root": {"device": "vhost-user-blk",
        "binding": {"map": [0, 0], "source": "…"}, "engine": {"value": "…", "source": "…"},
        "poll_us": 20 | null, "poll_source": "…"}, …},
     "qemu": {"pid": 4711, "start_ticks": 1, "boot_id": "…"} | null, "number": 1,
     "claim": {"vm": "…", "host": "a", "epoch": 7, "id": "…", "images": ["…"]} | null,
     "work": {"kind": "restarting", "number": 2, "resume": true, "switched": false,
              "qemu": {"pid": 4712, …} | null}
           | {"kind": "saving", "resume": true, "saved": false}
           | {"kind": "restoring", "loaded": false, "resume": false}
           | {"kind": "rescuing", "disk": "root", "resume": true}
           | {"kind": "snapshotting", "frozen": true}
           | {"kind": "standing", "holder": "a"}
           | {"kind": "departing", "id": "…", "destination": "b", "address": "10.0.0.2:7443",
              "phase": "precopy", "mode": "precopy", "running": true, "by_images": false}
           | {"kind": "arriving", "id": "…", "source": "a", "phase": "promised", "running": true,
              "epoch": 7, "images": ["…"], "by_images": false} | null,
     "user": {"number": 2013265937 | null, "why": "", "groups": [2013265920]} | null,
     "end": {"run": "stopped", "reason": "…", "exit_code": 0, "signal": null, "with_host": false}
            | null}

`number` counts the QEMUs that this VM has had. `claim` is what the store gave this host, until it
was released. `work` is what went on with the VM when the record was written (`vm.work`).

`user` is the VM's own (`vm.user`); null: an earlier release, which knew none, has started it.

Neither `qemu` nor `end`: the agent ended between its intention and the start of QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sempervirt.core.queue_map import DevicePlan, check_map
from sempervirt.host.procfs import ProcessId
from sempervirt.host.records import RecordDamaged, read_record, write_record
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import End, Runstate, VmState
from sempervirt.store.registry import Claim
from sempervirt.vm.user import VmUser
from sempervirt.vm.work import Restarting, Work

VERSION = 2
# More QEMUs than that, or a start in the year 5138, is damage.
NUMBER_MAX = 1 << 31
STARTED_MAX = 1e11
_ACCELERATOR = TypeAdapter(Accelerator)
_QEMU: TypeAdapter[ProcessId | None] = TypeAdapter(ProcessId | None)
_CLAIM: TypeAdapter[Claim | None] = TypeAdapter(Claim | None)
_END = TypeAdapter(End)
_PLANS = TypeAdapter(dict[str, DevicePlan])
_USER: TypeAdapter[VmUser | None] = TypeAdapter(VmUser | None)
_WORK: TypeAdapter[Work | None] = TypeAdapter(Work | None)


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
    claim: Claim | None = None
    work: Work | None = None
    user: VmUser | None = None

    @property
    def qemus(self) -> tuple[ProcessId, ...]:
        """The VM's QEMU, and the one that is to take over."""
        new = self.work.qemu if isinstance(self.work, Restarting) else None
        return tuple(dict.fromkeys(one for one in (self.qemu, new) if one is not None))

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
            "claim": asdict(self.claim) if self.claim else None,
            "work": _WORK.dump_python(self.work, mode="json"),
            "user": asdict(self.user) if self.user else None,
            "end": end,
        }
        write_record(path, VERSION, content)

    def ended(self, state: VmState) -> VmRecord:
        """The record of the same VM after its end."""
        return replace(self, end=state)


def record_path(directory: Path) -> Path:
    """The record in the directory of a VM."""
    return directory / "vm.json"


def read_vm_record(path: Path) -> VmRecord | None:
    """The record at `path`, None when there is none. Raises RecordDamaged."""
    content = read_record(path, VERSION)
    if content is None:
        return None
    try:
        spec = VmSpec.model_validate(content["spec"])
        claim = _CLAIM.validate_python(content.get("claim"))
        number = int(content.get("number", 1))
        started = float(content["started"])
        user = _USER.validate_python(content.get("user"))
        if user is not None and user.number is not None and not 1 << 16 <= user.number < 1 << 31:
            raise ValueError(f"user {user.number} of the VM")
        if not 1 <= number <= NUMBER_MAX or not 0 <= started <= STARTED_MAX:
            raise ValueError(f"QEMU {number} of the VM, started at {started}")
        if claim is not None and claim.vm != spec.name:
            raise ValueError(f"the claim of VM {spec.name} is for VM {claim.vm}")
        return VmRecord(
            spec=spec,
            accelerator=_ACCELERATOR.validate_python(content["accelerator"]),
            started=started,
            qemu=_QEMU.validate_python(content["qemu"]),
            end=_end(content["end"]),
            plans=_plans(content.get("plans", {})),
            number=number,
            claim=claim,
            work=_WORK.validate_python(content["work"]),
            user=user,
        )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RecordDamaged(
            f"{path} is not the record of a VM: {_in_one_line(error)}",
            remedy="move the file away and end the VM's processes by hand",
        ) from error


def _end(content: dict[str, Any] | None) -> VmState | None:
    if content is None:
        return None
    run = Runstate(content["run"])
    if not run.is_end:
        raise ValueError(f"{run.value} is no end")
    end = _END.validate_python({key: content[key] for key in content if key != "run"})
    return VmState(run=run, why=end.reason, end=end)


def _plans(content: object) -> dict[str, DevicePlan]:
    plans = _PLANS.validate_python(content)
    for plan in plans.values():
        check_map(plan.binding.map)
    return plans


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]
    return f"{type(error).__name__}: {error}"[:200]
