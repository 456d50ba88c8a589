"""The plan of an evacuation: what fits, in which order, and whether a person can read why."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from sempervirt.evacuation import plan as planning
from sempervirt.evacuation.messages import plan_view
from sempervirt.evacuation.placement import Need, Room, best
from sempervirt.evacuation.plan import Absent, Plan, Survey, plan
from sempervirt.evacuation.values import Cause, EvacuationOrder, Reason

GIB = 1 << 30
ORDER = EvacuationOrder(Cause.OPERATOR, "a test")


def fleet(seed: int, vms: int, hosts: int) -> Survey:
    """A host with so many VMs of all sizes, and others with some room."""
    drawn = random.Random(seed)
    rooms = [
        Room(f"h{n}", drawn.randrange(0, 64) * GIB, drawn.choice((0, 4, 64))) for n in range(hosts)
    ]
    needs = []
    for number in range(vms):
        against = {
            f"h{n}": (drawn.choice(("no image", "no tap", "an older QEMU")),)
            for n in range(hosts)
            if drawn.random() < 0.2
        }
        memory = drawn.choice((1, 1, 2, 4, 8, 16)) * GIB // 2
        needs.append(
            Need(
                f"vm{number}",
                memory,
                drawn.choice((10, 50, 50, 90)),
                drawn.randrange(memory),
                drawn.choice((0.0, 0.0, 1e6, 1e9)),
                drawn.choice((1, 2, 8)),
                against,
                "it is halted" if drawn.random() < 0.05 else "",
            )
        )
    return Survey(tuple(rooms), tuple(needs), (Absent("away", "the agent of away is silent"),))


def faults(survey: Survey, order: EvacuationOrder, made: Plan) -> list[str]:
    """What is wrong with a plan."""
    found = []
    needs = {need.vm: need for need in survey.needs}
    rooms = {room.host: room for room in survey.rooms}
    named = [move.vm for move in made.moves] + [left.vm for left in made.left]
    if sorted(named) != sorted(needs):
        found.append("a VM is missing, or stands twice")
    given: Counter[str] = Counter()
    for move in made.moves:
        need = needs[move.vm]
        given[move.host] += need.memory_bytes
        if need.against.get(move.host) or need.stuck:
            found.append(f"{move.vm} goes where it cannot")
    found += [f"{host} has too much" for host in given if given[host] > rooms[host].memory_bytes]
    priorities = [move.priority for move in made.moves]
    if priorities != sorted(priorities, reverse=True):
        found.append("a VM of lower priority goes first")
    found += _timing_faults(made, order)
    for left in made.left:
        need = needs[left.vm]
        host = best(need, survey.rooms, {h: rooms[h].memory_bytes - given[h] for h in rooms})
        if host is not None and not need.stuck:
            found.append(f"{left.vm} stays, and fits on {host}")
        if not left.why:
            found.append(f"nobody is told why {left.vm} stays")
    return found


def _timing_faults(made: Plan, order: EvacuationOrder) -> list[str]:
    found = []
    for move in made.moves:
        if move.late is not (move.ends_s is None or move.ends_s > order.deadline_s):
            found.append(f"{move.vm} is late, or is it?")
        at_once = sum(
            other.begins_s <= move.begins_s
            and (other.ends_s is None or other.ends_s > move.begins_s)
            for other in made.moves
        )
        endless = sum(other.ends_s is None for other in made.moves)
        if at_once > order.concurrency + endless:
            found.append(f"{at_once} at once")
    return found


@pytest.mark.parametrize("seed", range(60))
def test_a_plan_is_sound_whatever_the_fleet(seed: int) -> None:
    drawn = random.Random(seed)
    survey = fleet(seed, drawn.randrange(0, 60), drawn.randrange(0, 9))
    order = replace(ORDER, concurrency=drawn.randrange(1, 9), deadline_s=drawn.choice((5.0, 300.0)))
    made = plan(survey, order)
    assert faults(survey, order, made) == []
    assert plan(survey, order) == made


def spread_alone(
    needs: Sequence[Need], rooms: Sequence[Room], free: dict[str, int]
) -> dict[str, str]:
    """Only the first of the ways."""
    prefer, sequence = planning._WAYS[0]
    placed, left = planning._placed(sorted(needs, key=sequence), rooms, free, prefer)
    free.update(left)
    return placed


def crowd(needs: Sequence[Need], rooms: Sequence[Room], _free: dict[str, int]) -> dict[str, str]:
    """Does not look at memory."""
    return {need.vm: rooms[0].host for need in needs} if rooms else {}


def test_a_mistake_in_the_plan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_place", crowd)
    survey = fleet(3, 40, 6)
    assert any("too much" in fault for fault in faults(survey, ORDER, plan(survey, ORDER)))


def test_the_way_is_chosen_that_places_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small VMs over all hosts would leave no host with room for a large one."""
    rooms = (Room("b", 10 * GIB), Room("c", 10 * GIB))
    sizes = (4, 4, 6, 6)
    survey = Survey(rooms, tuple(Need(f"vm{n}", s * GIB) for n, s in enumerate(sizes)))
    assert len(plan(survey, ORDER).moves) == 4
    dense = Survey(
        rooms, (Need("small1", 5 * GIB), Need("small2", 5 * GIB), Need("large", 10 * GIB))
    )
    assert len(plan(dense, ORDER).moves) == 3
    monkeypatch.setattr(planning, "_place", spread_alone)
    assert len(plan(dense, ORDER).moves) == 2


def test_a_thousand_vms_on_fifty_hosts_take_less_than_a_second() -> None:
    survey = fleet(7, 1000, 50)
    begun = time.process_time()
    made = plan(survey, ORDER)
    took = time.process_time() - begun
    assert faults(survey, ORDER, made) == []
    assert len(made.moves) > 500
    assert took < 1.0


def test_priority_comes_before_number() -> None:
    """One large VM of high priority takes the room of two others, and leaves first."""
    needs = (Need("large", 4 * GIB, priority=90), Need("one", 2 * GIB), Need("two", 2 * GIB))
    made = plan(Survey((Room("b", 5 * GIB),), needs), ORDER)
    assert [move.vm for move in made.moves] == ["large"]
    assert {left.vm: left.reason for left in made.left} == {
        "one": Reason.NO_MEMORY,
        "two": Reason.NO_MEMORY,
    }


def test_what_is_sent_soonest_goes_first_within_a_priority() -> None:
    needs = (
        Need("busy", 2 * GIB, resident_bytes=GIB, dirtied=40e6),
        Need("idle", 2 * GIB, resident_bytes=GIB),
        Need("empty", 8 * GIB, resident_bytes=1 << 20),
        Need("wild", 2 * GIB, resident_bytes=GIB, dirtied=1e12),
    )
    made = plan(Survey((Room("b", 64 * GIB),), needs), ORDER)
    assert [move.vm for move in made.moves] == ["empty", "idle", "busy", "wild"]
    assert [move.ends_s is None for move in made.moves] == [False, False, False, True]
    assert made.moves[-1].late


def test_every_reason_is_in_words_a_person_understands() -> None:
    rooms = (Room("b", 2 * GIB), Room("c", GIB))
    needs = (
        Need("halted", GIB, stuck="it is halted"),
        Need("nat", GIB, against={"b": ("user-mode networking",), "c": ("user-mode networking",)}),
        Need("image", GIB, against={"b": ("b has no tap",), "c": ("c has no image",)}),
        Need("big", 3 * GIB),
    )
    left = {one.vm: (one.reason, one.why) for one in plan(Survey(rooms, needs), ORDER).left}
    assert left == {
        "halted": (Reason.NOT_MOVABLE, "it is halted"),
        "nat": (Reason.OBSTACLES, "on every host: user-mode networking"),
        "image": (Reason.OBSTACLES, "on b: b has no tap; on c: c has no image"),
        "big": (
            Reason.NO_MEMORY,
            "it needs 3G, and of the hosts that fit b has the most left: 2G",
        ),
    }
    alone = plan(Survey(needs=(Need("web", GIB),), absent=(Absent("b", "it is silent"),)), ORDER)
    assert (alone.left[0].reason, alone.left[0].why) == (Reason.NO_HOST, "b: it is silent")


def test_a_vm_with_more_processors_than_its_host_is_the_last_choice() -> None:
    wide = Need("wide", GIB, vcpus=8)
    assert (
        plan(Survey((Room("b", 9 * GIB, 2), Room("c", 2 * GIB, 8)), (wide,)), ORDER).moves[0].host
        == "c"
    )
    assert plan(Survey((Room("b", 9 * GIB, 2),), (wide,)), ORDER).moves[0].host == "b"


def test_the_view_says_all_that_the_plan_does() -> None:
    survey = fleet(5, 30, 4)
    made = plan(survey, ORDER)
    view = plan_view(made, ORDER)
    assert [(move.vm, move.host) for move in view.moves] == [(m.vm, m.host) for m in made.moves]
    assert [left.reason for left in view.left] == [left.reason for left in made.left]
    assert [one.host for one in view.absent] == ["away"]
