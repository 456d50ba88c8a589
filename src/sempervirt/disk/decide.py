"""Which backend processes a disk should have: a pure decision.

Two processes hold the same listening socket. The *active* one holds the image's lock and
serves; the *spare* has prepared everything and blocks in the kernel on that lock. When the
active one ends, the kernel gives the lock to the spare, which serves, without anybody's
help: what is decided here is only what to start next, when, and from which binary.

                Begin                     Serving                     Ready
    (nothing) ────────► active starting ─────────► unguarded ─────────────────► guarded
                              │                       ▲  ▲                         │
                first exit:   │                       │  └── spare exits ◄───────┤
                refused ◄─────┘         takes over by │      (restart, back-off)   │
                                        the lock      └── active exits ◄───────────┤
                                                                                   │
    unguarded, active exits ──► a new one at once ──► … ──► back-off ──► failing   │
    Stop: spare killed, then active terminated (drains), then stopped  ◄─────────┘

- The active one exits, a spare is there: it *is* the active one from now on. The next
  spare starts `spare_after_s` later, so as not to compete with the recovery for a processor.
- The active one exits, none is there: a new one starts at once, waiting for the lock (the
  dead one's kernel I/O may hold it for a moment). If this goes on without progress (no guest
  request completed, not steady for `steady_s`), starts are delayed more and more: a crash
  loop. At the ceiling the disk is called failing, and is still retried.
- The spare serves while the active one still waits for the lock (both were started when
  nobody held it): they change places.
- A spare exits: it is replaced after `spare_after_s` or the back-off; the guest notices nothing.
- Upgrade: PREPARING replaces the spare by one from the new binary; once it is ready,
  SWITCHING terminates the active one; the new one takes over and VERIFYING waits until it
  serves. Failure in PREPARING leaves the old one serving throughout; failure in VERIFYING
  ends the new one, and the old binary takes over again. Starts in between use the old binary.
- Stalled: a process that is silent or completes nothing, though it exists. If that is its own fault
  it is killed, and the spare takes over as from one that died; if the medium hangs, or nobody can
  tell, nothing is killed, and the condition says so (`disk.liveness`). An active one of a frozen
  disk is never killed for it: it has no successor.
- Which thread works on which queue: see `disk.rebinding`.
- Frozen, while the VM moves to another host or comes from one: the spare, which would take the
  image as soon as the active one lets go of it, is killed, and whoever ends has no successor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from sempervirt.disk import rebinding
from sempervirt.disk.state import (
    Accept,
    Backend,
    Begin,
    Blame,
    Condition,
    Connected,
    Decision,
    Effect,
    Exited,
    Freeze,
    GoesOn,
    Kill,
    MapSeen,
    Noted,
    Phase,
    Policy,
    Progressed,
    Ready,
    RebindAsked,
    Refuse,
    Seen,
    Serving,
    Stall,
    Stalled,
    Start,
    State,
    StopAsked,
    SupervisionEvent,
    Terminate,
    Thaw,
    Tick,
    Told,
    TookOver,
    Upgrade,
    UpgradeAsked,
    UpgradeEnded,
)


def decide(state: State, event: SupervisionEvent, now: float, policy: Policy) -> Decision:
    """The next state, and what has to be done to get there. `now` is the owner's clock, in s."""
    state, effects = _supervise(state, event, now, policy)
    state, more = rebinding.tell_next(state, now)
    return state, [*effects, *more]


def _supervise(state: State, event: SupervisionEvent, now: float, policy: Policy) -> Decision:
    match event:
        case Begin():
            return _start_active(state, wait_for_lock=False)
        case UpgradeAsked():
            return _upgrade_asked(state, event, now, policy)
        case RebindAsked():
            return rebinding.asked(state, event, now, policy)
        case Freeze(ticket):
            return _frozen(state, ticket)
        case Thaw():
            return _thawed(state, now), []
        case StopAsked():
            return _stop_asked(state, now, policy)
        case Tick():
            return _tick(state, now, policy)
        case _:
            return _seen(state, event, now, policy)


def _seen(state: State, event: Seen, now: float, policy: Policy) -> Decision:
    match event:
        case Ready(generation):
            return _ready(state, generation, now, policy)
        case Serving(generation):
            return _serving(state, generation, now)
        case Progressed(generation):
            if state.active is not None and state.active.generation == generation:
                return replace(state, active=replace(state.active, progressed=True)), []
            return state, []
        case Stalled():
            return _stalled(state, event, now)
        case GoesOn(generation):
            return _goes_on(state, generation)
        case Exited(generation, reason):
            return _exited(state, generation, reason, now, policy)
        case Connected():
            return replace(state, connected=True), []
        case MapSeen():
            return rebinding.map_seen(state, event), []
        case Told():
            return rebinding.told(state, event, now, policy)
        case _:
            assert_never(event)


def next_wake(state: State) -> float | None:
    """When a Tick is due."""
    times = [
        state.start_due,
        state.upgrade.deadline if state.upgrade else None,
        state.stop_deadline,
        *rebinding.wake_times(state),
    ]
    return min((time for time in times if time is not None), default=None)


def condition(state: State, policy: Policy) -> Condition:
    """How the disk is served, and whether a spare stands by."""
    active = state.active
    if state.stopping:
        ended = active is None and state.spare is None
        return Condition.STOPPED if ended else Condition.STOPPING
    serving = active is not None and active.serving_since is not None
    if not serving and policy.active_backoff.at_ceiling(state.active_failures):
        return Condition.FAILING
    if active is None:
        if state.frozen:
            return Condition.FROZEN
        return Condition.BACKING_OFF if state.served else Condition.STOPPED
    if active.stall is not None:
        hangs = active.stall.blame is Blame.MEDIUM
        return Condition.MEDIUM_HANGS if hangs else Condition.STALLED
    if active.serving_since is None:
        return Condition.RECOVERING if state.served else Condition.STARTING
    if state.spare is not None and state.spare.ready and state.spare.stall is None:
        return Condition.GUARDED
    return Condition.UNGUARDED


def _is_steady(backend: Backend | None, now: float, policy: Policy) -> bool:
    if backend is None or backend.serving_since is None:
        return False
    return backend.progressed or now - backend.serving_since >= policy.steady_s


def _start_active(state: State, *, wait_for_lock: bool) -> Decision:
    generation = state.next_generation
    state = replace(state, active=Backend(generation, state.binary), next_generation=generation + 1)
    return state, [Start(generation, state.binary, wait_for_lock)]


def _start_spare(state: State, binary: str) -> Decision:
    generation = state.next_generation
    state = replace(
        state,
        spare=Backend(generation, binary),
        next_generation=generation + 1,
        start_due=None,
    )
    return state, [Start(generation, binary, wait_for_lock=True)]


def _ready(state: State, generation: int, now: float, policy: Policy) -> Decision:
    if state.active is not None and state.active.generation == generation:
        return replace(state, active=replace(state.active, ready=True)), []
    if state.spare is None or state.spare.generation != generation:
        return state, []
    state = replace(state, spare=replace(state.spare, ready=True), spare_failures=0)
    upgrade = state.upgrade
    if upgrade is None or upgrade.generation != generation or state.active is None:
        return state, []
    upgrade = replace(upgrade, phase=Phase.SWITCHING, deadline=now + policy.drain_s)
    return replace(state, upgrade=upgrade), [Terminate(state.active.generation)]


def _serving(state: State, generation: int, now: float) -> Decision:
    if state.spare is not None and state.spare.generation == generation:
        # Both waited for the lock, and the one that was started later got it.
        state = replace(state, active=state.spare, spare=state.active)
    active = state.active
    if active is None or active.generation != generation or active.serving_since is not None:
        return state, []
    first = not state.served
    state = replace(state, served=True, active=replace(active, ready=True, serving_since=now))
    alone = state.spare is None and state.start_due is None and state.upgrade is None
    if first or alone:
        return replace(state, start_due=None if state.frozen else now), []
    upgrade = state.upgrade
    if upgrade and upgrade.phase is Phase.VERIFYING and upgrade.generation == generation:
        return replace(state, binary=upgrade.binary, upgrade=None), [
            UpgradeEnded("", upgrade.ticket)
        ]
    return state, []


def _with(state: State, changed: Backend) -> State:
    """The state with `changed` in the place of the process of that generation."""
    if state.active is not None and state.active.generation == changed.generation:
        return replace(state, active=changed)
    return replace(state, spare=changed)


def _member(state: State, generation: int) -> Backend | None:
    members = (backend for backend in (state.active, state.spare) if backend is not None)
    return next((member for member in members if member.generation == generation), None)


def _stalled(state: State, seen: Stalled, now: float) -> Decision:
    backend = _member(state, seen.generation)
    if backend is None:
        return state, []
    effects: list[Effect] = []
    known = backend.stall
    if known is None or known.blame is not seen.blame:
        effects.append(Noted(seen.generation, f"{seen.blame.value}: {seen.evidence}"))
    since = now if known is None else known.since
    state = _with(state, replace(backend, stall=Stall(seen.blame, seen.evidence, since)))
    is_active = state.active is not None and state.active.generation == seen.generation
    last = state.frozen and is_active  # nobody would take over
    if seen.blame is Blame.BACKEND and not state.stopping and not last:
        effects.append(Kill(seen.generation))
    return state, effects


def _goes_on(state: State, generation: int) -> Decision:
    backend = _member(state, generation)
    if backend is None or backend.stall is None:
        return state, []
    return _with(state, replace(backend, stall=None)), [Noted(generation, "it goes on")]


def _exited(state: State, generation: int, reason: str, now: float, policy: Policy) -> Decision:
    if state.active is not None and state.active.generation == generation:
        return _active_exited(state, state.active, reason, now, policy)
    if state.spare is not None and state.spare.generation == generation:
        return _spare_exited(state, state.spare, reason, now, policy)
    return state, []


def _active_exited(
    state: State, dead: Backend, reason: str, now: float, policy: Policy
) -> Decision:
    hung = dead.stall is not None and dead.stall.blame is Blame.BACKEND
    if dead.stall is not None and hung:
        reason = f"{reason}, because it hung: {dead.stall.evidence}"
    if state.stopping:
        return _stop_further(replace(state, active=None))
    if state.frozen:
        left = replace(state, active=None, last_end=reason, restarts=state.restarts + 1)
        return left, [TookOver(dead.generation, None, planned=False, reason=reason, hung=hung)]
    if not state.served:
        return replace(state, active=None, stopping=True, refused=reason), []
    upgrade = state.upgrade
    planned = upgrade is not None and upgrade.phase is Phase.SWITCHING
    if not planned:
        failures = 0 if _is_steady(dead, now, policy) else state.active_failures
        state = replace(state, active_failures=failures + 1, restarts=state.restarts + 1)
    state = replace(state, last_end=reason)
    effects: list[Effect] = []
    if upgrade is not None and upgrade.generation == dead.generation:
        state = replace(state, upgrade=None)
        failure = f"the new backend ended ({reason}); the old binary serves"
        effects.append(UpgradeEnded(failure, upgrade.ticket))
    elif upgrade is not None and upgrade.generation is not None:
        upgrade = replace(upgrade, phase=Phase.VERIFYING, deadline=now + policy.verify_s)
        state = replace(state, upgrade=upgrade)
    elif upgrade is not None:  # the old spare, told to end, takes over if it still can
        state = replace(state, upgrade=None)
        effects.append(UpgradeEnded(f"the backend ended meanwhile ({reason})", upgrade.ticket))
    state, more = _succeed(state, now, policy)
    successor = state.active.generation if state.active else None
    took_over = TookOver(dead.generation, successor, planned, reason, hung)
    return state, [*more, took_over, *effects]


def _succeed(state: State, now: float, policy: Policy) -> Decision:
    """Finds the successor of a dead active process: the spare, or a new one."""
    if state.spare is not None:
        due = now + policy.spare_after_s
        return replace(state, active=state.spare, spare=None, start_due=due), []
    delay_s = policy.active_backoff.delay_s(state.active_failures)
    if delay_s > 0:
        return replace(state, active=None, start_due=now + delay_s), []
    state = replace(state, start_due=now + policy.spare_after_s if policy.spare else None)
    return _start_active(state, wait_for_lock=True)


def _spare_exited(state: State, dead: Backend, reason: str, now: float, policy: Policy) -> Decision:
    state = replace(state, spare=None)
    if state.stopping:
        return _stop_further(state)
    if state.frozen:
        return state, []
    upgrade = state.upgrade
    if upgrade is not None and upgrade.generation is None:
        state, effects = _start_spare(state, upgrade.binary)
        assert state.spare is not None
        return replace(state, upgrade=replace(upgrade, generation=state.spare.generation)), effects
    effects = []
    if upgrade is not None and upgrade.generation == dead.generation:
        # In SWITCHING the active one was told to end: its exit starts the old binary again.
        failure = f"the new backend ended ({reason}); the old binary serves"
        effects.append(UpgradeEnded(failure, upgrade.ticket))
        state = replace(state, upgrade=None)
    failures = state.spare_failures + 1
    delay_s = max(policy.spare_after_s, policy.spare_backoff.delay_s(failures))
    return replace(state, spare_failures=failures, start_due=now + delay_s), effects


def _thawed(state: State, now: float) -> State:
    # A spare would take the image from one that awaits its first queue.
    waits = state.active is not None and state.active.serving_since is None
    return replace(state, frozen=False, served=True, start_due=None if waits else now)


def _frozen(state: State, ticket: int) -> Decision:
    effects: list[Effect] = [Accept(ticket)] if ticket else []
    if state.upgrade is not None:
        if ticket:
            return state, [Refuse(ticket, "frozen", "the disk is being upgraded")]
        effects.append(UpgradeEnded("the VM moves", state.upgrade.ticket))
    if state.spare is not None:
        effects.append(Kill(state.spare.generation))
    return replace(state, frozen=True, upgrade=None, start_due=None), effects


def _upgrade_asked(state: State, asked: UpgradeAsked, now: float, policy: Policy) -> Decision:
    if (obstacle := _no_upgrade_because(state, policy)) is not None:
        return state, [Refuse(asked.ticket, "upgraded", obstacle)]
    upgrade = Upgrade(asked.binary, Phase.PREPARING, now + policy.prepare_s, ticket=asked.ticket)
    state = replace(state, upgrade=upgrade, start_due=None)
    if state.spare is not None:
        return state, [Kill(state.spare.generation)]
    state, effects = _start_spare(state, asked.binary)
    assert state.spare is not None
    return replace(state, upgrade=replace(upgrade, generation=state.spare.generation)), effects


def _no_upgrade_because(state: State, policy: Policy) -> str | None:
    if state.frozen:
        return "the VM moves"
    if state.stopping or state.active is None or state.active.serving_since is None:
        return "the disk is not being served now"
    if not policy.spare:
        return "this backend can have no spare"
    return None if state.upgrade is None else "another upgrade is under way"


def _stop_asked(state: State, now: float, policy: Policy) -> Decision:
    state, effects = rebinding.give_up(state)
    if state.upgrade is not None:
        effects.append(UpgradeEnded("the disk was stopped", state.upgrade.ticket))
    state = replace(
        state,
        stopping=True,
        start_due=None,
        upgrade=None,
        stop_deadline=now + policy.drain_s,
    )
    if state.spare is not None:
        return state, [*effects, Kill(state.spare.generation)]
    state, more = _stop_further(state)
    return state, [*effects, *more]


def _stop_further(state: State) -> Decision:
    """The spare goes first: otherwise it would take over from the one that ends."""
    if state.spare is not None:
        return replace(state, active=None), []
    if state.active is not None:
        return state, [Terminate(state.active.generation)]
    return replace(state, stop_deadline=None, stopped=True), []


def _tick(state: State, now: float, policy: Policy) -> Decision:
    if state.stop_deadline is not None and now >= state.stop_deadline:
        state = replace(state, stop_deadline=None)
        return state, [Kill(b.generation) for b in (state.spare, state.active) if b]
    if state.upgrade is not None and now >= state.upgrade.deadline:
        return _upgrade_late(state, state.upgrade, now, policy)
    state, given_up = rebinding.expire(state, now)
    state, effects = _start_due(state, now, policy)
    return state, [*given_up, *effects]


def _start_due(state: State, now: float, policy: Policy) -> Decision:
    if state.start_due is None or now < state.start_due or state.stopping:
        return state, []
    if state.active is None:
        due = now + policy.spare_after_s if policy.spare else None
        return _start_active(replace(state, start_due=due), wait_for_lock=True)
    if state.spare is None and policy.spare:
        return _start_spare(state, state.binary)
    return replace(state, start_due=None), []


def _upgrade_late(state: State, upgrade: Upgrade, now: float, policy: Policy) -> Decision:
    """A deadline of the upgrade passed."""
    if upgrade.phase is Phase.SWITCHING:
        # It does not drain. Killing it is safe: what is in flight will be replayed.
        later = replace(upgrade, deadline=now + policy.drain_s)
        effects: list[Effect] = [Kill(state.active.generation)] if state.active else []
        return replace(state, upgrade=later), effects
    what = "was not prepared" if upgrade.phase is Phase.PREPARING else "did not serve"
    failure = f"the new backend {what} in time; the old binary serves"
    effects = [] if upgrade.generation is None else [Kill(upgrade.generation)]
    return replace(state, upgrade=None), [*effects, UpgradeEnded(failure, upgrade.ticket)]
