"""Which processes of VMs live on this host, by their arguments: what records say is compared with
this before it is believed.

    -chardev socket,id=monitor,path=RUN/vm/NAME/qmp.sock,…          a QEMU (qN/qmp.sock: the N-th)
    --control-socket=RUN/vm/NAME/disk-DISK-GENERATION.ctl           a backend
    --control-socket=RUN/vm/NAME/qN/standin-DISK.ctl                a stand-in, of a restart of QEMU
    --control-socket=RUN/vm/NAME/device-DEVICE.ctl                  a mediator
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from sempervirt.core.queue_map import counted
from sempervirt.host.lending import group_of
from sempervirt.host.places import Places
from sempervirt.host.procfs import ProcessId, find_processes
from sempervirt.host.records import RecordDamaged
from sempervirt.vm.record import read_vm_record, record_path


@dataclass(frozen=True)
class Living:
    """What lives of one VM: its QEMUs, its backends by disk, its stand-ins, and its mediators."""

    qemus: tuple[ProcessId, ...] = ()
    backends: Mapping[str, tuple[ProcessId, ...]] = field(default_factory=dict)
    stand_ins: tuple[ProcessId, ...] = ()
    mediators: tuple[ProcessId, ...] = ()

    @property
    def all(self) -> tuple[ProcessId, ...]:
        """Every process, QEMUs first."""
        backends = (one for disk in self.backends.values() for one in disk)
        return (*self.qemus, *backends, *self.stand_ins, *self.mediators)

    def __str__(self) -> str:
        """ "QEMU (pid 4711) and 2 backends (pids 4712, 4713)"."""
        words = [f"QEMU (pid {one.pid})" for one in self.qemus]
        others = [one for one in self.all[len(self.qemus) :] if one not in self.mediators]
        for what, found in (("backend", others), ("mediator", self.mediators)):
            if found:
                pids = ", ".join(str(one.pid) for one in found)
                words.append(f"{counted(len(found), what)} (pid {pids})")
        return " and ".join(words) or "nothing"


NOTHING = Living()


def living(places: Places) -> dict[str, Living]:
    """What lives of each VM, by the VM's name. Waits for /proc, so not in the event loop."""
    return _found(places, "[^/]+")


def living_of(places: Places, name: str) -> Living:
    """What lives of the VM of that name; waits for /proc."""
    return _found(places, re.escape(name)).get(name, NOTHING)


def _user_of_vm(places: Places, name: str, user: int) -> int | None:
    """`user`, if that may be the user of a VM's QEMU: the agent's own, or the VM's by the group of
    its run directory, or by its record where somebody has removed that directory.
    """
    if user == os.geteuid() or group_of(places.vm_run_dir(name)) == user:
        return user
    with contextlib.suppress(RecordDamaged):
        record = read_vm_record(record_path(places.vm_state_dir(name)))
        if record is not None and record.user is not None:
            return record.user.number
    return None


def _found(places: Places, name: str) -> dict[str, Living]:
    directory = str(places.vm_run_dir("x").parent)
    # QEMU wants a comma in a value written twice.
    in_qemu, in_backend = re.escape(directory.replace(",", ",,")), re.escape(directory)
    pattern = re.compile(
        rf"socket,id=monitor,path={in_qemu}/(?P<guest>{name})/(?:q\d+/)?qmp\.sock,.*"
        rf"|--control-socket={in_backend}/(?P<owner>{name})/"
        rf"(?:disk-(?P<disk>[^/]+)-\d+|q\d+/standin-[^/]+|device-(?P<device>[^/]+))\.ctl",
        re.DOTALL,
    )
    qemus: defaultdict[str, list[ProcessId]] = defaultdict(list)
    backends: defaultdict[str, dict[str, tuple[ProcessId, ...]]] = defaultdict(dict)
    stand_ins: defaultdict[str, list[ProcessId]] = defaultdict(list)
    mediators: defaultdict[str, list[ProcessId]] = defaultdict(list)
    for found in find_processes(pattern, of_all=True):
        owner, disk = found.match["owner"], found.match["disk"]
        whose = os.geteuid() if owner else _user_of_vm(places, found.match["guest"], found.user)
        if found.user != whose:
            continue  # it says to be what it is not
        if owner is None:
            qemus[found.match["guest"]].append(found.identity)
        elif found.match["device"] is not None:
            mediators[owner].append(found.identity)
        elif disk is None:
            stand_ins[owner].append(found.identity)
        else:
            backends[owner][disk] = (*backends[owner].get(disk, ()), found.identity)
    return {
        vm: Living(tuple(qemus[vm]), backends[vm], tuple(stand_ins[vm]), tuple(mediators[vm]))
        for vm in {*qemus, *backends, *stand_ins, *mediators}
    }
