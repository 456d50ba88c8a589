"""What was removed under a running VM is noticed, and made again where that can be done.

A record is in memory as well, and is written again: the agent has the lock of its directory. A
socket of QEMU's is for QEMU to make, which only another QEMU does; so the VM is shown as unknown,
with the reason and the remedy, as the next agent would find it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from sempervirt.qemu.state import Runstate
from sempervirt.vm.user import renew_run_dir
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)

LOOK_S = 5.0
_SETTLED = (Runstate.RUNNING, Runstate.PAUSED, Runstate.HALTED)


async def keep(vms: Callable[[], Iterable[Vm]], users_top: Path) -> None:
    """Looks after the VMs until it is cancelled. `users_top` is as in the agent's settings."""
    while True:
        await asyncio.sleep(LOOK_S)
        for vm in list(vms()):
            await look(vm, users_top)


async def look(vm: Vm, users_top: Path) -> None:
    """Looks at the files of one VM, unless it begins, ends, or is worked on."""
    if not _is_settled(vm):
        return
    files, record = vm.machine.files, vm.ledger.path
    gone = await asyncio.to_thread(
        lambda: [p for p in (record, files.peers, files.monitor) if not os.path.lexists(p)]
    )
    if not gone or not _is_settled(vm):
        return
    try:
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        renew_run_dir(files, vm.record.user, vm.record.number, users_top)
    except OSError as error:
        log.error("vm name=%s its directories cannot be made: %s", vm.name, error)  # noqa: TRY400
    if record in gone and vm.ledger.rewrite():
        log.warning("vm name=%s its record %s was gone, and is written again", vm.name, record)
    if files.peers in gone:
        vm.ledger.note_peers()
    reason = (
        f"{files.monitor} is gone, so a later agent cannot reach its monitor; for another one: "
        f"semper vm restart-qemu {vm.name}"
    )
    if files.monitor in gone and reason not in vm.doubts:
        vm.doubt(reason)


def _is_settled(vm: Vm) -> bool:
    return vm.run in _SETTLED and vm.work is None
