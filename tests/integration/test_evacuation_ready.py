"""Ends of the wire that wait: what a move uses on a host on which no program can be started."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from sempervirt.core.errors import CommandFailed
from sempervirt.host import process
from sempervirt.host.process import Process
from sempervirt.host.reserve import Reserve
from sempervirt.migration import wire

DEADLINE_S = 90.0
USAGE = 2
# As semper-wired is started, and incomplete: it says so and ends.
ARGV = ["semper-wired", "source", "--migration=m"]


async def ended(one: Process) -> int | None:
    async with asyncio.timeout(DEADLINE_S):
        return (await one.wait()).code


@pytest.fixture
def reserve(tmp_path: Path) -> Iterator[Reserve]:
    made = wire.waiting(tmp_path / "waiting.log")
    yield made
    made.release()
    wire.fall_back_on(None)


async def test_what_waits_does_what_it_is_told_and_says_so_where_it_is_told(
    tmp_path: Path, reserve: Reserve
) -> None:
    assert reserve.take(ARGV[1:], tmp_path / "wired.log") is None
    reserve.keep(2)
    reserve.keep(2)
    assert reserve.count == 2
    waiting = [one.process for one in reserve._waiting]
    taken = reserve.take(ARGV[1:], tmp_path / "wired.log")
    assert taken is waiting[0]
    assert await ended(taken) == USAGE
    assert "required arguments" in (tmp_path / "wired.log").read_text()
    assert waiting[1].exit is None
    reserve.release()
    assert await ended(waiting[1]) == 0
    assert "error" not in (tmp_path / "waiting.log").read_text()


async def test_one_that_ended_is_passed_over_and_replaced(tmp_path: Path, reserve: Reserve) -> None:
    reserve.keep(1)
    (first,) = (one.process for one in reserve._waiting)
    await first.end(0)
    assert reserve.take(ARGV[1:], tmp_path / "wired.log") is None
    reserve.keep(1)
    (second,) = (one.process for one in reserve._waiting)
    await second.end(0)
    reserve.keep(1)
    (third,) = (one.process for one in reserve._waiting)
    assert third is not second
    assert third.exit is None


async def test_it_is_taken_only_when_nothing_can_be_started(
    tmp_path: Path, reserve: Reserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve.keep(1)
    wire.fall_back_on(reserve)
    argv = [str(reserve._argv[0]), *ARGV[1:]]
    started = wire._started(argv, tmp_path / "wired.log")
    assert await ended(started) == USAGE
    assert reserve.count == 1

    def refuse(*_arguments: object, **_named: object) -> Process:
        raise CommandFailed("semper-wired", None, ["Resource temporarily unavailable"])

    monkeypatch.setattr(process, "spawn", refuse)
    taken = wire._started(argv, tmp_path / "wired.log")
    assert await ended(taken) == USAGE
    assert reserve.count == 0
    with pytest.raises(CommandFailed):
        wire._started(argv, tmp_path / "wired.log")
