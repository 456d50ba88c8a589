"""A VM on its way to this host, as the agent and its API see it: driver, ports and watches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, assert_never

from sempervirt.cluster.cluster import Cluster
from sempervirt.core.errors import SempervirtError, StateConflict, Unavailable
from sempervirt.migration import stream
from sempervirt.migration.destination import decide
from sempervirt.migration.destination.adapters import (
    DestinationGuest,
    DestinationOwnership,
    DestinationRecord,
    Forget,
)
from sempervirt.migration.destination.driver import DestinationDriver
from sempervirt.migration.destination.ports import Ports
from sempervirt.migration.destination.state import (
    Incoming,
    PromiseAsked,
    QemuEnded,
    Ready,
    SourceSilent,
    Step,
    ToldToAbort,
    ToldToRun,
)
from sempervirt.migration.events import Loaded, StreamFailed
from sempervirt.migration.messages import ArrivalAnswer, ArrivalRequest, DeviceStates
from sempervirt.qemu.state import Request, Runstate
from sempervirt.store.registry import Claim
from sempervirt.vm.phases import Arrival
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Arriving

log = logging.getLogger(__name__)

LOOK_S = 0.1
# A source that has not asked for so long is gone, as long as nothing was promised.
SILENT_S = 15.0
PROMISE_S = 30.0
RUNS_S = 30.0


class DestinationMigration:
    """Made by `prepare`, or by `resume` after a restart of the agent."""

    def __init__(
        self, vm: Vm, cluster: Cluster, work: Arriving, stack: AsyncExitStack, forget: Forget
    ) -> None:
        self.vm = vm
        self.work = work
        self.address = ""
        self._cluster = cluster
        self._stack = stack
        self._guest = DestinationGuest(vm, cluster, work, forget)
        self._heard_at = time.monotonic()
        self._driver: DestinationDriver | None = None

    @classmethod
    async def prepare(
        cls,
        vm: Vm,
        cluster: Cluster,
        work: Arriving,
        forget: Forget,
        request: ArrivalRequest,
    ) -> DestinationMigration:
        """Has QEMU wait for the stream. Raises Unavailable, StateConflict, InvalidRequest; `vm` is
        left then.

        Afterwards it waits for `begin`.
        """
        migration = cls(vm, cluster, work, AsyncExitStack(), forget)
        guest, machine = migration._guest, vm.machine
        await machine.hold(Request.ARRIVE)
        await guest.wire.sweep()
        await stream.prepare_destination(
            machine.execute, guest.wire.files.stream, postcopy=request.postcopy
        )
        guest.wire.files.share_stream()
        configured = {name: one.configured() for name, one in request.devices.items()}
        await guest.devices.prepare(configured)
        migration.address = await guest.wire.start_destination(cluster.settings.address)
        return migration

    def begin(self, stack: AsyncExitStack) -> None:
        """From now on the VM goes its way; `stack` holds what is needed for it."""
        self._stack = stack
        self._go((Incoming(), []))
        self.driver.post(Ready())

    @classmethod
    async def resume(
        cls, vm: Vm, cluster: Cluster, work: Arriving, stack: AsyncExitStack, forget: Forget
    ) -> DestinationMigration:
        """Goes on from the record of an agent that has ended meanwhile."""
        migration = cls(vm, cluster, work, stack.pop_all(), forget)
        if work.phase not in (Arrival.PROMISED, Arrival.RUNNING):
            await migration._guest.wire.sweep()
        migration._go(decide.recover(work.phase, time.monotonic()))
        return migration

    def _go(self, begun: Step) -> None:
        vm = self.vm
        ports = Ports(
            DestinationOwnership(vm, self._cluster, self.work),
            self._guest,
            DestinationRecord(vm, self.work),
        )
        state, effects = begun
        driver = self._driver = DestinationDriver(vm.name, state, ports, followed=self._followed)
        vm.moving = self
        vm.machine.listen(self._heard)
        driver.start(effects)
        driver.keep(self._close_when_over(), "end")
        driver.keep(self._watch_qemu(), "end of QEMU")
        driver.keep(self._watch_source(), "source")
        driver.keep(self._watch_disks(), "disks")
        driver.keep(self._watch_stream(), "stream")

    async def _close_when_over(self) -> None:
        await self.driver.changes.wait_until(
            lambda: self.driver.over, timeout_s=None, what="the end of the arrival"
        )
        self.vm.machine.listen(None)
        await self.driver.detach()
        await self._stack.aclose()

    async def detach(self) -> None:
        """Leaves everything as it is, for another agent to go on with."""
        if self.over:
            return
        await self.driver.detach()
        self.vm.machine.listen(None)
        self._guest.wire.forget()
        await self._stack.aclose()

    # What can be asked of it

    @property
    def driver(self) -> DestinationDriver:
        """The driver, from `begin` or `resume` on."""
        assert self._driver is not None
        return self._driver

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self.driver.over

    def shown(self) -> tuple[Runstate, str] | None:
        """What the VM is because of the migration, if that is not what QEMU alone would tell."""
        state = self.driver.state
        if self.over or self.vm.run.is_end:
            return None
        source, why = self.work.source, f": {state.why}" if state.why else ""
        match state.phase:
            case Arrival.PREPARING | Arrival.INCOMING | Arrival.ABORTED:
                return Runstate.PAUSED, f"comes from {source}{why}"
            case Arrival.PROMISED:
                return Runstate.PAUSED, f"perhaps still with {source}{why}"
            case Arrival.RUNNING if not state.drained and self.vm.run is Runstate.RUNNING:
                return self.vm.run, f"part of its memory is still on {source}"
            case Arrival.RUNNING | Arrival.LOST:
                return None
            case _:
                assert_never(state.phase)

    def answer(self) -> ArrivalAnswer:
        """How far it is."""
        state = self.driver.state
        return ArrivalAnswer(
            id=self.work.id,
            phase=state.phase,
            why=state.why,
            address=self.address,
            drained=state.drained,
        )

    async def answer_after(self, seen: Arrival, wait_s: float) -> ArrivalAnswer:
        """As `answer`, when the phase is not `seen` any more, or after some time."""
        self._heard_at = time.monotonic()
        driver = self.driver
        with contextlib.suppress(Unavailable):
            await driver.changes.wait_until(
                lambda: driver.state.phase is not seen or driver.state.drained,
                timeout_s=wait_s,
                what="another phase",
            )
        return self.answer()

    async def promise(self) -> None:
        """The source is about to hand over. Raises StateConflict when it cannot be promised,
        Unavailable.
        """
        self.driver.post(PromiseAsked())
        await self.driver.reach(
            "a promise", lambda state: state.phase is Arrival.PROMISED, PROMISE_S
        )

    async def replay(self, rounds: Mapping[str, str]) -> None:
        """Sets registers of the passed-through devices as the guest has at the source.

        Raises StateConflict when the memory is here already, InvalidRequest, Unavailable,
        OutcomeUnknown.
        """
        self._require_incoming()
        await self._guest.devices.replay(rounds)

    async def receive(self, states: DeviceStates) -> None:
        """The state of every passed-through device; mediators keep it. Raises as `replay`."""
        self._require_incoming()
        moved = {name: state.moved() for name, state in states.states.items()}
        await self._guest.devices.receive(moved)

    def _require_incoming(self) -> None:
        """Before the rest of the memory, and so before anything was promised."""
        phase = self.driver.state.phase
        if phase is not Arrival.INCOMING:
            raise StateConflict(
                f"the arrival of VM {self.vm.name} is {phase.value}: it takes the state of devices "
                "only while it is incoming"
            )

    async def recover(self) -> ArrivalAnswer:
        """Has QEMU take up a stream that broke in postcopy, on a new wire.

        Raises StateConflict, Unavailable.
        """
        wire = self._guest.wire
        await wire.end()
        await wire.sweep()
        await stream.take_up(self.vm.machine.execute, wire.files.stream)
        wire.files.share_stream()
        self.address = await wire.start_destination(self._cluster.settings.address)
        return self.answer()

    async def run(self, epoch: int, claim: str) -> None:
        """The VM is this host's; returns when the guest runs. Raises StateConflict, Unavailable.

        The word of the source is enough: it asked the store, and the images check the epoch.
        """
        if epoch <= self.work.epoch:
            raise StateConflict(f"epoch {epoch} is not newer than the source's, {self.work.epoch}")
        host, images = self._cluster.settings.host, self.work.images
        self.driver.post(ToldToRun(Claim(self.vm.name, host, epoch, claim, images)))
        await self.driver.reach("a guest that runs", lambda state: state.runs, RUNS_S)

    async def abort(self, why: str) -> None:
        """The source keeps the VM."""
        log.info("arrival vm=%s is given up by %s: %s", self.vm.name, self.work.source, why)
        self.driver.post(ToldToAbort())

    # What is watched

    async def _watch_qemu(self) -> None:
        await self.vm.machine.wait_ended()
        self.driver.post(QemuEnded(self.vm.state.why or "QEMU ended"))

    async def _watch_source(self) -> None:
        while not self.over:
            await asyncio.sleep(LOOK_S)
            if time.monotonic() - self._heard_at > SILENT_S:
                self._heard_at = time.monotonic()
                self.driver.post(SourceSilent())

    async def _watch_disks(self) -> None:
        """A backend or a mediator that ended before the VM is this host's."""
        while self.driver.state.phase in (Arrival.PREPARING, Arrival.INCOMING):
            for disk in self.vm.disks.values():
                if disk.active_pid is None:
                    self.driver.post(StreamFailed(f"the backend of disk {disk.name} ended"))
            if (gone := self._guest.devices.ended()) is not None:
                self.driver.post(StreamFailed(f"the mediator of device {gone} ended"))
            await asyncio.sleep(LOOK_S)

    def _heard(self, name: str, data: Mapping[str, Any]) -> None:
        """QEMU's events come at once; `_watch_stream` finds the same later."""
        if name == "MIGRATION":
            self._judge(str(data.get("status", "")), "")

    def _judge(self, status: str, error: str) -> None:
        match status:
            case "completed":
                self.driver.post(Loaded())
            case "failed" if error:
                self.driver.post(StreamFailed(error))

    async def _watch_stream(self) -> None:
        while not self.driver.state.drained and not self.over:
            await asyncio.sleep(LOOK_S)
            try:
                told = await stream.look(self.vm.machine.execute)
            except SempervirtError:  # its end is seen, and a silent one shows in the VM's state
                continue
            self._judge(told.status, told.error or "QEMU says no more")

    def _followed(self, before: Incoming, after: Incoming) -> None:
        if after.phase is before.phase:
            return
        why = f" ({after.why})" if after.why else ""
        text = f"from {self.work.source}: {before.phase.value} -> {after.phase.value}{why}"
        self.vm.machine.journal.note(time.time(), "migration", text)
        log.info("arrival vm=%s %s", self.vm.name, text)
