"""`semper host audit`: what each process of a VM could do, if somebody took it over."""

from __future__ import annotations

import re

from pydantic import BaseModel

from sempervirt.cli.output import Output, listing, out, print_json
from sempervirt.host.confinement import Seccomp, confinement_of
from sempervirt.host.places import Places
from sempervirt.host.procfs import find_processes
from sempervirt.vm.processes import living


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


def audit(places: Places) -> list[Audited]:
    """Every process that works for VMs of this agent; the agent itself is not among them."""
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
    for one in found:
        findings = "; ".join(one.findings) or "–"
        table.add_row(str(one.pid), one.role, one.user, one.system_calls.value, findings)
    out.print(table if found else "no VM runs on this host")
