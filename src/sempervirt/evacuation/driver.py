"""Carries out what `decide` decides about an evacuation, by way of `ports`.

The driver decides nothing: what it does depends on the effect alone, and every outcome of a port is
an event. So the explorer (tests/unit/test_evacuation_worlds.py) steps this driver itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from sempervirt.core.errors import NotFound, SempervirtError, Unavailable
from sempervirt.core.failure import Failure
from sempervirt.evacuation import decide
from sempervirt.evacuation.ports import Ports
from sempervirt.evacuation.state import (
    CancelVm,
    CheckVm,
    Decision,
    Effect,
    Evacuation,
    Event,
    Failed,
    Fall,
    FollowVm,
    GiveUpAsked,
    LookAround,
    Mark,
    Marked,
    MoveVm,
    NoStandby,
    Tick,
    Unmark,
)
from sempervirt.host.owner import HOST_CLOCK, Clock, Owner

log = logging.getLogger(__name__)


def _nobody(_before: Evacuation, _after: Evacuation) -> None:
    """For those who are not told of each step."""


class EvacuationDriver(Owner[Evacuation, Event, Effect]):
    """One evacuation of this host. `followed` is called after each step."""

    def __init__(
        self,
        state: Evacuation,
        ports: Ports,
        clock: Clock = HOST_CLOCK,
        followed: Callable[[Evacuation, Evacuation], None] = _nobody,
    ) -> None:
        super().__init__("evacuation", state, clock)
        self._ports = ports
        self._followed = followed

    # What can be asked of it

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self.state.over

    def give_up(self) -> None:
        """What has not left yet stays."""
        self.post(GiveUpAsked())

    async def wait_over(self, timeout_s: float | None = None) -> None:
        """Returns at the end. Raises Unavailable after `timeout_s`."""
        await self.changes.wait_until(
            lambda: self.over, timeout_s=timeout_s, what="the end of the evacuation"
        )

    # The shell's

    def decide(self, state: Evacuation, event: Event, now: float) -> Decision:
        """See `decide.decide`."""
        return decide.decide(state, event, now)

    def record(self, before: Evacuation, after: Evacuation) -> bool:
        """A note for the next agent. One that cannot be written stops nothing: the next agent finds
        the moves in the records of the VMs, and the rest by asking.
        """
        if (before.step, before.passages) != (after.step, after.passages):
            self._ports.record.write(after)
        return True

    def wake_at(self, state: Evacuation) -> float | None:
        """See `decide.wake_at`."""
        return decide.wake_at(state)

    def tick(self) -> Event:
        """Time has passed."""
        return Tick()

    def after_step(self, before: Evacuation) -> None:
        """Tells whoever follows the evacuation; at its end nothing more is waited for."""
        self._followed(before, self.state)
        if self.over and self._task is not None:
            self._task.cancel()

    async def work(self, effect: Effect) -> None:
        """Carries out an effect. Every outcome is an event."""
        try:
            event = await self._outcome(effect)
        except SempervirtError as error:
            log.info("evacuate %s: %s", effect, error)
            event = Failed(effect, Failure.of(error))
        except OSError as error:
            log.warning("evacuate %s: %s", effect, error)
            event = Failed(effect, Failure.named(Unavailable, str(error)))
        if event is not None:
            self.post(event)

    async def _outcome(self, effect: Effect) -> Event | None:
        ports = self._ports
        match effect:
            case Mark(why):
                await ports.service.mark(why)
                return Marked()
            case Unmark():
                await ports.service.unmark()
            case LookAround(destinations, look):
                return replace(await ports.fleet.look(destinations), look=look)
            case MoveVm(vm, host, deadline_s, pressing):
                return await ports.moves.move(vm, host, deadline_s, pressing=pressing)
            case FollowVm(vm, host):
                return await ports.moves.follow(vm, host)
            case CancelVm(vm):
                await ports.moves.cancel(vm)
            case CheckVm(vm, host):
                return await ports.moves.check(vm, host)
            case Fall(vm):
                return await self._fall(vm)
            case _:
                assert_never(effect)
        return None

    async def _fall(self, vm: str) -> Event:
        try:
            return await self._ports.standby.fall(vm)
        except NotFound as error:
            return NoStandby(vm, error.message)
