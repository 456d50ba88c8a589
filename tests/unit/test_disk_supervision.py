"""Supervision of backends, exhaustively: every order of events up to a depth, in a model world.

The world holds the processes that supervision started. Any of them may become ready, serve or
end at any moment, time may pass, an upgrade or the end may be asked for at any moment. After
every step the invariants must hold; every world must be able to come to rest.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import assert_never

import pytest

from sempervirt.core.durations import Backoff
from sempervirt.core.errors import InvalidRequest, OutcomeUnknown, Unavailable
from sempervirt.core.failure import Failure
from sempervirt.core.queue_map import Binding
from sempervirt.disk.decide import condition, decide, next_wake
from sempervirt.disk.state import (
    Accept,
    Backend,
    Begin,
    Blame,
    Condition,
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
    RebindEnded,
    Refuse,
    Serving,
    Stalled,
    Start,
    State,
    StopAsked,
    SupervisionEvent,
    Tell,
    Terminate,
    Thaw,
    Tick,
    Told,
    TookOver,
    UpgradeAsked,
    UpgradeEnded,
)

POLICY = Policy(
    spare_after_s=1,
    steady_s=100,
    prepare_s=10,
    drain_s=10,
    verify_s=10,
    active_backoff=Backoff(free=2, first_s=2, ceiling_s=4),
    spare_backoff=Backoff(free=1, first_s=2, ceiling_s=4),
)
OLD, NEW = "old", "new"
BINDING = Binding((0, 1), "test")
GONE = Failure.named(Unavailable, "it does not listen")
SILENT = Failure.named(OutcomeUnknown, "it did not answer")
NEVER = Failure.named(InvalidRequest, "it has one queue")


@dataclass(frozen=True)
class World:
    """What surrounds supervision: the processes that run, and what has been asked for."""

    state: State = field(default_factory=lambda: State(binary=OLD))
    now: float = 0.0
    alive: frozenset[int] = frozenset()
    dying: frozenset[int] = frozenset()
    upgrades_asked: int = 0
    upgrades_answered: int = 0
    freezes: int = 0
    stalls: int = 0
    rebinds_asked: int = 0
    rebinds_answered: int = 0

    @property
    def key(self) -> object:
        """Worlds that behave alike: generations and times only matter relative to now."""
        base = self.state.next_generation

        def backend(b: Backend | None) -> object:
            if b is None:
                return None
            stalled = b.stall and b.stall.blame
            marks = (b.ready, b.serving_since is not None, b.progressed, stalled)
            doomed = b.generation in self.dying
            return (base - b.generation, b.binary, marks, b.generation in self.alive, doomed)

        s, u = self.state, self.state.upgrade
        late = None if s.start_due is None else s.start_due - self.now
        stop = None if s.stop_deadline is None else s.stop_deadline - self.now
        return (
            s.binary,
            backend(s.active),
            backend(s.spare),
            s.served,
            min(s.active_failures, 5),
            min(s.spare_failures, 4),
            late,
            stop,
            s.stopping,
            u and (u.binary, u.phase, u.deadline - self.now, u.generation and base - u.generation),
            frozenset(base - g for g in self.alive),
            frozenset(base - g for g in self.dying),
            self.upgrades_asked - self.upgrades_answered,
            self.freezes,
            self.stalls,
            s.frozen,
            s.refused,
            s.stopped,
            *self.rebinding_key,
        )

    @property
    def rebinding_key(self) -> tuple[object, ...]:
        s, base = self.state, self.state.next_generation
        return (
            s.binding and s.binding.map,
            tuple((r.binding.map, r.deadline - self.now) for r in s.rebindings),
            s.telling and (base - s.telling.generation, s.telling.ticket > 0),
            frozenset(base - generation for generation in s.astray),
            s.tell_due and s.tell_due - self.now,
            self.rebinds_asked,
        )


def after(world: World, event: SupervisionEvent, now: float | None = None) -> World:
    """The world after an event, with the effects carried out; checks the invariants."""
    now = world.now if now is None else now
    state, effects = decide(world.state, event, now, POLICY)
    world = replace(world, state=state, now=now)
    if isinstance(event, UpgradeAsked):
        world = replace(world, upgrades_asked=world.upgrades_asked + 1)
    if isinstance(event, Freeze):
        world = replace(world, freezes=world.freezes + 1)
    if isinstance(event, Stalled):
        world = replace(world, stalls=world.stalls + 1)
        killed = {effect.generation for effect in effects if isinstance(effect, Kill)}
        assert killed <= {event.generation}
        assert not killed or event.blame is Blame.BACKEND, "killed for the fault of a medium"
        active = state.active is not None and state.active.generation == event.generation
        assert not (killed and active and state.frozen), "it has no successor"
    if isinstance(event, RebindAsked):
        world = replace(world, rebinds_asked=world.rebinds_asked + 1)
    if isinstance(event, Exited):
        gone = frozenset({event.generation})
        world = replace(world, alive=world.alive - gone, dying=world.dying - gone)
    for effect in effects:
        world = carry_out(world, effect)
    check(world)
    return world


def carry_out(world: World, effect: Effect) -> World:
    state = world.state
    match effect:
        case Start(generation, _, wait_for_lock):
            assert generation not in world.alive
            assert generation == state.next_generation - 1
            # Only the very first one may refuse a locked image: later, waiting is right.
            assert wait_for_lock == (generation != 1)
            assert not state.stopping
            assert not state.frozen or generation == 1, "it could take the image from its new host"
            return replace(world, alive=world.alive | {generation})
        case Terminate(generation):
            if state.stopping:
                # A spare that is still there would take over from the one that ends.
                assert state.spare is None
            else:
                # The one that serves is told to go only when another is ready.
                assert state.active is not None
                assert generation == state.active.generation
                assert state.spare is not None
                assert state.spare.ready
            return replace(world, dying=world.dying | {generation})
        case Tell(generation, binding):
            assert generation in world.alive, "nobody is there to be told"
            assert state.telling is not None, "nobody waits for what comes of it"
            assert state.telling.generation == generation
            if state.telling.ticket == 0:
                assert binding == state.binding, "only a request brings another map"
            return world
        case RebindEnded(_, binding, failure):
            assert failure is not None or state.binding == binding, (
                "answered before it is on record"
            )
            return replace(world, rebinds_answered=world.rebinds_answered + 1)
        case Kill(generation):
            return replace(world, dying=world.dying | {generation})
        case UpgradeEnded() | Refuse():
            return replace(world, upgrades_answered=world.upgrades_answered + 1)
        case Accept() | Noted():
            return world
        case TookOver(predecessor, successor):
            assert successor is None or (state.active and state.active.generation == successor)
            assert predecessor not in world.alive
            assert state.last_end
            return world
        case _:
            assert_never(effect)


def check(world: World) -> None:
    """The invariants."""
    state = world.state
    known = {b.generation for b in (state.active, state.spare) if b}
    assert known <= world.alive, "a process is counted on that does not run"
    assert world.alive - known <= world.dying, "a process runs that nobody counts on"
    assert len(known) == sum(1 for b in (state.active, state.spare) if b)
    if state.frozen:
        # Nobody is left who waits for the image.
        assert state.spare is None or state.spare.generation in world.dying
        assert state.upgrade is None
    elif state.served and not state.stopping:
        assert state.active or state.start_due is not None, "nobody serves, and nothing will"
        guarded = state.spare or state.start_due is not None or state.upgrade
        unserved = state.active and state.active.serving_since is None
        assert guarded or unserved, "no spare, and none will be started"
    if state.upgrade and state.upgrade.phase is not Phase.PREPARING:
        assert state.upgrade.generation is not None
    assert not state.stopped or not world.alive
    assert not state.stopped or not state.rebindings
    assert world.rebinds_asked - world.rebinds_answered == len(state.rebindings)
    assert 0 <= world.upgrades_asked - world.upgrades_answered <= 1
    assert (state.upgrade is not None) == (world.upgrades_asked > world.upgrades_answered)
    assert condition(state, POLICY) in Condition


def choices(world: World) -> list[World]:
    """Every world that can come next."""
    state = world.state
    found = []
    for generation in sorted(world.alive):
        found.append(after(world, Exited(generation, "it died")))
        if generation in world.dying:
            continue
        active = state.active is not None and state.active.generation == generation
        if active:
            found.append(after(world, Serving(generation)))
            if state.active and state.active.serving_since is not None:
                found.append(after(world, Progressed(generation)))
        else:
            found.append(after(world, Ready(generation)))
            if state.active and state.active.serving_since is None and not state.upgrade:
                # Both wait for the lock; the kernel decides.
                found.append(after(world, Serving(generation)))
    wake = next_wake(state)
    if wake is not None:
        found.append(after(world, Tick(), max(world.now, wake)))
    if not state.stopping:
        if world.upgrades_asked < 2:
            found.append(after(world, UpgradeAsked(NEW)))
        if state.frozen:
            found.append(after(world, Thaw()))
        elif world.freezes < 1 and state.served:
            found.append(after(world, Freeze()))
        found.append(after(world, StopAsked()))
    return found


def hangs(world: World) -> list[World]:
    """Every world in which somebody hangs next, or goes on."""
    if not world.state.served:
        return []
    blames = (Blame.BACKEND, Blame.MEDIUM)
    living = sorted(world.alive - world.dying)
    found = [after(world, GoesOn(generation)) for generation in living if world.stalls]
    if world.stalls < 2:
        found += [
            after(world, Stalled(generation, blame, "seen"))
            for generation in living
            for blame in blames
        ]
    return found


def settle(world: World, *, healthy: bool) -> World:
    """Lets the world run on by itself; processes become what they should, or all die."""
    for _ in range(400):
        state = world.state
        if world.dying:
            world = after(world, Exited(min(world.dying), "told to"))
        elif stalled := [b for b in (state.active, state.spare) if b and b.stall]:
            world = after(world, GoesOn(stalled[0].generation))
        elif (telling := state.telling) is not None:
            there = telling.generation in world.alive
            world = after(world, Told(telling.generation, None if there else GONE))
        elif state.frozen and not state.stopping:
            world = after(world, Thaw())
        elif not healthy and world.alive:
            world = after(world, Exited(min(world.alive), "it died"))
        elif state.active and state.active.serving_since is None:
            world = after(world, Serving(state.active.generation))
        elif state.spare and not state.spare.ready:
            world = after(world, Ready(state.spare.generation))
        elif (wake := next_wake(state)) is not None:
            world = after(world, Tick(), max(world.now, wake))
            if not healthy and world.now > 500:
                return world
        else:
            return world
    return world


def test_every_order_of_events_up_to_depth_twelve() -> None:
    first = after(World(), Begin())
    seen = {first.key}
    queue = deque([(first, 0)])
    while queue:
        world, depth = queue.popleft()
        rest = settle(world, healthy=True)
        if rest.state.stopping:
            assert rest.state.stopped or rest.state.refused
            assert not rest.alive
        else:
            assert condition(rest.state, POLICY) is Condition.GUARDED
        assert rest.upgrades_asked == rest.upgrades_answered
        if depth == 12:
            continue
        for following in choices(world):
            if following.key not in seen:
                seen.add(following.key)
                queue.append((following, depth + 1))
    assert len(seen) > 5000


def test_every_order_of_hangs_and_other_events() -> None:
    first = serving()
    seen = {first.key}
    queue = deque([(first, 0)])
    while queue:
        world, depth = queue.popleft()
        rest = settle(world, healthy=True)
        if not rest.state.stopping:
            assert condition(rest.state, POLICY) is Condition.GUARDED
        if depth == 5:
            continue
        for following in (*choices(world), *hangs(world)):
            if following.key not in seen:
                seen.add(following.key)
                queue.append((following, depth + 1))
    assert len(seen) > 2000


def serving(**changes: object) -> World:
    """A disk with a serving backend and a ready spare."""
    world = settle(after(World(), Begin()), healthy=True)
    return replace(world, **changes)  # type: ignore[arg-type]


def test_take_over_starts_the_next_spare_after_the_settling_time() -> None:
    world = serving()
    assert world.state.active
    spare = world.state.spare
    state, effects = decide(
        world.state, Exited(world.state.active.generation, "killed"), world.now, POLICY
    )
    assert state.active == spare
    assert state.spare is None
    assert [type(effect) for effect in effects] == [TookOver]
    assert next_wake(state) == world.now + POLICY.spare_after_s
    assert decide(state, Tick(), world.now, POLICY)[1] == []
    _, effects = decide(state, Tick(), world.now + POLICY.spare_after_s, POLICY)
    assert [type(effect) for effect in effects] == [Start]


def test_without_a_spare_the_next_one_starts_at_once() -> None:
    world = serving()
    assert world.state.active
    assert world.state.spare
    state, _ = decide(world.state, Exited(world.state.spare.generation, "died"), 0, POLICY)
    _, effects = decide(state, Exited(world.state.active.generation, "died"), 0, POLICY)
    assert any(isinstance(effect, Start) for effect in effects)


def told(world: World, failure: Failure | None = None) -> World:
    """The process that is being told its map has answered, or has not."""
    assert world.state.telling is not None
    return after(world, Told(world.state.telling.generation, failure))


def rebound(world: World) -> World:
    return told(after(world, RebindAsked(BINDING, 7)))


def test_a_new_map_is_on_record_before_it_is_answered_and_the_spare_is_told() -> None:
    before = serving()
    assert before.state.active
    assert before.state.spare
    asked, effects = decide(before.state, RebindAsked(BINDING, 7), before.now, POLICY)
    assert effects == [Tell(before.state.active.generation, BINDING)]
    assert asked.binding is None, "it does not count before the active one has done it"
    done, effects = decide(asked, Told(before.state.active.generation), before.now, POLICY)
    assert done.binding == BINDING
    spare = before.state.spare.generation
    assert effects == [RebindEnded(7, BINDING), Tell(spare, BINDING)]
    rest, effects = decide(done, Told(spare, GONE), before.now, POLICY)
    assert rest == replace(before.state, binding=BINDING), "whoever misses it is seen later"
    assert effects == []
    upgraded = settle(after(settle(rebound(before), healthy=True), UpgradeAsked(NEW)), healthy=True)
    assert (upgraded.state.binary, upgraded.state.binding) == (NEW, BINDING)


def test_maps_are_told_one_after_the_other() -> None:
    other = Binding((1, 0), "test")
    world = after(after(serving(), RebindAsked(BINDING, 7)), RebindAsked(other, 8))
    assert len(world.state.rebindings) == 2
    world = told(world)
    assert world.state.binding == BINDING
    assert world.state.telling
    assert world.state.telling.ticket == 8
    assert settle(world, healthy=True).state.binding == other


def test_the_successor_of_a_backend_that_died_is_told() -> None:
    world = after(serving(), RebindAsked(BINDING, 7))
    assert world.state.active
    world = after(world, Exited(world.state.active.generation, "killed"))
    world = told(world, GONE)
    assert world.rebinds_answered == 0
    assert world.state.tell_due is not None
    world = after(world, Tick(), world.state.tell_due)
    assert world.state.telling
    assert world.state.active
    assert world.state.telling.generation == world.state.active.generation
    assert settle(world, healthy=True).state.binding == BINDING


@pytest.mark.parametrize(("failure", "again"), [(GONE, True), (SILENT, True), (NEVER, False)])
def test_what_fails_is_tried_again_until_the_deadline(failure: Failure, again: bool) -> None:
    world = after(serving(), RebindAsked(BINDING, 7))
    assert world.state.telling
    event = Told(world.state.telling.generation, failure)
    failed, effects = decide(world.state, event, world.now, POLICY)
    assert (len(failed.rebindings) == 1) is again
    assert effects == ([] if again else [RebindEnded(7, BINDING, failure)])
    late, effects = decide(world.state, event, world.now + POLICY.rebind_s, POLICY)
    assert effects == [RebindEnded(7, BINDING, failure)]
    assert late.binding is None


def test_a_request_that_no_backend_is_there_for_ends_at_its_deadline() -> None:
    world = after(World(), Begin())
    world = after(world, Serving(1))
    frozen = after(world, Freeze())
    dead = after(frozen, Exited(1, "killed"))
    asked = after(dead, RebindAsked(BINDING, 7))
    assert asked.state.telling is None
    wake = next_wake(asked.state)
    assert wake == asked.now + POLICY.rebind_s
    assert after(asked, Tick(), wake).rebinds_answered == 1


def test_who_is_seen_to_work_by_another_map_is_told() -> None:
    world = settle(rebound(serving()), healthy=True)
    assert world.state.active
    generation = world.state.active.generation
    assert decide(world.state, MapSeen(generation, BINDING.map), 0, POLICY)[1] == []
    astray, effects = decide(world.state, MapSeen(generation, (0, 0)), 0, POLICY)
    assert effects == [Tell(generation, BINDING)]
    assert decide(astray, MapSeen(generation, (0, 0)), 0, POLICY) == (
        replace(astray, astray=frozenset({generation})),
        [],
    )
    # While a request is under way, the former map is no surprise.
    asked, _ = decide(world.state, RebindAsked(Binding((1, 0), "test"), 8), 0, POLICY)
    assert decide(asked, MapSeen(generation, BINDING.map), 0, POLICY) == (asked, [])


def test_every_order_of_requests_for_threads_and_deaths() -> None:
    """With what may come of each telling, at any moment."""
    first = serving()
    seen = {first.key}
    queue = deque([(first, 0)])
    while queue:
        world, depth = queue.popleft()
        rest = settle(world, healthy=True)
        assert rest.rebinds_asked == rest.rebinds_answered, "somebody waits for ever"
        assert rest.state.telling is None
        if depth == 6:
            continue
        following = choices(world)
        if (telling := world.state.telling) is not None:
            alive = telling.generation in world.alive
            following += [told(world, failure) for failure in (GONE, SILENT, NEVER)]
            following += [told(world)] if alive else []
        if world.rebinds_asked < 2 and not world.state.stopping:
            asked = Binding((0, 1) if world.rebinds_asked else (1, 0), "test")
            following.append(after(world, RebindAsked(asked, world.rebinds_asked + 1)))
        if world.state.active:
            following.append(after(world, MapSeen(world.state.active.generation, (0, 0))))
        for later in following:
            if later.key not in seen:
                seen.add(later.key)
                queue.append((later, depth + 1))
    assert len(seen) > 2000


def test_a_freeze_that_is_asked_for_is_refused_during_an_upgrade() -> None:
    world = after(serving(), UpgradeAsked(NEW))
    state, effects = decide(world.state, Freeze(7), world.now, POLICY)
    assert (state, effects) == (world.state, [Refuse(7, "frozen", "the disk is being upgraded")])
    frozen, effects = decide(serving().state, Freeze(7), 0, POLICY)
    assert frozen.frozen
    assert effects[0] == Accept(7)


def test_a_backend_that_hangs_is_killed_and_the_spare_takes_over() -> None:
    state = serving().state
    assert state.active
    assert state.spare
    hung, next_one = state.active.generation, state.spare.generation
    state, effects = decide(state, Stalled(hung, Blame.BACKEND, "stopped"), 5, POLICY)
    assert condition(state, POLICY) is Condition.STALLED
    assert [effect for effect in effects if isinstance(effect, Kill)] == [Kill(hung)]
    state, effects = decide(state, Stalled(hung, Blame.BACKEND, "stopped"), 6, POLICY)
    assert effects == [Kill(hung)], "again, and noted once"
    state, effects = decide(state, Exited(hung, "killed by SIGKILL"), 6, POLICY)
    assert state.active
    assert state.active.generation == next_one
    reason = "killed by SIGKILL, because it hung: stopped"
    assert effects == [TookOver(hung, next_one, planned=False, reason=reason, hung=True)]


@pytest.mark.parametrize("blame", [Blame.MEDIUM, Blame.UNCLEAR])
def test_nothing_is_killed_for_a_medium_that_hangs(blame: Blame) -> None:
    state = serving().state
    assert state.active
    active = state.active.generation
    state, effects = decide(state, Stalled(active, blame, "in pread"), 5, POLICY)
    assert effects == [Noted(active, f"{blame.value}: in pread")]
    expected = Condition.MEDIUM_HANGS if blame is Blame.MEDIUM else Condition.STALLED
    assert condition(state, POLICY) is expected
    state, effects = decide(state, Stalled(active, blame, "in pread, still"), 9, POLICY)
    assert effects == []
    assert state.active
    assert state.active.stall
    assert state.active.stall.since == 5
    state, effects = decide(state, GoesOn(active), 10, POLICY)
    assert effects == [Noted(active, "it goes on")]
    assert condition(state, POLICY) is Condition.GUARDED
    assert decide(state, GoesOn(active), 11, POLICY) == (state, [])


def test_a_spare_that_hangs_guards_nothing_and_is_replaced() -> None:
    state = serving().state
    assert state.spare
    spare = state.spare.generation
    state, effects = decide(state, Stalled(spare, Blame.BACKEND, "stopped"), 5, POLICY)
    assert condition(state, POLICY) is Condition.UNGUARDED
    assert Kill(spare) in effects
    state, _ = decide(state, Exited(spare, "killed by SIGKILL"), 5, POLICY)
    assert state.start_due is not None


def test_a_loop_of_crashes_backs_off_to_the_ceiling_and_goes_on() -> None:
    world = settle(serving(), healthy=False)
    assert condition(world.state, POLICY) is Condition.FAILING
    assert world.state.next_generation > 50  # it went on trying
    starts = world.state.next_generation
    later = settle(replace(world, now=0.0), healthy=False)
    tries = later.state.next_generation - starts
    assert tries <= 500 / POLICY.active_backoff.ceiling_s + 5  # but no faster than the ceiling


def test_progress_ends_a_loop_of_crashes() -> None:
    state = serving().state
    for _ in range(20):
        assert state.active
        generation = state.active.generation
        state, _ = decide(state, Serving(generation), 0, POLICY)
        state, _ = decide(state, Progressed(generation), 0, POLICY)
        assert state.active
        state, _ = decide(state, Exited(state.active.generation, "killed"), 0, POLICY)
        assert state.active_failures == 1
        assert state.active  # never a delay


def test_upgrade_in_order() -> None:
    world = serving()
    assert world.state.spare
    old = world.state.active
    assert old
    world = after(world, UpgradeAsked(NEW))
    world = after(world, Exited(world.state.spare.generation, "told to"))  # type: ignore[union-attr]
    assert world.state.upgrade
    assert world.state.spare
    assert world.state.spare.binary == NEW
    assert world.state.active == old
    world = after(world, Ready(world.state.spare.generation))
    assert world.state.upgrade
    assert world.state.upgrade.phase is Phase.SWITCHING
    assert world.dying == {old.generation}
    world = after(world, Exited(old.generation, "exit code 0"))
    assert world.state.binary == OLD  # not before the new one serves
    assert world.state.active
    world = after(world, Serving(world.state.active.generation))
    assert world.state.binary == NEW
    assert world.state.upgrade is None
    assert world.state.active_failures == 0


@pytest.mark.parametrize("phase", list(Phase))
def test_an_upgrade_that_is_late_keeps_the_old_binary(phase: Phase) -> None:
    world = after(serving(), UpgradeAsked(NEW))
    world = after(world, Exited(min(world.dying), "told to"))
    if phase is not Phase.PREPARING:
        assert world.state.spare
        world = after(world, Ready(world.state.spare.generation))
    if phase is Phase.VERIFYING:
        world = after(world, Exited(min(world.dying), "exit code 0"))
    assert world.state.upgrade
    assert world.state.upgrade.phase is phase
    world = after(world, Tick(), world.state.upgrade.deadline)
    if phase is Phase.SWITCHING:  # killed instead of drained: safe, and the upgrade goes on
        assert world.state.upgrade
        return
    assert world.state.upgrade is None
    rest = settle(world, healthy=True)
    assert rest.state.active
    assert rest.state.active.binary == OLD
    assert rest.state.binary == OLD


def test_a_backend_without_spare_cannot_be_upgraded() -> None:
    policy = replace(POLICY, spare=False)
    state, _ = decide(State(binary=OLD), Begin(), 0, policy)
    state, _ = decide(state, Serving(1), 0, policy)
    state, effects = decide(state, Tick(), 0, policy)
    assert effects == []
    assert next_wake(state) is None
    _, effects = decide(state, UpgradeAsked(NEW), 0, policy)
    assert [type(effect) for effect in effects] == [Refuse]


def test_a_backend_that_does_not_drain_is_killed_at_the_end() -> None:
    world = after(serving(), StopAsked())
    assert world.state.spare
    world = after(world, Exited(world.state.spare.generation, "told to"))
    assert world.state.active
    assert world.dying == {world.state.active.generation}
    _, effects = decide(world.state, Tick(), world.now + POLICY.drain_s, POLICY)
    assert effects == [Kill(world.state.active.generation)]


def test_the_one_that_got_the_lock_is_the_active_one() -> None:
    """Started while nobody held the lock, the later process won it: they change places."""
    world = serving()
    for _ in range(2):
        assert world.state.active is not None
        world = after(world, Exited(world.state.active.generation, "killed"))
    assert world.state.active is not None
    waits = world.state.active.generation
    assert world.state.start_due is not None
    world = after(world, Tick(), world.state.start_due)
    assert world.state.spare is not None
    won = world.state.spare.generation
    world = after(after(world, Ready(waits)), Serving(won))
    assert world.state.active is not None
    assert world.state.spare is not None
    assert (world.state.active.generation, world.state.spare.generation) == (won, waits)
    assert condition(world.state, POLICY) is Condition.GUARDED
