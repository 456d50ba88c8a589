"""Carries out what `decide` decides about a restart of QEMU, by way of `ports`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import assert_never

from sempervirt.core.errors import SempervirtError
from sempervirt.core.failure import Failure
from sempervirt.host.owner import HOST_CLOCK, Clock
from sempervirt.renewal.driver import RenewalDriver, ignore
from sempervirt.renewal.restart import decide
from sempervirt.renewal.restart.ports import Attempt, Ports
from sempervirt.renewal.restart.state import (
    Decision,
    Discard,
    Discarded,
    Effect,
    EndOld,
    EndStandIns,
    Event,
    Failed,
    FreeTaps,
    GiveUp,
    GoBack,
    Gone,
    GuestRuns,
    Held,
    Hold,
    Leave,
    Left,
    Link,
    Linked,
    MovedIn,
    MoveIn,
    Parted,
    Restart,
    Restarted,
    Run,
    Start,
    Started,
    Step,
    Switch,
    Switched,
    Tick,
    TookOver,
    Transfer,
    Transferred,
    Unrecorded,
    WentBack,
)
from sempervirt.vm.work import Restarting

log = logging.getLogger(__name__)


class RestartDriver(RenewalDriver[Restart, Event, Effect, Restarted]):
    """One restart of the QEMU of one VM."""

    def __init__(
        self,
        vm: str,
        state: Restart,
        ports: Ports,
        told: Callable[[Restarted | Failure], None] = ignore,
        clock: Clock = HOST_CLOCK,
    ) -> None:
        super().__init__(vm, "a restart of QEMU", state, told, clock)
        self._ports = ports

    def answer_of(self, state: Restart) -> Restarted | Failure | None:
        """What the caller is told."""
        return state.answer

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self.state.step is Step.OVER

    # The shell's

    def decide(self, state: Restart, event: Event, now: float) -> Decision:
        """See `decide.decide`."""
        return decide.decide(state, event, now)

    def record(self, before: Restart, after: Restart) -> bool:
        """Writes down what the next agent has to know. The way back is gone without that, too."""
        was, entry = decide.entry(before), decide.entry(after)
        if was == entry:
            return True
        record = self._ports.record
        match entry:
            case None:
                record.end_work()
            case TookOver(qemu, number):
                record.took_over(qemu, number)
            case Restarting() if was is None:
                try:
                    record.begin(entry)
                except SempervirtError as error:
                    log.error("restart-qemu vm=%s %s", self.vm, error)  # noqa: TRY400
                    return False
            case Restarting():
                return record.advance(entry) or after.step is Step.DISCARD
            case _:
                assert_never(entry)
        return True

    def unrecorded(self) -> Event:
        """In place of the event of a step that has to be on record."""
        return Unrecorded()

    def wake_at(self, state: Restart) -> float | None:
        """When something is tried again."""
        return state.again_at

    def tick(self) -> Event:
        """Time passed."""
        return Tick()

    def give_up(self, why: str) -> Event:
        """The agent closes."""
        return GiveUp(why)

    def failed(self, effect: Effect, failure: Failure) -> Event:
        """The effect was not done."""
        return Failed(effect, failure)

    # What is to be done

    async def perform(self, effect: Effect) -> Event:
        """One effect."""
        match effect:
            case Hold() | Start() | Transfer() | Switch():
                attempt = self._ports.attempt
                assert attempt is not None
                return await _attempt(attempt, effect)
            case EndOld() | EndStandIns() | FreeTaps() | Run() | MoveIn() | Link():
                return await self._forward(effect)
            case Discard() | GoBack() | Leave():
                return await self._back(effect)
            case _:
                assert_never(effect)

    async def _back(self, effect: Discard | GoBack | Leave) -> Event:
        back = self._ports.back
        match effect:
            case Discard():
                await back.discard()
                return Discarded()
            case GoBack():
                if why := back.ended():
                    return Gone(why)
                if effect.reset:
                    await back.reset()
                if effect.cont:
                    await back.cont()
                return WentBack()
            case Leave():
                back.release(running=effect.running)
                back.tidy()
                return Left()
            case _:
                assert_never(effect)

    async def _forward(
        self, effect: EndOld | EndStandIns | FreeTaps | Run | MoveIn | Link
    ) -> Event:
        forward, back = self._ports.forward, self._ports.back
        match effect:
            case EndOld():
                await forward.end_old()
                return Parted(effect)
            case EndStandIns():
                await forward.end_stand_ins()
                return Parted(effect)
            case FreeTaps():
                await forward.free_taps()
                return Parted(effect)
            case Run():
                await forward.connect()
                if effect.cont:
                    await forward.cont_new()
                return GuestRuns()
            case MoveIn():
                await forward.move_in()
                return MovedIn()
            case Link():
                back.release(running=effect.running)
                back.tidy()
                await forward.link()
                return Linked(back.ended())
            case _:
                assert_never(effect)


async def _attempt(attempt: Attempt, effect: Hold | Start | Transfer | Switch) -> Event:
    match effect:
        case Hold():
            return Held(await attempt.hold())
        case Start():
            return Started(*await attempt.start())
        case Transfer():
            await attempt.keep_packets()
            await attempt.stop(pause=effect.pause)
            await attempt.give()
            await attempt.take()
            return Transferred()
        case Switch():
            await attempt.switch()
            return Switched()
        case _:
            assert_never(effect)
