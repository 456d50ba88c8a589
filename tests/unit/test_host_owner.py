"""The one shell around every decision: order, records, time, failures, replies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.host.owner import Owner, Replies

DEADLINE_S = 90.0


@dataclass
class FakeClock:
    """Time that passes when a test says so."""

    time: float = 100.0
    calls: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def call_at(self, when: float, call: Callable[[], None]) -> FakeAlarm:
        entry = (when, call)
        self.calls.append(entry)
        return FakeAlarm(self, entry)

    async def sleep(self, seconds: float) -> None:
        self.time += seconds

    def pass_to(self, when: float) -> None:
        self.time = when
        for entry in [entry for entry in self.calls if entry[0] <= when]:
            self.calls.remove(entry)
            entry[1]()


@dataclass
class FakeAlarm:
    clock: FakeClock
    entry: tuple[float, Callable[[], None]]

    def cancel(self) -> None:
        if self.entry in self.clock.calls:
            self.clock.calls.remove(self.entry)


@dataclass(frozen=True)
class Count:
    """The state of the owner below."""

    value: int = 0
    refused: int = 0
    wake: float | None = None


@dataclass(frozen=True)
class Add:
    amount: int


@dataclass(frozen=True)
class WakeAt:
    when: float


@dataclass(frozen=True)
class NotWritten:
    pass


@dataclass(frozen=True)
class Woken:
    pass


Event = Add | WakeAt | NotWritten | Woken


class Counter(Owner[Count, Event, int]):
    """Adds up; an effect is the sum that was reached. `seen` is what happened, in order."""

    def __init__(self, clock: FakeClock | None = None, *, full: bool = False) -> None:
        self.seen: list[tuple[str, int]] = []
        self.full = full
        if clock is None:
            super().__init__("the counter", Count())
        else:
            super().__init__("the counter", Count(), clock)

    def decide(self, state: Count, event: Event, now: float) -> tuple[Count, Sequence[int]]:
        match event:
            case Add(0):
                raise RuntimeError("a mistake")
            case Add(amount):
                value = state.value + amount
                return replace(state, value=value), [value]
            case WakeAt(when):
                return replace(state, wake=when), []
            case NotWritten():
                return replace(state, refused=state.refused + 1), [-1]
            case Woken():
                return replace(state, value=int(now), wake=None), [int(now)]

    def carry_out(self, effect: int) -> None:
        self.seen.append(("done", effect))

    def record(self, before: Count, after: Count) -> bool:
        self.seen.append(("record", after.value))
        return not self.full or after.value == before.value

    def unrecorded(self) -> Event:
        return NotWritten()

    def wake_at(self, state: Count) -> float | None:
        return state.wake

    def tick(self) -> Event:
        return Woken()

    def after_step(self, before: Count) -> None:
        self.seen.append(("after_step", self.state.value))


async def reached(counter: Counter, value: int) -> None:
    await counter.changes.wait_until(
        lambda: counter.state.value == value, timeout_s=DEADLINE_S, what=f"the sum {value}"
    )


async def wait_crash(crashes: list[tuple[str, BaseException]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if crashes:
                return
            await asyncio.sleep(0)


def test_a_step_is_on_record_before_it_is_done() -> None:
    counter = Counter()
    counter.step(Add(2))
    assert counter.seen == [("record", 2), ("done", 2), ("after_step", 2)]


def test_a_step_that_cannot_be_recorded_is_not_taken() -> None:
    counter = Counter(full=True)
    counter.step(Add(2))
    # Decided anew on the state before, and that is tried to be recorded as well.
    assert counter.state == Count(value=0, refused=1)
    assert counter.seen == [("record", 2), ("record", 0), ("done", -1), ("after_step", 0)]


async def test_events_are_taken_one_after_the_other() -> None:
    counter = Counter()
    counter.start()
    for amount in (1, 2, 3):
        counter.post(Add(amount))
    await reached(counter, 6)
    assert [what for what in counter.seen if what[0] == "done"] == [
        ("done", 1),
        ("done", 3),
        ("done", 6),
    ]
    await counter.detach()


async def test_time_is_an_event() -> None:
    clock = FakeClock()
    counter = Counter(clock)
    counter.start()
    counter.post(WakeAt(105))
    await counter.changes.wait_until(
        lambda: counter.state.wake == 105, timeout_s=DEADLINE_S, what="the first alarm"
    )
    counter.post(WakeAt(107))
    await counter.changes.wait_until(
        lambda: counter.state.wake == 107, timeout_s=DEADLINE_S, what="the second alarm"
    )
    assert [when for when, _ in clock.calls] == [107], "one alarm, for the last state"
    clock.pass_to(107)
    await reached(counter, 107)
    assert clock.calls == []
    counter.post(WakeAt(110))
    await counter.changes.wait_until(
        lambda: counter.state.wake == 110, timeout_s=DEADLINE_S, what="the third alarm"
    )
    await counter.detach()
    assert clock.calls == [], "nobody wakes an owner that has ended"


async def test_a_step_that_fails_ends_the_agent(crashes: list[tuple[str, BaseException]]) -> None:
    counter = Counter()
    counter.start()
    counter.post(Add(0))
    counter.post(Add(5))
    await wait_crash(crashes)
    (what, error), *more = crashes
    crashes.clear()
    assert (what, str(error), more) == ("the counter", "a mistake", [])
    assert counter.state.value == 0, "nothing follows a step that failed"
    await counter.detach()


async def test_work_that_fails_ends_the_agent(crashes: list[tuple[str, BaseException]]) -> None:
    async def work() -> None:
        raise Unavailable("nobody expected this here")

    counter = Counter()
    counter.start()
    counter.keep(work(), "some work")
    await wait_crash(crashes)
    ((what, error),) = crashes
    crashes.clear()
    assert what == "the counter: some work"
    assert isinstance(error, Unavailable)
    await counter.detach()


async def test_detach_ends_the_queue_and_the_work_and_is_no_failure() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    counter = Counter()
    counter.start()
    task = counter.keep(work(), "some work")
    counter.post(Add(1))
    await reached(counter, 1)
    await counter.detach()
    assert ended.is_set()
    assert task.cancelled()
    counter.post(Add(1))
    await asyncio.sleep(0)
    assert counter.state.value == 1


async def test_work_can_detach_its_own_owner() -> None:
    counter = Counter()

    async def work() -> None:
        await counter.detach()

    counter.start()
    await asyncio.wait_for(counter.keep(work(), "the end"), DEADLINE_S)


async def test_each_request_is_answered_once() -> None:
    replies = Replies()
    first, accepted = replies.open()
    second, refused = replies.open()
    assert 0 not in (first, second)
    assert first != second
    replies.answer(second, StateConflict("busy"))
    replies.answer(first)
    replies.answer(first, StateConflict("too late"))
    replies.answer(0)
    replies.answer(99, StateConflict("to nobody"))
    await accepted
    with pytest.raises(StateConflict, match="busy"):
        await refused


async def test_who_does_not_wait_any_more_hinders_nobody() -> None:
    replies = Replies()
    ticket, reply = replies.open()
    reply.cancel()
    replies.answer(ticket)


async def test_the_end_of_an_owner_answers_all_requests() -> None:
    replies = Replies()
    _, reply = replies.open()
    replies.close(Unavailable("the owner has ended"))
    with pytest.raises(Unavailable, match="has ended"):
        await reply
    with pytest.raises(Unavailable, match="has ended"):
        replies.open()
