"""What a new agent does about a restart, a save or a restore during which the former agent ended.

The machines are the same as for work that was begun here; they start from what the record says
(`recover` in each `decide`), and have these ports. There is no owner of the VM's QEMU yet.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, assert_never

from sempervirt.core.errors import OutcomeUnknown, RollbackFailed, SempervirtError
from sempervirt.core.failure import Failure
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.stand_in import lead_to_disk
from sempervirt.host import process
from sempervirt.host.owner import HOST_CLOCK
from sempervirt.host.procfs import ProcessId, find_by_argument, find_processes, identify
from sempervirt.qemu import device_state, tap
from sempervirt.qemu.command_line import nic_id
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.qmp import Monitor
from sempervirt.renewal.driver import RenewalDriver
from sempervirt.renewal.restart import decide as restarts
from sempervirt.renewal.restart import ports as restart_ports
from sempervirt.renewal.restart.driver import RestartDriver
from sempervirt.renewal.restore import decide as restores
from sempervirt.renewal.restore import ports as restore_ports
from sempervirt.renewal.restore.driver import RestoreDriver
from sempervirt.renewal.save import decide as saves
from sempervirt.renewal.save import ports as save_ports
from sempervirt.renewal.save.driver import SaveDriver
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.ledger import Ledger
from sempervirt.vm.work import (
    Arriving,
    Departing,
    MergingLayers,
    Rescuing,
    Restarting,
    Restoring,
    Saving,
    Snapshotting,
    Standing,
)

log = logging.getLogger(__name__)

MONITOR_S = 10.0

AnyDriver = RenewalDriver[Any, Any, Any, Any]


async def recover(config: AgentConfig, ledger: Ledger) -> None:
    """Ends what a former agent left half done on a VM; `ledger` tells what came of it.

    Raises OutcomeUnknown or RollbackFailed when a process does not end: nobody may touch the VM
    before that process has ended.
    """
    work = ledger.record.work
    if ledger.record.end is not None or work is None:
        return
    name, files = ledger.name, VmFiles(config.vm_run_dir(ledger.name))
    effects: list[Any]
    driver: AnyDriver
    match work:
        case Restarting():
            two = TwoQemus(ledger, files, work)
            restart, effects = restarts.recover(
                name, work, HOST_CLOCK.now(), new_lives=two.new_lives
            )
            driver = RestartDriver(name, restart, restart_ports.Ports(two, two, ledger))
            guest: LeftQemu = two
        case Saving():
            guest = LeftQemu(ledger, files)
            save, effects = saves.recover(name, work)
            driver = SaveDriver(name, save, save_ports.Ports(guest, ledger))
        case Restoring():
            guest = LeftQemu(ledger, files)
            restore, effects = restores.recover(name, work)
            driver = RestoreDriver(name, restore, restore_ports.Ports(guest, ledger))
        case Rescuing():
            await _run_on(LeftQemu(ledger, files), ledger, resume=work.resume)
            return
        case Snapshotting():
            return  # `snapshot.Thawing`, which takes as long as a guest likes
        case Standing():
            return  # `standby` goes on with it
        case MergingLayers():
            return  # the VM has ended, and `Vm` goes on with it
        case Departing() | Arriving():
            return  # `migration` goes on with these
        case _:
            assert_never(work)
    try:
        await _recovered(driver, effects)
    finally:
        await guest.close()


async def _run_on(guest: LeftQemu, ledger: Ledger, *, resume: bool) -> None:
    """Lets a guest run on that was paused for a moment."""
    try:
        if resume and not guest.ended():
            await guest.cont()
    except SempervirtError as error:
        log.error("adopt vm=%s stays paused: %s", ledger.name, error)  # noqa: TRY400
    finally:
        await guest.close()
    ledger.end_work()


async def _recovered(driver: AnyDriver, effects: list[Any]) -> None:
    driver.start(effects)
    try:
        await driver.changes.wait_until(
            lambda: driver.over or driver.answer is not None,
            timeout_s=None,
            what=f"the recovery of VM {driver.vm}",
        )
    finally:
        await driver.abandon()
    answer = driver.answer
    if not isinstance(answer, Failure):
        log.warning("adopt vm=%s %s was brought to its end", driver.vm, driver.doing)
        return
    if not driver.over:
        raise answer.error()
    level = logging.ERROR if issubclass(answer.kind.error, RollbackFailed) else logging.WARNING
    log.log(level, "adopt vm=%s %s", driver.vm, answer.message)


class LeftQemu:
    """The QEMU on record: `WayBack` of every work, with what a save and a restore add."""

    def __init__(self, ledger: Ledger, files: VmFiles) -> None:
        self._ledger = ledger
        self._name = ledger.name
        self._files = files
        self._monitor: Monitor | None = None

    @property
    def _identity(self) -> ProcessId | None:
        return self._ledger.record.qemu

    def ended(self) -> str:
        """Why the VM has ended; "" while QEMU is there."""
        alive = self._identity is not None and self._identity.is_alive()
        return "" if alive else "QEMU ended while no agent ran"

    async def reset(self) -> None:
        """Undoes what QEMU was told so that it gives or loads a state."""
        await device_state.reset((await self._connected()).execute_within(MONITOR_S))

    async def cont(self) -> None:
        """Lets the guest run on."""
        await (await self._connected()).execute("cont", timeout_s=MONITOR_S)

    def release(self, *, running: bool) -> None:
        """Nothing: nobody holds a QEMU that has no owner yet."""

    def tidy(self) -> None:
        """Removes what is left of other QEMUs than the VM's."""
        self._files.remove_successors(keep=self._ledger.record.number)

    async def end(self) -> None:
        """Kills QEMU, and waits for its end. Raises OutcomeUnknown."""
        await _kill(self._name, self._identity)

    async def free(self) -> None:
        """Nothing: adoption ends the backends of a VM that has ended."""

    async def close(self) -> None:
        """Lets go of the monitor, which serves one client at a time."""
        if self._monitor is not None:
            await self._monitor.close()
            self._monitor = None

    async def _connected(self) -> Monitor:
        return await self._connected_to(self._files.monitor, self._identity)

    async def _connected_to(self, path: Path, qemu: ProcessId | None) -> Monitor:
        if self._monitor is None:
            pid = qemu.pid if qemu else None
            self._monitor = await Monitor.connect(path, self._name, MONITOR_S, pid)
        return self._monitor


class TwoQemus(LeftQemu):
    """The two QEMUs of a restart, and the stand-ins: `WayBack` and `WayForward`."""

    def __init__(self, ledger: Ledger, files: VmFiles, work: Restarting) -> None:
        super().__init__(ledger, files)
        self._work = work
        self._late = files.successor(work.number)
        user = ledger.record.user
        self._new = work.qemu or _find(
            rf"socket,id=monitor,path={re.escape(str(self._late.monitor))},.*",
            os.geteuid() if user is None or user.number is None else user.number,
        )

    @property
    def new_lives(self) -> bool:
        """Whether the new QEMU has not ended."""
        return self._new is not None and self._new.is_alive()

    async def discard(self) -> None:
        """Ends the new QEMU, and the stand-ins. Raises OutcomeUnknown when one does not end."""
        await _kill(self._name, self._new)
        await self.end_stand_ins()

    async def end_old(self) -> None:
        """Kills the old QEMU. Raises OutcomeUnknown when it does not end."""
        await _kill(self._name, self._identity)

    async def end_stand_ins(self) -> None:
        """Ends the backends that stood in. Raises OutcomeUnknown when one does not end."""
        directory = re.escape(str(self._late.directory))
        for pid in find_by_argument(re.compile(rf"--control-socket={directory}/standin-.*")):
            await _kill(self._name, identify(pid))

    async def free_taps(self) -> None:
        """Nothing: `connect` takes away and gives in one go."""

    async def connect(self) -> None:
        """Leads the new QEMU to the disks and taps. Packets of that time are lost."""
        spec = self._ledger.record.spec
        for disk in spec.disks:
            if disk.backend == "blkd":
                socket = DiskFiles(self._files.directory, disk.name).socket
                lead_to_disk(self._late.directory, socket)
        for index, nic in enumerate(spec.nics):
            if nic.tap is not None and self._new is not None:
                await tap.finish(self._new.pid, nic_id(index), nic.tap)

    async def cont_new(self) -> None:
        """Lets the guest run in the new QEMU."""
        monitor = await self._connected_to(self._new_monitor, self._new)
        await monitor.execute("cont", timeout_s=MONITOR_S)

    async def move_in(self) -> None:
        """Puts the sockets into their places, and lets go of the monitor."""
        try:
            monitor = await self._connected_to(self._new_monitor, self._new)
            await device_state.reset(monitor.execute_within(MONITOR_S))
        except SempervirtError as error:
            log.info("adopt vm=%s %s", self._name, error)
        await self.close()
        self._files.take_sockets(self._late, self._ledger.record.spec)

    async def link(self) -> None:
        """Nothing: the owner of the QEMU connects to the monitor, when the VM is adopted."""

    @property
    def _new_monitor(self) -> Path:
        """The monitor of the new QEMU; the former agent may have put it into its place."""
        late = self._late.monitor
        return late if late.exists() else self._files.monitor


def _find(argument: str, user: int) -> ProcessId | None:
    found = find_processes(re.compile(argument), of_all=True)
    return next((one.identity for one in found if one.user == user), None)


async def _kill(name: str, identity: ProcessId | None) -> None:
    adopted = identity and process.adopt(identity, lambda _end: None)
    if adopted and await adopted.end(0) is None:
        raise OutcomeUnknown(f"VM {name}: the process {adopted.pid} was killed and does not end")
