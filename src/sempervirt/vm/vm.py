"""A VM as the agent sees it: one QEMU and the disks that serve it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from sempervirt.core.errors import NotFound, SempervirtError, StateConflict, Unavailable
from sempervirt.core.queue_map import DevicePlan
from sempervirt.disk.driver import Disk
from sempervirt.host import background, process
from sempervirt.host.procfs import ProcessId
from sempervirt.qemu.command_line import disk_id
from sempervirt.qemu.driver import STOP_GRACE_S, Machine
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import ON_REQUEST, End, Runstate, VmState
from sempervirt.store.registry import Claim
from sempervirt.vm.claims import title_of
from sempervirt.vm.planning import plans_of_record
from sempervirt.vm.record import VmRecord
from sempervirt.vm.work import Work

log = logging.getLogger(__name__)

RELEASE_WAIT_S = 2.0


class Move(Protocol):
    """A migration of a VM, from here or to here, as the VM sees it."""

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""

    def shown(self) -> tuple[Runstate, str] | None:
        """What the VM is because of it, if that is not what QEMU alone would tell."""

    async def detach(self) -> None:
        """Leaves everything as it is, for another agent to go on with."""


@dataclass(frozen=True)
class Progress:
    """Work on the whole VM that takes long: bytes that are done, of how many."""

    what: str
    done: int
    total: int


class Vm:
    """Made by `Agent.run_vm` or adoption. Its disks end with QEMU, and never before."""

    def __init__(
        self,
        machine: Machine,
        disks: dict[str, Disk],
        record: VmRecord,
        record_path: Path,
        release: Callable[[Claim], Awaitable[bool]],
    ) -> None:
        self.machine = machine
        self.disks = disks
        self._record = record
        self._record_path = record_path
        self._release = release
        self.progress: Progress | None = None
        self.moving: Move | None = None
        self._unsettled: SempervirtError | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._settling = background.start(self._settle(), f"{self.name}: settle", crash=True)

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.machine.name

    @property
    def record(self) -> VmRecord:
        """What the next agent is told about the VM; only this class changes it."""
        return self._record

    @property
    def work(self) -> Work | None:
        """The work of many steps that goes on with the VM."""
        return self._record.work

    @property
    def spec(self) -> VmSpec:
        """What it was started from."""
        return self.machine.spec

    @property
    def state(self) -> VmState:
        """Everything that is known about its runstate."""
        return self.machine.state

    @property
    def run(self) -> Runstate:
        """Its runstate."""
        return self.machine.run

    @property
    def shown(self) -> tuple[Runstate, str]:
        """Its runstate and the reason, for people: a move may know better than QEMU."""
        moving = self.moving.shown() if self.moving is not None else None
        return moving or (self.run, self.state.why)

    @property
    def end(self) -> End | None:
        """How it ended, once it has."""
        return self.machine.state.end

    @property
    def pid(self) -> int | None:
        """QEMU's process id, while it runs."""
        return self.machine.pid

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

    @property
    def settled(self) -> bool:
        """Whether QEMU has ended and its disks are free."""
        return self._settling.done()

    def log_tail(self, lines: int = process.TAIL_LINES) -> list[str]:
        """The last lines that QEMU wrote."""
        return process.tail_of(self.machine.files.log, lines)

    def channel_path(self, name: str) -> Path:
        """The host end of a channel. Raises NotFound."""
        for channel in self.spec.channels:
            if name in (channel.name, channel.socket_name):
                return self.machine.files.channel(channel)
        raise NotFound(f"VM {self.name} has no channel {name}")

    async def pause(self) -> None:
        """See `Machine.pause`."""
        await self.machine.pause()

    async def resume(self) -> None:
        """See `Machine.resume`."""
        await self.machine.resume()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """See `Machine.stop`; returns when the disks are free too."""
        await self.machine.stop(grace_s)
        await self.wait_settled()

    async def kill(self, because: str = ON_REQUEST) -> None:
        """See `Machine.kill`; returns when the disks are free too."""
        if not self.run.is_end:
            await self.machine.kill(because)
        await self.wait_settled()

    async def wait_ended(self, timeout_s: float | None = None) -> None:
        """Waits until QEMU has ended and the disks are free. Raises Unavailable."""
        await self.machine.wait_ended(timeout_s)
        await self.wait_settled()

    async def wait_state(self, *states: Runstate, timeout_s: float) -> None:
        """See `Machine.wait_state`."""
        await self.machine.wait_state(*states, timeout_s=timeout_s)

    async def wait_settled(self) -> None:
        """Waits until the disks are free. Raises OutcomeUnknown when a backend does not end."""
        await asyncio.shield(self._settling)
        if self._releasing is not None:  # so that another host can have it at once
            await asyncio.wait([self._releasing], timeout=RELEASE_WAIT_S)
        if self._unsettled is not None:
            raise self._unsettled

    def set_claim(self, claim: Claim) -> None:
        """From now on the images are written by this claim."""
        self._record = replace(self._record, claim=claim)
        for disk in self.disks.values():
            title = title_of(claim, self.spec.disk(disk.setup.short_name))
            if title is not None:
                disk.set_title(title)
        self._keep_record()

    # Work of many steps (`vm.work`)

    def begin(self, work: Work) -> None:
        """Puts work on record, before anything of it is done.

        Raises StateConflict while other work goes on, Unavailable when the record cannot be
        written: nothing was begun then.
        """
        if self.work is not None:
            raise StateConflict(f"VM {self.name} is busy: {self.work.kind}")
        before, self._record = self._record, replace(self._record, work=work)
        try:
            self._write_record()
        except OSError as error:
            self._record = before
            raise Unavailable(
                f"the record of VM {self.name} cannot be written: {error.strerror}",
                remedy="make room in the state directory",
            ) from error

    def advance(self, work: Work) -> bool:
        """Replaces the work by the same work, further on; whether that is on record."""
        assert self.work is not None
        assert self.work.kind == work.kind
        self._record = replace(self._record, work=work)
        return self._keep_record()

    def end_work(self) -> bool:
        """Nothing goes on with the VM any more; whether that is on record."""
        self._record = replace(self._record, work=None)
        return self._keep_record()

    def took_over(self, qemu: ProcessId, number: int) -> bool:
        """Ends a restart: from now on `qemu`, the VM's QEMU of that number, is the VM."""
        self._record = replace(self._record, qemu=qemu, number=number, work=None)
        return self._keep_record()

    def _keep_record(self) -> bool:
        """A failure is logged: the next agent finds the former record, and asks the processes."""
        try:
            self._write_record()
        except OSError as error:
            log.error("record vm=%s not written: %s", self.name, error)  # noqa: TRY400
            return False
        return True

    def _write_record(self) -> None:
        self._record.write(self._record_path)

    async def detach(self) -> None:
        """Leaves QEMU and the backends running, for another agent to adopt."""
        if self.moving is not None:
            await self.moving.detach()
        if not self._settling.done():
            self._settling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._settling
            for disk in self.disks.values():
                await disk.detach()
        if self._releasing is not None:
            self._releasing.cancel()
        await self.machine.detach()

    async def give_back(self) -> None:
        """Frees the VM in the store, if this host has claimed it; otherwise it is tried again when
        the agent begins anew.
        """
        claim = self.record.claim
        if claim is not None and self._unsettled is None and await self._release(claim):
            self._record = replace(self._record, claim=None)
            self._keep_record()

    async def _settle(self) -> None:
        """Frees the disks after QEMU's end, and writes the end down."""
        await self.machine.wait_ended()
        self._record = self._record.ended(self.state)
        self._keep_record()
        try:
            await asyncio.gather(*(disk.stop() for disk in self.disks.values()))
        except SempervirtError as error:
            self._unsettled = error
            log.error("vm name=%s its disks are not free: %s", self.name, error)  # noqa: TRY400
        self._releasing = background.start(self.give_back(), f"{self.name}: release")
        log.info("ended vm=%s state=%s: %s", self.name, self.run.value, self.state.why)
