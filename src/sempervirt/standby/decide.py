"""What is done next about the standbys of a VM: a pure decision.

    TAKING ─► COPYING ─► BOOTING ─► SETTLING ─► FREEZING ─► STANDING ─► READY ─ take-over ─► SERVING
      └──────────┴──────────┴──────────┴───────────┴───────────┴──────────┤ a newer one is READY │
                     not made: why is told, and tried again later         ▼                      ▼
                                                                  RETIRING ─► gone             LOST

    READY ─ take-over ─ called off ─► RETURNING ─ what has loaded the state gives way ─► READY

    DECLARED ─ state loaded, first VM proven dead ─► CLAIMING ─► RUNNING ─► PROBING ─► DONE
       └──────────────── no generation is left ─────────┴─► FAILED

- One generation is made at a time, and only while the first VM runs. An older one is retired once
  there are `policy.keep` newer ones that are READY, and never before.
- DECLARED: the first VM's QEMU was seen to have ended, or an operator asked. Loading the state and
  proving that the first VM writes no more go on together: the standby writes to no disk that the
  first VM has before the proof is there. A proof that is not there yet is tried for again, for as
  long as it takes, or until an operator calls the take-over off. A generation that cannot be loaded
  is retired, and the next older one is tried.
- A take-over that is called off spends no standby: what has loaded the state, and cannot wait with
  it, gives way to a QEMU that waits for the same memory and state (RETURNING). Where that fails
  another standby is made at once.
- CLAIMING and RUNNING are on record before they are done. CLAIMING is the point of no return: from
  then on the generation is the VM. A guest that then does not run is a VM that an operator sees,
  paused or unknown; no other generation is tried, for the guest may have run.
- The VM that took over gets standbys of its own. The disks of a generation that was the VM before
  are kept for a week (LOST): they have what was written after the snapshot.
- An agent that begins anew goes on by `recover`, with what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.core.failure import Failure
from sempervirt.standby.lost import KEPT_S, WRONG_CLOCK_S
from sempervirt.standby.state import (
    Accept,
    Boot,
    Booted,
    CancelAsked,
    Claim,
    Claimed,
    Copied,
    Copy,
    Decision,
    DisableAsked,
    Effect,
    Event,
    Failed,
    FailoverAsked,
    Fence,
    Fenced,
    First,
    FirstSeen,
    Found,
    Freeze,
    Frozen,
    Generation,
    GivenUp,
    GiveUp,
    Life,
    Load,
    Loaded,
    Lost,
    Making,
    PolicyAsked,
    Probe,
    Probed,
    Refuse,
    Rehearsed,
    Remove,
    Removed,
    Run,
    Runs,
    Settle,
    Settled,
    Stand,
    StandAgain,
    Standby,
    Step,
    Stood,
    Take,
    Taken,
    TakeOver,
    Tick,
    Unrecorded,
)
from sempervirt.standby.values import Policy, Tier

AGAIN_S = 1.0
# After a generation that was not made; doubled each time, at most until the next one is due.
RETRY_S = 15.0
UNRECORDED = Failure.named(
    Unavailable, "the record cannot be written", "make room in the state directory"
)


def begin(vm: str, policy: Policy) -> Standby:
    """The standbys of the VM of that name: none yet."""
    return Standby(vm, policy)


def decide(state: Standby, event: Event, now: float) -> Decision:  # noqa: C901 one case an event
    """The next state, and what has to be done."""
    match event:
        case FirstSeen():
            return _first_seen(state, event, now)
        case Taken(number, time, snapshots, consistency):
            taken = _changed(
                state, number, taken=time, snapshots=snapshots, consistency=consistency
            )
            one = taken.generation(number)
            if one is None or not one.life.being_made:
                return _unwanted(state, snapshots)
            return _made(taken, number, Life.COPYING, Copy(number, snapshots, _ours(taken)))
        case Copied(number, notes):
            copied = _noted(_changed(state, number, snapshots=()), number, notes)
            return _made(copied, number, Life.BOOTING, Boot(number))
        case Booted(number, seconds):
            booted = _changed(state, number, made_s=seconds)
            return _made(booted, number, Life.SETTLING, Settle(number))
        case Settled(number, notes):
            settled = _noted(state, number, notes)
            return _made(settled, number, Life.FREEZING, Freeze(number, _tier(state, number)))
        case Frozen(number, machine, memory_bytes):
            frozen = _changed(state, number, machine=machine, memory_bytes=memory_bytes)
            stand = Stand(number, machine, _tier(state, number))
            return _made(frozen, number, Life.STANDING, stand)
        case Stood():
            return _stood(state, event, now)
        case Lost(number, why):
            return _lost(state, number, why, now)
        case Removed(number):
            kept = tuple(one for one in state.generations if one.number != number)
            return _closed(replace(state, generations=kept))
        case GivenUp(snapshots, notes):
            given = _without(state, snapshots)
            return (replace(given, trouble="; ".join(notes)) if notes else given), []
        case Loaded(number):
            return _prepared(_timed(state, number, "loaded", now, loaded=True), number)
        case Fenced():
            over = state.take_over
            if over is None:
                return state, []
            fenced = _timed(state, over.number, "fenced", now, fenced=True, again_at=None)
            return _prepared(fenced, over.number)
        case Claimed(number):
            claimed = _serves(_timed(state, number, "claimed", now, step=Step.RUNNING), number)
            return claimed, [Run(number)]
        case Runs(number, notes):
            # What was seen of the VM before is of the one that has ended.
            state = replace(state, first=First.RUNNING, why="")
            runs = _timed(state, number, "running", now, step=Step.PROBING)
            return _told(runs, notes), [Probe(number)]
        case Probed(number, _, notes):
            probed = _told(_timed(state, number, "probed", now, step=Step.DONE), notes)
            return _over(probed, now, None)
        case Failed(effect, failure):
            return _failed(state, effect, failure, now)
        case FailoverAsked():
            return _failover(state, event, now)
        case CancelAsked(ticket):
            return _called_off(state, ticket, now)
        case Rehearsed(time):
            return replace(state, tested=time), []
        case PolicyAsked(policy):
            # Standbys that were removed come again; that one has taken over is still known.
            closing = state.closing and not state.over
            return replace(state, policy=policy, due=min(state.due, now), closing=closing), []
        case DisableAsked(ticket):
            return _close(state, ticket)
        case Unrecorded(undone):
            return _unrecorded(state, undone, now)
        case Tick():
            return _tick(state, now)
        case _:
            assert_never(event)


def wake_at(state: Standby) -> float | None:
    """When time alone changes the state."""
    times = [one.again_at for one in state.generations]
    if state.take_over is not None:
        times.append(state.take_over.again_at)
    elif state.first is First.RUNNING and state.making is None and not state.closing:
        times.append(state.due)
    return min((time for time in times if time is not None), default=None)


def must_be_on_record(before: Standby, after: Standby) -> bool:
    """Whether a step begins what the next agent has to know of."""
    step = after.take_over.step if after.take_over is not None else None
    was = before.take_over.step if before.take_over is not None else None
    return after.last != before.last or (step is not was and step in (Step.CLAIMING, Step.RUNNING))


def recover(state: Standby, found: Mapping[int, Found], now: float) -> Decision:
    """What another agent has left, and what is there of each generation.

    What was being made is removed. A take-over goes on where it was: from the claim on it is the
    only one that has the VM.
    """
    effects: list[Effect] = []
    kept = []
    unwanted = state.unwanted
    over = state.take_over
    for one in state.generations:
        seen = found.get(one.number, Found.NOTHING)
        usable = seen in (Found.KEPT, Found.WAITS, Found.LOADED)
        taking_over = over is not None and over.number == one.number
        if one.life in (Life.SERVING, Life.LOST) or (
            one.life is Life.READY and usable and (seen is not Found.LOADED or taking_over)
        ):
            kept.append(one)
        elif one.life is Life.RETURNING and seen is Found.KEPT:
            kept.append(replace(one, life=Life.READY))
        elif one.life is Life.RETURNING and seen is Found.WAITS:
            # It may not have been prepared for its state yet: it is made to wait once more.
            kept.append(one)
            effects.append(StandAgain(one.number, one.machine, one.tier))
        else:
            kept.append(replace(one, life=Life.RETIRING, again_at=None, snapshots=()))
            effects.append(Remove(one.number))
            unwanted += one.snapshots  # of a copy that was not made to its end
    due = min(state.due, now + state.policy.every_s)
    state = replace(state, generations=tuple(kept), due=due, ticket=0, first=First.AWAY)
    if unwanted:
        state, more = _unwanted(replace(state, unwanted=()), unwanted)
        effects += more
    if over is None:
        return state, effects
    over = replace(over, ticket=0, again_at=None, fenced=False, since=min(over.since, now))
    state = replace(state, take_over=over)
    match over.step, found.get(over.number, Found.NOTHING):
        case (Step.PROBING, _) | (_, Found.RUNS):
            state = _serves(replace(state, take_over=replace(over, step=Step.PROBING)), over.number)
            return state, [*effects, Probe(over.number)]
        case Step.RUNNING, _:
            return state, [*effects, Run(over.number)]
        case Step.CLAIMING, Found.LOADED:
            return state, [*effects, Claim(over.number)]
        case Step.DECLARED, Found.LOADED:
            state = replace(state, take_over=replace(over, loaded=True))
            return state, [*effects, Fence(over.forced, over.word)]
        case Step.DECLARED, Found.KEPT | Found.WAITS:
            state = replace(state, take_over=replace(over, loaded=False))
            return state, [*effects, _load(state, over.number), Fence(over.forced, over.word)]
        case _:
            why = Failure.named(Unavailable, "the standby ended while no agent ran")
            after, more = _other(state, over.number, why, now)
            return after, [*effects, *(one for one in more if one not in effects)]


# Making


def _next(state: Standby, now: float) -> Decision:
    """Begins the next generation, if it is time. Only in steps of which nothing else follows: one
    that cannot be put on record is not taken.
    """
    idle = state.making is None and state.take_over is None and not state.closing
    if not idle or state.first is not First.RUNNING or now < state.due:
        return state, []
    number = state.last + 1
    made = Generation(number, Life.TAKING, state.policy.tier)
    begun = replace(state, last=number, generations=(*state.generations, made))
    return begun, [Take(number)]


def _made(state: Standby, number: int, life: Life, then: Making) -> Decision:
    """The generation is one step further. One that is not wanted any more stays what it is."""
    one = state.generation(number)
    if one is None or not one.life.being_made:
        return state, []
    return _changed(state, number, life=life), [then]


def _stood(state: Standby, stood: Stood, now: float) -> Decision:
    number = stood.number
    one = state.generation(number)
    if one is None or one.life not in (Life.STANDING, Life.RETURNING):
        return state, []
    state = _changed(state, number, life=Life.READY)
    if one.life is Life.STANDING:
        state = replace(state, due=now + state.policy.every_s, failures=0)
    state = replace(state, trouble="")
    effects: list[Effect] = []
    over = state.take_over
    for old in state.ready[: -state.policy.keep]:
        if over is not None and over.number == old.number:
            continue  # an older one takes over, while this one was still being made
        state, more = _retire(state, old.number)
        effects += more
    if state.first is First.DEAD and over is None and not state.declined:
        declared, more = _declare(state, state.why, stood.time, now)
        return declared, [*effects, *more]
    return state, effects


def _not_made(state: Standby, number: int, failure: Failure, now: float) -> Decision:
    one = state.generation(number)
    if one is None or not one.life.being_made:
        return state, []
    wait = min(RETRY_S * 2 ** min(state.failures, 10), state.policy.every_s)
    what = f"standby {number} was not made ({one.life.value}): {failure.message}"
    if failure.remedy:
        what += f"; {failure.remedy}"
    failed = replace(state, failures=state.failures + 1, trouble=what, due=now + wait)
    return _retire(failed, number)


def _retire(state: Standby, number: int) -> Decision:
    return _changed(state, number, life=Life.RETIRING), [Remove(number)]


def _lost(state: Standby, number: int, why: str, now: float) -> Decision:
    over = state.take_over
    if over is not None and over.number == number:
        if over.step is not Step.DECLARED:
            return state, []  # the claim, or the order to run, fails and says so
        return _other(state, number, Failure.named(Unavailable, why), now)
    one = state.generation(number)
    if one is None or one.life is not Life.READY:
        return state, []
    return _retire(replace(state, trouble=f"standby {number}: {why}", due=now), number)


# Taking over


def _first_seen(state: Standby, seen: FirstSeen, now: float) -> Decision:
    declined = state.declined and seen.first is not First.RUNNING
    state = replace(state, first=seen.first, why=seen.why, declined=declined)
    over = state.take_over
    if over is not None:
        alarm = over.step is Step.DECLARED and not over.forced and not over.fenced
        if not alarm or seen.first is not First.RUNNING:
            return state, []
        runs = Failure.named(StateConflict, f"VM {state.vm} runs again")
        return _given_up(state, runs, now)
    for one in state.generations:
        if one.life is Life.LOST and KEPT_S <= seen.time - one.ended < WRONG_CLOCK_S:
            return _retire(state, one.number)
    if state.closing:
        return state, []
    match seen.first:
        case First.DEAD if state.declined:
            return state, []
        case First.DEAD if state.ready:
            return _declare(state, seen.why, seen.time, now)
        case First.DEAD:
            return replace(state, trouble=f"{seen.why}, and no standby is ready"), []
        case First.RUNNING | First.AWAY:
            return _next(state, now)
        case _:
            assert_never(seen.first)


def _declare(state: Standby, cause: str, time: float, now: float) -> Decision:
    newest = state.ready[-1]
    over = TakeOver(newest.number, cause, time, now)
    return replace(state, take_over=over), [_load(state, newest.number), Fence(kill=False)]


def _failover(state: Standby, asked: FailoverAsked, now: float) -> Decision:
    def refused(why: str, remedy: str = "") -> Decision:
        return state, [Refuse(asked.ticket, Failure.named(StateConflict, why, remedy))]

    if state.closing or state.take_over is not None:
        return refused(f"VM {state.vm} has a take-over or the end of its standbys under way")
    if not state.ready:
        why = f": {state.trouble}" if state.trouble else ""
        return refused(f"no standby of VM {state.vm} is ready{why}")
    if state.first is First.RUNNING and not asked.force:
        return refused(
            f"VM {state.vm} runs, and what it wrote to its system disk since the snapshot would "
            "be lost",
            f"lose nothing: semper standby switchover {state.vm}; or end it and take over "
            f"nevertheless: semper standby failover {state.vm} --force",
        )
    declared, _ = _declare(state, asked.cause, asked.time, now)
    assert declared.take_over is not None
    over = replace(declared.take_over, forced=True, word=asked.word, ticket=asked.ticket)
    declared = replace(declared, declined=False)
    return replace(declared, take_over=over), [
        _load(state, over.number),
        Fence(kill=True, word=over.word),
    ]


def _called_off(state: Standby, ticket: int, now: float) -> Decision:
    def refused(why: str) -> Decision:
        return state, [Refuse(ticket, Failure.named(StateConflict, why))]

    over = state.take_over
    if over is None:
        return refused(f"no standby of VM {state.vm} takes over")
    if over.step is not Step.DECLARED:
        return refused(f"standby {over.number} is VM {state.vm} already: its guest may have run")
    called = Failure.named(StateConflict, "an operator has called it off")
    after, effects = _given_up(replace(state, declined=True), called, now)
    return after, [*effects, Accept(ticket)]


def _prepared(state: Standby, number: int) -> Decision:
    over = state.take_over
    if over is None or over.number != number or over.step is not Step.DECLARED:
        return state, []
    if not (over.loaded and over.fenced):
        return state, []
    return replace(state, take_over=replace(over, step=Step.CLAIMING)), [Claim(number)]


def _serves(state: Standby, number: int) -> Standby:
    """That generation is the VM, and the one before is kept."""
    before = state.serving
    if before is not None and before.number != number:
        ended = state.take_over.began if state.take_over else 0.0
        state = _changed(state, before.number, life=Life.LOST, ended=ended)
    return _changed(state, number, life=Life.SERVING)


def _other(state: Standby, number: int, failure: Failure, now: float) -> Decision:
    """That generation cannot take over; the next older one is tried."""
    over = state.take_over
    assert over is not None
    if over.step is not Step.DECLARED:
        return _over(state, now, failure)
    state, effects = _retire(state, number)
    note = f"standby {number} could not take over: {failure.message}"
    if not state.ready:
        after, more = _over(_told(state, (note,)), now, failure)
        return after, [*effects, *more]
    newest = state.ready[-1]
    again = replace(over, number=newest.number, loaded=False, notes=(*over.notes, note))
    return replace(state, take_over=again), [*effects, _load(state, newest.number)]


def _over(state: Standby, now: float, failure: Failure | None) -> Decision:
    """The take-over has come to its end, well or not."""
    over = state.take_over
    if over is None:
        return state, []
    effects: list[Effect] = []
    if failure is not None:
        over = replace(over, step=Step.FAILED, trouble=failure.message)
    if over.ticket:
        answer = Refuse(over.ticket, failure) if failure else Accept(over.ticket)
        effects.append(answer)
    state = replace(state, take_over=None, past=replace(over, again_at=None), due=now)
    if failure is not None:
        state = replace(state, trouble=f"no take-over: {failure.message}")
    return state, effects


def _failed(  # noqa: C901 one case an effect
    state: Standby, effect: Effect, failure: Failure, now: float
) -> Decision:
    match effect:
        case Take(number) | Copy(number) | Boot(number) | Settle(number):
            return _not_made(state, number, failure, now)
        case Freeze(number) | Stand(number):
            return _not_made(state, number, failure, now)
        case StandAgain(number):
            return _spent(state, number, failure, now)
        case Remove(number):
            what = f"standby {number} is not removed: {failure.message}"
            state = _changed(state, number, again_at=now + RETRY_S)
            return replace(state, trouble=what), []
        case GiveUp(snapshots):
            which = ", ".join(f"{number} of disk {disk}" for disk, number in snapshots)
            what = f"a snapshot that was taken for a standby stays ({which}): {failure.message}"
            return replace(_without(state, snapshots), trouble=what), []
        case Load(number):
            over = state.take_over
            mine = over is not None and over.number == number
            return _other(state, number, failure, now) if mine else (state, [])
        case Fence() if failure.again or state.take_over is None:
            return _again(state, failure, now), []
        case Fence():
            return _given_up(state, failure, now)
        case Claim(number):
            if failure.again:
                return _again(state, failure, now), []
            state, effects = _retire(state, number)
            after, more = _over(state, now, failure)
            return after, [*effects, *more]
        case Run():
            return _over(state, now, failure)
        case Probe():
            return _over(_told(state, (f"not probed: {failure.message}",)), now, None)
        case Accept() | Refuse():
            return state, []  # no work is begun for these
        case _:
            assert_never(effect)


def _given_up(state: Standby, failure: Failure, now: float) -> Decision:
    """The first VM is not to be taken over any more: it lives, or somebody has started it again.
    What has loaded the state is made to wait for it once more, and can take over then.
    """
    over = state.take_over
    assert over is not None
    if over.step is not Step.DECLARED:
        return _again(state, failure, now), []
    one = state.generation(over.number)
    if one is None or one.life is not Life.READY:
        return _over(state, now, failure)
    due, note = state.due, f"standby {one.number} is not spent: it is made to wait once more"
    state = _changed(_told(state, (note,)), one.number, life=Life.RETURNING)
    after, effects = _over(state, now, failure)
    again = StandAgain(one.number, one.machine, one.tier)
    return replace(after, due=due, trouble=f"{after.trouble}; {note}"), [again, *effects]


def _spent(state: Standby, number: int, failure: Failure, now: float) -> Decision:
    """What was to wait once more does not: another one is made at once."""
    one = state.generation(number)
    if one is None or one.life is not Life.RETURNING:
        return state, []
    what = f"standby {number} does not wait any more, and another one is made: {failure.message}"
    return _retire(replace(state, trouble=what, due=now), number)


def _again(state: Standby, failure: Failure, now: float) -> Standby:
    over = state.take_over
    if over is None:
        return state
    over = replace(over, again_at=now + AGAIN_S, trouble=failure.message)
    return replace(state, take_over=over)


def _tick(state: Standby, now: float) -> Decision:
    effects: list[Effect] = []
    for one in state.generations:
        if one.again_at is not None and one.again_at <= now:
            state = _changed(state, one.number, again_at=None)
            effects.append(Remove(one.number))
    over = state.take_over
    if over is None:
        state, more = _next(state, now)
    elif over.again_at is None or now < over.again_at:
        more = []
    else:
        state, more = _tried_again(replace(state, take_over=replace(over, again_at=None)), over)
    return state, [*effects, *more]


def _tried_again(state: Standby, over: TakeOver) -> Decision:
    if over.step is Step.CLAIMING:
        return state, [Claim(over.number)]
    return (
        _prepared(state, over.number) if over.fenced else (state, [Fence(over.forced, over.word)])
    )


def _unrecorded(state: Standby, undone: Event, now: float) -> Decision:
    """Nothing is claimed, and nothing begun, of which the next agent would not know."""
    match undone:
        case Loaded(number):
            state = _timed(state, number, "loaded", now, loaded=True)
        case Fenced() if state.take_over is not None:
            state = _timed(state, state.take_over.number, "fenced", now, fenced=True)
        case _:
            pass  # whatever it was is tried again: it is decided anew from what is seen
    return replace(_again(state, UNRECORDED, now), due=max(state.due, now + RETRY_S)), []


# The end


def _close(state: Standby, ticket: int) -> Decision:
    if state.take_over is not None:
        why = f"a standby of VM {state.vm} takes over"
        return state, [Refuse(ticket, Failure.named(StateConflict, why, "wait for its end"))]
    if state.closing:
        why = f"the standbys of VM {state.vm} are being removed"
        return state, [Refuse(ticket, Failure.named(StateConflict, why))]
    state = replace(state, closing=True, ticket=ticket)
    effects: list[Effect] = []
    for one in state.generations:
        if one.life not in (Life.SERVING, Life.LOST, Life.RETIRING):
            state, more = _retire(state, one.number)
            effects += more
    state, more = _closed(state)
    return state, [*effects, *more]


def _closed(state: Standby) -> Decision:
    if state.over and state.ticket:
        return replace(state, ticket=0), [Accept(state.ticket)]
    return state, []


# Small changes


def _changed(state: Standby, number: int, **changes: object) -> Standby:
    generations = tuple(
        replace(one, **changes) if one.number == number else one  # type: ignore[arg-type]
        for one in state.generations
    )
    return replace(state, generations=generations)


def _noted(state: Standby, number: int, notes: tuple[str, ...]) -> Standby:
    one = state.generation(number)
    return state if one is None else _changed(state, number, notes=(*one.notes, *notes))


def _timed(state: Standby, number: int, what: str, now: float, **changes: object) -> Standby:
    """The take-over by that generation is one step further."""
    over = state.take_over
    if over is None or over.number != number:
        return state
    step = (what, round((now - over.since) * 1e3, 1))
    over = replace(over, steps=(*over.steps, step), trouble="", **changes)  # type: ignore[arg-type]
    return replace(state, take_over=over)


def _told(state: Standby, notes: tuple[str, ...]) -> Standby:
    over = state.take_over
    if over is None:
        return state
    return replace(state, take_over=replace(over, notes=(*over.notes, *notes)))


def _ours(state: Standby) -> tuple[tuple[str, int], ...]:
    """The snapshots that were taken for standbys."""
    return tuple(snapshot for one in state.generations for snapshot in one.snapshots)


def _unwanted(state: Standby, snapshots: tuple[tuple[str, int], ...]) -> Decision:
    """No copy of those is made any more."""
    state = replace(state, unwanted=(*state.unwanted, *snapshots))
    return state, [GiveUp(snapshots, (*_ours(state), *state.unwanted))]


def _without(state: Standby, snapshots: tuple[tuple[str, int], ...]) -> Standby:
    left = tuple(one for one in state.unwanted if one not in snapshots)
    return replace(state, unwanted=left)


def _tier(state: Standby, number: int) -> Tier:
    one = state.generation(number)
    return one.tier if one is not None else state.policy.tier


def _load(state: Standby, number: int) -> Load:
    one = state.generation(number)
    assert one is not None
    return Load(number, one.machine, one.tier)
