"""Which processes of VMs live on this host, by their arguments: what records say is compared with
this before it is believed.

    -chardev socket,id=monitor,path=RUN/vm/NAME/qmp.sock,…          a QEMU (qN/qmp.sock: the N-th)
    --control-socket=RUN/vm/NAME/disk-DISK-GENERATION.ctl           a backend
    --control-socket=RUN/vm/NAME/qN/standin-DISK.ctl                a stand-in, of a restart of QEMU
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from sempervirt.core.queue_map import counted
from sempervirt.host.places import Places
from sempervirt.host.procfs import ProcessId, find_processes


@dataclass(frozen=True)
class Living:
    """What lives of one VM: its QEMUs, its backends by disk, and its stand-ins."""

    qemus: tuple[ProcessId, ...] = ()
    backends: Mapping[str, tuple[ProcessId, ...]] = field(default_factory=dict)
    stand_ins: tuple[ProcessId, ...] = ()

    @property
    def all(self) -> tuple[ProcessId, ...]:
        """Every process, QEMUs first."""
        backends = (one for disk in self.backends.values() for one in disk)
        return (*self.qemus, *backends, *self.stand_ins)

    def __str__(self) -> str:
        """ "QEMU (pid 4711) and 2 backends (pids 4712, 4713)"."""
        words = [f"QEMU (pid {one.pid})" for one in self.qemus]
        others = [str(one.pid) for one in self.all[len(self.qemus) :]]
        if others:
            words.append(f"{counted(len(others), 'backend')} (pid {', '.join(others)})")
        return " and ".join(words) or "nothing"


NOTHING = Living()


def living(places: Places) -> dict[str, Living]:
    """What lives of each VM, by the VM's name. Waits for /proc, so not in the event loop."""
    return _found(places, "[^/]+")


def living_of(places: Places, name: str) -> Living:
    """What lives of the VM of that name; waits for /proc."""
    return _found(places, re.escape(name)).get(name, NOTHING)


def _found(places: Places, name: str) -> dict[str, Living]:
    directory = str(places.vm_run_dir("x").parent)
    # QEMU wants a comma in a value written twice.
    in_qemu, in_backend = re.escape(directory.replace(",", ",,")), re.escape(directory)
    pattern = re.compile(
        rf"socket,id=monitor,path={in_qemu}/(?P<guest>{name})/(?:q\d+/)?qmp\.sock,.*"
        rf"|--control-socket={in_backend}/(?P<owner>{name})/"
        rf"(?:disk-(?P<disk>[^/]+)-\d+|q\d+/standin-[^/]+)\.ctl",
        re.DOTALL,
    )
    qemus: defaultdict[str, list[ProcessId]] = defaultdict(list)
    backends: defaultdict[str, dict[str, tuple[ProcessId, ...]]] = defaultdict(dict)
    stand_ins: defaultdict[str, list[ProcessId]] = defaultdict(list)
    for found in find_processes(pattern):
        owner, disk = found.match["owner"], found.match["disk"]
        if owner is None:
            qemus[found.match["guest"]].append(found.identity)
        elif disk is None:
            stand_ins[owner].append(found.identity)
        else:
            backends[owner][disk] = (*backends[owner].get(disk, ()), found.identity)
    return {
        vm: Living(tuple(qemus[vm]), backends[vm], tuple(stand_ins[vm]))
        for vm in {*qemus, *backends, *stand_ins}
    }
