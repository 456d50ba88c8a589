"""Which VM goes where, in which order, and which VM cannot go and why: a pure function.

    what hosts and VMs say (`Survey`) ──► place: priority by priority ──► order ──► reckon times

**Place.** Which host is best for one VM, `placement` says: a host is never given more memory than
it has. VMs of a higher priority are placed first, whatever that leaves for the others. Within one
priority four ways are tried, and the first one that places the most VMs counts (`_WAYS`): each VM
on its best host, or host after host; small VMs first, or large VMs first.

**Order.** Higher priority first; within one priority what is sent soonest, because then the most
VMs have left by any instant at which the evacuation may have to end.

**Reckon.** `concurrency` moves share the link evenly. A move takes SETUP_S, and the time for its
memory, which is sent again as far as the guest changes it meanwhile; near the end a guest that
changes it too fast is slowed down, to SLOWED of its pace. The times are for people and for the
order. No VM stays here because a reckoned time is too long: it is only marked `late`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from sempervirt.core.sizes import format_size
from sempervirt.evacuation.placement import (
    CROWDED,
    GIB,
    Key,
    Need,
    Room,
    best,
    by_score,
    is_crowded,
)
from sempervirt.evacuation.values import EvacuationOrder, Reason

# What a move takes beside its memory: two QEMUs, their disks, the store.
SETUP_S = 1.5
# Of the pace at which a guest changes memory, what a move leaves it at the most throttled.
SLOWED = 0.2
# A move that gains on its guest by less than this part of the link does not end by itself.
GAIN = 0.1
# A gigabit, until an earlier move has shown what the link carries.
LINK_BYTES_S = 125e6


@dataclass(frozen=True)
class Absent:
    """A host that takes no VMs, and why."""

    host: str
    why: str


@dataclass(frozen=True)
class Survey:
    """All that a plan is made of."""

    rooms: tuple[Room, ...] = ()
    needs: tuple[Need, ...] = ()
    absent: tuple[Absent, ...] = ()
    link_bytes_s: float = LINK_BYTES_S

    def need(self, vm: str) -> Need | None:
        """What that VM needs; None if it was not there."""
        return next((need for need in self.needs if need.vm == vm), None)


@dataclass(frozen=True)
class Move:
    """A VM and where it goes. `begins_s` and `ends_s` count from the beginning, as reckoned; None:
    its guest changes memory faster than the link carries, and nobody can say. `late`: it is not
    reckoned to end by the deadline.
    """

    vm: str
    host: str
    priority: int
    sent_bytes: int
    begins_s: float
    ends_s: float | None
    late: bool


@dataclass(frozen=True)
class Left:
    """A VM that cannot go, and why, in words."""

    vm: str
    reason: Reason
    why: str


@dataclass(frozen=True)
class Plan:
    """The moves in the order in which they begin, and what stays. `ends_s`: when all that is
    reckoned has ended.
    """

    moves: tuple[Move, ...] = ()
    left: tuple[Left, ...] = ()
    absent: tuple[Absent, ...] = ()
    ends_s: float = 0.0


def plan(survey: Survey, order: EvacuationOrder) -> Plan:
    """What is to be done to empty a host."""
    free = {room.host: room.memory_bytes for room in survey.rooms}
    movable = [need for need in survey.needs if not need.stuck]
    placed: dict[str, str] = {}
    for _, group in groupby(sorted(movable, key=_by_priority), key=_by_priority):
        placed |= _place(tuple(group), survey.rooms, free)
    going = [need for need in movable if need.vm in placed]
    moves = tuple(_reckoned(in_order(going, survey, order), placed, survey, order))
    left = tuple(
        why_left(need, survey.rooms, free, survey.absent)
        for need in sorted(survey.needs, key=lambda need: (_by_priority(need), need.vm))
        if need.vm not in placed
    )
    ends_s = max((move.ends_s for move in moves if move.ends_s is not None), default=0.0)
    return Plan(moves, left, survey.absent, ends_s)


def in_order(needs: Iterable[Need], survey: Survey, order: EvacuationOrder) -> list[Need]:
    """The order in which VMs leave: priority, then what is sent soonest."""
    share = _share(survey, order)

    def key(need: Need) -> tuple[int, float, str]:
        took = _takes_s(need, share)
        return _by_priority(need), float("inf") if took is None else took, need.vm

    return sorted(needs, key=key)


def why_left(
    need: Need, rooms: Sequence[Room], free: Mapping[str, int], absent: Sequence[Absent] = ()
) -> Left:
    """Why there is no host for a VM, of hosts that have so much left."""
    if need.stuck:
        return Left(need.vm, Reason.NOT_MOVABLE, need.stuck)
    if not rooms:
        why = "; ".join(f"{one.host}: {one.why}" for one in absent)
        return Left(need.vm, Reason.NO_HOST, why or "this host is alone")
    fitting = [room for room in rooms if not need.against.get(room.host)]
    if not fitting:
        return Left(need.vm, Reason.OBSTACLES, _obstacles(need, rooms))
    most = max(fitting, key=lambda room: free[room.host])
    why = (
        f"it needs {format_size(need.memory_bytes)}, and of the hosts that fit {most.host} has the "
        f"most left: {format_size(max(0, free[most.host]))}"
    )
    return Left(need.vm, Reason.NO_MEMORY, why)


def _by_priority(need: Need) -> int:
    return -need.priority


# Where


def _densely(need: Need, free: Mapping[str, int], room: Room) -> tuple[float, str]:
    """The fullest one, also to be taken last where it has too few processors."""
    crowded = -CROWDED if is_crowded(need, room) else 0.0
    return crowded + free[room.host] / GIB, room.host


def _small_first(need: Need) -> tuple[int, str]:
    return need.memory_bytes, need.vm


def _large_first(need: Need) -> tuple[int, str]:
    return -need.memory_bytes, need.vm


Sequencing = Callable[[Need], tuple[int, str]]
_WAYS: tuple[tuple[Key, Sequencing], ...] = (
    (by_score, _small_first),
    (by_score, _large_first),
    (_densely, _large_first),
    (_densely, _small_first),
)


def _place(needs: Sequence[Need], rooms: Sequence[Room], free: dict[str, int]) -> dict[str, str]:
    """The host of each VM of one priority that finds one; `free` is what is left then."""
    best: dict[str, str] = {}
    left = dict(free)
    for prefer, sequence in _WAYS:
        found, trial = _placed(sorted(needs, key=sequence), rooms, free, prefer)
        if len(found) > len(best):
            best, left = found, trial
        if len(best) == len(needs):
            break
    free.update(left)
    return best


def _placed(
    needs: Iterable[Need], rooms: Sequence[Room], free: Mapping[str, int], prefer: Key
) -> tuple[dict[str, str], dict[str, int]]:
    """One way of placing: the host of each VM that finds one, and what the hosts have left."""
    placed, left = dict[str, str](), dict(free)
    for need in needs:
        host = best(need, rooms, left, prefer)
        if host is not None:
            left[host] -= need.memory_bytes
            placed[need.vm] = host
    return placed, left


def _obstacles(need: Need, rooms: Sequence[Room]) -> str:
    """What stands in the way, each thing once, with the hosts on which it does."""
    hosts: dict[str, list[str]] = {}
    for room in rooms:
        for what in need.against.get(room.host, ()):
            hosts.setdefault(what, []).append(room.host)
    several = len(rooms) > 1
    texts = []
    for what, where in hosts.items():
        everywhere = len(where) == len(rooms)
        on = "on every host: " if everywhere else f"on {', '.join(where)}: "
        texts.append(on * several + what)
    return "; ".join(texts)


# When


def _share(survey: Survey, order: EvacuationOrder) -> float:
    """What one move has of the link, in bytes per second."""
    at_once = max(1, min(order.concurrency, len(survey.needs)))
    return survey.link_bytes_s / at_once


def _takes_s(need: Need, share: float) -> float | None:
    """How long the move of a VM takes; None: it does not end by itself."""
    gain = share - need.dirtied
    if gain < GAIN * share:
        gain = share - SLOWED * need.dirtied
    if gain < GAIN * share:
        return None
    return SETUP_S + need.sent_bytes / gain


def _reckoned(
    needs: Iterable[Need], placed: Mapping[str, str], survey: Survey, order: EvacuationOrder
) -> Iterator[Move]:
    """Each VM begins when one of the moves that go on at once has ended."""
    share = _share(survey, order)
    free_at = [0.0] * order.concurrency
    for need in needs:
        begins_s = heapq.heappop(free_at)
        took = _takes_s(need, share)
        ends_s = None if took is None else begins_s + took
        heapq.heappush(free_at, max(begins_s, order.deadline_s) if ends_s is None else ends_s)
        yield Move(
            need.vm,
            placed[need.vm],
            need.priority,
            need.sent_bytes,
            begins_s,
            ends_s,
            late=ends_s is None or ends_s > order.deadline_s,
        )
