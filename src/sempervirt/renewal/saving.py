"""Saves a VM to a file, and makes a VM from such a file.

Save: hold ─ pause ─ devices to a file ─ memory packed ─ all of it durable ─ QEMU is killed. Any
failure before the last step lets the guest run on. The guest's disks are then in the state that
the file names, and stay so until somebody writes to them.

Restore: the disks' states are checked, the memory is unpacked and verified while backends and
QEMU start, the devices are loaded, and only then the guest runs. Any failure leaves nothing
running. The file is only read: it can be restored again as long as the disks are as it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sempervirt.core.errors import InvalidRequest, RollbackFailed, SempervirtError, StateConflict
from sempervirt.host import process
from sempervirt.qemu import handover, memory, saved
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.saved import Figures, Shown
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Request, Runstate
from sempervirt.renewal.restart import wait_drained
from sempervirt.vm.vm import Progress, Vm
from sempervirt.vm.work import Saving as SavingWork

log = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True)
class Saving:
    """What became of it; the guest had to stand still for `paused_ms` before it ended."""

    figures: Figures
    paused_ms: float


@dataclass(frozen=True)
class Plan:
    """A VM as a saved state describes it."""

    spec: VmSpec
    accelerator: str
    machine: str
    running: bool
    images: Mapping[str, Path]


class Origin:
    """Where a VM comes from that is being restored."""

    def __init__(self, file: Path, plan: Plan) -> None:
        self.plan = plan
        self._file = file
        self._state = Path()
        self._unpacking: asyncio.Task[None] | None = None
        self._vm: Vm | None = None

    def begin(self, files: VmFiles, memory_fd: int) -> None:
        """Unpacks the memory from now on; QEMU does not look at it before `load`."""
        self._state = files.directory / "state.restore"
        descriptor = os.dup(memory_fd)

        async def unpack() -> None:
            try:
                await saved.restore(
                    self._file, descriptor, self._state, self.plan.images, self._progress
                )
            finally:
                os.close(descriptor)

        self._unpacking = asyncio.create_task(unpack(), name=f"unpack {self._file}")

    def _progress(self, done: int, of: int) -> None:
        if self._vm is not None:
            self._vm.progress = Progress("restoring", done, of)

    def cancel(self) -> None:
        """Gives up, if nobody waits for it any more."""
        if self._unpacking is not None:
            self._unpacking.cancel()

    async def load(self, vm: Vm) -> None:
        """Waits for the memory, loads the devices, and lets the guest run on if it ran."""
        assert self._unpacking is not None
        machine = vm.machine
        self._vm = vm
        await machine.hold(Request.RESTORE)
        status = "paused"
        try:
            await self._unpacking
            await handover.take(machine.execute, self._state)
            await handover.reset(machine.execute)
            vm.end_work()
            if self.plan.running:
                await machine.execute("cont")
                status = "running"
        finally:
            self._state.unlink(missing_ok=True)
            self._vm = vm.progress = None
            machine.release(status)
        machine.journal.note(time.time(), "restore", f"restored from {self._file}")
        if self.plan.running:
            await machine.wait_state(Runstate.RUNNING, timeout_s=10.0)


async def save_vm(vm: Vm, output: Path) -> Saving:
    """Saves `vm` to `output` and ends it.

    Raises InvalidRequest, StateConflict or Unavailable when it was not saved: it is as it was;
    RollbackFailed when it was not saved and is not as it was.
    """
    if not output.parent.is_dir():
        raise InvalidRequest(f"there is no directory {output.parent}", remedy="make it first")
    return await asyncio.shield(asyncio.create_task(_save(vm, output)))


async def _save(vm: Vm, output: Path) -> Saving:
    machine = vm.machine
    await machine.hold(Request.SAVE)
    running = machine.run is Runstate.RUNNING
    directory = machine.files.directory
    state, about = directory / "state.save", directory / "about.save"
    stopped = time.monotonic()
    try:
        vm.begin(SavingWork(resume=running))
        await wait_drained(vm, pause=running)
        await handover.give(machine.execute, state)
        about.write_text(json.dumps(await _describe(vm, running=running)))
        assert vm.pid is not None
        descriptor = memory.open_of(vm.pid)
        try:
            images = {disk.name: disk.image for disk in vm.spec.disks}
            figures = await saved.save(
                descriptor,
                state,
                about,
                images,
                output,
                lambda done, of: setattr(vm, "progress", Progress("saving", done, of)),
            )
        finally:
            os.close(descriptor)
    except BaseException as error:
        left = await _go_on(vm, running=running)
        if left:
            raise RollbackFailed(
                f"VM {vm.name} was not saved ({error}), and {left}",
                remedy=f"look at it: semper vm show {vm.name}; then resume or end it",
            ) from error
        raise
    finally:
        vm.progress = None
        for path in (state, about):
            path.unlink(missing_ok=True)
    paused_ms = round((time.monotonic() - stopped) * 1e3, 1)
    machine.journal.note(time.time(), "save", f"saved to {output}")
    log.info("save vm=%s file=%s bytes=%d", vm.name, output, figures.file)
    await vm.kill()
    return Saving(figures, paused_ms)


async def _go_on(vm: Vm, *, running: bool) -> str:
    """Lets the guest run on, if it ran. Gives what is not as it was, "" if all is."""
    machine, status, left = vm.machine, "paused", ""
    if machine.held:
        try:
            await handover.reset(machine.execute)
            if running:
                await machine.execute("cont")
                status = "running"
        except SempervirtError as error:
            left = f"its guest does not go on: {error.message}"
            machine.journal.note(time.time(), "save", left)
            log.error("save vm=%s %s", vm.name, left)  # noqa: TRY400
    machine.release(status)
    vm.end_work()
    return left


async def _describe(vm: Vm, *, running: bool) -> dict[str, Any]:
    return {
        "version": VERSION,
        # The addresses stay, also if the VM is restored under another name.
        "spec": vm.pinned_spec.model_dump(mode="json"),
        "accelerator": vm.record.accelerator.kind,
        "machine": await handover.machine_type(vm.machine.execute),
        "plans": {name: asdict(plan) for name, plan in vm.plans.items()},
        "running": running,
        "saved": time.time(),
    }


@dataclass(frozen=True)
class Changes:
    """What is to be different from the VM that was saved.

    `images` by the disk's name, `taps` by the tap that was used before. With `new_macs` the
    cards have addresses that go with the new name; a guest that runs sees them when its driver
    starts anew, for the address is part of the device's state.
    """

    name: str | None = None
    images: Mapping[str, Path] = field(default_factory=dict)
    taps: Mapping[str, str] = field(default_factory=dict)
    new_macs: bool = False


NO_CHANGES = Changes()


def plan_of(shown: Shown, changes: Changes) -> Plan:
    """The VM to restore.

    Raises InvalidRequest for a description that this release does not understand.
    """
    about = shown.vm
    if about.get("version") != VERSION:
        raise InvalidRequest(
            f"the saved state describes its VM in version {about.get('version')!r}, this program "
            f"knows {VERSION}",
            remedy="use the release that wrote it",
        )
    try:
        spec = VmSpec.model_validate(about["spec"])
        accelerator, machine = str(about["accelerator"]), str(about["machine"])
        running = bool(about["running"])
        changed = _changed(spec, changes)
        spec = VmSpec.model_validate(changed)
    except (KeyError, TypeError, ValidationError) as error:
        raise InvalidRequest(f"the saved state does not describe a VM: {error}") from error
    return Plan(spec, accelerator, machine, running, {d.name: d.image for d in spec.disks})


def _changed(spec: VmSpec, changes: Changes) -> dict[str, Any]:
    known = {disk.name for disk in spec.disks}, {nic.tap for nic in spec.nics}
    for what, given, there in (
        ("disk", changes.images, known[0]),
        ("network on the tap", changes.taps, known[1]),
    ):
        if unknown := set(given) - there:
            raise InvalidRequest(f"the saved VM has no {what} {min(unknown)}")
    changed = spec.model_dump(mode="json") | {"name": changes.name or spec.name}
    for disk in changed["disks"]:
        disk["image"] = str(changes.images.get(disk["name"], disk["image"]))
    for nic in changed["nics"]:
        nic["tap"] = changes.taps.get(nic["tap"], nic["tap"])
        if changes.new_macs:
            nic["mac"] = None
    return changed


async def copy_images(shown: Shown, directory: Path, name: str) -> dict[str, Path]:
    """Copies of a saved state's images, shared with the original where the storage can do that.

    Raises InvalidRequest when a copy is there already, CommandFailed.
    """
    copies: dict[str, Path] = {}
    try:
        for disk, image in shown.images.items():
            copy = directory / f"{name}-{disk}.raw"
            if copy.exists():
                raise InvalidRequest(f"{copy} exists", remedy="choose another name or directory")
            copies[disk] = copy
            argv = ["cp", "--reflink=auto", "--sparse=always", str(image), str(copy)]
            await process.run(argv, timeout_s=3600)
    except BaseException:
        for copy in copies.values():
            with contextlib.suppress(OSError):
                copy.unlink(missing_ok=True)
        raise
    return copies


def check_accelerator(plan: Plan, present: str) -> None:
    """Raises StateConflict: a processor's state means nothing to another accelerator."""
    if plan.accelerator != present:
        raise StateConflict(
            f"the VM was saved under {plan.accelerator}, this host would run it under {present}"
        )
