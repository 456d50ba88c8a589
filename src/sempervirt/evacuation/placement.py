"""On which host a VM is best placed, and why: pure.

    filters   what stands in the way on a host, and memory. One reason is enough: never there
    points    of what is left, each with its reason; added up they are the score; the most wins

A point is a GiB of memory that the host has left when the VM is there: so VMs spread. There is no
solver, for it cannot say why. Of equal hosts the first by name wins, so that everybody who asks is
told the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from sempervirt.core.sizes import format_size

GIB = 1 << 30
# A VM with more processors than its host runs there, but slowly: only as the last choice. No host
# has as many GiB.
CROWDED = -100_000.0


@dataclass(frozen=True)
class Room:
    """What a host offers. `memory_bytes` is left for VMs; `processors` is 0 where unknown."""

    host: str
    memory_bytes: int
    processors: int = 0


@dataclass(frozen=True)
class Need:
    """A VM that is to be placed.

    `memory_bytes` has to be free where it goes; `resident_bytes` of it have to be sent, and the
    guest changes `dirtied` bytes per second. `against`: what stands in the way on a host, in words;
    a host that is not named fits. `stuck`: why the VM cannot move at all now, "" if it can.
    """

    vm: str
    memory_bytes: int
    priority: int = 50
    resident_bytes: int | None = None
    dirtied: float = 0.0
    vcpus: int = 1
    against: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    stuck: str = ""

    @property
    def sent_bytes(self) -> int:
        """What one pass over its memory sends."""
        known = self.resident_bytes
        return self.memory_bytes if known is None else min(known, self.memory_bytes)


@dataclass(frozen=True)
class Points:
    """A part of a score, and what it is given for."""

    points: float
    reason: str


@dataclass(frozen=True)
class Place:
    """A host for a VM: what stands in the way, all of it; or, of one that fits, its points."""

    host: str
    against: tuple[str, ...] = ()
    points: tuple[Points, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.against

    @property
    def score(self) -> float:
        """Of one that fits."""
        return sum(one.points for one in self.points)


@dataclass(frozen=True)
class Places:
    """All hosts for one VM, the best first. `stuck`: why it cannot go to any now; "" if it can."""

    hosts: tuple[Place, ...]
    stuck: str = ""


Key = Callable[[Need, Mapping[str, int], Room], tuple[float, str]]


def places(need: Need, rooms: Iterable[Room], free: Mapping[str, int] | None = None) -> list[Place]:
    """Every host with its reasons: those that fit first, the best of them before the others.
    `free`: what hosts have left for VMs, where that is less than they offer by themselves.
    """
    judged = []
    for room in rooms:
        left = room.memory_bytes if free is None else free[room.host]
        against = obstacles(need, room, left)
        points = _points(need, room, left) if not against else ()
        judged.append(Place(room.host, against, points))
    return sorted(judged, key=lambda place: (not place.fits, -place.score, place.host))


def obstacles(need: Need, room: Room, left: int) -> tuple[str, ...]:
    """What keeps a VM from a host that has so many bytes of memory left."""
    against = need.against.get(room.host, ())
    if left >= need.memory_bytes:
        return against
    has, needed = format_size(max(0, left)), format_size(need.memory_bytes)
    return (*against, f"{has} of memory left, and it needs {needed}")


def best(
    need: Need, rooms: Iterable[Room], free: Mapping[str, int], key: Key | None = None
) -> str | None:
    """The host for one VM, of those that fit; `key` is what to sort by, if not the score."""
    chosen = min(
        fitting(need, rooms, free),
        key=partial(key or by_score, need, free),
        default=None,
    )
    return None if chosen is None else chosen.host


def fitting(need: Need, rooms: Iterable[Room], free: Mapping[str, int]) -> Iterator[Room]:
    """The hosts that fit."""
    for room in rooms:
        if free[room.host] >= need.memory_bytes and not need.against.get(room.host):
            yield room


def by_score(need: Need, free: Mapping[str, int], room: Room) -> tuple[float, str]:
    """To sort by: the best first."""
    return -sum(_numbers(need, room, free[room.host])), room.host


def is_crowded(need: Need, room: Room) -> bool:
    """Whether the VM has more processors than the host."""
    return 0 < room.processors < need.vcpus


def _numbers(need: Need, room: Room, left: int) -> tuple[float, ...]:
    """The points, without their reasons: thousands of VMs are placed at once."""
    memory = (left - need.memory_bytes) / GIB
    return (memory, CROWDED) if is_crowded(need, room) else (memory,)


def _points(need: Need, room: Room, left: int) -> tuple[Points, ...]:
    reasons = (
        f"{format_size(max(0, left - need.memory_bytes))} of memory left beside it",
        f"{room.processors} processors, and the VM has {need.vcpus}: only if there is no other",
    )
    return tuple(map(Points, _numbers(need, room, left), reasons))
