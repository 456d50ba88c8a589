"""An evacuation: what follows from what is heard. Pure.

    MARK ──► SURVEY ──► MOVE ──► OVER
      │         │
      │         └─ failed: for an operator the host is in service again, and it is over;
      │                    on a host that ends hosts and VMs are asked again until the deadline
      └─ failed: over, nothing was done

`values.Fate` draws the way of each VM. What becomes of a VM depends on that VM alone, and on how
many moves go on: a move that hangs keeps one place, and nothing else.

- **The destination refuses, or the move fails.** The VM runs on here, and the next host that fits
  is tried; when all have been tried, all are tried again after AGAIN_S: in ROUNDS rounds for an
  operator, until the deadline on a host that ends.
- **The move has ended well.** That is the word of this host alone. The VM counts as moved when the
  store and the destination say so too.
- **The deadline.** No move begins after it. A move that goes on has the same deadline, by which it
  gives up by itself; GRACE_S later it is told to end, and after as long again what is not settled
  is called unknown: an evacuation always ends.
- **What cannot move**, on a host that ends, falls to its warm standby. For an operator it stays and
  runs on, for a standby has less than the VM that runs.

An agent that begins anew (`recover`) follows the moves that are under way, and asks hosts and VMs
again for the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from sempervirt.core.failure import Failure
from sempervirt.evacuation.placement import Room, best
from sempervirt.evacuation.plan import Survey, plan, why_left
from sempervirt.evacuation.state import (
    CancelVm,
    Checked,
    CheckVm,
    Decision,
    Effect,
    Evacuation,
    Event,
    Failed,
    Fall,
    FollowVm,
    GiveUpAsked,
    LookAround,
    Mark,
    Marked,
    MoveOver,
    MoveVm,
    NoStandby,
    Passage,
    StandbyRuns,
    Step,
    Surveyed,
    Tick,
    Unmark,
    Way,
    Word,
)
from sempervirt.evacuation.values import EvacuationOrder, Fate, Reason

AGAIN_S = 2.0
CHECK_AGAIN_S = 0.5
ROUNDS = 2
GRACE_S = 40.0
# After the deadline: nothing begins; what goes on is told to end; what is not settled is unknown.
BOUNDS = (0.0, GRACE_S, 2 * GRACE_S)
# The least that a move is given which begins just before the deadline.
LEAST_S = 1.0

# What a step makes of one VM, and what has to be done for it.
Next = tuple[Passage, list[Effect]]


def begin(order: EvacuationOrder, began: float, now: float) -> Decision:
    """A host is to be emptied. `began` is in seconds since the epoch."""
    return Evacuation(order, began, now + order.deadline_s), [Mark(order.why)]


def recover(state: Evacuation) -> Decision:
    """What the next agent goes on with; `state` is what is on record."""
    if state.over:
        return state, []
    effects: list[Effect] = [Mark(state.order.why)]
    for one in state.passages:
        match one.fate:
            case Fate.MOVES:
                effects.append(FollowVm(one.vm, one.host))
            case Fate.CHECKS:
                effects.append(CheckVm(one.vm, one.host))
            case Fate.FALLS:
                effects.append(Fall(one.vm))
            case _:  # those that wait are in the next survey, and the others have ended
                pass
    return replace(state, step=Step.MARK, survey=Survey(), again_at=None, looks=0), effects


def decide(state: Evacuation, event: Event, now: float) -> Decision:
    """The next state, and what has to be done."""
    if state.over:
        return state, []
    after, effects = _heard(state, event, now)
    after, late = _in_time(after, now)
    after, more = _go_on(after, now)
    return _timed(state, after, now), [*effects, *late, *more]


def wake_at(state: Evacuation) -> float | None:
    """When time alone changes something."""
    if state.over:
        return None
    times = [] if state.again_at is None else [state.again_at]
    if state.bounds < len(BOUNDS):
        times.append(state.until + BOUNDS[state.bounds])
    for one in state.passages:
        waits = one.fate is Fate.WAITS and _may_begin(state)
        if one.not_before and (waits or one.fate is Fate.CHECKS):
            times.append(one.not_before)
    return min(times, default=None)


# What is heard


def _heard(state: Evacuation, event: Event, now: float) -> tuple[Evacuation, list[Effect]]:
    match event:
        case Marked():
            return _marked(state)
        case Surveyed():
            return _surveyed(state, event)
        case MoveOver(vm) if (one := _in(state, vm, Fate.MOVES)) is not None:
            return _put(state, _moved(state, one, event, now))
        case Checked(vm) if (one := _in(state, vm, Fate.CHECKS)) is not None:
            return _put(state, _checked(state, one, event, now))
        case StandbyRuns(vm) if (one := _in(state, vm, Fate.FALLS)) is not None:
            return _fallen(state, one, event)
        case NoStandby(vm, why) if (one := _in(state, vm, Fate.FALLS)) is not None:
            return _put(state, (_stays(one, why), []))
        case Failed(effect, failure):
            return _failed(state, effect, failure, now)
        case GiveUpAsked():
            return _given_up(state)
        case Tick() | MoveOver() | Checked() | StandbyRuns() | NoStandby():
            return state, []  # the rest are answers that came too late
        case _:
            assert_never(event)


def _failed(
    state: Evacuation, effect: Effect, failure: Failure, now: float
) -> tuple[Evacuation, list[Effect]]:
    why = failure.message
    match effect:
        case Mark():  # an earlier agent may have begun moves already
            return _marked(state) if state.passages else (_over(state, why), [])
        case LookAround(_, look):
            if look != state.looks:
                return state, []
            if state.order.cause.ends_host and state.bounds == 0:
                return replace(state, again_at=now + AGAIN_S, failure=why), []
            return _stopped(state, why)
        case MoveVm(vm) | FollowVm(vm) if (one := _in(state, vm, Fate.MOVES)) is not None:
            return _put(state, _refused(state, one, why, now))
        case CheckVm(vm) if (one := _in(state, vm, Fate.CHECKS)) is not None:
            later = replace(one, not_before=now + CHECK_AGAIN_S, why=why)
            return _put(state, (later, []))
        case Fall(vm) if (one := _in(state, vm, Fate.FALLS)) is not None:
            unknown = replace(one, fate=Fate.UNKNOWN, why=why)
            return _put(state, (unknown if failure.unknown else _stays(one, why), []))
        case MoveVm() | FollowVm() | CheckVm() | Fall() | CancelVm() | Unmark():
            return state, []
        case _:
            assert_never(effect)


def _marked(state: Evacuation) -> tuple[Evacuation, list[Effect]]:
    if state.step is not Step.MARK:
        return state, []
    return replace(state, step=Step.SURVEY), [_look(state)]


def _look(state: Evacuation) -> LookAround:
    return LookAround(state.order.destinations, state.looks)


def _before_look(state: Evacuation, again_at: float | None) -> Evacuation:
    """A VM is to leave about which nobody was asked: all hosts are asked anew, at once or then."""
    return replace(state, step=Step.SURVEY, looks=state.looks + 1, again_at=again_at)


def _given_up(state: Evacuation) -> tuple[Evacuation, list[Effect]]:
    if state.step is not Step.MOVE:
        return _stopped(state, "it was given up")
    return _keep_here(replace(state, given_up=True), Reason.GIVEN_UP)


def _stopped(state: Evacuation, why: str) -> tuple[Evacuation, list[Effect]]:
    """No plan can be had, or none is wanted. What an earlier agent began goes on to its end."""
    if not state.passages:
        unmark: list[Effect] = [] if state.order.cause.ends_host else [Unmark()]
        return _over(state, why), unmark
    kept = replace(state, step=Step.MOVE, given_up=True, again_at=None, failure=why)
    return _keep_here(kept, Reason.GIVEN_UP)


def _keep_here(state: Evacuation, reason: Reason) -> tuple[Evacuation, list[Effect]]:
    """What has not left yet stays, and what is on its way is told to."""
    passages, effects = [], list[Effect]()
    for one in state.passages:
        after: Next = (one, [])
        if one.fate is Fate.WAITS:
            after = _cannot(state, one, reason, one.why)
        elif one.fate is Fate.MOVES and not one.cancelled:
            after = (replace(one, cancelled=True), [CancelVm(one.vm)])
        passages.append(after[0])
        effects += after[1]
    return replace(state, passages=tuple(passages)), effects


def _over(state: Evacuation, failure: str = "") -> Evacuation:
    return replace(state, step=Step.OVER, again_at=None, failure=failure)


# The plan


def _surveyed(state: Evacuation, event: Surveyed) -> tuple[Evacuation, list[Effect]]:
    if state.step is not Step.SURVEY or event.look != state.looks:
        return state, []
    survey = event.survey
    here = {need.vm for need in survey.needs}
    before = {one.vm: one for one in state.passages}
    known, effects = list[Passage](), list[Effect]()
    for one in state.passages:
        if one.fate is not Fate.WAITS:
            known.append(one)
        elif one.vm not in here and one.vm not in dict(event.moving):
            # It was moved, and the record of that was lost.
            known.append(replace(one, fate=Fate.CHECKS))
            effects.append(CheckVm(one.vm, one.host))
    begun = {one.vm for one in known}
    for vm, host in event.moving:
        if vm not in begun:
            was = before.get(vm, Passage(vm))
            known.append(replace(was, fate=Fate.MOVES, host=host, not_before=0.0))
            effects.append(FollowVm(vm, host))
    fixed = tuple(known)
    names = {one.vm for one in fixed}
    rooms = _rooms_left(survey, fixed)
    needs = tuple(need for need in survey.needs if need.vm not in names)
    made = plan(replace(survey, rooms=rooms, needs=needs), state.order)
    going = tuple(
        replace(before.get(move.vm, Passage(move.vm)), host=move.host, tried=(), not_before=0.0)
        for move in made.moves
    )
    planned = replace(
        state, step=Step.MOVE, survey=survey, passages=(*fixed, *going), again_at=None, failure=""
    )
    for left in made.left:
        was = before.get(left.vm, Passage(left.vm))
        one, more = _cannot(planned, was, left.reason, left.why)
        planned = replace(planned, passages=(*planned.passages, one))
        effects += more
    return planned, effects


def _fallen(state: Evacuation, one: Passage, event: StandbyRuns) -> tuple[Evacuation, list[Effect]]:
    """A standby that runs on another host is safe; one that runs here is a VM that has to leave."""
    if not event.here:
        return _put(state, (replace(one, fate=Fate.STANDBY, host=event.host), []))
    if state.bounds or state.given_up:
        return _put(state, (_stays(one, "its warm standby runs, on this host as well"), []))
    waits = replace(one, fate=Fate.WAITS, host="", reason=None, fell=True)
    state, _ = _put(state, (waits, []))
    state = _before_look(state, None)
    return state, [_look(state)]


def _rooms_left(survey: Survey, passages: tuple[Passage, ...]) -> tuple[Room, ...]:
    """What the hosts have left beside VMs that are here still, and have a place there."""
    needs = {need.vm: need.memory_bytes for need in survey.needs}
    taken: dict[str, int] = {}
    for one in passages:
        if one.host and one.fate not in (Fate.STAYS, Fate.LOST, Fate.ENDED):
            taken[one.host] = taken.get(one.host, 0) + needs.get(one.vm, 0)
    return tuple(
        replace(room, memory_bytes=room.memory_bytes - taken.get(room.host, 0))
        for room in survey.rooms
    )


# One VM


def _in(state: Evacuation, vm: str, fate: Fate) -> Passage | None:
    one = state.passage(vm)
    return one if one is not None and one.fate is fate else None


def _put(state: Evacuation, after: Next) -> tuple[Evacuation, list[Effect]]:
    changed, effects = after
    passages = tuple(changed if one.vm == changed.vm else one for one in state.passages)
    return replace(state, passages=passages), effects


def _moved(state: Evacuation, one: Passage, event: MoveOver, now: float) -> Next:
    one = replace(one, host=event.host or one.host)
    match event.way:
        case Way.MOVED:
            return replace(one, fate=Fate.CHECKS, not_before=0.0), [CheckVm(one.vm, one.host)]
        case Way.STAYED:
            return _refused(state, one, event.why, now)
        case Way.LOST:
            return replace(one, fate=Fate.LOST, why=event.why), []
        case Way.ENDED:
            return replace(one, fate=Fate.ENDED, host="", why=event.why), []
        case Way.CRASHED:
            return _cannot(state, one, Reason.NOT_MOVABLE, event.why)
        case _:
            assert_never(event.way)


def _checked(state: Evacuation, one: Passage, event: Checked, now: float) -> Next:
    match event.word:
        case Word.THERE:
            fate = Fate.STANDBY if one.fell else Fate.MOVED
            return replace(one, fate=fate, reason=None, why=event.why), []
        case Word.HERE:
            return _refused(state, one, event.why, now)
        case Word.ELSEWHERE:
            return replace(one, fate=Fate.UNKNOWN, why=event.why), []
        case _:
            assert_never(event.word)


def _refused(state: Evacuation, one: Passage, why: str, now: float) -> Next:
    """The VM runs on here; where next?"""
    why = f"{one.host}: {why}"
    need = state.survey.need(one.vm)
    if state.given_up:
        return _cannot(state, one, Reason.GIVEN_UP, why)
    if now >= state.until:
        return _cannot(state, one, Reason.TOO_LATE, why)
    if state.step is not Step.MOVE:
        return replace(one, fate=Fate.WAITS, host="", why=why), []
    if need is None:  # it was on its way while the hosts were asked, and they not about it
        if one.rounds + 1 >= ROUNDS and not state.order.cause.ends_host:
            return _cannot(state, one, Reason.REFUSED, why)
        return replace(one, fate=Fate.WAITS, host="", rounds=one.rounds + 1, why=why), []
    others = tuple(other for other in state.passages if other.vm != one.vm)
    rooms = _rooms_left(state.survey, others)
    free = {room.host: room.memory_bytes for room in rooms}
    tried = (*one.tried, one.host)
    waits = replace(one, fate=Fate.WAITS, why=why, not_before=0.0)
    if (host := best(need, [one for one in rooms if one.host not in tried], free)) is not None:
        return replace(waits, host=host, tried=tried), []
    rounds = one.rounds + 1
    if rounds >= ROUNDS and not state.order.cause.ends_host:
        return _cannot(state, one, Reason.REFUSED, why)
    if (host := best(need, rooms, free)) is not None:
        again = replace(waits, host=host, tried=(), rounds=rounds, not_before=now + AGAIN_S)
        return again, []
    left = why_left(need, rooms, free, state.survey.absent)
    return _cannot(state, one, left.reason, left.why)


def _cannot(state: Evacuation, one: Passage, reason: Reason, why: str) -> Next:
    """The VM does not move. What stays on a host that ends is lost, unless it has a standby."""
    stays = replace(one, host="", reason=reason, why=why, not_before=0.0)
    if state.order.cause.ends_host and not (state.given_up or one.fell):
        return replace(stays, fate=Fate.FALLS), [Fall(one.vm)]
    return _stays(stays), []


def _stays(one: Passage, standby: str = "") -> Passage:
    why = "; ".join(part for part in (one.why, standby) if part)
    return replace(one, fate=Fate.STAYS, host="", why=why)


# Time


def _in_time(state: Evacuation, now: float) -> tuple[Evacuation, list[Effect]]:
    """What the bounds in time say that have passed by now."""
    effects: list[Effect] = []
    while not state.over and state.bounds < len(BOUNDS):
        if now < state.until + BOUNDS[state.bounds]:
            break
        state, more = _passed(replace(state, bounds=state.bounds + 1))
        effects += more
    return state, effects


def _passed(state: Evacuation) -> tuple[Evacuation, list[Effect]]:
    if state.bounds == 1:
        if state.step is Step.MOVE:
            return _only_waiting(state)
        return _stopped(state, state.failure or "hosts and VMs were not heard by the deadline")
    if state.bounds == 2:
        return _keep_here(_unsettled(state, Fate.CHECKS), Reason.TOO_LATE)
    return _unsettled(state, Fate.CHECKS, Fate.MOVES, Fate.FALLS), []


def _only_waiting(state: Evacuation) -> tuple[Evacuation, list[Effect]]:
    """At the deadline what has not begun stays."""
    passages, effects = [], list[Effect]()
    for one in state.passages:
        after: Next = (one, [])
        if one.fate is Fate.WAITS:
            after = _cannot(state, one, Reason.TOO_LATE, one.why)
        passages.append(after[0])
        effects += after[1]
    return replace(state, passages=tuple(passages)), effects


def _unsettled(state: Evacuation, *fates: Fate) -> Evacuation:
    """Nobody could say in time what became of these VMs."""

    def settled(one: Passage) -> Passage:
        if one.fate not in fates:
            return one
        why = one.why or f"it was still on its way to {one.host or 'its standby'} at the end"
        return replace(one, fate=Fate.UNKNOWN, why=why)

    return replace(state, passages=tuple(settled(one) for one in state.passages))


def _may_begin(state: Evacuation) -> bool:
    going = sum(one.fate is Fate.MOVES for one in state.passages)
    return state.step is Step.MOVE and state.bounds == 0 and going < state.order.concurrency


def _is_placed_anew(state: Evacuation) -> bool:
    """Whether a VM is to go for which no place was asked for."""
    return any(one.fate is Fate.WAITS and not one.host for one in state.passages)


def _go_on(state: Evacuation, now: float) -> tuple[Evacuation, list[Effect]]:
    """Begins what may begin; ends the whole when every VM has its outcome."""
    effects: list[Effect] = []
    if state.again_at is not None and now >= state.again_at:
        state = replace(state, again_at=None)
        effects.append(_look(state))
    if state.step is Step.MOVE and _is_placed_anew(state):
        state = _before_look(state, now + AGAIN_S)  # the move that failed may not be over here
    for one in state.passages:
        if now < one.not_before:
            continue
        if one.fate is Fate.WAITS and _may_begin(state):
            rest_s = max(LEAST_S, state.until - now)
            pressing = state.order.cause.ends_host
            move = MoveVm(one.vm, one.host, rest_s, pressing)
            state, more = _put(state, (replace(one, fate=Fate.MOVES, not_before=0.0), [move]))
            effects += more
        elif one.fate is Fate.CHECKS and one.not_before:
            check = CheckVm(one.vm, one.host)
            state, more = _put(state, (replace(one, not_before=0.0), [check]))
            effects += more
    if state.step is Step.MOVE and all(one.fate.is_end for one in state.passages):
        state = _over(state, state.failure)
    return state, effects


def _timed(before: Evacuation, after: Evacuation, now: float) -> Evacuation:
    """Notes when moves begin and fates are certain."""
    since = now - (after.until - after.order.deadline_s)
    was = {one.vm: one.fate for one in before.passages}

    def timed(one: Passage) -> Passage:
        if one.fate is was.get(one.vm):
            return one
        if one.fate is Fate.MOVES and one.began_s is None:
            return replace(one, began_s=since)
        return replace(one, ended_s=since) if one.fate.is_end else one

    passages = tuple(timed(one) for one in after.passages)
    ended = after.began + since if after.over and not before.over else after.ended
    return replace(after, passages=passages, ended=ended)
