"""What a new agent does about a restart of QEMU during which the former agent died.

Two QEMUs may be there. The record tells which of them owns the VM, and the other one is killed
before anything else: only then the guest may run on.

    switched?   old one   new one     ──►
    no          runs      any             the old one goes on
    no          ended     any             the VM has ended, as without a restart
    yes         any       runs            the new one goes on
    yes         any       ended           the VM has ended with it

A save that was under way is the first case: the guest goes on. A VM whose memory was still being
restored has nothing to go on with, and is ended.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace

from sempervirt.core.errors import OutcomeUnknown, SempervirtError
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.stand_in import lead_to_disk
from sempervirt.host import process
from sempervirt.host.procfs import ProcessId, find_by_argument, identify
from sempervirt.qemu import handover, tap
from sempervirt.qemu.command_line import nic_id
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.qmp import Monitor
from sempervirt.qemu.spec import VmSpec
from sempervirt.renewal.restart import move_sockets
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.record import VmRecord
from sempervirt.vm.work import Restarting, Restoring, Saving

log = logging.getLogger(__name__)

MONITOR_S = 10.0


async def settle_restart(config: AgentConfig, record: VmRecord) -> VmRecord:
    """The record of the QEMU that owns the VM; it goes on, and the other one has ended.

    Raises OutcomeUnknown when a process does not end.
    """
    work = record.work
    if record.end is not None or not isinstance(work, Restarting | Saving):
        return record
    restart = work if isinstance(work, Restarting) else Restarting(record.number + 1, work.resume)
    spec = record.spec
    files = VmFiles(config.vm_run_dir(spec.name))
    late = files.successor(restart.number)
    new = restart.qemu or _find(rf"socket,id=monitor,path={re.escape(str(late.monitor))},.*")
    await _kill(spec.name, None if restart.switched else new)
    await _kill(spec.name, record.qemu if restart.switched else None)
    for pid in find_by_argument(
        re.compile(rf"--control-socket={re.escape(str(late.directory))}/standin-.*")
    ):
        await _kill(spec.name, identify(pid))
    if restart.switched:
        for disk in spec.disks:
            if disk.backend == "blkd":
                lead_to_disk(late.directory, DiskFiles(files.directory, disk.name).socket)
        move_sockets(late, files, spec)
        await _settle_taps(spec, new)
        record = replace(record, qemu=new, number=restart.number)
    files.remove_successors(keep=record.number)
    if restart.resume and record.qemu is not None and record.qemu.is_alive():
        await _go(files, spec.name)
    which = "new" if restart.switched else "old"
    log.warning(
        "adopt vm=%s an agent ended while it was moved or saved; the %s QEMU has it",
        spec.name,
        which,
    )
    return replace(record, work=None)


async def end_unfinished(record: VmRecord, identity: ProcessId | None) -> None:
    """Kills a QEMU that waits for a memory which nobody restores any more.

    Raises OutcomeUnknown when it does not end.
    """
    if isinstance(record.work, Restoring) and record.end is None:
        await _kill(record.spec.name, identity)


async def _go(files: VmFiles, name: str) -> None:
    """Lets the guest run on; if that fails, its state shows it."""
    try:
        monitor = await Monitor.connect(files.monitor, name, MONITOR_S)
        try:
            execute = monitor.execute_within(MONITOR_S)
            await handover.reset(execute)
            await execute("cont")
        finally:
            await monitor.close()
    except SempervirtError as error:
        log.error("adopt vm=%s does not go on: %s", name, error)  # noqa: TRY400


async def _settle_taps(spec: VmSpec, identity: ProcessId | None) -> None:
    for index, nic in enumerate(spec.nics):
        if nic.tap is not None and identity is not None and identity.is_alive():
            try:
                await tap.settle(identity.pid, nic_id(index), nic.tap)
            except SempervirtError as error:
                log.error("adopt vm=%s: %s", spec.name, error)  # noqa: TRY400


def _find(argument: str) -> ProcessId | None:
    pids = find_by_argument(re.compile(argument))
    return identify(pids[0]) if pids else None


async def _kill(name: str, identity: ProcessId | None) -> None:
    adopted = identity and process.adopt(identity, lambda _end: None)
    if adopted and await adopted.end(0) is None:
        raise OutcomeUnknown(f"VM {name}: the process {adopted.pid} was killed and does not end")
