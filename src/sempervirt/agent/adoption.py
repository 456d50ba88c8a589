"""Takes over what an earlier agent left running.

QEMU and the backends stand in sessions of their own and need no agent to go on. A new agent
finds them by their records (pid, start time and boot, so that a reused pid is not mistaken),
watches them by pidfd and connects to their sockets again. Disks come first: while a disk has no
backend, its guest stalls.
"""

from __future__ import annotations

import asyncio
import logging
import re
from functools import partial
from typing import assert_never

from sempervirt.core.errors import SempervirtError
from sempervirt.disk.driver import Disk
from sempervirt.disk.lifecycle import adopt_disk, sweep_disk
from sempervirt.host.procfs import ProcessId, find_by_argument, identify
from sempervirt.qemu.driver import Machine
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.state import Request
from sempervirt.renewal.recovery import recover
from sempervirt.vm import claims
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.ledger import Ledger
from sempervirt.vm.record import VmRecord, read_vm_record
from sempervirt.vm.setup import adopted_setups
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Arriving, Departing, Restarting, Restoring, Saving, Work

log = logging.getLogger(__name__)


Adopted = tuple[dict[str, Vm], dict[str, SempervirtError]]


async def adopt_all(config: AgentConfig) -> Adopted:
    """Every VM on record, running or ended, and why those that are missing could not be adopted.

    A VM whose record cannot be read is unknown, and not absent: something of it may run.
    """
    adopted, barred = {}, {}
    for path in sorted(config.vm_state_dir("web").parent.glob("*/vm.json")):
        name = path.parent.name
        try:
            record = read_vm_record(path)
            if record is not None:
                adopted[name] = await _adopt(config, Ledger(record, path))
        except SempervirtError as error:
            log.error("adopt record=%s failed: %s", path, error)  # noqa: TRY400
            barred[name] = error
    return adopted, barred


async def _adopt(config: AgentConfig, ledger: Ledger) -> Vm:
    spec = ledger.record.spec
    files = VmFiles(config.vm_run_dir(spec.name))
    release = partial(claims.release, config)
    if ledger.record.end is not None:
        return Vm(Machine.remember(spec, files, ledger.record.end), {}, ledger, release)
    if ledger.record.qemu is None:
        ledger.started(_find_qemu(files))
    await recover(config, ledger)
    record = ledger.record
    disks: dict[str, Disk] = {}
    if record.qemu is not None and record.qemu.is_alive():
        disks = await _adopt_disks(config, record)
    else:
        await _sweep_disks(config, record)
    held, leaving = _held_for(record.work)
    machine = Machine.adopt(spec, files, record.qemu, config.patience, held, leaving)
    machine.started = record.started
    log.info("adopt vm=%s pid=%s", spec.name, machine.pid)
    return Vm(machine, disks, ledger, release)


def _find_qemu(files: VmFiles) -> ProcessId | None:
    """A QEMU that was started and not recorded, found by its monitor's socket."""
    monitor = re.escape(str(files.monitor))
    pids = find_by_argument(re.compile(rf"socket,id=monitor,path={monitor},.*"))
    return identify(pids[0]) if pids else None


async def _adopt_disks(config: AgentConfig, record: VmRecord) -> dict[str, Disk]:
    setups = await adopted_setups(config, record)
    moves = isinstance(record.work, Departing | Arriving)
    disks = await asyncio.gather(
        *(adopt_disk(setup, frozen=moves and not setup.options.read_only) for setup in setups)
    )
    return {setup.short_name: disk for setup, disk in zip(setups, disks, strict=True)}


def _held_for(work: Work | None) -> tuple[Request | None, str]:
    """The request that the VM stays held for, and why its QEMU is about to be killed."""
    match work:
        case Departing():
            return Request.DEPART, work.farewell
        case Arriving():
            return Request.ARRIVE, ""
        case Restarting() | Saving() | Restoring() | None:
            return None, ""
        case _:
            assert_never(work)


async def _sweep_disks(config: AgentConfig, record: VmRecord) -> None:
    for setup in await adopted_setups(config, record):
        await sweep_disk(setup)
