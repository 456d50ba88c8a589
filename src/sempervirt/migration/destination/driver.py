"""Carries out what the destination's machine of a migration decides (`migration.arrival`).

    prepare: backends that await their claim, QEMU that waits for the stream, an end of the wire
      ──► INCOMING ──► everything is loaded ──► PROMISED ──► the store or the source says so
      ──► epoch on record at the images, claim to the backends, the guest runs

Nothing of it runs or writes before the VM is this host's: QEMU is started with its processors
stopped, and the backends take no image without a claim.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

from sempervirt.cluster.cluster import Cluster
from sempervirt.core.errors import NotFound, SempervirtError, StateConflict, Unavailable
from sempervirt.host.changes import Changes
from sempervirt.migration import stream
from sempervirt.migration.destination import decide as arrival
from sempervirt.migration.destination.decide import Incoming
from sempervirt.migration.events import (
    Act,
    DestinationEvent,
    Loaded,
    OwnershipSeen,
    PromiseAsked,
    QemuEnded,
    Ready,
    Side,
    SourceSilent,
    StreamFailed,
    Tick,
    ToldToAbort,
    ToldToRun,
)
from sempervirt.migration.journey import Journey
from sempervirt.migration.messages import ArrivalAnswer
from sempervirt.migration.wire import Wire, sweep
from sempervirt.qemu.state import Request, Runstate
from sempervirt.store.records import Custody, Ownership
from sempervirt.store.registry import Claim, StaleClaim
from sempervirt.vm.claims import claim_of, put_on_record, title_of
from sempervirt.vm.phases import Arrival
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Arriving

log = logging.getLogger(__name__)

TICK_S = 0.1
# A source that has not asked for so long is gone, as long as nothing was promised.
SILENT_S = 15.0
WIRE_S = 10.0
TAKE_AGAIN_S = 0.2
RUNS_S = 30.0


class Reception(Journey[DestinationEvent]):
    """One VM on its way to this host."""

    def __init__(self, vm: Vm, cluster: Cluster, record: Arriving) -> None:
        super().__init__(vm, cluster, record.id, "arrival")
        self.record = record
        self.changes = Changes()
        self.address = ""
        self.drained = False
        self._epoch = record.epoch
        # One that was about to run does so again: nothing of that does harm twice.
        runs = record.phase is Arrival.RUNNING
        self._state = Incoming(phase=Arrival.PROMISED if runs else record.phase)
        self._claim: Claim | None = None
        self._heard_at = time.monotonic()
        self._forget: Callable[[], Awaitable[None]] | None = None
        self._runs = asyncio.Event()

    # Its life

    async def prepare(self, *, postcopy: bool) -> None:
        """Has QEMU wait for the stream. Raises Unavailable, StateConflict; `vm` is left then."""
        machine = self.vm.machine
        await machine.hold(Request.ARRIVE)
        await sweep(self._wire_files)
        execute = machine.execute
        await stream.prepare_destination(execute, self._wire_files.stream, postcopy=postcopy)
        await self._start_wire()
        self._post(Ready())

    async def _start_wire(self) -> None:
        settings, trust = self._cluster.settings, self._cluster.identity.directory
        listen = await asyncio.to_thread(_listen_address, settings.address)
        source, disks = self.record.source, self._wire_disks()
        self._wire = Wire.destination(
            self._wire_files, trust, self.id, source, f"{listen}:0", disks
        )
        self.address = str(await self._wire.wait("address", (), WIRE_S))

    def go_to_work(self, stack: AsyncExitStack, forget: Callable[[], Awaitable[None]]) -> None:
        """From now on it goes its way. `forget` drops the VM if it does not come."""
        self._stack, self._forget = stack, forget
        self.vm.moving = self
        self._begin_work(self._own(), self._heard)
        self._keep(self._tick(), "ticks")
        self._keep(self._watch_machine(), "end of QEMU")
        self._keep(self._watch_stream(), "stream")

    async def resume(self, stack: AsyncExitStack, forget: Callable[[], Awaitable[None]]) -> None:
        """Goes on from the record of an agent that has ended meanwhile."""
        if self._state.phase is not Arrival.PROMISED:
            await sweep(self._wire_files)
            self._post(StreamFailed("the agent here began anew"))
        self.go_to_work(stack, forget)

    def shown(self) -> tuple[Runstate, str] | None:
        """What the VM is because of this, if that is not what QEMU alone would tell."""
        if self.over or self.vm.run.is_end or self._state.phase is Arrival.RUNNING:
            return None
        why = f": {self._state.why}" if self._state.why else ""
        what = (
            "it comes from" if self._state.phase is not Arrival.PROMISED else "perhaps still with"
        )
        return Runstate.PAUSED, f"{what} {self.record.source}{why}"

    # What the source says

    def answer(self) -> ArrivalAnswer:
        """How far it is."""
        return ArrivalAnswer(
            id=self.id,
            phase=self._state.phase,
            why=self._state.why,
            address=self.address,
            drained=self.drained,
        )

    async def answer_after(self, seen: Arrival, wait_s: float) -> ArrivalAnswer:
        """As `answer`, when the phase is not `seen` any more, or after some time."""
        self._heard_at = time.monotonic()
        with contextlib.suppress(Unavailable):
            await self.changes.wait_until(
                lambda: self._state.phase is not seen or self.drained,
                timeout_s=wait_s,
                what="another phase",
            )
        return self.answer()

    async def promise(self) -> None:
        """The source is about to hand over. Raises StateConflict when it cannot be promised."""
        self._post(PromiseAsked())
        await self._reach(Arrival.PROMISED)

    async def recover(self) -> None:
        """Has QEMU take up a stream that broke in postcopy, on a new wire.

        Raises StateConflict, Unavailable.
        """
        await self._end_wire()
        await sweep(self._wire_files)
        await stream.take_up(self.vm.machine.execute, self._wire_files.stream)
        await self._start_wire()

    async def run(self, epoch: int, claim: str) -> None:
        """The VM is this host's; returns when the guest runs. Raises StateConflict, Unavailable."""
        if epoch <= self._epoch:
            raise StateConflict(f"epoch {epoch} is not newer than the source's, {self._epoch}")
        if self._claim is None:
            # The word of the source is enough: it asked the store, and the images check the epoch.
            host, images = self._cluster.settings.host, self.record.images
            self._claim = Claim(self.vm.name, host, epoch, claim, images)
        self._post(ToldToRun())
        await self._reach(Arrival.RUNNING)
        async with asyncio.timeout(RUNS_S):
            await self._runs.wait()

    async def abort(self, why: str) -> None:
        """The source keeps the VM."""
        log.info("arrival vm=%s is given up by %s: %s", self.vm.name, self.record.source, why)
        self._post(ToldToAbort())

    async def _reach(self, phase: Arrival) -> None:
        try:
            await self.changes.wait_until(
                lambda: self._state.phase in (phase, Arrival.ABORTED, Arrival.LOST),
                timeout_s=RUNS_S,
                what=f"the arrival of VM {self.vm.name} to be {phase.value}",
            )
        finally:
            if self._state.phase in (Arrival.ABORTED, Arrival.LOST):
                raise StateConflict(f"VM {self.vm.name} did not arrive: {self._state.why}")

    # The owner task

    async def _own(self) -> None:
        while not self.over:
            event = await self._queue.get()
            before = self._state
            state, acts = arrival.step(before, event, time.monotonic())
            entered = state.phase is not before.phase
            if entered and not self._write(state) and state.phase is Arrival.PROMISED:
                continue  # not promised, then; the source gives up in time
            self._state = state
            if entered:
                self._entered(before)
            self.changes.notify()
            for act in acts:
                self._begin_act(act)
            if state.phase is Arrival.LOST:
                await self._give_back()
                await self._finish()

    async def _give_back(self) -> None:
        """The VM was this host's, and has ended: whoever runs it next may claim it."""
        claim = self.vm.record.claim or self._claim
        if claim is not None:
            self.vm.set_claim(claim)
        self.vm.end_work()
        await self.vm.give_back()

    def _entered(self, before: Incoming) -> None:
        state = self._state
        why = f" ({state.why})" if state.why else ""
        text = f"from {self.record.source}: {before.phase.value} -> {state.phase.value}{why}"
        self.vm.machine.journal.note(time.time(), "migration", text)
        log.info("arrival vm=%s %s", self.vm.name, text)

    def _write(self, state: Incoming) -> bool:
        self.record = replace(self.record, phase=state.phase)
        return self.vm.advance(self.record)

    async def _finish(self) -> None:
        self.vm.machine.listen(None)
        self._over.set()
        self._post(Tick())
        self.changes.notify()
        await self._end_wire()
        await self._end_tasks()

    # What is to be done

    def _begin_act(self, act: Act) -> None:
        match act:
            case Act.TAKE_AND_RUN:
                self._keep(self._take_and_run(), "run")
            case Act.ASK_STORE:
                self._keep(self._ask_store(), "ask the store")
            case Act.END_QEMU:
                self._keep(self._end_qemu(), "end")

    async def _ask_store(self) -> None:
        try:
            owned = await self._registry.find(self.vm.name)
        except NotFound:
            self._post(OwnershipSeen(Side.SOURCE))
            return
        except SempervirtError as error:
            log.debug("arrival vm=%s %s", self.vm.name, error)
            return
        self._post(self._judge(owned))

    def _judge(self, owned: Ownership) -> OwnershipSeen:
        here = self._cluster.settings.host
        if owned.epoch > self._epoch and owned.owner == here and owned.custody is Custody.OWNED:
            self._claim = claim_of(owned)
            return OwnershipSeen(Side.DESTINATION)
        same = owned.epoch == self._epoch and owned.owner == self.record.source
        under_way = owned.custody in (Custody.MOVING, Custody.UNKNOWN)
        return OwnershipSeen(Side.SOURCE, moving=same and under_way)

    async def _take_and_run(self) -> None:
        """Again and again, until the guest runs: it is at home here."""
        while not self.vm.run.is_end:
            try:
                await self._take()
            except StaleClaim as error:
                log.error("arrival vm=%s %s", self.vm.name, error)  # noqa: TRY400
                await self._kill("the VM was given to another host meanwhile")
                return
            except SempervirtError as error:
                log.warning("arrival vm=%s does not run yet: %s", self.vm.name, error)
                await asyncio.sleep(TAKE_AGAIN_S)
            else:
                self._runs.set()
                break
        await self._wait_drained()
        self.vm.end_work()
        await self._finish()

    async def _wait_drained(self) -> None:
        """After postcopy the memory comes while the guest runs."""
        with contextlib.suppress(Unavailable):
            await self.changes.wait_until(
                lambda: self.drained or self.vm.run.is_end, timeout_s=None, what="all memory"
            )

    async def _take(self) -> None:
        vm, claim = self.vm, self._claim
        assert claim is not None
        marks = [time.monotonic()]
        await put_on_record(claim, vm.spec)
        marks.append(time.monotonic())
        for name, disk in vm.disks.items():
            title = title_of(claim, vm.spec.disk(name))
            if title is not None:
                await disk.claim(title)
        vm.set_claim(claim)
        marks.append(time.monotonic())
        if self.record.running:
            await stream.let_run(vm.machine.execute)
        marks.append(time.monotonic())
        steps = [round((end - begin) * 1e3, 1) for begin, end in pairwise(marks)]
        log.info("arrival vm=%s took over, ms: epoch %s, claim %s, cont %s", vm.name, *steps)
        vm.machine.release("running" if self.record.running else "paused")
        for disk in vm.disks.values():
            disk.thaw()

    async def _end_qemu(self) -> None:
        await self._kill(f"it did not come from {self.record.source}: {self._state.why}")
        await self._finish()
        if self._forget is not None and self.vm.settled:
            await self._forget()

    async def _kill(self, because: str) -> None:
        try:
            await self.vm.kill(because)
        except SempervirtError as error:
            log.error("arrival vm=%s its QEMU is left: %s", self.vm.name, error)  # noqa: TRY400

    # What is watched

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if time.monotonic() - self._heard_at > SILENT_S:
                self._heard_at = time.monotonic()
                self._post(SourceSilent())
            if self._state.phase in (Arrival.PREPARING, Arrival.INCOMING):
                for disk in self.vm.disks.values():
                    if disk.active_pid is None:
                        self._post(StreamFailed(f"the backend of disk {disk.name} ended"))
            self._post(Tick())

    async def _watch_machine(self) -> None:
        await self.vm.machine.wait_ended()
        self._post(QemuEnded(self.vm.state.why))
        self.changes.notify()

    def _heard(self, name: str, data: Mapping[str, Any]) -> None:
        """QEMU's events come at once; `_watch_stream` finds the same later."""
        if name == "MIGRATION":
            self._look_at(str(data.get("status", "")), "")

    def _look_at(self, status: str, error: str) -> None:
        match status:
            case "completed":
                self.drained = True
                self._post(Loaded())
                self.changes.notify()
            case "failed" if error:
                self._post(StreamFailed(error))

    async def _watch_stream(self) -> None:
        while not self.drained and not self.over:
            await asyncio.sleep(TICK_S)
            try:
                told = await stream.look(self.vm.machine.execute)
            except SempervirtError:  # its end is seen, and a silent one shows in the VM's state
                continue
            self._look_at(told.status, told.error or "QEMU says no more")


def _listen_address(address: str) -> str:
    """This host's address as digits, for the end of the wire to listen on."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise Unavailable(f"{host} has no address: {error.strerror}") from error
    return f"[{found}]" if ipaddress.ip_address(found).version == 6 else str(found)
