"""What the guard does about a sign: a pure function of the presets, the state, the event and time.

    WATCHING ──evacuate──► EVACUATING ──nothing left──► EMPTY ─► the module may let it panic
       │                    ▲      │
       │                    │      └─VMs left─► WAITING ──time──► EVACUATING, so many times
       │                    │                      └──no attempt left──► STAYING: operator needed
       │                    └── a further sign that means "evacuate", in EMPTY, WAITING, STAYING
       └──let-die──► LET_DIE, from every phase and for good: nothing is put off or moved any more

- **Once.** While an evacuation goes on, further signs that ask for one are evidence and nothing
else.
  After one has ended, a further sign begins the next one; in EMPTY that finds nothing to do, unless
  somebody has brought VMs back meanwhile.
- **Rate.** A rule with `at_least` takes effect when that many signs were seen within `within_s`;
before,
  the sign is counted, and that is told.
- **Storms.** Each kind of sign is told at most once in `QUIET_S`, with the number of those in
between; what
  changes something is told each time. The state stays small, however much is seen.
- **The next agent** hears the module's first events again. Those of which nothing follows any more
  are on record (`KeepHeard`), by their time, and begin nothing: an agent that dies while the VMs
  leave leaves the events to the next one.
- **A simulated sign** decides like a real one, but the module is told nothing on its account.
- **An orderly shutdown** is a sign whose evacuation holds the shutdown, for `hold_s` at most: then
it goes
  on, whatever is left.

Method of US10552210B2: a predefined event, a policy for it, the live migration, then the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from sempervirt.guard.presets import Afterwards, Meaning, Presets, Rule
from sempervirt.guard.signs import Sign, SignId, one_line
from sempervirt.guard.sources.module import ModuleCommand
from sempervirt.guard.state import (
    Action,
    BeginEvacuation,
    Decided,
    Decision,
    Effect,
    EvacuationEnded,
    Event,
    GuardState,
    KeepHeard,
    LoadingEnded,
    LoadModule,
    ModuleIsThere,
    Phase,
    ReleaseShutdown,
    Seen,
    Tally,
    TellModule,
    Tick,
)

# Nothing follows any more from what the module has told so far. In STAYING and LET_DIE the next
# agent begins with that again.
SETTLED = (Phase.WATCHING, Phase.EMPTY)
QUIET_S = 60.0
DECISIONS_MAX = 256
EVIDENCE_MAX = 8
NAMES_MAX = 20
# After a failure the module is not loaded again for so long.
LOAD_AGAIN_S = 300.0


def decide(presets: Presets, state: GuardState, event: Event, now: float) -> Decided:
    """The next state, and what is to be done."""
    after, effects = _decided(presets, state, event, now)
    if after.phase in SETTLED and after.heard_ns > after.settled_ns:
        after = replace(after, settled_ns=after.heard_ns)
        effects = [*effects, KeepHeard(after.heard_ns)]
    return after, effects


def _decided(presets: Presets, state: GuardState, event: Event, now: float) -> Decided:
    match event:
        case Seen(sign):
            return _seen(presets, state, sign, now)
        case EvacuationEnded():
            return _ended(presets, state, event, now)
        case ModuleIsThere(there):
            return replace(state, module=there, loading=state.loading and not there), []
        case LoadingEnded(failure):
            return _loaded(state, failure, now)
        case Tick():
            return _time_passed(presets, state, now)
        case _:
            assert_never(event)


def wake_at(state: GuardState) -> float | None:
    """When time alone changes the state."""
    times = [
        moment
        for moment in (
            state.retry_at if state.phase is Phase.WAITING else None,
            state.release_at,
        )
        if moment is not None
    ]
    return min(times, default=None)


def counts(rule: Rule, tally: Tally) -> bool:
    """Whether the rule takes effect with what was seen."""
    return len(tally.times) >= rule.at_least


# Signs


def _seen(presets: Presets, state: GuardState, sign: Sign, now: float) -> Decided:
    if 0 < sign.ns <= state.settled_ns:
        # The device tells its first events to every agent. What was parked is parked still.
        broken = state.broken | frozenset(sign.broken)
        return replace(state, put_off=True, broken=broken), []
    state = replace(state, heard_ns=max(state.heard_ns, sign.ns))
    rule = presets.rules[sign.id]
    if rule.meaning is Meaning.IGNORE:
        # A shutdown that nobody cares about must not wait for its bound.
        return state, [ReleaseShutdown()] if sign.id is SignId.HOST_SHUTDOWN else []
    before = state.tallies.get(sign.id, Tally())
    tally = _counted(rule, before, sign, now)
    state = replace(
        state,
        # What was simulated does not count among what was seen.
        tallies={**state.tallies, sign.id: before if sign.simulated else tally},
        put_off=state.put_off or (sign.id.of_module and not sign.simulated),
        broken=state.broken | frozenset(sign.broken),
    )
    effects: list[Effect] = []
    if rule.load_module and _may_load(state, now) and not sign.simulated:
        state = _noted(replace(state, loading=True), Action.LOADS_MODULE, sign, rule, now)
        effects.append(LoadModule())
    if not counts(rule, tally):
        if sign.id is SignId.HOST_SHUTDOWN:
            effects.append(ReleaseShutdown())
        return _noted_rarely(state, Action.COUNTED, sign, rule, now), effects
    match rule.meaning:
        case Meaning.WATCH:
            after, more = _watched(state, sign, rule, now)
        case Meaning.EVACUATE:
            after, more = _asked_to_evacuate(presets, state, sign, rule, now)
        case Meaning.LET_DIE:
            after, more = _let_die(state, sign, rule, now)
        case _:
            assert_never(rule.meaning)
    return after, effects + more


def _counted(rule: Rule, tally: Tally, sign: Sign, now: float) -> Tally:
    """`at_least` times are all that a rule looks at, so no more are kept."""
    fresh = [time for time in tally.times if now - time <= rule.within_s]
    fresh += [now] * min(sign.count, rule.at_least)
    return replace(
        tally, times=tuple(fresh[-rule.at_least :]), total=tally.total + sign.count
    )  # fmt: skip


def _may_load(state: GuardState, now: float) -> bool:
    return not state.module and not state.loading and now >= state.load_after


def _watched(state: GuardState, sign: Sign, rule: Rule, now: float) -> Decided:
    state = _noted_rarely(state, Action.WATCHED, sign, rule, now)
    return state, [ReleaseShutdown()] if sign.id is SignId.HOST_SHUTDOWN else []


def _asked_to_evacuate(
    presets: Presets, state: GuardState, sign: Sign, rule: Rule, now: float
) -> Decided:
    shutdown = sign.id is SignId.HOST_SHUTDOWN and not sign.simulated
    if shutdown and state.release_at is None:
        state = replace(state, release_at=now + presets.hold_s)
    match state.phase:
        case Phase.LET_DIE:
            state = _noted_rarely(state, Action.GOES_ON, sign, rule, now)
            return (
                replace(state, release_at=None),
                [ReleaseShutdown()] if shutdown else [],
            )
        case Phase.EVACUATING:
            cause = (*state.cause, sign.evidence)[:EVIDENCE_MAX]
            state = replace(state, cause=cause, simulated=state.simulated and sign.simulated)
            return _noted_rarely(state, Action.GOES_ON, sign, rule, now), []
        case Phase.WATCHING | Phase.WAITING | Phase.STAYING | Phase.EMPTY:
            state = replace(
                state, cause=(sign.evidence,), simulated=sign.simulated, attempts=0, retry_at=None
            )
            state = _noted(state, Action.EVACUATES, sign, rule, now)
            return _begin(presets, state, now)
        case _:
            assert_never(state.phase)


def _begin(presets: Presets, state: GuardState, now: float) -> Decided:
    shutdown = state.release_at is not None
    left_s = presets.deadline_s if state.release_at is None else state.release_at - now
    begin = BeginEvacuation(
        state.cause, max(1.0, min(presets.deadline_s, left_s)), state.broken, shutdown
    )
    after = replace(
        state, phase=Phase.EVACUATING, attempts=state.attempts + 1, retry_at=None
    )  # fmt: skip
    return after, [begin]


def _let_die(state: GuardState, sign: Sign, rule: Rule, now: float) -> Decided:
    if sign.simulated:
        return _noted(state, Action.LETS_DIE, sign, rule, now), []
    if state.phase is Phase.LET_DIE:
        return _noted_rarely(state, Action.GOES_ON, sign, rule, now), []
    waits = state.release_at is not None or sign.id is SignId.HOST_SHUTDOWN
    state = _noted(state, Action.LETS_DIE, sign, rule, now)
    state = replace(state, phase=Phase.LET_DIE, retry_at=None, release_at=None)
    effects: list[Effect] = [TellModule(ModuleCommand.ALLOW)] if state.module else []
    if state.put_off:
        effects.append(TellModule(ModuleCommand.EVACUATED))
    return state, [*effects, ReleaseShutdown()] if waits else effects


# What came of it


def _ended(presets: Presets, state: GuardState, ended: EvacuationEnded, now: float) -> Decided:
    if state.phase is not Phase.EVACUATING:  # it was given up by `let-die`
        return state, []
    said = _outcome(ended)
    if not ended.left:
        return _nothing_left(presets, state, said, now)
    state = _told(state, Decision(now, Action.LEFT_BEHIND, said, simulated=state.simulated))
    if state.simulated or state.attempts >= presets.attempts:
        return replace(state, phase=Phase.STAYING, retry_at=None), []
    pause_s = presets.retry_after_s * 2.0 ** (state.attempts - 1)
    return replace(state, phase=Phase.WAITING, retry_at=now + pause_s), []


def _nothing_left(
    presets: Presets, state: GuardState, said: tuple[str, ...], now: float
) -> Decided:
    state = _told(state, Decision(now, Action.EVACUATED, said, simulated=state.simulated))
    waits, simulated = state.release_at is not None, state.simulated
    state = replace(state, phase=Phase.EMPTY, retry_at=None, release_at=None)
    effects: list[Effect] = []
    let_go = state.put_off and presets.afterwards is Afterwards.LET_GO
    if not simulated and (let_go or (waits and state.module)):
        effects.append(TellModule(ModuleCommand.EVACUATED))
    return state, [*effects, ReleaseShutdown()] if waits else effects


def _outcome(ended: EvacuationEnded) -> tuple[str, ...]:
    parts = (("moved", ended.moved), ("left", ended.left), ("lost", ended.lost))
    said = [f"{what}: {_names(vms)}" for what, vms in parts if vms] or ["there was no VM to move"]
    return tuple(one_line(text) for text in [*said, ended.why] if text)


def _names(vms: tuple[str, ...]) -> str:
    more = len(vms) - NAMES_MAX
    return ", ".join(vms[:NAMES_MAX]) + (f" and {more} more" if more > 0 else "")


def _loaded(state: GuardState, failure: str, now: float) -> Decided:
    if not failure:
        return replace(state, loading=False, load_failure=""), []
    said = (one_line(f"the module was not loaded: {failure}"),)
    state = _told(state, Decision(now, Action.LOADS_MODULE, said))
    after = now + LOAD_AGAIN_S
    return replace(state, loading=False, load_after=after, load_failure=said[0]), []


def _time_passed(presets: Presets, state: GuardState, now: float) -> Decided:
    effects: list[Effect] = []
    if state.release_at is not None and now >= state.release_at:
        said = (f"{presets.hold_s:g} s are over, and the shutdown goes on", *state.cause)
        state = _told(state, Decision(now, Action.LETS_SHUT_DOWN, said[:EVIDENCE_MAX]))
        state = replace(state, release_at=None)
        effects.append(ReleaseShutdown())
    if state.phase is Phase.WAITING and state.retry_at is not None and now >= state.retry_at:
        decision = Decision(now, Action.EVACUATES, state.cause, simulated=state.simulated)
        state, more = _begin(presets, _told(state, decision), now)
        effects += more
    return state, effects


# What is told


def _told(state: GuardState, decision: Decision) -> GuardState:
    return replace(state, decisions=(*state.decisions, decision)[-DECISIONS_MAX:])


def _noted(state: GuardState, action: Action, sign: Sign, rule: Rule, now: float) -> GuardState:
    tally = state.tallies[sign.id]
    state = _told(
        state,
        Decision(
            now,
            action,
            (sign.evidence,),
            sign.id,
            rule.meaning,
            simulated=sign.simulated,
            repeated=tally.untold,
        ),
    )
    told = replace(tally, told=now, untold=0)
    return replace(state, tallies={**state.tallies, sign.id: told})


def _noted_rarely(
    state: GuardState, action: Action, sign: Sign, rule: Rule, now: float
) -> GuardState:
    """At most once in QUIET_S for each kind of sign."""
    tally = state.tallies[sign.id]
    if tally.told is None or now - tally.told >= QUIET_S:
        return _noted(state, action, sign, rule, now)
    untold = replace(tally, untold=tally.untold + 1)
    return replace(state, tallies={**state.tallies, sign.id: untold})
