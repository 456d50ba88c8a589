"""The one shell around every decision: a task that owns a state and is the only one to change it.

    post(event) ─► queue ─► decide(state, event, now) ─► record ─► carry_out(effect) ─► after_step
                            pure: state and effects        │         one after the other
                                                           └─ not written, though it has to be:
                                                              decide anew, on the state before,
                                                              about `unrecorded()`

- **One step at a time.** A step never waits: whatever takes time is work that `carry_out` begins,
  and what comes of it is posted as an event. So nothing that hangs can hold up the queue.
- **Recorded before it is done.** The next agent finds the state that an effect belongs to, whenever
  this one dies.
- **Time is an event.** `wake_at` says when the state has to be looked at again; `tick()` is posted
  then.
- **Crash-only.** An exception in a step, or in work that was begun, is a mistake in the program:
  what the owner believes can no longer be trusted, and whoever waits for it would wait for ever. So
  it ends the process (`background.fail`); systemd starts the next agent, which adopts what runs.

The state and the effects are values. A subclass keeps no other state that a decision depends on:
that is what lets a test put an owner into any state, and step it (`tests/unit/exploration`).
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, Protocol, TypeVar

from sempervirt.core.errors import SempervirtError
from sempervirt.host import background
from sempervirt.host.changes import Changes

StateT = TypeVar("StateT")
EventT = TypeVar("EventT")
EffectT = TypeVar("EffectT")

Work = Coroutine[Any, Any, None]


class Alarm(Protocol):
    """A call that is to be made later."""

    def cancel(self) -> None:
        """Takes the call back: it will not be made."""


class Clock(Protocol):
    """Where an owner gets the time from, in seconds that only grow."""

    def now(self) -> float:
        """The time of this clock."""

    def call_at(self, when: float, call: Callable[[], None]) -> Alarm:
        """Has `call` made at a time of this clock."""

    async def sleep(self, seconds: float) -> None:
        """Returns after so long."""


class HostClock:
    """CLOCK_MONOTONIC, which is also the clock of asyncio's loop."""

    def now(self) -> float:
        """The time now."""
        return time.monotonic()

    def call_at(self, when: float, call: Callable[[], None]) -> Alarm:
        """By the running loop."""
        return asyncio.get_running_loop().call_at(when, call)

    async def sleep(self, seconds: float) -> None:
        """By the running loop."""
        await asyncio.sleep(seconds)


HOST_CLOCK = HostClock()


class Replies:
    """Those who wait for the answer to a request, by the ticket that the request carries."""

    def __init__(self) -> None:
        self._last = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._closed: SempervirtError | None = None

    def open(self) -> tuple[int, asyncio.Future[None]]:
        """A new ticket (never 0), and what its holder awaits. Raises what `close` was given."""
        if self._closed is not None:
            raise self._closed
        self._last += 1
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[self._last] = reply
        return self._last, reply

    def answer(self, ticket: int, error: SempervirtError | None = None) -> None:
        """Answers a request once; later answers, and those to nobody, change nothing."""
        reply = self._waiting.pop(ticket, None)
        if reply is None or reply.done():
            return
        if error is None:
            reply.set_result(None)
        else:
            reply.set_exception(error)

    def close(self, error: SempervirtError) -> None:
        """Answers every request, open or still to come, with `error`: the owner has ended."""
        self._closed = error
        for ticket in list(self._waiting):
            self.answer(ticket, error)


class Owner(abc.ABC, Generic[StateT, EventT, EffectT]):
    """See the module. `name` says in logs what is owned, for instance "disk web/root"."""

    def __init__(self, name: str, state: StateT, clock: Clock = HOST_CLOCK) -> None:
        self.changes = Changes()
        self._owned = name
        self._state = state
        self._clock = clock
        self._queue: asyncio.Queue[EventT] = asyncio.Queue()
        self._alarm: Alarm | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._begun: dict[asyncio.Task[None], EffectT] = {}
        self._task: asyncio.Task[None] | None = None

    # What an owner is made of

    @abc.abstractmethod
    def decide(self, state: StateT, event: EventT, now: float) -> tuple[StateT, Sequence[EffectT]]:
        """The next state, and what has to be done. Pure."""

    def carry_out(self, effect: EffectT) -> None:
        """Does an effect, or begins it. Must not wait. By itself it begins `work`."""
        self.begin(effect)

    async def work(self, effect: EffectT) -> None:
        """Carries out an effect that takes time, and posts what came of it.

        What it does depends on the effect alone, and not on the state, which goes on meanwhile.
        """
        raise NotImplementedError

    def record(self, before: StateT, after: StateT) -> bool:
        """Writes `after` down. False: it was not written, and the step must not be taken."""
        return True

    def unrecorded(self) -> EventT:
        """The event that takes the place of one whose step could not be recorded."""
        raise NotImplementedError

    def wake_at(self, state: StateT) -> float | None:
        """When time alone may change the state, on the owner's clock."""
        return None

    def tick(self) -> EventT:
        """The event that says that time has passed."""
        raise NotImplementedError

    def after_step(self, before: StateT) -> None:
        """Called after each step, when its effects have begun: for journals and logs."""

    # What it does

    @property
    def state(self) -> StateT:
        """The state that the last step has led to."""
        return self._state

    def start(self, effects: Sequence[EffectT] = ()) -> None:
        """Begins to drain the queue; `effects` belong to the state that the owner begins with.
        Called once, in the event loop.
        """
        assert self._task is None
        self._task = background.start(self._drain(), self._owned, crash=True)
        for effect in effects:
            self.carry_out(effect)
        self._rearm()

    def post(self, event: EventT) -> None:
        """Adds an event to the queue."""
        self._queue.put_nowait(event)

    def step(self, event: EventT) -> None:
        """Takes one step. Only `start`'s task calls it, and tests that have not called `start`."""
        before = self._state
        after, effects = self.decide(before, event, self._clock.now())
        if not self.record(before, after):
            after, effects = self.decide(before, self.unrecorded(), self._clock.now())
            self.record(before, after)
        self._state = after
        for effect in effects:
            self.carry_out(effect)
        self._rearm()
        self.after_step(before)
        self.changes.notify()

    def begin(self, effect: EffectT) -> None:
        """Begins the work of an effect beside the queue."""
        task = self.keep(self.work(effect), type(effect).__name__)
        self._begun[task] = effect
        task.add_done_callback(self._begun.pop)

    def cancel_work(self, *kinds: type) -> None:
        """Ends the work of effects of these kinds, wherever it stands; nothing is posted of it."""
        for task, effect in list(self._begun.items()):
            if isinstance(effect, kinds):
                task.cancel()

    def keep(self, work: Work, name: str) -> asyncio.Task[None]:
        """Runs `work` beside the queue, until it ends or the owner is detached."""
        task = background.start(work, f"{self._owned}: {name}", crash=True)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def detach(self) -> None:
        """Ends the owner and its work; what was owned is left as it is, for the next agent."""
        if self._alarm is not None:
            self._alarm.cancel()
        current = asyncio.current_task()
        tasks = [task for task in (self._task, *self._work) if task and task is not current]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(self) -> None:
        while True:
            self.step(await self._queue.get())

    def _rearm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        when = self.wake_at(self._state)
        if when is not None:
            self._alarm = self._clock.call_at(when, lambda: self.post(self.tick()))
