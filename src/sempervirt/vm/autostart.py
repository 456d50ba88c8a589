"""Which VMs a host starts by itself when it is up, and where the state of a VM is kept meanwhile.

    STATE_DIR/autostart.json   {"version": 1, "boot_id": "…", "settled": ["web", …]}
    STATE_DIR/kept/NAME.saved  docs/reference/saved-format.md

A VM is settled when it runs, or when it was given up: an agent that begins anew in the same boot
starts none that an operator has stopped since. VMs of a higher priority (`ha.priority`) come first,
one after the other: each is started when QEMU runs the one before. What cannot be started yet, as
long as a store does not answer or a mount is missing, is tried again until `BOUND_S` have passed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from pathlib import Path

from sempervirt.core.errors import SempervirtError, StateConflict, Unavailable
from sempervirt.host.procfs import boot_id
from sempervirt.host.records import RecordDamaged, read_record, write_record
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.record import VmRecord
from sempervirt.vm.work import has_left

log = logging.getLogger(__name__)

VERSION = 1
FILE = "autostart.json"
BOUND_S = 300.0
AGAIN_S = 3.0


def kept_state(state_dir: Path, name: str) -> Path:
    """Where the agent keeps the state of a VM that was saved without naming a file."""
    return state_dir / "kept" / f"{name}.saved"


def due(known: Iterable[tuple[VmSpec, bool]], settled: Set[str]) -> list[str]:
    """The VMs to start, in order. `known` are those on record, each with whether it may be started:
    it has ended, and not because it went to another host.
    """
    wanted = [spec for spec, idle in known if spec.autostart and idle and spec.name not in settled]
    return [spec.name for spec in sorted(wanted, key=lambda one: (-one.ha.priority, one.name))]


def is_idle(record: VmRecord, *, freed: bool) -> bool:
    """Whether a VM on record has ended here, and runs nowhere else as far as this host knows."""
    end = record.end.end if record.end is not None else None
    return freed and record.work is None and not (end is not None and has_left(end.reason))


def has_run_since_boot(record: VmRecord) -> bool:
    """Whether a VM on record has had a QEMU since the host was started, whoever asked for it."""
    return record.qemu is not None and record.qemu.boot_id == boot_id()


class Settled:
    """The VMs of this boot that nobody has to start any more."""

    def __init__(self, state_dir: Path, boot: str | None = None) -> None:
        self._path = state_dir / FILE
        self._boot = boot or boot_id()
        self.names = self._read()

    def add(self, name: str) -> None:
        """From now on `name` is one. What cannot be written is in the log: the next agent of this
        boot may start the VM once more.
        """
        self.names.add(name)
        content = {"boot_id": self._boot, "settled": sorted(self.names)}
        try:
            write_record(self._path, VERSION, content)
        except OSError as error:
            log.error("autostart %s not written: %s", self._path, error.strerror)  # noqa: TRY400

    def _read(self) -> set[str]:
        try:
            content: Mapping[str, object] = read_record(self._path, VERSION) or {}
        except RecordDamaged as error:
            log.error("autostart %s; VMs may be started once more", error)  # noqa: TRY400
            return set()
        names = content.get("settled")
        if content.get("boot_id") != self._boot or not isinstance(names, list):
            return set()
        return {name for name in names if isinstance(name, str)}


async def start_all(
    known: Callable[[], Iterable[tuple[VmSpec, bool]]],
    start: Callable[[str], Awaitable[object]],
    settled: Settled,
    *,
    bound_s: float = BOUND_S,
    again_s: float = AGAIN_S,
) -> dict[str, SempervirtError]:
    """Starts every VM that is to run when the host is up; those that do not, each with the cause.

    Whatever becomes of one, the others are started.
    """
    ends = time.monotonic() + bound_s
    failed: dict[str, SempervirtError] = {}
    while names := _left(known, settled):
        for name in names:
            failed.pop(name, None)
            try:
                await start(name)
            except (StateConflict, Unavailable) as error:
                failed[name] = error
                if time.monotonic() < ends:
                    log.info("autostart vm=%s is tried again: %s", name, error)
                    continue
            except SempervirtError as error:
                failed[name] = error
            except OSError as error:  # as of a medium that is full: no other VM waits for that
                failed[name] = Unavailable(f"VM {name} is not started: {error}")
            settled.add(name)
            if name in failed:
                log.error("autostart vm=%s not started: %s", name, failed[name])
            else:
                log.info("autostart vm=%s started", name)
        if _left(known, settled):
            await asyncio.sleep(again_s)
    return failed


def _left(known: Callable[[], Iterable[tuple[VmSpec, bool]]], settled: Settled) -> list[str]:
    """The VMs to start now. One that runs, because it ran on when the agent began or somebody has
    started it meanwhile, is settled: if it ends, somebody wanted that.
    """
    there = [*known()]
    for spec, idle in there:
        if spec.autostart and not idle and spec.name not in settled.names:
            settled.add(spec.name)
    return due(there, settled.names)
