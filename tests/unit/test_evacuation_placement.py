"""Which host is best for a VM: whether a person can add up why, and an evacuation chooses by it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from sempervirt.evacuation import placement
from sempervirt.evacuation.placement import GIB, Need, Place, Room, best, by_score, places
from sempervirt.evacuation.plan import Survey, plan
from sempervirt.evacuation.values import Cause, EvacuationOrder

ORDER = EvacuationOrder(Cause.OPERATOR, "a test")
ROOMS = (Room("a", 16 * GIB, 4), Room("b", 12 * GIB, 16), Room("c", 2 * GIB), Room("d", 64 * GIB))
NEED = Need("web", 4 * GIB, vcpus=8, against={"d": ("no image", "an older QEMU")})


def told(place: Place) -> list[tuple[float, str]]:
    return [(one.points, one.reason) for one in place.points]


def test_each_host_has_its_reason_and_the_best_is_first() -> None:
    b, a, c, d = places(NEED, ROOMS)
    assert (b.host, b.score, told(b)) == ("b", 8.0, [(8.0, "8G of memory left beside it")])
    assert a.fits
    assert told(a) == [
        (12.0, "12G of memory left beside it"),
        (-100_000.0, "4 processors, and the VM has 8: only if there is no other"),
    ]
    assert (c.host, c.against) == ("c", ("2G of memory left, and it needs 4G",))
    assert (d.host, d.against) == ("d", ("no image", "an older QEMU"))


def test_what_others_were_given_is_not_left() -> None:
    free = {room.host: room.memory_bytes for room in ROOMS} | {"b": 3 * GIB}
    found = {place.host: place for place in places(NEED, ROOMS, free)}
    assert found["b"].against == ("3G of memory left, and it needs 4G",)
    assert found["a"].fits


def test_of_equal_hosts_everybody_is_told_the_same() -> None:
    rooms = [Room(name, 8 * GIB) for name in "cab"]
    for _ in range(6):
        random.shuffle(rooms)
        assert [place.host for place in places(replace(NEED, against={}), rooms)] == ["a", "b", "c"]


def drawn(seed: int) -> tuple[Need, list[Room]]:
    draw = random.Random(seed)
    rooms = [
        Room(f"h{n}", draw.randrange(64 * GIB), draw.choice((0, 2, 64)))
        for n in range(draw.randrange(1, 12))
    ]
    against = {room.host: ("no tap",) for room in rooms if draw.random() < 0.2}
    return Need("web", draw.randrange(1, 32) * GIB, vcpus=4, against=against), rooms


def disagreements(seed: int) -> list[str]:
    """Where what a person is told, and what an evacuation does, are not the same."""
    need, rooms = drawn(seed)
    free = {room.host: room.memory_bytes for room in rooms}
    told_first, *_ = told_all = places(need, rooms)
    chosen = best(need, rooms, free)
    found = []
    if sorted(place.host for place in told_all) != sorted(free):
        found.append("a host is missing")
    if chosen != (told_first.host if told_first.fits else None):
        found.append("another host is chosen than is told")
    moves = plan(Survey(tuple(rooms), (need,)), ORDER).moves
    if [move.host for move in moves] != ([] if chosen is None else [chosen]):
        found.append("the plan has it elsewhere")
    for place in told_all:
        if place.fits == bool(place.against) or place.fits != bool(place.points):
            found.append(f"{place.host} has no reason")
        room = next(room for room in rooms if room.host == place.host)
        if place.fits and (-place.score, place.host) != by_score(need, free, room):
            found.append(f"the points of {place.host} do not add up to what is sorted by")
    return found


@pytest.mark.parametrize("seed", range(200))
def test_what_is_told_is_what_is_done(seed: int) -> None:
    assert disagreements(seed) == []


def test_a_point_that_nobody_is_told_of_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    numbers = placement._numbers

    def more(need: Need, room: Room, left: int) -> tuple[float, ...]:
        return (*numbers(need, room, left), 50.0 * (room.host == "h1"))

    monkeypatch.setattr(
        placement, "by_score",
        lambda need, free, room: (-sum(more(need, room, free[room.host])), room.host),
    )  # fmt: skip
    assert any(disagreements(seed) for seed in range(200))
