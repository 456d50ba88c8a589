"""The threads that look at sources: one that hangs, raises, floods or lies holds up nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from sempervirt.guard import watch as watching
from sempervirt.guard.signs import Sign, SignId
from sempervirt.guard.sources.source import AbsentError, Source
from sempervirt.guard.watch import SIGNS_MAX, Standing, Watch

DEADLINE_S = 90.0
SIGN = Sign(SignId.LOG_OOPS, "oops")


class Fake:
    """A source that does what a function says, at most every millisecond."""

    interval_s = 0.001

    def __init__(self, name: str, look: Callable[[int], Sequence[Sign]]) -> None:
        self.name = name
        self._look = look
        self.turn = 0
        self.closed = threading.Event()

    def look(self, patience_s: float) -> Sequence[Sign]:
        self.turn += 1
        return self._look(self.turn)

    def close(self) -> None:
        self.closed.set()


class Heard:
    """What reached the event loop, by source."""

    def __init__(self) -> None:
        self.signs: dict[str, list[Sign]] = {}
        self.watches: list[Watch] = []

    def start(self, *sources: Source) -> list[Watch]:
        self.watches = [Watch(source, self.hear) for source in sources]
        for one in self.watches:
            one.start()
        return self.watches

    def hear(self, watch: Watch, signs: Sequence[Sign]) -> None:
        self.signs.setdefault(watch.source.name, []).extend(signs)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)  # poll interval

    def end(self) -> None:
        for one in self.watches:
            one.end()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    monkeypatch.setattr(watching, "PAUSE_MIN_S", 0.002)
    monkeypatch.setattr(watching, "ABSENT_PAUSE_S", 0.002)
    return Heard()


def once(turn: int) -> Sequence[Sign]:
    return [SIGN] if turn == 1 else []


async def test_what_a_source_sees_reaches_the_loop_and_the_source_is_closed(heard: Heard) -> None:
    source = Fake("good", once)
    (one,) = heard.start(source)
    await heard.until(lambda: heard.signs.get("good") == [SIGN])
    assert one.health.standing is Standing.LOOKING
    one.end()
    await heard.until(source.closed.is_set)


async def test_one_that_hangs_is_told_and_the_others_go_on(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "HANGS_S", 0.05)
    free = threading.Event()

    def hang(turn: int) -> Sequence[Sign]:
        free.wait(DEADLINE_S)
        return []

    good = Fake("good", lambda turn: [SIGN])
    bad, _ = heard.start(Fake("bad", hang), good)
    await heard.until(lambda: bad.health.standing is Standing.HANGING)
    seen = good.turn
    await heard.until(lambda: good.turn > seen + 10)
    assert "has not answered" in bad.health.why
    free.set()
    await heard.until(lambda: bad.health.standing is Standing.LOOKING)
    heard.end()


@pytest.mark.parametrize(
    "error", [OSError("gone"), ValueError("nonsense"), RuntimeError("a mistake"), RecursionError()]
)
async def test_one_that_raises_is_asked_again(heard: Heard, error: Exception) -> None:
    mended, signs = threading.Event(), [[SIGN]]

    def fail(_turn: int) -> Sequence[Sign]:
        if not mended.is_set():
            raise error
        return signs.pop() if signs else []

    (one,) = heard.start(Fake("bad", fail))
    await heard.until(lambda: one.health.standing is Standing.FAILING)
    assert type(error).__name__ in one.health.why
    mended.set()
    await heard.until(lambda: heard.signs.get("bad") == [SIGN])
    assert one.health.standing is Standing.LOOKING
    heard.end()


async def test_one_that_comes_and_goes_is_absent_meanwhile(heard: Heard) -> None:
    loaded, signs = threading.Event(), [[SIGN]]

    def come(_turn: int) -> Sequence[Sign]:
        if not loaded.is_set():
            raise AbsentError("the module is not loaded")
        return signs.pop() if signs else []

    (one,) = heard.start(Fake("module", come))
    await heard.until(lambda: one.health.standing is Standing.ABSENT)
    assert one.health.why == "the module is not loaded"
    loaded.set()
    await heard.until(lambda: heard.signs.get("module") == [SIGN])
    heard.end()


async def test_one_that_floods_fills_its_own_share_alone(heard: Heard) -> None:
    flood = Fake("flood", lambda turn: [SIGN] * 10_000 if turn <= 20 else [])
    bad, good = heard.start(flood, Fake("good", once))
    # The loop does nothing meanwhile: what is not taken cannot pile up.
    begin = time.monotonic()
    while flood.turn <= 20 and time.monotonic() < begin + DEADLINE_S:
        time.sleep(0.001)  # poll interval # noqa: ASYNC251
    await heard.until(lambda: heard.signs.get("good") == [SIGN])
    assert len(heard.signs["flood"]) == SIGNS_MAX
    assert bad.health.dropped == 20 * 10_000 - SIGNS_MAX
    assert good.health.dropped == 0
    heard.end()


async def test_after_the_end_nothing_is_heard(heard: Heard) -> None:
    source = Fake("good", lambda turn: [SIGN])
    (one,) = heard.start(source)
    await heard.until(lambda: bool(heard.signs))
    one.end()
    await heard.until(source.closed.is_set)
    heard.signs.clear()
    await asyncio.sleep(0)
    assert heard.signs == {}
