"""Carries out what `decide` decides about a save, by way of `ports`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import assert_never

from sempervirt.core.errors import SempervirtError
from sempervirt.core.failure import Failure
from sempervirt.host.owner import HOST_CLOCK, Clock
from sempervirt.renewal.driver import RenewalDriver, ignore
from sempervirt.renewal.save import decide
from sempervirt.renewal.save.ports import Attempt, Ports
from sempervirt.renewal.save.state import (
    Decision,
    Effect,
    End,
    Ended,
    Event,
    Failed,
    Free,
    Freed,
    GiveUp,
    GoBack,
    Gone,
    Held,
    Hold,
    Leave,
    Left,
    Pack,
    Packed,
    Save,
    Saved,
    Step,
    StopPacking,
    Tick,
    Unrecorded,
    WentBack,
)

log = logging.getLogger(__name__)


class SaveDriver(RenewalDriver[Save, Event, Effect, Saved]):
    """One save of one VM."""

    def __init__(
        self,
        vm: str,
        state: Save,
        ports: Ports,
        told: Callable[[Saved | Failure], None] = ignore,
        clock: Clock = HOST_CLOCK,
    ) -> None:
        super().__init__(vm, "a save", state, told, clock)
        self._ports = ports

    def answer_of(self, state: Save) -> Saved | Failure | None:
        """What the caller is told."""
        return state.answer

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self.state.step is Step.OVER

    # The shell's

    def decide(self, state: Save, event: Event, now: float) -> Decision:
        """See `decide.decide`."""
        return decide.decide(state, event, now)

    def record(self, before: Save, after: Save) -> bool:
        """Only the beginning has to be on record: without the rest the next agent goes back."""
        was, entry = decide.entry(before), decide.entry(after)
        if was == entry:
            return True
        record = self._ports.record
        if entry is None:
            record.end_work()
        elif was is not None:
            record.advance(entry)
        else:
            try:
                record.begin(entry)
            except SempervirtError as error:
                log.error("save vm=%s %s", self.vm, error)  # noqa: TRY400
                return False
        return True

    def unrecorded(self) -> Event:
        """In place of the event that led to PACK."""
        return Unrecorded()

    def wake_at(self, state: Save) -> float | None:
        """When QEMU is killed once more."""
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

    def carry_out(self, effect: Effect) -> None:
        """Begins the work of an effect; only `StopPacking` is done at once."""
        if isinstance(effect, StopPacking):
            self._attempt.stop_packing()
        else:
            super().carry_out(effect)

    async def perform(self, effect: Effect) -> Event:
        """One effect."""
        back = self._ports.back
        match effect:
            case Hold():
                return Held(await self._attempt.hold())
            case Pack():
                return await self._pack(effect)
            case StopPacking():
                raise AssertionError("`carry_out` does it")
            case End():
                await back.end()
                return Ended()
            case Free():
                await back.free()
                return Freed()
            case GoBack():
                if why := back.ended():
                    return Gone(why)
                await back.reset()
                if effect.cont:
                    await back.cont()
                return WentBack()
            case Leave():
                back.release(running=effect.running)
                return Left()
            case _:
                assert_never(effect)

    async def _pack(self, effect: Pack) -> Event:
        attempt = self._attempt
        await attempt.stop(pause=effect.pause)
        await attempt.give()
        return Packed(await attempt.pack())

    @property
    def _attempt(self) -> Attempt:
        assert self._ports.attempt is not None
        return self._ports.attempt
