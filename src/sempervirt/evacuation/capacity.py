"""What a cluster has room for when hosts are lost: a pure function.

    each host says (`Survey`): its VMs, and what it found that every other host offers them
    for each set of N hosts that may be lost: are their VMs placed on the others? (`plan`)

What a host has left is what the least of those who asked was told, for between their questions it
may have given some of it away. Of very many sets those are looked at whose VMs need the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import nlargest
from itertools import combinations
from math import comb

from sempervirt.evacuation.placement import Room
from sempervirt.evacuation.plan import Absent, Left, Survey, plan
from sempervirt.evacuation.values import Cause, EvacuationOrder

LOST_MAX = 3
SETS_MAX = 300
_ORDER = EvacuationOrder(Cause.OPERATOR, "hosts are lost")


@dataclass(frozen=True)
class Loss:
    """Hosts that may be lost together, and what of their VMs would have no place then."""

    hosts: tuple[str, ...]
    vms: int
    down: tuple[Left, ...]


@dataclass(frozen=True)
class Capacity:
    """The sets of hosts that were looked at, those first that leave the most VMs down; `sets` is
    how many there are. `absent`: hosts that could not be asked, of whose VMs nothing is known.
    """

    losses: tuple[Loss, ...]
    sets: int
    absent: tuple[Absent, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every VM has a place, whichever of the sets is lost."""
        return not any(loss.down for loss in self.losses)

    @property
    def is_whole(self) -> bool:
        """Whether all sets were looked at, and all hosts have answered."""
        return len(self.losses) == self.sets and not self.absent


def capacity(surveys: Mapping[str, Survey], lost: int, absent: tuple[Absent, ...] = ()) -> Capacity:
    """What becomes of the VMs when so many hosts are lost, of those that were asked."""
    rooms = _rooms(surveys)

    def needed(hosts: tuple[str, ...]) -> int:
        return sum(need.memory_bytes for host in hosts for need in surveys[host].needs)

    looked = nlargest(SETS_MAX, combinations(sorted(surveys), lost), key=needed)
    losses = [_loss(surveys, rooms, hosts) for hosts in looked]
    losses.sort(key=lambda loss: (-len(loss.down), loss.hosts))
    return Capacity(tuple(losses), comb(len(surveys), lost), absent)


def _loss(surveys: Mapping[str, Survey], rooms: Mapping[str, Room], lost: tuple[str, ...]) -> Loss:
    # A VM that moves between two of them is told of by both.
    told = [need for host in lost for need in surveys[host].needs]
    needs = tuple({need.vm: need for need in sorted(told, key=lambda one: not one.stuck)}.values())
    left = tuple(room for host, room in sorted(rooms.items()) if host not in lost)
    away = tuple(Absent(host, "it is lost as well") for host in lost)
    return Loss(lost, len(needs), plan(Survey(left, needs, away), _ORDER).left)


def _rooms(surveys: Mapping[str, Survey]) -> dict[str, Room]:
    """What each host offers; nothing is known of one that nobody has heard."""
    rooms: dict[str, Room] = {}
    for survey in surveys.values():
        for room in survey.rooms:
            known = rooms.get(room.host, room)
            rooms[room.host] = min(known, room, key=lambda one: one.memory_bytes)
    return rooms
