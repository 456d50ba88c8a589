"""Control groups (cgroups(7)): what the processes of one VM may have of the host altogether.

                  version 1                version 2
    weight        cpu.shares (of 1024)     cpu.weight (of 100)
    memory        memory.limit_in_bytes    memory.max
    tasks         pids.max                 pids.max

    BASE/semper-TAG-agent    this process, with a weight that goes before all VMs together
    BASE/semper-TAG-vm-NAME  the QEMU of a VM: all limits
    BASE/semper-TAG-io-NAME  what serves its disks and devices: weight and tasks

TAG tells the VMs of one run directory from those of another. A kernel has each controller in one
version only. BASE is with version 1 the group that this process was started in. With version 2 a
group whose children are controlled has no process itself, and none can be started there: so BASE is
the group above, of a unit of systemd that was given away (Delegate=) and whose program is started
in a group below (DelegateSubgroup=); that one is the agent's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import assert_never

from sempervirt.host.procfs import PROC, unescape

VARIABLE = "SEMPERVIRT_VM_GROUPS"
OFF = "off"
# Of 100, as version 2 has it; no weight is greater.
WEIGHT_MAX = 10_000
_SHARES = 1024
_KINDS = ("vm", "io")
_REAL_TIME = "cpu.rt_runtime_us"


class Controller(Enum):
    """What is shared out, by the kernel's name for what does it."""

    CPU = "cpu"
    MEMORY = "memory"
    TASKS = "pids"


@dataclass(frozen=True)
class Limits:
    """`weight` is of 100, in the race for processors; `memory_bytes` and `tasks` are the most."""

    weight: int
    memory_bytes: int
    tasks: int


@dataclass(frozen=True)
class Base:
    """Where groups are made: a directory for each controller that is there. `missing` says of the
    others why not. `unified` are those of version 2, where `own` is the group of this process.
    """

    places: Mapping[Controller, Path]
    missing: Mapping[Controller, str]
    unified: Collection[Controller] = frozenset()
    own: Path | None = None


def find_base(proc: Path = PROC) -> Base:
    """Where groups can be made. Raises OSError."""
    mounts = list(_mounts((proc / "self/mountinfo").read_text()))
    groups = list(_own_groups((proc / "self/cgroup").read_text()))
    old = {
        name: point / group.lstrip("/")
        for point, kind, options in mounts
        for names, group in groups
        for name in names
        if kind == "cgroup" and name in options
    }
    new = [
        point / group.lstrip("/")
        for point, kind, _ in mounts
        for names, group in groups
        if kind == "cgroup2" and not names
    ]
    own = new[0] if new else None
    places: dict[Controller, Path] = {}
    missing: dict[Controller, str] = {}
    for controller in Controller:
        if (place := old.get(controller.value)) is not None:
            why = _why_not_ours(place)
        elif own is not None and _offers(own, controller):
            place, why = own.parent, _why_not_above(own)
        else:
            why = "this process has no control group that offers it"
        if why or place is None:
            missing[controller] = why
        else:
            places[controller] = place
    unified = frozenset(one for one in places if one.value not in old)
    return Base(places, missing, unified, own)


def _mounts(mountinfo: str) -> Iterable[tuple[Path, str, Collection[str]]]:
    """Mount point, type and options of each file system with control groups (proc_pid_mountinfo(5))
    that is mounted as a whole.
    """
    for line in mountinfo.splitlines():
        before, _, behind = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), behind.split(" ", 2)
        if kind in {"cgroup", "cgroup2"} and fields[3] == "/":
            yield Path(unescape(fields[4])), kind, options.split(",")


def _own_groups(text: str) -> Iterable[tuple[Collection[str], str]]:
    """Controllers (none: version 2) and path of each group of this process (cgroups(7))."""
    for line in text.splitlines():
        _, names, group = line.split(":", 2)
        yield [name for name in names.split(",") if name], group


def _offers(place: Path, controller: Controller) -> bool:
    try:
        return controller.value in (place / "cgroup.controllers").read_text().split()
    except OSError:
        return False


def _why_not_ours(place: Path) -> str:
    """Why no group may be made in this one; "" when that is allowed."""
    if not os.access(place, os.W_OK):
        return f"{place} cannot be written"
    # systemd makes and removes what is below its own, unless it was told not to (Delegate=).
    if place.suffix in {".service", ".scope", ".slice"} and not _is_delegated(place):
        return f"{place} is systemd's (Delegate= of its unit gives it away)"
    return ""


def _why_not_above(own: Path) -> str:
    """The same of the group above the one of this process, with version 2."""
    if not _is_delegated(own.parent):
        return (
            f"the agent's group {own} is not one of a unit that was given away (Delegate= and "
            "DelegateSubgroup=, which systemd has from 254 on)"
        )
    return "" if os.access(own.parent, os.W_OK) else f"{own.parent} cannot be written"


def _is_delegated(place: Path) -> bool:
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(place, name) == b"1":
                return True
    return False


def tag_of(run_dir: Path) -> str:
    """What tells the groups of an agent from those of another one on the same host."""
    return hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:10]


def is_of_a_vm(line: str) -> bool:
    """Whether a line of /proc/PID/cgroup says that the process is in the group of a VM."""
    return re.search(r"/semper-[0-9a-f]{10}-(vm|io)-[^/]+$", line) is not None


class Groups:
    """The groups of the VMs of one agent, below `base`. Nothing here waits for long."""

    def __init__(self, base: Base, tag: str) -> None:
        self._base = base
        self._prefix = f"semper-{tag}"
        self._controlled = not base.unified
        self._limited: dict[str, Mapping[Controller, int]] = {}

    @property
    def missing(self) -> str:
        """What VMs are not limited in, and why; "" when nothing is missing."""
        words = [f"{one.value}: {why}" for one, why in self._base.missing.items()]
        if not self._controlled:
            words.append("processes of earlier agents are still in the group above all VMs")
        return "; ".join(words)

    def enter(self, weight: int) -> None:
        """Puts this process into a group of its own, with that weight. Raises OSError."""
        own = {place: place / f"{self._prefix}-agent" for place in self._old_places()}
        for group in own.values():
            group.mkdir(exist_ok=True)
            _allow_real_time(group)
        for group in own.values():
            _move(os.getpid(), group)
        self._control()
        place = self._base.places.get(Controller.CPU)
        if place is None or not self._controlled:
            return
        mine = own.get(place, self._base.own)
        if mine is not None:
            _write(*self._setting(Controller.CPU, weight), mine)

    def leave(self) -> None:
        """Puts this process back to where it was started, where that can be done, and leaves no
        group without a process.
        """
        self.remove_all_but(())
        for place in self._old_places():
            with contextlib.suppress(OSError):
                _move(os.getpid(), place)
                (place / f"{self._prefix}-agent").rmdir()

    def hold(
        self, name: str, guests: Collection[int], others: Collection[int], limits: Limits
    ) -> None:
        """Puts the processes of a VM into its groups, those that are not there: its QEMUs, and the
        `others`, which serve them. Raises OSError.
        """
        values = {
            Controller.CPU: limits.weight,
            Controller.MEMORY: limits.memory_bytes,
            Controller.TASKS: limits.tasks,
        }
        # What a backend reads and writes stays in memory as long as the host has room for it.
        served: dict[Controller, int] = {**values}
        del served[Controller.MEMORY]
        self._put(f"{self._prefix}-vm-{name}", guests, values)
        self._put(f"{self._prefix}-io-{name}", others, served, real_time=True)

    def _put(
        self,
        name: str,
        pids: Collection[int],
        values: Mapping[Controller, int],
        *,
        real_time: bool = False,
    ) -> None:
        places = {one: place for one, place in self._base.places.items() if one in values}
        for place in set(places.values()):
            group = place / name
            group.mkdir(exist_ok=True)
            if real_time and _refuses_real_time(group):
                continue
            there = set(map(int, (group / "cgroup.procs").read_text().split()))
            for pid in pids:
                if pid not in there:
                    _move(pid, group)
        self._control()
        if not self._controlled or self._limited.get(name) == values:
            return
        for controller, place in places.items():
            _write(*self._setting(controller, values[controller]), place / name)
        self._limited[name] = values

    def remove_all_but(self, names: Collection[str]) -> None:
        """Removes the groups of other VMs, those that have no process any more."""
        kept = {f"{self._prefix}-{kind}-{name}" for name in names for kind in _KINDS}
        self._limited = {name: it for name, it in self._limited.items() if name in kept}
        for place in self._places():
            for group in place.glob(f"{self._prefix}-*-*"):
                if group.name not in kept:
                    with contextlib.suppress(OSError):
                        group.rmdir()

    def _places(self) -> set[Path]:
        return set(self._base.places.values())

    def _old_places(self) -> set[Path]:
        """Those of version 1."""
        places = self._base.places.items()
        return {place for one, place in places if one not in self._base.unified}

    def _control(self) -> None:
        """Version 2: has the controllers look at the groups below. That waits for processes that an
        earlier agent has started here, which are put into the groups of their VMs one by one.
        """
        if self._controlled:
            return
        place = self._base.places[next(iter(self._base.unified))]  # all of them have the same
        wanted = " ".join(f"+{one.value}" for one in self._base.unified)
        try:
            (place / "cgroup.subtree_control").write_text(wanted)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return
            raise
        self._controlled = True

    def _setting(self, controller: Controller, value: int) -> tuple[str, str]:
        """The file in which a limit stands, and what it says."""
        unified = controller in self._base.unified
        match controller:
            case Controller.CPU if unified:
                return "cpu.weight", str(min(value, WEIGHT_MAX))
            case Controller.CPU:
                return "cpu.shares", str(min(value, WEIGHT_MAX) * _SHARES // 100)
            case Controller.MEMORY:
                # The kernel counts pages.
                pages = value // os.sysconf("SC_PAGE_SIZE")
                name = "memory.max" if unified else "memory.limit_in_bytes"
                return name, str(pages * os.sysconf("SC_PAGE_SIZE"))
            case Controller.TASKS:
                return "pids.max", str(value)
            case _:
                assert_never(controller)


def _write(name: str, text: str, group: Path) -> None:
    (group / name).write_text(text)


def _move(pid: int, group: Path) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        (group / "cgroup.procs").write_text(str(pid))


def _refuses_real_time(group: Path) -> bool:
    """Whether no process of the group may have real-time priority, as spares have: version 1, in a
    kernel that shares that out as well (CONFIG_RT_GROUP_SCHED).
    """
    try:
        return int((group / _REAL_TIME).read_text()) == 0
    except (OSError, ValueError):
        return False


def _allow_real_time(group: Path) -> None:
    """Gives a part of what there is to a group, for the backends, which stay with the agent there:
    a spare needs it for the milliseconds of a take-over. Raises OSError.
    """
    if _refuses_real_time(group):
        there = int((group.parent / _REAL_TIME).read_text())
        (group / _REAL_TIME).write_text(str(there // 10))
