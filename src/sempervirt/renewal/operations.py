"""What can be asked of a VM in this room: a restart of QEMU, a save, a restore.

A request that is not waited for any more ends nothing: the owner of the work goes on.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, StateConflict
from sempervirt.core.events import EventKind
from sempervirt.core.failure import Failure
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.state import Runstate
from sempervirt.renewal.restart import decide as restarts
from sempervirt.renewal.restart import ports as restart_ports
from sempervirt.renewal.restart.adapters import LiveRestart, Program
from sempervirt.renewal.restart.driver import RestartDriver
from sempervirt.renewal.restart.state import Restarted
from sempervirt.renewal.restore import decide as restores
from sempervirt.renewal.restore import ports as restore_ports
from sempervirt.renewal.restore.adapters import LiveRestore, Unpacking
from sempervirt.renewal.restore.driver import RestoreDriver
from sempervirt.renewal.restore.state import Restored
from sempervirt.renewal.save import decide as saves
from sempervirt.renewal.save import ports as save_ports
from sempervirt.renewal.save.adapters import LiveSave
from sempervirt.renewal.save.driver import SaveDriver
from sempervirt.renewal.save.state import Saved
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)

RUNS_S = 10.0


@dataclass(frozen=True)
class RestartReport:
    """The VM is in a new QEMU, of that path, version and process id. The guest stood still for
    `blackout_ms`, of `total_ms` in all; `machine` is the versioned name of its machine.
    """

    qemu: str
    version: str
    pid: int
    machine: str
    blackout_ms: float
    total_ms: float


async def restart_qemu(vm: Vm, program: Program) -> RestartReport:
    """Moves `vm` to a new process of `program`.

    Raises InvalidRequest, StateConflict or Unavailable when QEMU was not restarted: the VM is as it
    was, or has ended for another reason. Raises RollbackFailed when the guest stays paused, in the
    old QEMU or in the new one, OutcomeUnknown when nobody knows whether it runs in the new one.
    """
    _require_control(vm)
    vm.require_no_devices("a restart of QEMU")
    vm.ledger.require_idle()
    await vm.require_images_in_place(own=True)
    live = LiveRestart(vm, program)
    state, effects = restarts.begin(vm.name, vm.record.number + 1, time.monotonic())
    ports = restart_ports.Ports(live, live, vm.ledger, live)
    driver = RestartDriver(vm.name, state, ports, partial(_note_restart, vm, program))
    vm.employ(driver)
    driver.start(effects)
    done = await driver.outcome()
    return RestartReport(
        qemu=program.path,
        version=program.features.version,
        pid=done.qemu.pid,
        machine=done.machine,
        blackout_ms=done.blackout_ms,
        total_ms=done.total_ms,
    )


def _require_control(vm: Vm) -> None:
    for disk in vm.disks.values():
        if not disk.setup.command.has_control:
            raise InvalidRequest(
                f"the backend of disk {disk.name} has no control socket, so nobody can tell "
                "whether its requests are done"
            )


def _note_restart(vm: Vm, program: Program, answer: Restarted | Failure) -> None:
    if isinstance(answer, Failure):
        _note(vm, "restart", answer.message, logging.WARNING)
        return
    text = (
        f"moved to QEMU {program.features.version} (pid {answer.qemu.pid}), the guest stood still "
        f"for {answer.blackout_ms:g} ms"
    )
    _note(vm, "restart", text, logging.INFO)


async def save_vm(vm: Vm, output: Path) -> Saved:
    """Saves `vm` to `output` and ends it.

    Raises InvalidRequest, StateConflict or Unavailable when the VM was not saved: it is as it was,
    or has ended for another reason. Raises RollbackFailed when the VM was not saved and stays
    paused, OutcomeUnknown when it was saved and does not end.
    """
    if not await call_storage(output, output.parent.is_dir):
        raise InvalidRequest(f"there is no directory {output.parent}", remedy="make it first")
    for disk in vm.disks.values():
        if disk.flush_failed:
            raise StateConflict(
                f"a flush of disk {disk.name} has failed: a saved state would outlive what the "
                "guest was told of that",
                remedy=f"check the storage; then stop {vm.name}, and check its file systems",
            )
    vm.require_no_devices("a saved state")
    vm.ledger.require_idle()
    await vm.require_images_in_place()
    live = LiveSave(vm, output)
    state, effects = saves.begin(vm.name)
    ports = save_ports.Ports(live, vm.ledger, live)
    driver = SaveDriver(vm.name, state, ports, partial(_note_save, vm, output))
    vm.employ(driver)
    driver.start(effects)
    return await driver.outcome()


def _note_save(vm: Vm, output: Path, answer: Saved | Failure) -> None:
    if isinstance(answer, Failure):
        _note(vm, "save", answer.message, logging.WARNING)
    else:
        _note(vm, "save", f"saved to {output}, {answer.figures.file} bytes", logging.INFO)


async def restore_into(vm: Vm, unpacking: Unpacking) -> None:
    """Has `vm`, which was started for it, go on where it was saved.

    Raises StateConflict, InvalidRequest or Unavailable: the VM has ended then. Raises
    RollbackFailed when the VM does not end, OutcomeUnknown when nobody knows whether it runs.
    """
    live = LiveRestore(vm, unpacking)
    plan = unpacking.plan
    state, effects = restores.begin(vm.name, running=plan.running)
    ports = restore_ports.Ports(live, vm.ledger, live)
    driver = RestoreDriver(vm.name, state, ports, partial(_note_restore, vm, unpacking.file))
    vm.employ(driver)
    driver.start(effects)
    await driver.outcome()
    if plan.running:
        await vm.machine.wait_state(Runstate.RUNNING, timeout_s=RUNS_S)


def _note_restore(vm: Vm, file: Path, answer: Restored | Failure) -> None:
    if isinstance(answer, Failure):
        _note(vm, "restore", answer.message, logging.WARNING)
    else:
        _note(vm, "restore", f"restored from {file}", logging.INFO)


def _note(vm: Vm, kind: EventKind, text: str, level: int) -> None:
    vm.machine.journal.note(time.time(), kind, text)
    log.log(level, "%s vm=%s %s", kind, vm.name, text)
