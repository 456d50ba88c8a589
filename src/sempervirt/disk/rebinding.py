"""Which process is told, and when, which thread works on which queue: a pure part of `decide`.

    RebindAsked ──► waits for its turn ──► the active process is told ──► Told: the map is recorded,
                                                 ▲         │              and the others are told
                                                 └─────────┘
                                      it died, or did not answer: again, until the deadline

- One process is told at a time, so no older map can overtake a newer one.
- The map that counts changes only when the active process works by the new one. Whoever is started
  later is started with that map.
- A process with another map serves as well. Who is seen to work by another map (the active process
  died just then, or a former agent did) is told; if that fails, the next status shows it again.
"""

from __future__ import annotations

from dataclasses import replace

from sempervirt.core.errors import Unavailable
from sempervirt.core.failure import Failure
from sempervirt.disk.state import (
    Decision,
    Effect,
    MapSeen,
    Policy,
    RebindAsked,
    RebindEnded,
    Rebinding,
    State,
    Tell,
    Telling,
    Told,
)


def asked(state: State, event: RebindAsked, now: float, policy: Policy) -> Decision:
    """Somebody wants the queues on other threads."""
    if state.stopping:
        return state, [RebindEnded(event.ticket, event.binding, _NOT_SERVED)]
    waiting = Rebinding(event.binding, event.ticket, now + policy.rebind_s)
    return replace(state, rebindings=(*state.rebindings, waiting)), []


def map_seen(state: State, event: MapSeen) -> State:
    """The active process works by a map that may be another one than the recorded one."""
    if state.binding is None or state.rebindings or event.map == state.binding.map:
        return state
    return replace(state, astray=state.astray | {event.generation})


def told(state: State, event: Told, now: float, policy: Policy) -> Decision:
    """What came of telling a process."""
    telling = state.telling
    if telling is None or telling.generation != event.generation:
        return state, []
    state = replace(state, telling=None)
    if telling.ticket == 0:
        return replace(state, astray=state.astray - {event.generation}), []
    if not state.rebindings or state.rebindings[0].ticket != telling.ticket:
        return state, []
    first, *others = state.rebindings
    if event.failure is None:
        recorded = replace(
            state,
            binding=first.binding,
            rebindings=tuple(others),
            astray=_processes(state) - {event.generation},
        )
        return recorded, [RebindEnded(first.ticket, first.binding)]
    if event.failure.again and now < first.deadline:
        return replace(state, tell_due=now + policy.retell_s), []
    ended = replace(state, rebindings=tuple(others))
    return ended, [RebindEnded(first.ticket, first.binding, event.failure)]


def expire(state: State, now: float) -> Decision:
    """Gives requests up that no process was there for."""
    if state.telling is not None or not state.rebindings:
        return state, []
    first, *others = state.rebindings
    if now < first.deadline:
        return state, []
    failure = Failure.named(Unavailable, "no backend has moved the queues in time")
    ended = replace(state, rebindings=tuple(others), tell_due=None)
    return ended, [RebindEnded(first.ticket, first.binding, failure)]


def give_up(state: State) -> Decision:
    """The disk is being stopped."""
    ended: list[Effect] = [
        RebindEnded(rebinding.ticket, rebinding.binding, _NOT_SERVED)
        for rebinding in state.rebindings
    ]
    return replace(state, rebindings=(), astray=frozenset(), tell_due=None), ended


def tell_next(state: State, now: float) -> Decision:
    """Begins to tell the next process its map, unless one is being told."""
    if state.telling is not None or state.stopping:
        return state, []
    if state.rebindings:
        first, due = state.rebindings[0], state.tell_due
        if state.active is None or (due is not None and now < due):
            return state, []
        generation = state.active.generation
        told = replace(state, telling=Telling(generation, first.ticket), tell_due=None)
        return told, [Tell(generation, first.binding)]
    astray = state.astray & _processes(state)
    state = replace(state, astray=astray)
    if not astray or state.binding is None:
        return state, []
    generation = min(astray)
    return replace(state, telling=Telling(generation)), [Tell(generation, state.binding)]


def wake_times(state: State) -> list[float]:
    """When time alone changes something here."""
    if state.telling is not None or not state.rebindings:
        return []
    # While nobody serves, the next try begins with the next process.
    due = [state.tell_due] if state.tell_due is not None and state.active else []
    return [state.rebindings[0].deadline, *due]


def _processes(state: State) -> frozenset[int]:
    return frozenset(b.generation for b in (state.active, state.spare) if b)


_NOT_SERVED = Failure.named(Unavailable, "the disk is not served any more")
