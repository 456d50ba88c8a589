"""Carries out what `decide` decides on the destination, by way of `ports`.

Nothing of the VM runs or writes here before it is this host's: QEMU is started with its processors
stopped, and the backends take no image without a claim. The driver decides nothing; every outcome
of a port is an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import assert_never

from sempervirt.core.errors import SempervirtError, StateConflict
from sempervirt.host.owner import HOST_CLOCK, Clock, Owner
from sempervirt.migration.destination import decide
from sempervirt.migration.destination.ports import Ports
from sempervirt.migration.destination.state import (
    AskStore,
    DestinationEffect,
    DestinationEvent,
    EndQemu,
    Failed,
    Finish,
    GiveBack,
    GuestRuns,
    Incoming,
    Stale,
    Step,
    TakeAndRun,
)
from sempervirt.migration.events import NotRecorded, Tick
from sempervirt.store.registry import StaleClaim
from sempervirt.vm.phases import Arrival

log = logging.getLogger(__name__)

FAILED = (Arrival.ABORTED, Arrival.LOST)


class DestinationDriver(Owner[Incoming, DestinationEvent, DestinationEffect]):
    """One VM on its way to this host. `state` is where it begins; `name` is the VM's.

    `followed` is called after each step with the state before it and the one after it.
    """

    def __init__(
        self,
        name: str,
        state: Incoming,
        ports: Ports,
        clock: Clock = HOST_CLOCK,
        followed: Callable[[Incoming, Incoming], None] = lambda _before, _after: None,
    ) -> None:
        super().__init__(f"arrival of {name}", state, clock)
        self.name = name
        self._ports = ports
        self._followed = followed
        self._over = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self._over.is_set()

    async def reach(self, what: str, reached: Callable[[Incoming], bool], timeout_s: float) -> None:
        """Waits until `reached`. Raises StateConflict when the VM does not come, Unavailable at
        the deadline.
        """
        await self.changes.wait_until(
            lambda: reached(self.state) or self.state.phase in FAILED,
            timeout_s=timeout_s,
            what=f"the arrival of VM {self.name}: {what}",
        )
        if self.state.phase in FAILED:
            raise StateConflict(f"VM {self.name} did not arrive: {self.state.why}")

    # The shell's

    def decide(self, state: Incoming, event: DestinationEvent, now: float) -> Step:
        """See `decide.step`."""
        return decide.step(state, event, now)

    def record(self, before: Incoming, after: Incoming) -> bool:
        """Writes the phase down; a promise has to be on record before the source hears of it."""
        if before.phase is after.phase:
            return True
        return self._ports.record.write(after.phase) or not decide.owes_record(before, after)

    def unrecorded(self) -> DestinationEvent:
        """In place of the event that led to the promise."""
        return NotRecorded()

    def wake_at(self, state: Incoming) -> float | None:
        """See `decide.wake_at`."""
        return decide.wake_at(state)

    def tick(self) -> DestinationEvent:
        """Time passed."""
        return Tick()

    def after_step(self, before: Incoming) -> None:
        """Tells whoever follows the migration."""
        self._followed(before, self.state)

    async def work(self, effect: DestinationEffect) -> None:
        """Carries out an effect. Every outcome is an event."""
        try:
            event = await self._outcome(effect)
        except SempervirtError as error:
            log.info("arrival vm=%s %s: %s", self.name, type(effect).__name__, error)
            event = failure_of(effect, error)
        if event is not None:
            self.post(event)

    async def _outcome(self, effect: DestinationEffect) -> DestinationEvent | None:
        ports = self._ports
        match effect:
            case TakeAndRun(claim):
                await ports.guest.take_images(claim)
                await ports.guest.run()
                return GuestRuns()
            case AskStore():
                return await ports.ownership.look()
            case EndQemu(because):
                await ports.guest.end(because)
            case GiveBack(claim):
                ports.record.end()
                await ports.ownership.give_back(claim)
            case Finish(forget):
                await self._finish(forget=forget)
            case _:
                assert_never(effect)
        return None

    async def _finish(self, *, forget: bool) -> None:
        ports = self._ports
        await ports.guest.end_wire()
        if forget:
            await ports.guest.forget()
        elif self.state.phase is Arrival.RUNNING:
            ports.record.end()
        self._over.set()
        self.changes.notify()


def failure_of(effect: DestinationEffect, error: SempervirtError) -> DestinationEvent | None:
    """What it means that an effect failed; None where nothing follows from that."""
    match effect:
        case TakeAndRun():
            if isinstance(error, StaleClaim):
                return Stale(f"the VM was given to another host meanwhile: {error.message}")
            return Failed(effect, str(error))
        case EndQemu():
            return Failed(effect, str(error))
        case AskStore() | GiveBack() | Finish():
            return None
        case _:
            assert_never(effect)
