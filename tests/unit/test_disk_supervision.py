"""Supervision of backends, exhaustively: every order of events up to a depth, in a model world.

The world holds the processes that supervision started. Any of them may become ready, serve or
end at any moment, time may pass, an upgrade or the end may be asked for at any moment. After
every step the invariants must hold; every world must be able to come to rest.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import pytest

from sempervirt.core.durations import Backoff
from sempervirt.core.queue_map import Binding
from sempervirt.disk.decide import condition, decide, next_wake
from sempervirt.disk.state import (
    Backend,
    Begin,
    Condition,
    Effect,
    Exited,
    Freeze,
    Kill,
    Phase,
    Policy,
    Progressed,
    Ready,
    Rebind,
    Rebound,
    Refused,
    Serving,
    Start,
    State,
    StopAsked,
    Stopped,
    SupervisionEvent,
    Terminate,
    Thaw,
    Tick,
    TookOver,
    UpgradeAsked,
    UpgradeEnded,
    UpgradeRefused,
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
    refused: bool = False
    stopped: bool = False

    @property
    def key(self) -> object:
        """Worlds that behave alike: generations and times only matter relative to now."""
        base = self.state.next_generation

        def backend(b: Backend | None) -> object:
            if b is None:
                return None
            marks = (b.ready, b.serving_since is not None, b.progressed)
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
            s.frozen,
            self.refused,
            self.stopped,
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
        case Rebind(generation):
            # The active one has already done it.
            assert generation in world.alive
            assert state.spare is not None
            assert generation == state.spare.generation
            return world
        case Kill(generation):
            return replace(world, dying=world.dying | {generation})
        case UpgradeEnded() | UpgradeRefused():
            return replace(world, upgrades_answered=world.upgrades_answered + 1)
        case Refused():
            return replace(world, refused=True)
        case Stopped():
            assert not world.alive
            return replace(world, stopped=True)
        case TookOver(_, successor):
            assert successor is None or (state.active and state.active.generation == successor)
            return world


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


def settle(world: World, *, healthy: bool) -> World:
    """Lets the world run on by itself; processes become what they should, or all die."""
    for _ in range(400):
        state = world.state
        if world.dying:
            world = after(world, Exited(min(world.dying), "told to"))
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
            assert rest.stopped or rest.refused
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


def test_a_new_map_is_remembered_and_told_to_the_spare() -> None:
    before = serving()
    world = after(before, Rebound(BINDING))
    assert world.state == replace(before.state, binding=BINDING)
    assert world.state.spare
    alone = after(world, Exited(world.state.spare.generation, "died"))
    assert decide(alone.state, Rebound(BINDING), alone.now, POLICY) == (alone.state, [])
    upgraded = settle(after(settle(alone, healthy=True), UpgradeAsked(NEW)), healthy=True)
    assert (upgraded.state.binary, upgraded.state.binding) == (NEW, BINDING)


@pytest.mark.parametrize("stopping", [False, True])
def test_a_new_map_changes_nothing_else_wherever_it_comes(stopping: bool) -> None:
    worlds = [after(World(), Begin())]
    for _ in range(5):
        worlds = [following for world in worlds for following in choices(world)]
    worlds = [world for world in worlds if world.state.stopping is stopping]
    assert len(worlds) > 20
    for world in worlds:
        rebound = after(world, Rebound(BINDING))
        assert rebound == replace(world, state=replace(world.state, binding=BINDING))


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
    assert [type(effect) for effect in effects] == [UpgradeRefused]


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
