"""Carries out what `decide` decides about a restore, by way of `ports`."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from sempervirt.core.failure import Failure
from sempervirt.host.owner import HOST_CLOCK, Clock
from sempervirt.renewal.driver import RenewalDriver, ignore
from sempervirt.renewal.restore import decide
from sempervirt.renewal.restore.ports import Attempt, Ports
from sempervirt.renewal.restore.state import (
    Decision,
    Effect,
    End,
    Ended,
    Event,
    Failed,
    GiveUp,
    GuestRuns,
    Held,
    Hold,
    Leave,
    Left,
    Load,
    Loaded,
    Restore,
    Restored,
    Run,
    Step,
    Tick,
    Unrecorded,
)


class RestoreDriver(RenewalDriver[Restore, Event, Effect, Restored]):
    """One restore of one VM."""

    def __init__(
        self,
        vm: str,
        state: Restore,
        ports: Ports,
        told: Callable[[Restored | Failure], None] = ignore,
        clock: Clock = HOST_CLOCK,
    ) -> None:
        super().__init__(vm, "a restore", state, told, clock)
        self._ports = ports

    def answer_of(self, state: Restore) -> Restored | Failure | None:
        """What the caller is told."""
        return state.answer

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self.state.step is Step.OVER

    # The shell's

    def decide(self, state: Restore, event: Event, now: float) -> Decision:
        """See `decide.decide`."""
        return decide.decide(state, event, now)

    def record(self, before: Restore, after: Restore) -> bool:
        """Writes down how far the restore is: that the guest is loaded, before the guest runs."""
        entry = decide.entry(after)
        if entry == decide.entry(before):
            return True
        if entry is None:
            self._ports.record.end_work()
            return True
        return self._ports.record.advance(entry) or after.step is not Step.RUN

    def unrecorded(self) -> Event:
        """In place of the event that led to RUN."""
        return Unrecorded()

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
        back = self._ports.back
        match effect:
            case Hold():
                await self._attempt.hold()
                return Held()
            case Load():
                await self._attempt.unpacked()
                await self._attempt.take()
                await back.reset()
                return Loaded()
            case Run():
                if effect.cont and not back.ended():
                    await back.cont()
                return GuestRuns()
            case Leave():
                back.release(running=effect.running)
                return Left(back.ended())
            case End():
                await back.end()
                return Ended()
            case _:
                assert_never(effect)

    @property
    def _attempt(self) -> Attempt:
        assert self._ports.attempt is not None
        return self._ports.attempt
