"""The owner of the guard with ports of a test: what is carried out, what is logged, what is
simulated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.guard.adapters import HeardRecord, KernelModule
from sempervirt.guard.driver import Guard, fresh, simulated
from sempervirt.guard.presets import Meaning, ModulePolicy, Rule, shipped
from sempervirt.guard.signs import Sign, SignId
from sempervirt.guard.sources.module import ModuleCommand
from sempervirt.guard.sources.source import AbsentError
from sempervirt.guard.state import (
    Action,
    BeginEvacuation,
    Effect,
    EvacuationEnded,
    Event,
    ModuleIsThere,
    Phase,
    Seen,
    TellModule,
)
from tests.unit.driver_mistakes import Mutation, drops, repeats, tells_twice
from tests.unit.exploration import run_until_it_waits

DEADLINE_S = 90.0
PANIC = Sign(SignId.MODULE_PANIC, "event 0: panic", broken=(790,))


class World:
    """The ports: what was asked for, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.orders: list[BeginEvacuation] = []
        self.free = asyncio.Event()
        self.free.set()
        self.answer = EvacuationEnded(("web",), (), ())
        self.refuses = ""
        self.limit_s: float | None = 5.0

    async def evacuate(self, order: BeginEvacuation) -> EvacuationEnded:
        self.asked.append("evacuate")
        self.orders.append(order)
        await self.free.wait()
        return self.answer

    async def tell(self, command: ModuleCommand) -> None:
        self.asked.append(command.value)
        if self.refuses:
            raise OSError(self.refuses)

    async def load(self, policy: ModulePolicy) -> None:
        self.asked.append(f"load {policy.value}")
        if self.refuses:
            raise Unavailable(self.refuses, remedy="semper guard install")

    def release(self) -> None:
        self.asked.append("release")


class Module:
    """A source that stands for the module's device."""

    name = "module"
    interval_s = 0.001

    def __init__(self) -> None:
        self.there = False
        self.signs: list[Sign] = []

    def look(self, patience_s: float) -> Sequence[Sign]:
        if not self.there:
            raise AbsentError("not loaded")
        signs, self.signs = self.signs, []
        return signs

    def close(self) -> None:
        pass


@pytest.fixture
async def world() -> World:
    return World()


@pytest.fixture
async def guard(world: World) -> AsyncIterator[Guard]:
    made = Guard(shipped(), world, world, world)
    made.start()
    yield made
    await made.detach()


async def until(guard: Guard, condition: Callable[[], bool]) -> None:
    await guard.changes.wait_until(condition, timeout_s=DEADLINE_S, what="the guard")


async def test_a_sign_is_carried_out_to_its_end(guard: Guard, world: World) -> None:
    guard.post(ModuleIsThere(True))
    guard.post(Seen(PANIC))
    await until(guard, lambda: guard.state.phase is Phase.EMPTY)
    async with asyncio.timeout(DEADLINE_S):
        while "evacuated" not in world.asked:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert world.asked == ["evacuate", "evacuated"]
    assert world.orders[0].broken == {790}


async def test_a_module_that_refuses_is_no_end_of_the_agent(
    guard: Guard, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.refuses = "no such device"
    guard.post(Seen(PANIC))
    await until(guard, lambda: guard.state.phase is Phase.EMPTY)
    async with asyncio.timeout(DEADLINE_S):
        while "no such device" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_the_module_is_loaded_upon_a_sign_and_a_failure_is_kept(
    guard: Guard, world: World
) -> None:
    world.refuses = "the kernel is 7.1"
    guard.post(Seen(Sign(SignId.LOG_HUNG_TASK, "INFO: task x blocked")))
    await until(guard, lambda: bool(guard.state.load_failure))
    assert world.asked == ["load strict"]
    assert "the kernel is 7.1" in guard.state.load_failure


async def test_every_decision_is_logged_with_its_evidence(
    guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sempervirt")
    guard.post(Seen(PANIC))
    await until(guard, lambda: guard.state.phase is Phase.EMPTY)
    told = [record for record in caplog.records if record.message.startswith("guard ")]
    assert [record.levelname for record in told] == ["WARNING", "INFO"]
    assert "evacuates sign=module.panic meaning=evacuate: event 0: panic" in told[0].message
    assert "moved: web" in told[1].message


@pytest.mark.parametrize("identifier", list(SignId))
async def test_to_simulate_does_nothing(guard: Guard, world: World, identifier: SignId) -> None:
    before = guard.state
    decisions = guard.simulate(identifier)
    wanted = {
        Meaning.WATCH: Action.WATCHED,
        Meaning.EVACUATE: Action.EVACUATES,
        Meaning.LET_DIE: Action.LETS_DIE,
    }
    meaning = guard.presets.rules[identifier].meaning
    assert [decision.action for decision in decisions] == [wanted[meaning]]
    assert all(decision.simulated for decision in decisions)
    await asyncio.sleep(0)
    assert guard.state is before
    assert world.asked == []


async def test_a_simulated_sign_that_acts_moves_vms_and_tells_the_module_nothing(
    guard: Guard, world: World
) -> None:
    guard.post(ModuleIsThere(True))
    world.free.clear()
    guard.act(SignId.MODULE_PANIC)
    await until(guard, lambda: guard.state.phase is Phase.EVACUATING)
    with pytest.raises(StateConflict, match="evacuating already"):
        guard.act(SignId.MODULE_PANIC)
    world.free.set()
    await until(guard, lambda: guard.state.phase is Phase.EMPTY)
    await asyncio.sleep(0)
    assert world.asked == ["evacuate"]


async def test_a_rule_with_a_number_is_simulated_as_if_that_was_reached(world: World) -> None:
    presets = shipped()
    rules = {**presets.rules, SignId.LOG_OOPS: Rule(Meaning.EVACUATE, 7)}
    guard = Guard(replace(presets, rules=rules), world, world, world)
    assert [decision.action for decision in guard.simulate(SignId.LOG_OOPS)] == [Action.EVACUATES]


async def test_the_device_comes_tells_and_goes(guard: Guard, world: World) -> None:
    module = Module()
    guard.watch([module], module)
    module.there = True
    await until(guard, lambda: guard.state.module)
    module.signs = [PANIC]
    await until(guard, lambda: guard.state.phase is Phase.EMPTY)
    module.there = False
    await until(guard, lambda: not guard.state.module)
    assert [one.name for one in guard.health] == ["module"]


async def test_the_end_of_the_agent_lets_a_shutdown_go_on(world: World) -> None:
    guard = Guard(shipped(), world, world, world)
    guard.start()
    await guard.detach()
    assert world.asked == ["release"]


def test_fresh_decisions_are_those_after_the_last_one_that_was_there() -> None:
    from sempervirt.guard.decide import decide
    from sempervirt.guard.state import GuardState

    one, _ = decide(shipped(), GuardState(), Seen(PANIC), 1.0)
    two, _ = decide(shipped(), one, EvacuationEnded((), (), ()), 2.0)
    assert [decision.action for decision in fresh(one, two)] == [Action.EVACUATED]
    assert fresh(two, two) == []
    assert simulated(SignId.LOG_OOPS).simulated


async def test_a_command_is_written_to_the_device_and_a_refusal_is_raised(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    module = KernelModule(device)
    await module.tell(ModuleCommand.EVACUATED)
    assert device.read_text() == "evacuated"
    with pytest.raises(FileNotFoundError):
        await KernelModule(tmp_path / "none").tell(ModuleCommand.ALLOW)


# Mistakes in the driver


def carried_out(mutate: Mutation) -> list[str]:
    """What comes of a panic that the module has put off: what was asked for, and what was wrong."""
    world, posted, begun = World(), list[Event](), list[Effect]()
    guard = Guard(shipped(), world, world, world)
    guard.post = posted.append  # type: ignore[method-assign, assignment]
    guard.begin = begun.append  # type: ignore[method-assign, assignment]
    mutate(guard)
    seen: list[Event] = [ModuleIsThere(True), Seen(PANIC)]
    while seen or begun:
        if seen:
            guard.step(seen.pop(0))
            continue
        assert not run_until_it_waits(guard.work(begun.pop(0)))
        if len(posted) > 1:
            world.asked.append("told twice")
        seen, posted[:] = [*posted], []
    return [*world.asked, guard.state.phase.value]


@pytest.mark.parametrize(
    "mutate",
    [
        drops(BeginEvacuation),
        repeats(BeginEvacuation),
        drops(TellModule),
        repeats(TellModule),
        tells_twice(EvacuationEnded),
    ],
    ids=["no evacuation", "two evacuations", "nothing told", "told again", "heard twice"],
)
def test_a_mistake_in_the_driver_is_found(mutate: Mutation) -> None:
    assert carried_out(lambda _guard: None) == ["evacuate", "evacuated", Phase.EMPTY.value]
    assert carried_out(mutate) != ["evacuate", "evacuated", Phase.EMPTY.value]


async def test_what_was_dealt_with_is_on_record_for_this_boot_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "guard.json"
    made = Guard(shipped(), world, world, world, heard=HeardRecord(path))
    made.start()
    made.post(Seen(replace(PANIC, ns=7_000)))
    async with asyncio.timeout(DEADLINE_S):
        while not path.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # poll interval
    await made.detach()
    assert HeardRecord(path).ns == 7_000
    HeardRecord(path).keep(6_999)  # a thread that was late
    assert HeardRecord(path).ns == 7_000
    world.asked.clear()
    following = Guard(shipped(), world, world, world, heard=HeardRecord(path))
    following.start()
    following.post(Seen(replace(PANIC, ns=7_000)))
    following.post(Seen(replace(PANIC, ns=7_001)))
    await until(following, lambda: following.state.phase is Phase.EMPTY)
    await following.detach()
    assert world.asked.count("evacuate") == 1
    # The control: another boot counts from zero. And what is no record keeps nobody from guarding.
    monkeypatch.setattr("sempervirt.guard.adapters.boot_id", lambda: "another")
    assert HeardRecord(path).ns == 0
    path.write_text("{")
    assert HeardRecord(path).ns == 0
