"""Carries out what the source's machine of a migration decides (`migration.states`).

One task drains the queue of events and is the only one to step the machine. What it asks for is
done beside it, and reported as an event. The phase is on record before anything is done for it:
an agent that begins anew goes on from there.

    queue ◄── what the destination says (asked again and again), QEMU's events, the store's
      │       answers, time
      ▼
    step ──► record ──► acts

Whatever fails before the store was asked, `_go_back` undoes all of it: QEMU, disks, wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from sempervirt.api.client import Client
from sempervirt.cluster.cluster import Cluster
from sempervirt.core.errors import (
    NotFound,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.migration import stream
from sempervirt.migration.events import (
    Act,
    AnswerLost,
    CancelAsked,
    DestinationEnded,
    DestinationGone,
    DisksReleased,
    Drained,
    GuestStopped,
    Hopeless,
    Loaded,
    NotCommitted,
    PostcopyChosen,
    Prepared,
    Refused,
    Resolved,
    SourceEnded,
    SourceEvent,
    StreamFailed,
    Tick,
)
from sempervirt.migration.journey import Journey
from sempervirt.migration.messages import (
    ArrivalRequest,
    MigrationView,
    MovePolicy,
    RunRequest,
    WireView,
)
from sempervirt.migration.source import convergence
from sempervirt.migration.source import decide as states
from sempervirt.migration.source.convergence import (
    ConvergencePolicy,
    GiveUp,
    GoPostcopy,
    Sample,
)
from sempervirt.migration.source.decide import Bounds, Migration
from sempervirt.migration.source.departing import RELEASE_S, DepartingDisks, Transfer
from sempervirt.migration.source.figures import Figures
from sempervirt.migration.source.steering import LOOK_S, Steering
from sempervirt.migration.wire import Wire, sweep
from sempervirt.qemu import handover
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Request, Runstate
from sempervirt.store.registry import Claim
from sempervirt.vm.claims import claimed_images
from sempervirt.vm.phases import Arrival, Mode, Phase
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Departing

log = logging.getLogger(__name__)

TICK_S = 0.1
DEADLINE_GRACE_S = 30.0
# The destination answers at the latest then, also if nothing has changed.
ASK_WAIT_S = 1.0
GONE_S = 10.0
WIRE_READY_S = 120.0
QEMU_S = 10.0
# QEMU says at once whether the guest runs; its blackout goes on meanwhile.
ANSWER_S = 1.0
TELL_AGAIN_S = 0.2
TELL_FOR_S = 5.0
KILL_AGAIN_S = 1.0
Work = Callable[[], Awaitable[None]]
Failure = Callable[[str], SourceEvent]
# The least that QEMU is given for the guest's blackout, whatever the rest of it takes.
LEAST_BLACKOUT_S = 0.02


class Departure(Journey[SourceEvent]):
    """One VM on its way to another host. Made by `begin`, or by `resume` after a restart."""

    def __init__(self, vm: Vm, cluster: Cluster, record: Departing) -> None:
        super().__init__(vm, cluster, record.id, "departure")
        self.record = record
        self.policy = MovePolicy()
        self.figures = Figures(time.time(), memory=vm.spec.memory)
        if vm.record.claim is None:
            raise StateConflict(f"VM {vm.name} is not claimed by this host")
        self._transfer = Transfer(self._registry, vm.record.claim, record.destination)
        self._disks = DepartingDisks(vm)
        self._state = Migration(Bounds(), 0.0, phase=record.phase, mode=record.mode)
        self._steering = Steering(ConvergencePolicy())
        self._address = ""
        self._client: Client | None = None
        self._back = self._told = self._recovering = False

    # Its life

    async def begin(self, policy: MovePolicy, stack: AsyncExitStack) -> None:
        """Holds the VM, tells the store, and goes to work; `stack` holds what is needed for it.

        Raises StateConflict, Unavailable, OutcomeUnknown: nothing was begun then, or what was told
        to the store is taken back by the next try.
        """
        self.policy = policy
        await self.vm.machine.hold(Request.DEPART)
        try:
            self.vm.begin(self.record)
            await self._connect(stack)
            self._limit(await self._transfer.begin())
        except BaseException:
            self.vm.end_work()
            self.vm.machine.release("running" if self.record.running else "paused")
            raise
        # At the deadline `convergence` decides; the machine's own only catches what hangs.
        bounds = Bounds(policy.deadline_s + DEADLINE_GRACE_S, policy.blackout_max_s)
        self._state, acts = states.begin(bounds, time.monotonic())
        self._go_to_work(acts)

    async def resume(self, stack: AsyncExitStack) -> None:
        """Goes on from the record of an agent that has ended meanwhile."""
        await self._connect(stack)
        self._state = replace(self._state, guest_stopped=True, until=0.0)
        if self.record.phase is not Phase.POSTCOPY:
            await sweep(self._wire_files)
        acts: list[Act] = []
        match self.record.phase:
            case Phase.PREPARE | Phase.PRECOPY | Phase.SWITCHOVER:
                self._post(StreamFailed("the agent here began anew"))
            case Phase.COMMIT:
                self._post(AnswerLost("the agent here ended while it asked the store"))
            case Phase.DONE | Phase.LOST:
                acts = [Act.LET_RUN, Act.END_SOURCE]
            case Phase.ABANDONED:
                self._keep(self._go_back(), "go back")
            case Phase.POSTCOPY:
                self._told = True
                self._keep(self._watch_destination(), "destination")
                self._keep(self._watch_stream(), "stream")
        self._go_to_work(acts)

    def _go_to_work(self, acts: list[Act]) -> None:
        self.vm.moving = self
        self._begin_work(self._own(acts), self._heard)
        self._keep(self._tick(), "ticks")
        self._keep(self._watch_machine(), "end of QEMU")

    async def detach(self) -> None:
        """Leaves everything as it is, for another agent to go on with.

        But while the VM can still stay it does: QEMU would stop the guest, and wait for somebody.
        """
        if self._state.may_cancel and not self.over:
            with contextlib.suppress(SempervirtError):
                await self.cancel()
        await super().detach()

    @property
    def phase(self) -> Phase:
        """Where it is."""
        return self._state.phase

    def shown(self) -> tuple[Runstate, str] | None:
        """What the VM is because of this, if that is not what QEMU alone would tell."""
        match self._state.phase:
            case _ if self.over or self.vm.run.is_end:
                return None
            case Phase.UNKNOWN:
                why = f"whether {self.record.destination} owns it is not known: {self._state.why}"
                return Runstate.UNKNOWN, why
            case Phase.SWITCHOVER | Phase.COMMIT:
                return Runstate.PAUSED, f"it moves to {self.record.destination}"
        return None

    # What can be asked of it

    async def cancel(self) -> None:
        """Has the VM stay, and waits until it does. Raises StateConflict when it is too late."""
        if not self._state.may_cancel:
            raise StateConflict(
                f"the migration of VM {self.vm.name} is {self._state.phase.value} and cannot be "
                "cancelled any more",
                remedy=f"see where it is: semper vm show {self.vm.name}",
            )
        self._post(CancelAsked())
        await self.wait_over(QEMU_S + RELEASE_S)

    def settle(self, resolved: Resolved) -> None:
        """An operator says who owns the VM; it counts only while that is unknown."""
        self._post(resolved)

    async def wait_over(self, timeout_s: float) -> None:
        """Waits for the end. Raises OutcomeUnknown at the deadline."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._over.wait()
        except TimeoutError as error:
            raise OutcomeUnknown(
                f"the migration of VM {self.vm.name} is still {self._state.phase.value}",
                remedy=f"see where it is: semper vm show {self.vm.name}",
            ) from error

    def view(self) -> MigrationView:
        """All that is known."""
        figures, told = self.figures, self.figures.told
        sample = self._steering.reckoned(told.sample) if told and told.sample else None
        expected_s = convergence.expected_blackout_s(sample) if sample else float("inf")
        return MigrationView(
            id=self.id,
            vm=self.vm.name,
            source=self._cluster.settings.host,
            destination=self.record.destination,
            phase=self._state.phase.value,
            over=self.over,
            mode=self._state.mode.value,
            why=self._state.why,
            may_cancel=self._state.may_cancel,
            started=figures.started,
            elapsed_s=figures.elapsed_s,
            memory=figures.memory,
            remaining=sample.remaining_bytes if sample else figures.memory,
            passes=sample.passes if sample else 0,
            dirtied=sample.dirtied if sample else 0.0,
            expected_blackout_ms=None if expected_s == float("inf") else expected_s * 1e3,
            limit_ms=self._steering.track.limit_s * 1e3,
            throttle=self._steering.track.throttle,
            blackout_ms=figures.blackout_ms,
            timeline_ms=figures.timeline_ms,
            wire=_wire_view(self._wire.status) if self._wire else None,
        )

    # The owner task

    async def _own(self, acts: list[Act]) -> None:
        """Steps until nothing can follow."""
        self._begin_acts(acts)
        while not self._ended():
            event = await self._queue.get()
            before = self._state
            self._state, acts = states.step(before, event, time.monotonic())
            self.figures.mark(event)
            if self._state.phase is not before.phase:
                self._entered(before)
                if not self._write() and self._state.phase is Phase.COMMIT:
                    # Without it a later agent could not know that the store was asked.
                    acts = []
                    self._post(NotCommitted("the record cannot be written"))
            self._begin_acts(acts)
            if self._state.phase is Phase.ABANDONED and before.phase is not Phase.ABANDONED:
                self._keep(self._go_back(), "go back")
        await self._finish()

    def _ended(self) -> bool:
        gone = self.vm.run.is_end
        match self._state.phase:
            case Phase.ABANDONED:
                return self._state.settled and (gone or self._back)
            case Phase.DONE:
                return gone and self._told
            case phase:
                return phase.is_end and gone

    def _entered(self, before: Migration) -> None:
        phase = self._state.phase
        if phase is Phase.SWITCHOVER:
            self.figures.guest_stopped()
        why = f" ({self._state.why})" if self._state.why else ""
        text = f"to {self.record.destination}: {before.phase.value} -> {phase.value}{why}"
        self.vm.machine.journal.note(time.time(), "migration", text)
        level = logging.WARNING if phase in (Phase.UNKNOWN, Phase.LOST) else logging.INFO
        log.log(level, "migrate vm=%s %s", self.vm.name, text)

    def _write(self) -> bool:
        self.record = replace(self.record, phase=self._state.phase, mode=self._state.mode)
        return self.vm.advance(self.record)

    async def _finish(self) -> None:
        self.figures.ended = time.time()
        if self._state.phase is Phase.ABANDONED:
            self.vm.end_work()
        await self._end_wire()
        self.vm.machine.listen(None)
        self._over.set()
        await self._end_tasks()

    # What is to be done

    def _begin_acts(self, acts: list[Act]) -> None:
        for act in acts:
            if act in self._works:  # RESUME_GUEST is part of `_go_back`
                work, failed = self._works[act]
                self._keep(self._guarded(work, failed), act.name.lower())

    @property
    def _works(self) -> dict[Act, tuple[Work, Failure | None]]:
        """How each act is done, and what it means if that fails."""
        return {
            Act.PREPARE: (self._prepare, Refused),
            Act.START_STREAM: (self._start_stream, StreamFailed),
            Act.SWITCH_TO_POSTCOPY: (self._switch_to_postcopy, StreamFailed),
            Act.FINISH_STREAM: (self._finish_stream, StreamFailed),
            Act.ASK_PROMISE: (self._ask_promise, StreamFailed),
            Act.RELEASE_DISKS: (self._release_disks, StreamFailed),
            Act.HAND_OVER: (self._hand_over, NotCommitted),
            Act.WITHDRAW: (self._withdraw, None),
            Act.ABORT_DESTINATION: (self._abort_destination, None),
            Act.LET_RUN: (self._let_run, None),
            Act.RECOVER_STREAM: (self._recover_stream, StreamFailed),
            Act.END_SOURCE: (self._end_source, None),
        }

    async def _guarded(self, work: Work, failed: Failure | None) -> None:
        try:
            await work()
        except SempervirtError as error:
            log.info("migrate vm=%s %s", self.vm.name, error)
            if failed is not None:
                self._post(failed(str(error)))

    async def _prepare(self) -> None:
        vm, peer = self.vm, self._peer
        claim = self._transfer.claim
        images = dict(zip(_claimed_disks(vm.spec), claim.images, strict=True))
        answer = await peer.prepare_arrival(
            ArrivalRequest(
                id=self.id,
                source=self._cluster.settings.host,
                epoch=claim.epoch,
                spec=vm.pinned_spec,
                machine=await handover.machine_type(vm.machine.execute),
                accelerator=vm.record.accelerator.kind,
                running=self.record.running,
                postcopy=self.policy.postcopy,
                images=images,
            )
        )
        self._address = answer.address
        self._keep(self._watch_destination(), "destination")
        self._post(Prepared())

    async def _start_stream(self) -> None:
        await self._disks.arm()
        await self._start_wire(self._address)
        execute = self.vm.machine.execute
        await stream.prepare_source(execute, postcopy=self.policy.postcopy)
        await self._steering.begin(execute)
        await stream.start(execute, self._wire_files.stream)
        self._keep(self._watch_stream(), "stream")

    async def _start_wire(self, address: str) -> None:
        await self._end_wire()
        await sweep(self._wire_files)
        disks = self._wire_disks()
        trust, peer = self._cluster.identity.directory, self.record.destination
        self._wire = Wire.source(self._wire_files, trust, self.id, peer, address, disks)
        await self._wire.wait("state", ("ready",), WIRE_READY_S)

    async def _recover_stream(self) -> None:
        """Postcopy goes on where its stream broke: both QEMUs know what is missing."""
        if self._recovering:
            return
        self._recovering = True
        try:
            answer = await self._peer.recover_arrival(self.id)
            await self._start_wire(answer.address)
            await stream.go_on(self.vm.machine.execute, self._wire_files.stream)
        finally:
            self._recovering = False

    async def _switch_to_postcopy(self) -> None:
        await self.vm.machine.execute("migrate-start-postcopy")

    async def _finish_stream(self) -> None:
        await stream.finish(self.vm.machine.execute)

    async def _ask_promise(self) -> None:
        await self._peer.promise_arrival(self.id)

    async def _release_disks(self) -> None:
        await self._disks.released()
        self._post(DisksReleased())

    async def _hand_over(self) -> None:
        """QEMU lets the guest run on by itself when its migration fails. So it has to stand still
        now, and from now on QEMU itself does; in postcopy it has more to send.
        """
        if self._state.mode is Mode.PRECOPY:
            if await self._guest_runs():
                self._post(NotCommitted("the guest runs on: the migration has failed"))
                return
            self.vm.machine.suspend(on=True)
        self._post(await self._transfer.commit())

    async def _guest_runs(self) -> bool:
        """Raises Unavailable for a QEMU that is silent, as one is that waits for a disk."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return bool((await self.vm.machine.execute("query-status"))["running"])
        except TimeoutError as error:
            raise Unavailable("QEMU does not say whether the guest stands still") from error

    async def _withdraw(self) -> None:
        if (answer := await self._transfer.withdraw()) is not None:
            self._post(answer)

    async def _abort_destination(self) -> None:
        """It also learns of it from the store."""
        with contextlib.suppress(SempervirtError):
            await self._peer.abort_arrival(self.id, self._state.why)

    async def _let_run(self) -> None:
        """Tells the destination; if it cannot be reached, it learns of it from the store."""
        await self._transfer.make_certain()
        if self._transfer.handed is not None:
            await self._tell(self._transfer.handed)
        self._told = True
        self._post(Tick())

    async def _tell(self, claim: Claim) -> None:
        request = RunRequest(epoch=claim.epoch, claim=claim.id)
        deadline = time.monotonic() + TELL_FOR_S
        while True:
            try:
                await self._peer.run_arrival(self.id, request)
            except SempervirtError as error:
                if time.monotonic() > deadline:
                    log.warning("migrate vm=%s it is not told: %s", self.vm.name, error)
                    return
            else:
                self.figures.guest_runs()
                if self.figures.blackout_ms is not None:
                    log.info(
                        "migrate vm=%s blackout_ms=%.1f after its stop: %s",
                        self.vm.name,
                        self.figures.blackout_ms,
                        self.figures.timeline_ms,
                    )
                return
            await asyncio.sleep(TELL_AGAIN_S)

    async def _end_source(self) -> None:
        """Again and again: this guest must never run any more."""
        because = self.record.farewell or self._state.why
        while not self.vm.run.is_end:
            try:
                await self.vm.machine.kill(because)
            except SempervirtError as error:
                log.error("migrate vm=%s %s", self.vm.name, error)  # noqa: TRY400
                await asyncio.sleep(KILL_AGAIN_S)
        await self.vm.wait_settled()
        self._post(Tick())

    async def _go_back(self) -> None:
        """Undoes everything; the guest goes on. Repeated until it is done."""
        status = "paused"
        self.vm.machine.suspend(on=False)
        while not self.vm.run.is_end:
            try:
                await self._disks.take_back()
                status = await self._let_go_on()
            except SempervirtError as error:
                log.warning("migrate vm=%s does not go on yet: %s", self.vm.name, error)
                await asyncio.sleep(TELL_AGAIN_S)
            else:
                break
        if status == "running":
            self.figures.guest_runs()
        await self._end_wire()
        self.vm.machine.release(status)
        self._back = True
        self._post(Tick())

    async def _let_go_on(self) -> str:
        """Ends QEMU's migration and has the guest run, if it ran before; tells what QEMU does."""
        execute = self.vm.machine.execute
        await stream.cancel(execute, QEMU_S)
        await stream.throttle(execute, stream.MIN_THROTTLE)
        status = str((await execute("query-status"))["status"])
        if self.record.running and status in ("paused", "postmigrate", "finish-migrate"):
            await execute("cont")
            status = "running"
        if self._state.guest_stopped and status == "running":
            await stream.announce(execute)
        return status

    # What is watched

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            # Not by way of QEMU: it may be silent for as long as a disk is not served.
            disk = self._disks.ended()
            if disk is not None and self._state.phase in (Phase.PRECOPY, Phase.SWITCHOVER):
                self._post(StreamFailed(f"the backend of disk {disk} ended"))
            self._post(Tick())

    async def _watch_machine(self) -> None:
        await self.vm.machine.wait_ended()
        self._post(SourceEnded(self.vm.state.why))

    async def _watch_destination(self) -> None:
        """Asks how far it is, and passes on what matters."""
        seen, heard = Arrival.INCOMING, time.monotonic()
        while not self._state.phase.is_end:
            try:
                answer = await self._peer.arrival(self.id, seen, ASK_WAIT_S)
            except NotFound:
                self._post(DestinationEnded(f"{self.record.destination} knows nothing of it"))
                return
            except SempervirtError as error:
                if time.monotonic() - heard > GONE_S:
                    self._post(DestinationGone(f"{self.record.destination} is silent: {error}"))
                    heard = time.monotonic()
                await asyncio.sleep(TELL_AGAIN_S)
                continue
            heard = time.monotonic()
            if answer.phase is not seen:
                self._post_arrival(answer.phase, answer.why)
                if answer.phase is Arrival.PROMISED and self._state.mode is Mode.PRECOPY:
                    return  # from now on the store decides
            if answer.drained:
                self._post(Drained())
            seen = answer.phase

    def _post_arrival(self, phase: Arrival, why: str) -> None:
        match phase:
            case Arrival.PROMISED:
                self._post(Loaded())
            case Arrival.ABORTED | Arrival.LOST:
                self._post(DestinationEnded(f"{self.record.destination}: {why}"))

    def _heard(self, name: str, data: Mapping[str, Any]) -> None:
        """QEMU's events come at once; `_watch_stream` finds the same later."""
        if name == "MIGRATION":
            self._judge(str(data.get("status", "")), "")
        elif name == "RESUME":
            self._post(StreamFailed("QEMU lets the guest run on by itself"))

    def _judge(self, status: str, error: str) -> None:
        if status in stream.STOPPED:
            self._post(GuestStopped())
        elif status in stream.FAILED and error:
            self._post(StreamFailed(error))

    async def _watch_stream(self) -> None:
        """Follows QEMU's figures until it is not needed any more, and decides how hard to push."""
        while not self._state.phase.is_end:
            try:
                await self._look()
            except SempervirtError as error:
                self._post(StreamFailed(f"QEMU does not tell how far it is: {error.message}"))
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        if self._state.phase not in (Phase.PRECOPY, Phase.SWITCHOVER, Phase.POSTCOPY):
            return  # QEMU has nothing to tell, and may be suspended
        told = await stream.look(self.vm.machine.execute)
        self.figures.told = told
        self.figures.memory = told.total_bytes or self.figures.memory
        failure = ""
        if self._wire is not None:
            await self._wire.ask()
            failure = self._wire.failure
        match self._state.phase:
            case Phase.PRECOPY | Phase.SWITCHOVER:
                self._judge(told.status, failure or told.error or "QEMU says no more")
                if self._state.phase is Phase.PRECOPY and told.status == "active" and told.sample:
                    await self._push(told.sample)
            case Phase.POSTCOPY if told.status == stream.BROKEN and not self._recovering:
                self._post(StreamFailed(failure or "the connection broke"))

    async def _push(self, sample: Sample) -> None:
        wire = self._wire.status if self._wire else {}
        decision = await self._steering.steer(self.vm.machine.execute, sample, wire)
        match decision:
            case GoPostcopy():
                self._post(PostcopyChosen())
            case GiveUp(reason):
                self._post(Hopeless(reason))
        if decision is not None:
            log.info("migrate vm=%s %s", self.vm.name, decision)

    def _limit(self, store_s: float) -> None:
        """Of the guest's blackout the store and the word to the destination take their part."""
        own_s = 2 * store_s
        policy = self.policy
        decides = ConvergencePolicy(
            blackout_s=max(LEAST_BLACKOUT_S, policy.blackout_s - own_s),
            blackout_max_s=max(LEAST_BLACKOUT_S, policy.blackout_max_s - own_s),
            deadline_s=policy.deadline_s,
            throttle_max=policy.throttle_max,
            postcopy=policy.postcopy,
        )
        self._steering = Steering(decides)

    @property
    def _peer(self) -> Client:
        assert self._client is not None
        return self._client

    async def _connect(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        tls = self._cluster.identity.client_context()
        connected = Client.connect_host(self.record.address, self.record.destination, tls)
        self._client = await stack.enter_async_context(connected)


def _claimed_disks(spec: VmSpec) -> list[str]:
    images = set(claimed_images(spec))
    return [disk.name for disk in spec.disks if disk.image in images and not disk.read_only]


def _wire_view(status: Mapping[str, Any]) -> WireView | None:
    if not status:
        return None
    return WireView(
        stream_bytes=status["stream_bytes"],
        wire_bytes=status["wire_bytes_sent"],
        pages=status["pages"],
        zero_pages=status["zero_pages"],
        references=status["references"],
        mismatches=status["mismatches"],
    )
