"""`semper host audit`: what each process of a VM could do, if somebody took it over; and which
users of the host could stop a VM's disks by its images.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from sempervirt.cli.output import Output, listing, out, print_json
from sempervirt.host.confinement import Seccomp, confinement_of
from sempervirt.host.exposure import finding, readers
from sempervirt.host.places import Places
from sempervirt.host.procfs import find_helpers, find_processes
from sempervirt.host.records import RecordDamaged
from sempervirt.standby.record import places_of
from sempervirt.vm.processes import living
from sempervirt.vm.record import VmRecord, read_vm_record, record_path


class Audited(BaseModel):
    """A process, what it is, and what holds it back (see `Confinement`)."""

    pid: int
    role: str
    user: str
    capabilities: tuple[str, ...]
    obtainable: tuple[str, ...]
    new_privileges: bool
    system_calls: Seccomp
    own_network: bool
    limited: bool
    findings: list[str]


class AuditedImage(BaseModel):
    """An image of a VM that others than its owner may open for reading."""

    vm: str
    image: Path
    readers: list[str]
    finding: str


class Audit(BaseModel):
    """What there is to know of a host."""

    processes: list[Audited]
    images: list[AuditedImage]


def audit(places: Places) -> Audit:
    """Every process that works for VMs of this agent; the agent itself is not among them."""
    return Audit(processes=_processes(places), images=_images(places))


def _records(places: Places) -> list[VmRecord]:
    """Of VMs and of standbys, as far as they can be read; the agent tells of the others."""
    directories = sorted(places.vm_state_dir("x").parent.glob("*"))
    for _, _, own in places_of(places):
        directories += sorted(own.vm_state_dir("x").parent.glob("*"))
    records: list[VmRecord | None] = []
    for directory in directories:
        with suppress(RecordDamaged):
            records.append(read_vm_record(record_path(directory)))
    return [record for record in records if record is not None]


def _images(places: Places) -> list[AuditedImage]:
    return [
        AuditedImage(
            vm=record.spec.name, image=disk.image, readers=who, finding=finding(disk.image, who)
        )
        for record in _records(places)
        for disk in record.spec.imaged
        if not disk.read_only and (who := readers(disk.image))
    ]


def _processes(places: Places) -> list[Audited]:
    found = ((pid, role, confinement_of(pid)) for pid, role in sorted(_roles(places).items()))
    why = _why_no_user(places)
    return [
        Audited(pid=pid, role=role, findings=held.findings + why.get(pid, []), **vars(held))
        for pid, role, held in found
        if held is not None
    ]


def _why_no_user(places: Places) -> dict[int, list[str]]:
    """Why a QEMU has no user of its own, by its pid."""
    earlier = "an earlier release has started it: semper vm stop, then run"
    reasons: dict[int, list[str]] = {}
    for record in _records(places):
        why = earlier if record.user is None else record.user.why
        for qemu in record.qemus:
            reasons[qemu.pid] = [f"it has no user of its own: {why}"] if why else []
    return reasons


def _roles(places: Places) -> dict[int, str]:
    roles: dict[int, str] = {}
    lives = [*living(places).items()]
    for vm, number, own in places_of(places):
        lives += [(f"{vm} (standby {number})", found) for found in living(own).values()]
    for vm, found in lives:
        roles |= {one.pid: f"QEMU of {vm}" for one in found.qemus}
        roles |= {one.pid: f"stand-in of {vm}" for one in found.stand_ins}
        roles |= {one.pid: f"mediator of {vm}" for one in found.mediators}
        for disk, backends in found.backends.items():
            roles |= {one.pid: f"backend of {vm}/{disk}" for one in backends}
    # Whoever moves or saves a VM.
    for other in find_processes(re.compile(rf".*{re.escape(str(places.run_dir))}/.*", re.DOTALL)):
        program = other.arguments[0].rpartition("/")[2]
        if program.startswith("semper-"):
            roles.setdefault(other.identity.pid, program)
    helpers = find_helpers(roles)
    return roles | {pid: f"{name} of {roles[parent]}" for pid, parent, name in helpers}


def show(places: Places, output: Output) -> None:
    """Prints the audit."""
    found = audit(places)
    if output is Output.JSON:
        print_json(found)
        return
    table = listing("pid", "process", "user", "system calls", "if it were taken over")
    for one in found.processes:
        findings = "; ".join(one.findings) or "–"
        table.add_row(str(one.pid), one.role, one.user, one.system_calls.value, findings)
    out.print(table if found.processes else "no VM runs on this host")
    if not found.images:
        return
    table = listing("vm", "image", "who else may stop it")
    for image in found.images:
        table.add_row(image.vm, str(image.image), image.finding)
    out.print(table)
