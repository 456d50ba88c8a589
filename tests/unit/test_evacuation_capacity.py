"""What a cluster has room for when hosts are lost: whether the answer can be believed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import combinations

import pytest

from sempervirt.evacuation import capacity as module
from sempervirt.evacuation.capacity import capacity
from sempervirt.evacuation.placement import GIB, Need, Room
from sempervirt.evacuation.plan import Absent, Survey
from sempervirt.evacuation.values import Reason


def cluster(free: Mapping[str, int], vms: Mapping[str, tuple[int, ...]]) -> dict[str, Survey]:
    """Hosts with so many GiB left, and VMs of so many GiB each; the later ones count for more."""
    return {
        host: Survey(
            tuple(Room(other, left * GIB) for other, left in free.items() if other != host),
            tuple(
                Need(f"{host}{n}", memory * GIB, priority=10 + n)
                for n, memory in enumerate(vms.get(host, ()))
            ),
        )
        for host in free
    }


def test_what_fits_and_what_stays_down_by_priority() -> None:
    found = capacity(cluster({"a": 4, "b": 4, "c": 0}, {"a": (2, 2), "b": (8, 4), "c": (1,)}), 1)
    assert not found.fits
    assert found.is_whole
    assert found.sets == 3
    first, *others = found.losses
    assert (first.hosts, [left.vm for left in first.down]) == (("b",), ["b0"])
    assert first.down[0].reason is Reason.NO_MEMORY
    assert "needs 8G" in first.down[0].why
    assert [(loss.hosts, loss.vms, loss.down) for loss in others] == [
        (("a",), 2, ()),
        (("c",), 1, ()),
    ]


def test_two_lost_hosts_share_what_is_left() -> None:
    surveys = cluster({"a": 9, "b": 9, "c": 4}, {"a": (3,), "b": (3,)})
    assert capacity(surveys, 1).fits
    found = capacity(surveys, 2)
    assert [(loss.hosts, [left.vm for left in loss.down]) for loss in found.losses] == [
        (("a", "b"), ["b0"]),
        (("a", "c"), []),
        (("b", "c"), []),
    ]
    assert capacity(surveys, 3).losses[0].down != ()


def test_a_vm_that_moves_between_two_lost_hosts_counts_once() -> None:
    surveys = cluster({"a": 0, "b": 0, "c": 4}, {"a": (4,)})
    arriving = Need("a0", 0, stuck="it is being started")
    surveys["b"] = Survey(surveys["b"].rooms, (arriving,))
    both = {loss.hosts: loss for loss in capacity(surveys, 2).losses}["a", "b"]
    assert (both.vms, both.down) == (1, ())
    # The control: two VMs of two names are two, and one of them is stuck.
    surveys["b"] = Survey(surveys["b"].rooms, (Need("b0", 0, stuck="it is being started"),))
    both = {loss.hosts: loss for loss in capacity(surveys, 2).losses}["a", "b"]
    assert (both.vms, [left.vm for left in both.down]) == (2, ["b0"])


def test_who_could_not_be_asked_is_told() -> None:
    found = capacity(cluster({"a": 4, "b": 4}, {"a": (2,)}), 1, (Absent("c", "it is silent"),))
    assert found.fits
    assert not found.is_whole
    assert capacity({}, 1).losses == ()


def test_of_very_many_sets_the_heaviest_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETS_MAX", 2)
    found = capacity(cluster({"a": 4, "b": 4, "c": 4}, {"a": (1,), "b": (3,), "c": (2,)}), 2)
    assert {loss.hosts for loss in found.losses} == {("b", "c"), ("a", "b")}
    assert (found.sets, found.is_whole) == (3, False)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_said_to_fit_does(seed: int) -> None:
    """What was told least of each host is never exceeded, and no host that is lost is used."""
    draw = random.Random(seed)
    hosts = [f"h{n}" for n in range(draw.randrange(2, 6))]
    surveys = {}
    for host in hosts:
        rooms = tuple(Room(other, draw.randrange(16) * GIB) for other in hosts if other != host)
        needs = tuple(
            Need(f"{host}-{n}", draw.randrange(1, 8) * GIB, draw.choice((10, 50)))
            for n in range(draw.randrange(5))
        )
        surveys[host] = Survey(rooms, needs)
    least = {
        host: min(
            room.memory_bytes
            for survey in surveys.values()
            for room in survey.rooms
            if room.host == host
        )
        for host in hosts
    }
    lost = draw.randrange(1, len(hosts))
    found = capacity(surveys, lost)
    assert {loss.hosts for loss in found.losses} == set(combinations(sorted(hosts), lost))
    for loss in found.losses:
        lost_vms = {need.vm: need for host in loss.hosts for need in surveys[host].needs}
        down = {left.vm for left in loss.down}
        placed = sum(need.memory_bytes for vm, need in lost_vms.items() if vm not in down)
        room = sum(memory for host, memory in least.items() if host not in loss.hosts)
        assert placed <= room
        assert (loss.vms, down - lost_vms.keys()) == (len(lost_vms), set())
