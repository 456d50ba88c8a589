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
from sempervirt.host.exposure import readers
from sempervirt.host.places import Places
from sempervirt.host.procfs import find_processes
from sempervirt.host.records import RecordDamaged
from sempervirt.vm.processes import living
from sempervirt.vm.record import read_vm_record, record_path


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


def _images(places: Places) -> list[AuditedImage]:
    """Whoever may read an image may hold a lock on it: the kernel asks for no more, and neither our
    locks nor QEMU's can be had beside some of those (`crates/block/src/lock.rs`).
    """
    found: list[AuditedImage] = []
    for directory in sorted(places.vm_state_dir("x").parent.glob("*")):
        with suppress(RecordDamaged):  # the agent tells of that
            record = read_vm_record(record_path(directory))
            written = (
                [disk.image for disk in record.spec.disks if not disk.read_only] if record else []
            )
            found += [
                _exposed(directory.name, image, who) for image in written if (who := readers(image))
            ]
    return found


def _exposed(vm: str, image: Path, who: list[str]) -> AuditedImage:
    remedy = f"chmod o-r,g-r {image}; or close a directory above it"
    finding = (
        f"{' and '.join(who)} may read it, and whoever reads it may lock it: no backend takes it "
        f"over then, and the VM does not start again; {remedy}"
    )
    return AuditedImage(vm=vm, image=image, readers=who, finding=finding)


def _processes(places: Places) -> list[Audited]:
    found = ((pid, role, confinement_of(pid)) for pid, role in sorted(_roles(places).items()))
    return [
        Audited(pid=pid, role=role, findings=held.findings, **vars(held))
        for pid, role, held in found
        if held is not None
    ]


def _roles(places: Places) -> dict[int, str]:
    roles: dict[int, str] = {}
    for vm, found in living(places).items():
        roles |= {one.pid: f"QEMU of {vm}" for one in found.qemus}
        roles |= {one.pid: f"stand-in of {vm}" for one in found.stand_ins}
        for disk, backends in found.backends.items():
            roles |= {one.pid: f"backend of {vm}/{disk}" for one in backends}
    # Whoever moves or saves a VM.
    for other in find_processes(re.compile(rf".*{re.escape(str(places.run_dir))}/.*", re.DOTALL)):
        program = other.arguments[0].rpartition("/")[2]
        if program.startswith("semper-"):
            roles.setdefault(other.identity.pid, program)
    return roles


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
