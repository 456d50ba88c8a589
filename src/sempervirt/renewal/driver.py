"""What the three drivers of this room share: an owner whose effects are works, each with one event.

    decide ──► record ──► effects ──► perform, by way of the ports ──► an event, or `Failed`
       ▲                                                                  │
       └──────────────────────────────────────────────────────────────────┘

A driver decides nothing and remembers nothing: what it does depends on the effect alone. So tests
step the driver itself, with every outcome of every port (tests/unit/renewal_explorer.py).
"""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.core.failure import Failure
from sempervirt.host.owner import HOST_CLOCK, Clock, EffectT, EventT, Owner, StateT
from sempervirt.qemu.state import Runstate

log = logging.getLogger(__name__)

# An agent that closes waits so long for work that it has begun, then leaves it to the next one.
CLOSE_S = 20.0

AnswerT = TypeVar("AnswerT")


def ignore(answer: object) -> None:
    """For those who wait for the answer and need not be told."""
    del answer


class RenewalDriver(Owner[StateT, EventT, EffectT], Generic[StateT, EventT, EffectT, AnswerT]):
    """`vm` is the VM's name, `doing` the work in plain words. `told` is called once, with the
    answer.
    """

    def __init__(
        self,
        vm: str,
        doing: str,
        state: StateT,
        told: Callable[[AnswerT | Failure], None],
        clock: Clock = HOST_CLOCK,
    ) -> None:
        super().__init__(f"{doing} of VM {vm}", state, clock)
        self.vm = vm
        self._doing = doing
        self._told = told
        self._detached = False

    # What a driver is made of

    @abc.abstractmethod
    async def perform(self, effect: EffectT) -> EventT:
        """Does an effect, by way of the ports. Raises SempervirtError or OSError."""

    @abc.abstractmethod
    def failed(self, effect: EffectT, failure: Failure) -> EventT:
        """The event that says so."""

    @abc.abstractmethod
    def give_up(self, why: str) -> EventT:
        """The event that leads back, if there still is a way back."""

    @abc.abstractmethod
    def answer_of(self, state: StateT) -> AnswerT | Failure | None:
        """What the caller is told in that state, if anything yet."""

    @property
    @abc.abstractmethod
    def over(self) -> bool:
        """Whether nothing follows any more."""

    # What it does

    @property
    def doing(self) -> str:
        """The work, in plain words."""
        return self._doing

    @property
    def answer(self) -> AnswerT | Failure | None:
        """What the caller is told, once that is known."""
        return self.answer_of(self.state)

    async def outcome(self) -> AnswerT:
        """Waits for the answer. Raises the error if the answer is one, and OutcomeUnknown when the
        agent closes before there is an answer.

        A caller that does not wait any more ends nothing.
        """
        await self.changes.wait_until(
            lambda: self.answer is not None or self._detached, timeout_s=None, what=self.doing
        )
        answer = self.answer
        if answer is None:
            raise OutcomeUnknown(
                f"the agent closes during {self.doing} of VM {self.vm}",
                remedy=f"the next agent goes on with it; then: semper vm show {self.vm}",
            )
        if isinstance(answer, Failure):
            raise answer.error()
        return answer

    def shown(self) -> tuple[Runstate, str] | None:
        """The VM stands still when the caller was told before the end, and waits for something."""
        answer = self.answer
        if self.over or not isinstance(answer, Failure):
            return None
        return Runstate.PAUSED, answer.message

    async def detach(self) -> None:
        """Has the work go back, if that is still possible, or on to its end. After `CLOSE_S` all is
        left as it is, for the next agent.
        """
        if not self.over:
            self.post(self.give_up("the agent closes"))
            with contextlib.suppress(Unavailable):
                await self.changes.wait_until(
                    lambda: self.over, timeout_s=CLOSE_S, what=f"the end of {self.doing}"
                )
        await self.abandon()

    async def abandon(self) -> None:
        """Leaves everything as it is, for the next agent."""
        self._detached = True
        self.changes.notify()
        await super().detach()

    def after_step(self, before: StateT) -> None:
        """Tells the answer; at the end nothing more is waited for."""
        answer = self.answer
        if answer is not None and self.answer_of(before) is None:
            self._told(answer)
        if self.over and self._task is not None:
            self._task.cancel()

    async def work(self, effect: EffectT) -> None:
        """Performs an effect, and posts what came of it."""
        try:
            event = await self.perform(effect)
        except SempervirtError as error:
            log.info("%s vm=%s %s: %s", self.doing, self.vm, type(effect).__name__, error)
            event = self.failed(effect, Failure.of(error))
        except OSError as error:  # a full disk, say
            log.warning("%s vm=%s %s: %s", self.doing, self.vm, type(effect).__name__, error)
            event = self.failed(effect, Failure.named(Unavailable, str(error)))
        self.post(event)
