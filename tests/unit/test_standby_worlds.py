"""The owner of standbys: the real driver in random histories, with deaths of the agent.

`World` plays everything that the driver does not decide: its ports, the first VM, an operator, and
what a new agent finds. A port may fail, or be silent about what it did; the record may not be
written; the agent may die and begin anew from what is on record. After each step the invariants are
looked at, and each mistake, in the machine as in the driver, has to be found by one of them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sempervirt.core.errors import (
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.standby import decide as machine
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.ports import Kept, Ports, Snapshot, Snapshots
from sempervirt.standby.recovery import with_taken
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
    GivenUp,
    GiveUp,
    Life,
    Load,
    Loaded,
    Lost,
    PolicyAsked,
    Probe,
    Probed,
    Remove,
    Run,
    Stand,
    StandAgain,
    Standby,
    Step,
    Stood,
    Take,
    Tick,
)
from sempervirt.standby.values import Policy, Tier
from tests.unit.driver_mistakes import Mutation, drops, pretends, repeats, tells_twice
from tests.unit.exploration import Stopped, run_until_it_waits

STEPS, HISTORIES = 120, 600
POLICY = Policy(60.0, 2, Tier.READY)
KINDS = (Unavailable, OutcomeUnknown, StateConflict)
KILLED = "QEMU was killed by signal 9"


class Broken(AssertionError):
    """An invariant does not hold."""


def correct(_driver: Any) -> None:
    """No mistake."""


class Driver(StandbyDriver):
    """The real one; work is kept in the world instead of a task, and the world tells what ends."""

    world: World

    def begin(self, effect: Effect) -> None:
        self.world.take_up(effect)

    def cancel_work(self, *kinds: type) -> None:
        self.world.begun = [one for one in self.world.begun if not isinstance(one, kinds)]

    def keep(self, work: Any, name: str) -> asyncio.Task[None]:
        work.close()
        return cast("asyncio.Task[None]", SimpleNamespace(cancel=lambda: None))


class Answers:
    """Whoever has asked."""

    def __init__(self, world: World) -> None:
        self._world = world

    def answer(self, ticket: int, _error: SempervirtError | None = None) -> None:
        """Once."""
        if ticket not in self._world.open:
            raise Broken(f"ticket {ticket} is answered twice, or was never given")
        self._world.open.discard(ticket)


@dataclass
class World:
    """Everything but the driver, for which it is all ports. `there` is what stands of each
    generation, `recorded` what the next agent reads, `fails` what the next port raises; `though`:
    it is done all the same.
    """

    random: random.Random
    mutate: Mutation = correct
    recorded: Standby = field(default_factory=lambda: machine.begin("web", POLICY))
    clock: Stopped = field(default_factory=Stopped)
    begun: list[Effect] = field(default_factory=list)
    first: First = First.RUNNING
    owner: int = 0  # the generation that has the shared disks; 0: the first VM
    fenced: bool = False
    there: dict[int, Found] = field(default_factory=dict)
    tickets: int = 0
    open: set[int] = field(default_factory=set)
    ran: set[int] = field(default_factory=set)
    snapshots: set[int] = field(default_factory=set)  # that take room on the first VM's disks
    taken: Snapshots = ()  # the last ones, which are noted before the next agent would keep them
    called_off: bool = False
    given_up: int = 0  # take-overs that were called off
    posted: list[Event] = field(default_factory=list)
    fails: SempervirtError | None = None
    though: bool = False

    def __post_init__(self) -> None:
        self.driver = self.made(self.recorded)

    @property
    def state(self) -> Standby:
        return self.driver.state

    @property
    def now(self) -> float:
        return self.clock.time

    def made(self, state: Standby) -> Driver:
        port: Any = self
        clock: Any = self.clock
        driver = Driver(state, Ports(port, port, port), clock)
        driver.world = self
        driver._replies = cast("Any", Answers(self))
        driver.post = self.posted.append  # type: ignore[method-assign, assignment]
        self.mutate(driver)
        return driver

    def step(self, event: Event) -> None:
        before = self.state
        self.driver.step(event)
        if self.is_given_up(before):
            self.given_up += 1
        match event:
            case CancelAsked() if before.take_over is not None and self.state.take_over is None:
                self.called_off = True
            case FailoverAsked() | FirstSeen(First.RUNNING):
                self.called_off = False
            case _:
                pass
        self.check()

    def is_given_up(self, before: Standby) -> bool:
        """Whether a take-over has just been called off. The standby is not spent by that."""
        was, past = before.take_over, self.state.past
        if was is None or self.state.take_over is not None or was.step is not Step.DECLARED:
            return False
        one = self.state.generation(was.number)
        if past is None or past.step is not Step.FAILED or "not spent" not in "".join(past.notes):
            return False
        if one is None or one.life is not Life.RETURNING:
            raise Broken("a take-over that was called off has spent its standby")
        return True

    def take_up(self, effect: Effect) -> None:
        """The driver begins an effect."""
        if machine.must_be_on_record(self.recorded, self.state):
            raise Broken("begun before it was on record")
        if effect in self.begun:
            raise Broken("begun twice")
        match effect:
            case Claim(number):
                if not self.fenced:
                    raise Broken("claimed before the first VM was proven to have ended")
                # One that has ended meanwhile is seen by the claim itself, and refused.
                if self.there.get(number) is Found.WAITS:
                    raise Broken("claimed without the guest's state")
                if self.first is First.RUNNING:
                    raise Broken("claimed while the first VM runs")
            case Run(number):
                if self.owner != number:
                    raise Broken("the guest runs without its disks")
            case Remove(number) if number in self.ran:
                raise Broken("the VM itself is removed")
            case Remove(number) if (over := self.state.take_over) and over.number == number:
                raise Broken("one that takes over is removed")
            case Take() if self.state.first is not First.RUNNING:
                raise Broken("a snapshot of a VM that does not run")
            case _:
                pass
        self.begun.append(effect)

    def check(self) -> None:
        state = self.state
        making = [one for one in state.generations if one.life.being_made]
        serving = [one for one in state.generations if one.life is Life.SERVING]
        if len(making) > 1:
            raise Broken("two are made at a time")
        if making and not self.begun and making[0].again_at is None:
            raise Broken("one that is made waits for nothing")
        if len(serving) > 1:
            raise Broken("two are the VM")
        numbers = [one.number for one in state.generations]
        if numbers != sorted(set(numbers)):
            raise Broken("a number is used twice")
        over = state.take_over
        if over is not None and not self.begun and machine.wake_at(state) is None:
            raise Broken("a take-over waits for nothing")
        retiring = {one.number for one in state.generations if one.life is Life.RETIRING}
        removing = {one.number for one in self.begun if isinstance(one, Remove)}
        later = {one.number for one in state.generations if one.again_at is not None}
        if retiring - removing - later:
            raise Broken("one that is not wanted is not removed")
        wanted = [one for one in self.begun if isinstance(one, Copy | GiveUp)]
        if self.snapshots - {number for one in wanted for _, number in one.snapshots}:
            raise Broken("a snapshot is kept for nobody")
        if self.called_off and over is not None and not over.forced:
            raise Broken("an operator has called that off")
        again = {one.number for one in self.begun if isinstance(one, StandAgain)}
        if {one.number for one in state.generations if one.life is Life.RETURNING} - again:
            raise Broken("one that is to wait once more is not made to")
        waiting = {number for number, found in self.there.items() if found is Found.WAITS}
        taking_over = {over.number} if over is not None else set()
        if {one.number for one in state.ready} - taking_over - waiting - self.ran:
            raise Broken("one that cannot take over is taken for ready")

    # What happens

    def happen(self) -> None:
        """One thing, at random."""
        chance = self.random.random()
        if self.begun and chance < 0.62:
            self.end(self.begun.pop(self.random.randrange(len(self.begun))))
        elif chance < 0.72:
            self.clock.time += self.random.choice((0.5, 1.0, 20.0, 70.0))
            self.step(Tick())
        elif chance < 0.82:
            self.change_first()
        elif chance < 0.87 and self.state.ready:
            lost = self.random.choice(self.state.ready).number
            self.there[lost] = Found.NOTHING
            self.step(Lost(lost, "it ended"))
        elif chance < 0.92:
            self.step(FailoverAsked(self.ticket(), self.random.random() < 0.5, self.now))
        elif chance < 0.94:
            self.step(PolicyAsked(replace(POLICY, keep=self.random.choice((1, 2, 3)))))
        elif chance < 0.943:
            self.step(DisableAsked(self.ticket()))
        elif chance < 0.95:
            self.step(CancelAsked(self.ticket()))
        elif chance < 0.967:
            self.agent_dies()

    def ticket(self) -> int:
        self.tickets += 1
        self.open.add(self.tickets)
        return self.tickets

    def change_first(self) -> None:
        """A VM that has ended does not run again while a standby takes over from it."""
        choices = [First.RUNNING, First.AWAY, First.DEAD]
        if self.state.take_over is not None and (self.fenced or self.state.take_over.fenced):
            choices = [First.DEAD]
        self.first = self.random.choice(choices)
        if self.first is First.RUNNING:
            self.fenced = False
            serving = self.state.serving
            self.owner = serving.number if serving is not None else 0
        self.step(FirstSeen(self.first, KILLED, self.now))

    def agent_dies(self) -> None:
        """Whatever was begun may have been done, and nobody hears of it."""
        for effect in self.begun:
            if self.random.random() < 0.5:
                self.work(effect)
        self.begun, self.open = [], set()
        left = with_taken(self.recorded, self.taken)
        self.recorded, effects = machine.recover(left, self.there, self.now)
        self.driver = self.made(self.recorded)
        for effect in effects:
            self.driver.carry_out(effect)
        self.check()

    def end(self, effect: Effect) -> None:
        """An effect comes to its end, well or not; one of which nobody knows may be done."""
        if self.random.random() < 0.08:
            kind = self.random.choice(KINDS)
            self.fails = kind("it failed")
            self.though = kind is OutcomeUnknown and self.random.random() < 0.5
            if isinstance(effect, Load):
                self.there[effect.number], self.though = Found.NOTHING, False
        for event in self.work(effect):
            self.step(event)

    def work(self, effect: Effect) -> list[Event]:
        """The driver does an effect, and tells what came of it."""
        self.posted.clear()
        assert not run_until_it_waits(self.driver.work(effect))
        self.fails, self.though = None, False
        if len(self.posted) != 1:
            raise Broken(f"what came of an effect is told {len(self.posted)} times")
        return list(self.posted)

    # The ports

    def write(self, state: Standby) -> None:
        """Sometimes the disk is full."""
        if self.random.random() < 0.05:
            raise OSError("no space left on device")
        self.recorded = state

    def let_go(self) -> None:
        """Nothing is kept."""

    def did(self, change: Callable[[], object] = lambda: None) -> None:
        """What the next port does, or raises."""
        if self.fails is None or self.though:
            change()
        if self.fails is not None:
            raise self.fails

    async def take(self) -> Snapshot:
        self.did()  # one that fails has none, or names what may stay
        number = 1 + max(self.snapshots, default=self.taken[0][1] if self.taken else 0)
        self.snapshots.add(number)
        self.taken = (("root", number),)
        return Snapshot(self.now, self.taken, "crash")

    async def copy(self, _number: int, snapshots: Snapshots, _ours: Snapshots) -> tuple[str, ...]:
        self.snapshots -= {number for _, number in snapshots}  # however that ends
        self.did()
        return ()

    async def give_up(self, snapshots: Snapshots, _ours: Snapshots) -> tuple[str, ...]:
        self.snapshots -= {number for _, number in snapshots}  # or it is told that they stay
        self.did()
        return ()

    async def boot(self, _number: int) -> float:
        self.did()
        return 20.0

    async def settle(self, _number: int) -> tuple[str, ...]:
        self.did()
        return ()

    async def freeze(self, _number: int, _tier: Tier) -> Kept:
        self.did()
        return Kept("pc-q35-10.0", 1 << 28)

    async def stand(self, number: int, _machine: str, _tier: Tier) -> None:
        self.did(lambda: self.there.update({number: Found.WAITS}))

    async def stand_again(self, number: int, machine: str, tier: Tier) -> None:
        for one in [one for one in self.begun if isinstance(one, Load) and one.number == number]:
            self.begun.remove(one)  # the driver has it end first
        if self.there.get(number, Found.NOTHING) is Found.NOTHING:
            raise Unavailable("it has ended")
        await self.stand(number, machine, tier)

    async def gone(self, _number: int) -> str:
        raise AssertionError("the world says who has ended")

    async def remove(self, number: int) -> None:
        for one in [one for one in self.begun if isinstance(one, Copy) and one.number == number]:
            self.begun.remove(one)  # the driver has it end first, and that gives its snapshots up
            self.snapshots -= {snapshot for _, snapshot in one.snapshots}
        self.did(lambda: self.there.pop(number, None))

    async def load(self, number: int, _machine: str, _tier: Tier) -> None:
        if self.there.get(number) is not Found.WAITS:
            raise Unavailable("it has ended")
        self.did(lambda: self.there.update({number: Found.LOADED}))

    async def fence(self, *, kill: bool, word: str) -> None:
        assert not word
        if self.first is First.RUNNING and not kill:
            raise Unavailable("it runs")
        self.did(self._fence)

    async def prove_anew(self, *, kill: bool, word: str) -> None:
        assert not word
        self.proved = True

    def _fence(self) -> None:
        self.first, self.fenced = First.DEAD, True

    async def claim(self, number: int) -> None:
        assert self.proved, "by this agent, or once more"
        self.proved = False
        if self.there.get(number) is not Found.LOADED:
            raise StateConflict("it has ended")
        self.did(lambda: setattr(self, "owner", number))

    async def run(self, number: int) -> tuple[str, ...]:
        self.did(lambda: self._run(number))
        return ()

    def _run(self, number: int) -> None:
        self.there[number] = Found.RUNS
        self.ran.add(number)
        self.first, self.fenced = First.RUNNING, False

    async def probe(self, _number: int) -> tuple[str, ...]:
        self.did()
        return ()


def walk(seed: int, mutate: Mutation = correct) -> World:
    """One history."""
    world = World(random.Random(seed), mutate)
    world.step(FirstSeen(First.RUNNING))
    for _ in range(STEPS):
        world.happen()
    return world


def quiet(world: World) -> None:
    """Lets everything that was begun end well, and time pass: nothing is left to wait for."""
    world.random = random.Random(2)
    world.random.random = lambda: 1.0  # type: ignore[method-assign]
    world.step(FirstSeen(world.first, KILLED, world.now))
    for _ in range(200):
        if world.begun:
            world.end(world.begun.pop(0))
            continue
        wake = machine.wake_at(world.state)
        removes = any(one.again_at is not None for one in world.state.generations)
        if (world.state.take_over is None and not removes) or wake is None:
            break
        world.clock.time = max(world.now, wake)
        world.step(FirstSeen(world.first, KILLED, world.now))
        world.step(Tick())
    if world.state.take_over is not None:
        raise Broken("a take-over has no end")
    if world.open:
        raise Broken("somebody is not answered")


def test_no_history_breaks_an_invariant_and_each_comes_to_its_end() -> None:
    seen, given_up = [], 0
    for seed in range(HISTORIES):
        world = walk(seed)
        seen.append((world.ran, world.state.past))
        given_up += world.given_up
        quiet(world)
    # The histories get where they should: a machine that does nothing breaks no invariant.
    assert sum(bool(ran) for ran, _ in seen) > HISTORIES / 4
    assert sum(len(ran) > 1 for ran, _ in seen) > HISTORIES / 20
    assert any(past is not None and past.step is Step.FAILED for _, past in seen)
    assert given_up > HISTORIES / 20


# Mistakes in the machine

Real = Callable[[Standby, Event, float], Decision]
Decide = Callable[[Real, Standby, Event, float], Decision]


def decides(decide: Decide) -> Mutation:
    """In place of the machine; what that decides comes first."""

    def mutate(driver: Any) -> None:
        real = driver.decide
        driver.decide = lambda state, event, now: decide(real, state, event, now)

    return mutate


def _without_proof(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    if isinstance(event, Loaded) and state.take_over is not None:
        state = replace(state, take_over=replace(state.take_over, fenced=True))
    return decide(state, event, now)


def _without_state(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    if isinstance(event, Fenced) and state.take_over is not None:
        state = replace(state, take_over=replace(state.take_over, loaded=True))
    return decide(state, event, now)


def _forgets_to_remove(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    after, effects = decide(state, event, now)
    if isinstance(event, Stood):
        effects = [effect for effect in effects if not isinstance(effect, Remove)]
    return after, effects


def _does_not_try_again(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    after, effects = decide(state, event, now)
    if isinstance(event, Failed) and after.take_over is not None:
        after = replace(after, take_over=replace(after.take_over, again_at=None))
    return after, effects


def _runs_unnoted(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    after, effects = decide(state, event, now)
    if isinstance(event, Claimed) and state.take_over is not None:
        after = replace(after, take_over=state.take_over, generations=state.generations)
    return after, effects


def _keeps_snapshots(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    after, effects = decide(state, event, now)
    return after, [effect for effect in effects if not isinstance(effect, GiveUp)]


def _all_the_same(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    after, effects = decide(state, event, now)
    return replace(after, declined=False), effects


def _makes_two(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    after, effects = decide(state, event, now)
    if isinstance(event, Copied) and after.making is not None:
        again = replace(after.making, number=after.last + 1)
        after = replace(after, last=again.number, generations=(*after.generations, again))
    return after, effects


def _spends(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    after, effects = decide(state, event, now)
    again = {one.number for one in effects if isinstance(one, StandAgain)}
    generations = tuple(
        replace(one, life=Life.RETIRING) if one.number in again else one
        for one in after.generations
    )
    kept: list[Effect] = [one for one in effects if not isinstance(one, StandAgain)]
    kept += [Remove(number) for number in sorted(again)]
    return replace(after, generations=generations), kept


def _is_ready_at_once(decide: Real, state: Standby, event: Event, now: float) -> Decision:
    after, effects = decide(state, event, now)
    again = {one.number for one in effects if isinstance(one, StandAgain)}
    generations = tuple(
        replace(one, life=Life.READY) if one.number in again else one for one in after.generations
    )
    kept: list[Effect] = [one for one in effects if not isinstance(one, StandAgain)]
    return replace(after, generations=generations), kept


# Mistakes in the driver


def without_a_record(driver: Any) -> None:
    """Nothing is written."""
    driver.record = lambda _before, _after: True


def ignores_a_full_disk(driver: Any) -> None:
    """Whether a step is on record is not looked at."""
    real = driver.record
    driver.record = lambda before, after: real(before, after) or True


def lets_a_fence_go_on(driver: Any) -> None:
    """The fence of a take-over that has come to its end is not ended."""
    driver.cancel_work = lambda *_kinds: None


def swallows_errors(driver: Any) -> None:
    """What fails is told to nobody."""
    post = driver.post
    driver.post = lambda event: None if isinstance(event, Failed) else post(event)


MISTAKES: dict[str, tuple[Mutation, str]] = {
    "claims without proof": (decides(_without_proof), "claimed"),
    "claims without state": (decides(_without_state), "claimed without the guest's state"),
    "forgets to remove": (decides(_forgets_to_remove), "one that is not wanted is not removed"),
    "does not try again": (decides(_does_not_try_again), "a take-over waits for nothing"),
    "runs unnoted": (decides(_runs_unnoted), "the VM itself is removed"),
    "keeps snapshots": (decides(_keeps_snapshots), "a snapshot is kept for nobody"),
    "takes over all the same": (decides(_all_the_same), "an operator has called that off"),
    "spends what was called off": (decides(_spends), "has spent its standby"),
    "has it ready at once": (decides(_is_ready_at_once), "called off has spent|taken for ready"),
    "drops what waits again": (drops(StandAgain), "wait once more is not made to"),
    "tells twice what was given up": (tells_twice(GivenUp), "is told 2 times"),
    "makes two": (decides(_makes_two), "two are made at a time"),
    "drops a boot": (drops(Boot), "one that is made waits for nothing"),
    "drops what waits": (drops(Stand), "one that is made waits for nothing"),
    "drops a removal": (drops(Remove), "one that is not wanted is not removed"),
    "drops the fence": (drops(Fence), "a take-over waits for nothing"),
    "drops the order to run": (drops(Run), "a take-over waits for nothing"),
    "drops the probe": (drops(Probe), "a take-over waits for nothing"),
    "drops an answer": (drops(Accept), "somebody is not answered"),
    "answers twice": (repeats(Accept), "answered twice"),
    "claims twice": (repeats(Claim), "begun twice"),
    "runs twice": (repeats(Run), "begun twice"),
    "tells a boot twice": (tells_twice(Booted), "is told 2 times"),
    "tells a probe twice": (tells_twice(Probed), "is told 2 times"),
    "swallows errors": (swallows_errors, "is told 0 times"),
    "pretends to fence": (
        pretends(Fence, Fenced(), "_perform"),
        "claimed before the first VM was proven to have ended",
    ),
    "pretends to claim": (
        pretends(Claim, Claimed(1), "_perform"),
        "the guest runs without its disks",
    ),
    "lets a fence go on": (lets_a_fence_go_on, "begun twice"),
    "writes no record": (without_a_record, "begun before it was on record"),
    "ignores a full disk": (ignores_a_full_disk, "begun before it was on record"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_found(name: str) -> None:
    mistake, broken = MISTAKES[name]

    def walk_all() -> None:
        for seed in range(HISTORIES):
            quiet(walk(seed, mistake))

    with pytest.raises(Broken, match=broken):
        walk_all()
