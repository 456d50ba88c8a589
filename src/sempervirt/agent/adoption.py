"""Takes over what an earlier agent left running.

QEMU and the backends stand in sessions of their own and need no agent to go on. A new agent
finds them by their records (pid, start time and boot, so that a reused pid is not mistaken) and
by their arguments, watches them by pidfd and connects to their sockets again. Disks come first:
while a disk has no backend, its guest stalls.

Records and processes have to say the same. Where they do not, and what lives can be told for
certain, the VM is taken over, and shown as unknown with the reason (`Vm.doubt`); otherwise it is
an `UnknownVm`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from functools import partial
from pathlib import Path
from typing import assert_never

from sempervirt.core.errors import SempervirtError, StateConflict, Unavailable
from sempervirt.core.names import is_name
from sempervirt.disk.driver import Disk
from sempervirt.disk.lifecycle import adopt_disk, sweep_disk
from sempervirt.disk.setup import DiskSetup
from sempervirt.host.records import RecordDamaged
from sempervirt.passthrough.device import Device
from sempervirt.qemu.driver import Machine
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.state import Request
from sempervirt.renewal.recovery import recover
from sempervirt.renewal.snapshot import Thawing
from sempervirt.vm import claims
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.ending import merge_at_end
from sempervirt.vm.house import Adopted
from sempervirt.vm.ledger import Ledger
from sempervirt.vm.phases import Arrival
from sempervirt.vm.processes import NOTHING, Living, living, living_of
from sempervirt.vm.record import VmRecord, read_vm_record, record_path
from sempervirt.vm.setup import adopted_setups, device_setups
from sempervirt.vm.unknown import UnknownVm
from sempervirt.vm.user import renew_run_dir
from sempervirt.vm.vm import Vm
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
    Work,
)

log = logging.getLogger(__name__)

_RECORD = re.compile(r"vm\.json|disk-.*\.json")


async def adopt_all(config: AgentConfig) -> Adopted:
    """Every VM that is on record, running or ended, and every one of which a process lives.

    Whatever stands in the records, or in their place: a VM that cannot be taken over is unknown,
    and not absent.
    """
    seen = await asyncio.to_thread(living, config)
    adopted = Adopted()
    for name in sorted({*seen, *await asyncio.to_thread(_on_record, config)}):
        there = seen.get(name, NOTHING)
        record = None
        try:
            record = await asyncio.to_thread(_read, config, name)
            adopted.vms[name] = await _adopt(config, record, there)
        except SempervirtError as error:
            there = await asyncio.to_thread(living_of, config, name)
            adopted.unknown[name] = await UnknownVm.take(config, name, error, there, record)
    return adopted


def _on_record(config: AgentConfig) -> list[str]:
    """The names of all VMs of which there is a record, or something in its place."""
    directory = config.vm_state_dir("x").parent
    try:
        entries = [entry.name for entry in directory.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        log.error("adopt records=%s cannot be listed: %s", directory, error.strerror)  # noqa: TRY400
        return []
    return [name for name in entries if is_name(name) and _has_record(directory / name)]


def _has_record(directory: Path) -> bool:
    """Whether something in the directory of a VM tells of the VM, or there is no such directory."""
    try:
        names = [entry.name for entry in directory.iterdir()]
    except OSError:
        return True
    return any(_RECORD.fullmatch(name) for name in names)


def _read(config: AgentConfig, name: str) -> VmRecord:
    """The record of a VM. Raises RecordDamaged, also when there is none."""
    path = record_path(config.vm_state_dir(name))
    record = read_vm_record(path)
    if record is None:
        raise RecordDamaged(f"the record of the VM, {path}, is gone")
    if record.spec.name != name:
        raise RecordDamaged(
            f"{path} is the record of another VM, {record.spec.name}",
            remedy="put each record back into its place",
        )
    return record


async def _adopt(config: AgentConfig, found: VmRecord, seen: Living) -> Vm:
    spec = found.spec
    files, path = VmFiles(config.vm_run_dir(spec.name)), record_path(config.vm_state_dir(spec.name))
    _require_own(found, seen)
    if found.end is not None:
        if seen.qemus:
            raise StateConflict(f"its record says that it has ended, and there is {seen}")
        return remembered(config, found, path)
    ledger = Ledger(found, path, files.peers)
    release, finish = partial(claims.release, config), partial(merge_at_end, config)
    doubts = _find_qemu(ledger, seen)
    await recover(config, ledger)
    record = ledger.record
    disks: dict[str, Disk] = {}
    devices: dict[str, Device] = {}
    if record.qemu is not None and record.qemu.is_alive():
        doubts += _remade(config, files, record)
        ledger.note_peers()
        disks = await _adopt_disks(config, record)
        devices = await _adopt_devices(config, record)
        doubts += [f"disk {disk.name}: {disk.doubt}" for disk in disks.values() if disk.doubt]
    else:
        await _sweep_disks(config, record)
        await _sweep_devices(config, record)
    held, leaving = _held_for(record.work)
    machine = Machine.adopt(spec, files, record.qemu, config.patience, held, leaving)
    machine.started = record.started
    log.info("adopt vm=%s pid=%s", spec.name, machine.pid)
    vm = Vm(machine, disks, ledger, release, finish, devices)
    for doubt in doubts:
        vm.doubt(doubt)
    if isinstance(record.work, Snapshotting):
        vm.employ(Thawing(vm, record.work))
    return vm


def remembered(config: AgentConfig, record: VmRecord, path: Path) -> Vm:
    """A VM that has ended, as its record at `path` tells."""
    assert record.end is not None
    files = VmFiles(config.vm_run_dir(record.spec.name))
    ledger = Ledger(record, path, files.peers)
    release, finish = partial(claims.release, config), partial(merge_at_end, config)
    return Vm(Machine.remember(record.spec, files, record.end), {}, ledger, release, finish)


def _require_own(record: VmRecord, seen: Living) -> None:
    """Raises RecordDamaged when the record names a living process that is no QEMU of the VM."""
    new = record.work.qemu if isinstance(record.work, Restarting) else None
    for identity in (record.qemu, new):
        if identity is not None and identity.is_alive() and identity not in seen.qemus:
            raise RecordDamaged(
                f"its record names the process {identity.pid} as its QEMU, which is another program"
            )


def _find_qemu(ledger: Ledger, seen: Living) -> list[str]:
    """Puts the QEMU that lives on record, if the record names none or one that is gone; what is
    doubtful about that. Raises StateConflict when it cannot be told which one is the VM's.
    """
    recorded = ledger.record.qemu
    if isinstance(ledger.record.work, Restarting):
        return []  # of which there may be two; its recovery tells them apart
    others = [one for one in seen.qemus if one != recorded]
    if not others:
        return []
    if len(seen.qemus) > 1:
        raise StateConflict(f"more than one QEMU of it lives: {seen}")
    ledger.started(others[0])
    if recorded is None:  # the agent ended between the start of QEMU and its note of that
        return []
    return [f"its record names a QEMU that is gone, pid {recorded.pid}; pid {others[0].pid} lives"]


def _remade(config: AgentConfig, files: VmFiles, record: VmRecord) -> list[str]:
    """Makes the run directory of a VM that runs, if somebody has removed it; what is missing."""
    missing = [path for path in (files.directory, files.monitor) if not path.exists()]
    try:
        renew_run_dir(files, record.user, record.number, config.users_top)
    except OSError as error:
        raise Unavailable(
            f"{files.directory} cannot be made: {error.strerror}",
            remedy="what stands in its place? Remove that, and start semperd again",
        ) from error
    return [f"{missing[0]} is gone, so its monitor cannot be reached"] if missing else []


async def _adopt_disks(config: AgentConfig, record: VmRecord) -> dict[str, Disk]:
    setups = await adopted_setups(config, record)
    moves = isinstance(record.work, Departing | Arriving)

    def frozen(setup: DiskSetup) -> bool:
        awaits = setup.title is not None and setup.title.epoch is None
        return awaits or (moves and not setup.options.read_only)

    disks = await asyncio.gather(*(adopt_disk(setup, frozen=frozen(setup)) for setup in setups))
    return {setup.short_name: disk for setup, disk in zip(setups, disks, strict=True)}


def _held_for(work: Work | None) -> tuple[Request | None, str]:
    """The request that the VM stays held for, and why its QEMU is about to be killed."""
    match work:
        case Departing():
            return Request.DEPART, work.farewell
        case Arriving(phase=Arrival.PROMISED | Arrival.RUNNING | Arrival.LOST):
            return Request.ARRIVE, ""  # it may be this host's VM, and then it has crashed
        case Arriving():
            return Request.ARRIVE, f"it did not come from {work.source}: the agent here began anew"
        case Restarting() | Saving() | Restoring() | Rescuing() | Snapshotting():
            return None, ""
        case MergingLayers() | None:
            return None, ""
        case Standing():
            return None, ""  # nobody else knows of it
        case _:
            assert_never(work)


async def _adopt_devices(config: AgentConfig, record: VmRecord) -> dict[str, Device]:
    """The mediators run already: by what right they write stands in their arguments."""
    setups = device_setups(config, record.spec, {}, incoming=isinstance(record.work, Arriving))
    return {setup.short_name: await Device.adopt(setup) for setup in setups}


async def _sweep_devices(config: AgentConfig, record: VmRecord) -> None:
    for setup in device_setups(config, record.spec, {}, incoming=False):
        await (await Device.adopt(setup)).stop()


async def _sweep_disks(config: AgentConfig, record: VmRecord) -> None:
    for setup in await adopted_setups(config, record):
        await sweep_disk(setup)
