"""Carries out what `decide` decides on the source, by way of `ports`, and tells how far it is.

    what the destination says, QEMU's events, the store's answers, time
                                  │
                              events ──► decide ──► record ──► effects ──► work, by way of ports
                                  ▲                                          │
                                  └──────────── what came of it ◄────────────┘

The driver decides nothing: what it does depends on the effect alone, and every outcome of a port is
an event. So the explorer (tests/unit/test_migration_worlds.py) steps this driver itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import assert_never

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, StateConflict
from sempervirt.host.owner import HOST_CLOCK, Clock, Owner
from sempervirt.migration.events import NotRecorded, StreamFailed, Tick
from sempervirt.migration.source import decide
from sempervirt.migration.source.ports import Ports
from sempervirt.migration.source.state import (
    AbortDestination,
    AnswerLost,
    AskPromise,
    CancelAsked,
    Certain,
    Committed,
    DevicesMoved,
    DisksReleased,
    EndSource,
    Failed,
    Finish,
    FinishStream,
    GoBack,
    HandOver,
    LetRun,
    MakeCertain,
    Migration,
    MoveDevices,
    NotCommitted,
    Prepare,
    Prepared,
    Recovered,
    RecoverStream,
    Refused,
    ReleaseDisks,
    Resolved,
    SourceEffect,
    SourceEvent,
    StartStream,
    Step,
    Superseded,
    SwitchToPostcopy,
    Told,
    WentBack,
    Withdraw,
    Withdrawn,
)
from sempervirt.store.registry import StaleClaim
from sempervirt.vm.phases import Mode

log = logging.getLogger(__name__)

# Cancelling takes a disk back, and ends a migration of QEMU.
CANCEL_S = 15.0
# What still goes on towards the destination when the source goes back. None of it may follow.
FORWARD = (
    Prepare,
    StartStream,
    SwitchToPostcopy,
    FinishStream,
    AskPromise,
    MoveDevices,
    ReleaseDisks,
)


class SourceDriver(Owner[Migration, SourceEvent, SourceEffect]):
    """One VM on its way to another host. `state` is where it begins; `name` is the VM's.

    `followed` is called after each step with the state before it and the one after it.
    """

    def __init__(
        self,
        name: str,
        state: Migration,
        ports: Ports,
        clock: Clock = HOST_CLOCK,
        followed: Callable[[Migration, Migration], None] = lambda _before, _after: None,
    ) -> None:
        super().__init__(f"migration of {name}", state, clock)
        self.name = name
        self._ports = ports
        self._followed = followed
        self._over = asyncio.Event()

    # What can be asked of it

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self._over.is_set()

    async def cancel(self) -> None:
        """Has the VM stay, and waits until it does.

        Raises StateConflict when the store was asked already, OutcomeUnknown at the deadline.
        """
        if not self.state.may_cancel:
            raise StateConflict(
                f"the migration of VM {self.name} is {self.state.phase.value} and cannot be "
                "cancelled any more",
                remedy=f"see where it is: semper vm show {self.name}",
            )
        self.post(CancelAsked())
        await self.wait_over(CANCEL_S)

    def resolve(self, resolved: Resolved) -> None:
        """An operator says who owns the VM; it counts only while that is unknown."""
        self.post(resolved)

    async def wait_over(self, timeout_s: float) -> None:
        """Waits for the end. Raises OutcomeUnknown at the deadline."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._over.wait()
        except TimeoutError as error:
            raise OutcomeUnknown(
                f"the migration of VM {self.name} is still {self.state.phase.value}",
                remedy=f"see where it is: semper vm show {self.name}",
            ) from error

    # The shell's

    def decide(self, state: Migration, event: SourceEvent, now: float) -> Step:
        """See `decide.step`."""
        return decide.step(state, event, now)

    def record(self, before: Migration, after: Migration) -> bool:
        """Writes phase and mode down; only COMMIT has to be on record before it is entered."""
        if (before.phase, before.mode) == (after.phase, after.mode):
            return True
        written = self._ports.record.write(after.phase, after.mode)
        return written or not decide.owes_record(before, after)

    def unrecorded(self) -> SourceEvent:
        """In place of the event that led to COMMIT."""
        return NotRecorded()

    def wake_at(self, state: Migration) -> float | None:
        """See `decide.wake_at`."""
        return decide.wake_at(state)

    def tick(self) -> SourceEvent:
        """Time passed."""
        return Tick()

    def after_step(self, before: Migration) -> None:
        """Tells whoever follows the migration."""
        self._followed(before, self.state)

    def carry_out(self, effect: SourceEffect) -> None:
        """Begins the work of an effect; before the way back, ends what goes on forwards."""
        if isinstance(effect, GoBack):
            self.cancel_work(*FORWARD)
        self.begin(effect)

    async def work(self, effect: SourceEffect) -> None:
        """Carries out an effect. Every outcome is an event."""
        try:
            event = await self._outcome(effect)
        except SempervirtError as error:
            log.info("migrate vm=%s %s: %s", self.name, type(effect).__name__, error)
            event = failure_of(effect, error)
        if event is not None:
            self.post(event)

    async def _outcome(self, effect: SourceEffect) -> SourceEvent | None:  # noqa: C901
        ports = self._ports
        match effect:
            case Prepare():
                return Prepared(await ports.destination.prepare())
            case StartStream(address):
                # The guest stands still for a moment: no disk may be let go for that.
                await ports.devices.capture()
                await ports.disks.arm()
                await ports.guest.start(address)
            case SwitchToPostcopy():
                await ports.guest.switch_to_postcopy()
            case FinishStream():
                await ports.guest.finish_stream()
            case AskPromise():
                await ports.destination.promise()
            case MoveDevices():
                await ports.devices.move()
                return DevicesMoved()
            case ReleaseDisks():
                await ports.disks.released()
                return DisksReleased()
            case HandOver(mode):
                return await self._hand_over(mode)
            case Withdraw():
                await ports.ownership.withdraw()
                return Withdrawn()
            case MakeCertain():
                return Certain(await ports.ownership.make_certain())
            case GoBack(stopped):
                await ports.disks.take_back()
                await ports.devices.go_on()
                return WentBack(await ports.guest.go_back(stopped=stopped))
            case AbortDestination(why):
                await ports.destination.abort(why)
            case LetRun(claim):
                await ports.destination.run(claim)
                return Told()
            case RecoverStream():
                await ports.guest.recover(await ports.destination.recover())
                return Recovered()
            case EndSource(because):
                await ports.guest.end(because)
            case Finish(stays):
                await self._finish(stays=stays)
            case _:
                assert_never(effect)
        return None

    async def _hand_over(self, mode: Mode) -> SourceEvent:
        """QEMU lets the guest run on by itself when its migration fails. So it has to stand still
        now, and from now on QEMU itself does; in postcopy it has more to send.
        """
        if mode is Mode.PRECOPY:
            try:
                runs = await self._ports.guest.runs()
            except SempervirtError as error:  # the store was not asked
                return NotCommitted(str(error))
            if runs:
                return NotCommitted("the guest runs on: the migration has failed")
            self._ports.guest.suspend()
        return Committed(await self._ports.ownership.hand_over())

    async def _finish(self, *, stays: bool) -> None:
        if stays:
            self._ports.record.end()
        await self._ports.guest.end_wire()
        self._over.set()
        self.changes.notify()


def failure_of(effect: SourceEffect, error: SempervirtError) -> SourceEvent | None:
    """What it means that an effect failed; None where nothing follows from that."""
    reason = str(error)
    match effect:
        case Prepare():
            return Refused(reason)
        case StartStream() | SwitchToPostcopy() | FinishStream() | AskPromise():
            return StreamFailed(reason)
        case MoveDevices() | ReleaseDisks():
            return StreamFailed(reason)
        case HandOver():
            if isinstance(error, StaleClaim):
                return Superseded()
            unknown = isinstance(error, OutcomeUnknown)
            return AnswerLost(reason) if unknown else NotCommitted(reason)
        case Withdraw():
            return Superseded() if isinstance(error, StaleClaim) else Failed(effect, reason)
        case MakeCertain() | GoBack() | LetRun() | RecoverStream() | EndSource():
            return Failed(effect, reason)
        case AbortDestination() | Finish():
            return None
        case _:
            assert_never(effect)
