"""A VM as the agent sees it: one QEMU, and the disks that backends serve to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Protocol

from sempervirt.core.errors import (
    NotFound,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.queue_map import DevicePlan
from sempervirt.disk.driver import Disk
from sempervirt.disk.image import Finding, ImageState, has_open
from sempervirt.host import background, process
from sempervirt.host.storage_call import call_storage
from sempervirt.passthrough.device import Device
from sempervirt.qemu.command_line import disk_id
from sempervirt.qemu.driver import STOP_GRACE_S, Machine
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import FOR_STANDBY, ON_REQUEST, End, Runstate, VmState
from sempervirt.store.registry import Claim
from sempervirt.vm.claims import title_of
from sempervirt.vm.ending import merges_at_end
from sempervirt.vm.ledger import Ledger
from sempervirt.vm.planning import plans_of_record
from sempervirt.vm.record import VmRecord
from sempervirt.vm.work import MergingLayers, Work

log = logging.getLogger(__name__)

RELEASE_WAIT_S = 2.0


class Worker(Protocol):
    """Whoever does the work of many steps that goes on with a VM."""

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""

    def shown(self) -> tuple[Runstate, str] | None:
        """What the VM is because of the work, if that is not what QEMU alone would tell."""

    async def detach(self) -> None:
        """Leaves everything as it is, for another agent to go on with."""


class Renewal(Worker, Protocol):
    """A restart of QEMU, a save or a restore."""

    @property
    def doing(self) -> str:
        """What kind of work, in plain words."""


class LongWork(StrEnum):
    """Work that takes so long that people want to see how far it is."""

    SAVING = "saving"
    RESTORING = "restoring"
    RESCUING = "rescuing"
    EXPORTING = "exporting"


@dataclass(frozen=True)
class Progress:
    """How far work on the whole VM is: bytes that are done, of how many."""

    what: LongWork
    done: int
    total: int


class Vm:
    """Made by `launch.launch` or adoption. Its disks end with QEMU, and never before.

    Two things keep others from a VM on which work of many steps goes on. The work on record
    (`begin`, `advance`, `end_work`) is the VM's: one at a time, known to the next agent, named to
    whoever asks for something else. `Machine.hold` is the present QEMU's: the pauses of the work
    are not taken for the VM's runstate, and it ends by itself when QEMU falls silent or has ended.
    """

    def __init__(
        self,
        machine: Machine,
        disks: dict[str, Disk],
        ledger: Ledger,
        release: Callable[[Claim], Awaitable[bool]],
        finish: Callable[[VmRecord], Awaitable[str]],
        devices: Mapping[str, Device] | None = None,
    ) -> None:
        self.machine = machine
        self.disks = disks
        self.devices = dict(devices or {})
        self.ledger = ledger
        self._release = release
        self._finish = finish
        self.progress: Progress | None = None
        self.doubts: list[str] = []
        self.moving: Worker | None = None
        self._renewal: Renewal | None = None
        self._not_freed: SempervirtError | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._freeing = background.start(self._free(), f"{self.name}: free", crash=True)

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.machine.name

    @property
    def record(self) -> VmRecord:
        """What the next agent is told about the VM; only the ledger changes it."""
        return self.ledger.record

    @property
    def work(self) -> Work | None:
        """The work of many steps that goes on with the VM."""
        return self.ledger.record.work

    @property
    def spec(self) -> VmSpec:
        """The VM file, as it was when the VM was started."""
        return self.machine.spec

    @property
    def state(self) -> VmState:
        """Everything that is known about the runstate."""
        return self.machine.state

    @property
    def run(self) -> Runstate:
        """The runstate."""
        return self.machine.run

    @property
    def shown(self) -> tuple[Runstate, str]:
        """The runstate and its reason, for people: the work may know better than QEMU."""
        for worker in (self.moving, self._renewal):
            if worker is not None and not self.run.is_end and (better := worker.shown()):
                return better
        if self.doubts and not self.run.is_end:
            return Runstate.UNKNOWN, "; ".join(self.doubts)
        return self.run, self.state.why

    def doubt(self, what: str) -> None:
        """What was found of the VM is not what its records say: until another QEMU has taken over,
        or the next agent finds all as it should be, the VM is shown as unknown.
        """
        self.doubts.append(what)
        self.machine.journal.note(time.time(), "state", what)
        log.error("vm name=%s %s", self.name, what)

    @property
    def ailments(self) -> str:
        """Which disks and devices are not served, and why; "" when all are."""
        disks = [disk.ailment for disk in self.disks.values()]
        devices = [
            one.ailment or one.failing for one in self.devices.values() if not self.run.is_end
        ]
        return "; ".join(ailment for ailment in (*disks, *devices) if ailment)

    @property
    def end(self) -> End | None:
        """How the VM ended, once it has."""
        return self.machine.state.end

    @property
    def pid(self) -> int | None:
        """QEMU's process id, while it runs."""
        return self.machine.pid

    @property
    def workplace(self) -> Path:
        """The directory in which the present QEMU makes files."""
        files, user = self.machine.files, self.record.user
        own = user is not None and user.number is not None
        return files.successor(self.record.number).directory if own else files.directory

    @property
    def plans(self) -> dict[str, DevicePlan]:
        """How the queues of each device are served, by QEMU's id."""
        plans = dict(plans_of_record(self.spec, self.record.plans))
        for disk in self.disks.values():
            if disk.plan is not None:
                plans[disk_id(self.spec.disk(disk.setup.short_name))] = disk.plan
        return plans

    @property
    def pinned_spec(self) -> VmSpec:
        """The VM as the guest sees it: what was left to this host is written down."""
        spec = self.spec
        nics = [nic.model_copy(update={"mac": spec.mac(i)}) for i, nic in enumerate(spec.nics)]
        disks = [
            disk.model_copy(update={"queues": self.plans[disk_id(disk)].binding.queues})
            for disk in spec.disks
        ]
        return spec.model_copy(update={"nics": tuple(nics), "disks": tuple(disks)})

    def has_ejected(self, disk: str) -> bool:
        """Whether the guest has unplugged the disk of that name."""
        return disk_id(self.spec.disk(disk)) in self.state.gone

    @property
    def freed(self) -> bool:
        """Whether QEMU has ended and its disks are free."""
        return self._freeing.done()

    def log_tail(self, lines: int = process.TAIL_LINES) -> list[str]:
        """The last lines that the present QEMU, or the last one, wrote."""
        return process.said(self.machine.files.log, lines)

    def channel_path(self, name: str) -> Path:
        """The host end of a channel. Raises NotFound."""
        for channel in self.spec.channels:
            if name in (channel.name, channel.socket_name):
                return self.machine.files.channel(channel)
        raise NotFound(f"VM {self.name} has no channel {name}")

    async def pause(self) -> None:
        """See `Machine.pause`. Raises StateConflict while work goes on."""
        self.ledger.require_idle()
        with self.naming_disks():
            await self.machine.pause()

    async def resume(self) -> None:
        """See `Machine.resume`. Raises StateConflict while work goes on."""
        self.ledger.require_idle()
        with self.naming_disks():
            await self.machine.resume()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """See `Machine.stop`; returns when the disks are free too. Raises StateConflict while work
        goes on.
        """
        self.ledger.require_idle()
        with self.naming_disks():
            await self.machine.stop(grace_s)
        await self.wait_freed()

    async def kill(self, because: str = ON_REQUEST) -> None:
        """See `Machine.kill`; returns when the disks are free too."""
        if not self.run.is_end:
            await self.machine.kill(because)
        await self.wait_freed()

    async def wait_ended(self, timeout_s: float | None = None) -> None:
        """Waits until QEMU has ended and the disks are free. Raises Unavailable."""
        await self.machine.wait_ended(timeout_s)
        await self.wait_freed()

    async def wait_state(self, *states: Runstate, timeout_s: float) -> None:
        """See `Machine.wait_state`."""
        await self.machine.wait_state(*states, timeout_s=timeout_s)

    async def wait_freed(self) -> None:
        """Waits until the disks are free. Raises OutcomeUnknown when a backend does not end."""
        await asyncio.shield(self._freeing)
        if self._releasing is not None:  # so that another host can have it at once
            await asyncio.wait([self._releasing], timeout=RELEASE_WAIT_S)
        if self._not_freed is not None:
            raise self._not_freed

    @contextlib.contextmanager
    def naming_disks(self) -> Iterator[None]:
        """Adds to an error of the block which disks are not served, and why: QEMU, and what QEMU
        answers, may wait for them; then the disk is to be mended, and the VM goes on by itself.
        """
        try:
            yield
        except (StateConflict, Unavailable, OutcomeUnknown) as error:
            if not (ailments := self.ailments):
                raise
            kind = next(
                k for k in (StateConflict, Unavailable, OutcomeUnknown) if isinstance(error, k)
            )
            ailing = [disk.name for disk in self.disks.values() if disk.ailment]
            remedy = (
                f"mend what that disk lies on, and the VM goes on by itself; look at it: "
                f"semper disk show {ailing[0]}"
                if ailing
                else f"a device that is gone comes back at the next run: semper vm kill {self.name}"
            )
            raise kind(f"{error.message}; {ailments}", remedy=remedy) from error

    def set_claim(self, claim: Claim) -> None:
        """From now on the images are written by this claim."""
        for disk in self.disks.values():
            described = self.spec.disk(disk.setup.short_name)
            title = title_of(claim, described, disk.setup.volume)
            if title is not None:
                disk.set_title(title)
        self.ledger.set_claim(claim)

    async def misplaced_images(self) -> list[Finding]:
        """The images to which their paths do not lead: whoever opens them by path, as a QEMU or a
        host that goes on with this VM does, would have another VM's disk.
        """
        await asyncio.gather(*(disk.look_at_image() for disk in self.disks.values()))
        found = [disk.image.finding for disk in self.disks.values()]
        return [finding for finding in found if finding.misplaced] + await self._own_misplaced()

    async def _own_misplaced(self) -> list[Finding]:
        """Those of the disks that QEMU itself serves."""
        if (pid := self.pid) is None:
            return []
        found = []
        for disk in self.spec.disks:
            if disk.name in self.disks:
                continue
            with contextlib.suppress(OSError, Unavailable):
                if await call_storage(disk.image, partial(has_open, pid, disk.image)):
                    continue
            cause = f"disk {self.name}/{disk.name}: {disk.image} is not the file that QEMU has open"
            found.append(Finding(ImageState.REPLACED, cause, "put the image back to its path"))
        return found

    async def require_images_in_place(self, *, own: bool = False) -> None:
        """Raises StateConflict for an image to which its path does not lead; with `own` only for
        one that QEMU itself serves.
        """
        for finding in await (self._own_misplaced() if own else self.misplaced_images()):
            raise StateConflict(finding.cause, remedy=finding.remedy)

    def require_no_devices(self, what: str) -> None:
        """Raises StateConflict when the VM has passed-through devices: QEMU gives their state to no
        file and to no other QEMU of this host.
        """
        if self.spec.passthrough:
            names = ", ".join(device.name for device in self.spec.passthrough)
            raise StateConflict(
                f"VM {self.name} has passed-through devices ({names}), and {what} does not know "
                "them",
                remedy=f"move the VM to another host: semper vm migrate {self.name} --to HOST",
            )

    # Work of many steps (`vm.work`)

    def begin(self, work: Work) -> None:
        """See `Ledger.begin`."""
        self.ledger.begin(work)

    def advance(self, work: Work) -> bool:
        """See `Ledger.advance`."""
        return self.ledger.advance(work)

    def end_work(self) -> bool:
        """See `Ledger.end_work`."""
        return self.ledger.end_work()

    def employ(self, worker: Renewal) -> None:
        """`worker` restarts the VM's QEMU, or saves or restores the VM, from now on.

        Raises StateConflict while another one does.
        """
        if self._renewal is not None and not self._renewal.over:
            raise StateConflict(f"VM {self.name} is busy: {self._renewal.doing} is under way")
        self._renewal = worker

    async def detach(self) -> None:
        """Leaves QEMU and the backends running, for another agent to adopt."""
        for worker in (self.moving, self._renewal):
            if worker is not None:
                await worker.detach()
        if not self._freeing.done():
            self._freeing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._freeing
            for disk in self.disks.values():
                await disk.detach()
            for device in self.devices.values():
                device.detach()
        if self._releasing is not None:
            self._releasing.cancel()
        await self.machine.detach()

    async def release_claim(self) -> None:
        """Gives the claim on the VM back to the store, if this host has one.

        A store that does not answer leaves the claim on record, and the next agent tries again.
        """
        claim = self.record.claim
        if claim is not None and self._not_freed is None and await self._release(claim):
            self.ledger.set_claim(None)

    def _plan_merges(self) -> None:
        """Puts on record that the layers of the disks are to be merged, if the VM file says so. A
        VM that goes on elsewhere, or in a saved state, keeps its layers, and so does one whose QEMU
        died, or was ended for a standby: whoever takes its place waits for the images.
        """
        if self.work is not None or self.run is Runstate.CRASHED:
            return
        if self.state.killed_because == FOR_STANDBY:
            return
        if any(merges_at_end(disk) for disk in self.spec.disks):
            # Without the record the next agent leaves the layers as they are.
            with contextlib.suppress(Unavailable):
                self.begin(MergingLayers())

    async def _merge_layers(self) -> None:
        """Merges the layers of the disks into images that no other host can have yet. What another
        agent has begun is done again.
        """
        if not isinstance(self.work, MergingLayers):
            return
        if self._not_freed is None and (failed := await self._finish(self.record)):
            self.machine.journal.note(time.time(), "snapshot", failed)
            log.error("vm name=%s keeps layers: %s", self.name, failed)
        self.end_work()

    async def _free(self) -> None:
        """Frees the disks after QEMU's end, and writes the end down."""
        await self.machine.wait_ended()
        if self.record.end is None:
            self._plan_merges()
        self.ledger.ended(self.state)
        try:
            await asyncio.gather(
                *(disk.stop() for disk in self.disks.values()),
                *(device.stop() for device in self.devices.values()),
            )
        except SempervirtError as error:
            self._not_freed = error
            log.error("vm name=%s its disks are not free: %s", self.name, error)  # noqa: TRY400
        await self._merge_layers()
        self._releasing = background.start(self.release_claim(), f"{self.name}: release")
        log.info("ended vm=%s state=%s: %s", self.name, self.run.value, self.state.why)
