"""Every world that a driver of `sempervirt.renewal` can reach, by stepping the driver itself.

A world is a frozen value: the driver's state, the work that it has begun, what is on record, the
processes. Whatever can happen is tried in each: every port may fail or not answer, a QEMU may die,
the agent may die and begin anew from the record, the record may not be written. A `Room` says what
the ports do to a world, and what must hold.
"""

from __future__ import annotations

import abc
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sempervirt.renewal.driver import RenewalDriver
from tests.unit.exploration import Outcome, Pending, Script, Stopped, run_until_it_waits

# A tick comes when its time has come: all times in a world are 0, and it ticks later.
NOW, LATER = 0.0, 1e6
OK, FAILED, UNKNOWN = Outcome(), Outcome(error="failed"), Outcome(error="unknown")

AnyDriver = RenewalDriver[Any, Any, Any, Any]


@dataclass(frozen=True)
class World:
    """`state` is None when no work goes on; `works` are in an order of their own, and one that was
    begun twice is there twice. `faults` may still happen; `writable`: the record.
    """

    state: Any
    works: tuple[Pending, ...] = ()
    faults: int = 3
    writable: bool = True


@dataclass(frozen=True)
class Edge:
    """What happened, and the world after it. A fault is what no rest may depend on."""

    what: str
    world: Any
    fault: bool = False


class Ports:
    """Every port of a driver: what is asked is scripted, what is told changes the world at once."""

    def __init__(self, room: Room, world: Any) -> None:
        self.room = room
        self.world = world
        self.script = Script()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def tell(*arguments: Any, **named: Any) -> Any:
            self.world, answer = self.room.told(self.world, name, *arguments, **named)
            if isinstance(answer, Exception):
                raise answer
            return answer

        async def ask(*_arguments: Any, **_named: Any) -> Any:
            return self.script.answer(name)

        if name in self.room.told_calls:
            return tell
        if name in self.room.asked_at_once:
            return lambda: self.script.answer(name)
        return ask


class Room(abc.ABC):
    """One kind of work."""

    told_calls: frozenset[str] = frozenset(
        {"release", "tidy", "begin", "advance", "end_work", "took_over", "stop_packing"}
    )
    asked_at_once: frozenset[str] = frozenset({"ended"})

    @abc.abstractmethod
    def first(self) -> Iterator[tuple[Any, list[Any]]]:
        """The worlds that all begins with, and the effects to carry out in each."""

    @abc.abstractmethod
    def driver(self, world: Any, ports: Any, clock: Stopped) -> AnyDriver:
        """A driver in the state of `world`."""

    @abc.abstractmethod
    def options(self, world: Any, call: str) -> Iterator[tuple[Outcome, Any, bool]]:
        """What may come of a call: its outcome, the world, and whether it is a fault."""

    @abc.abstractmethod
    def told(self, world: Any, call: str, *arguments: Any, **named: Any) -> tuple[Any, Any]:
        """What a port that is told something does: the world, and the answer."""

    @abc.abstractmethod
    def happens(self, world: Any) -> Iterator[Edge]:
        """What happens by itself."""

    @abc.abstractmethod
    def crashed(self, world: Any) -> tuple[Any, list[Any]]:
        """The world of the next agent, and the effects that it begins with."""

    @abc.abstractmethod
    def events(self, world: Any) -> Iterator[tuple[Any, float]]:
        """Events from outside, and when they come."""

    @abc.abstractmethod
    def wrong(self, world: Any) -> Iterator[str]:
        """What must never be."""

    @abc.abstractmethod
    def wrong_at_rest(self, world: Any) -> Iterator[str]:
        """What must not be when nothing follows any more."""

    @abc.abstractmethod
    def over(self, world: Any) -> bool:
        """Whether nothing follows."""


class Explorer:
    """Steps a driver of `room`, changed by `mutate` if a test wants to see that it matters."""

    def __init__(
        self, room: Room, mutate: Callable[[AnyDriver], None] = lambda _driver: None
    ) -> None:
        self.room = room
        self.mutate = mutate
        self.edges: dict[Any, list[Edge]] = {}
        self.came_from: dict[Any, tuple[Any, str]] = {}
        self.wrong: dict[str, Any] = {}

    def run(self, until: str = "") -> Explorer:
        """Explores everything, or until something is wrong that has `until` in its name."""
        queue: deque[Any] = deque()
        for world, effects in self.room.first():
            for started in self._begun(world, effects):
                self._add(started, None, "", queue)
        while queue:
            world = queue.popleft()
            self.edges[world] = list(self.moves(world))
            for edge in self.edges[world]:
                self._add(edge.world, world, edge.what, queue)
            if until and any(until in name for name in self.wrong):
                return self
        self._find_stuck()
        return self

    def way_to(self, wrong: str) -> list[str]:
        """How it came to that, for people."""
        world, steps = self.wrong[wrong], []
        while (before := self.came_from[world])[0] is not None:
            steps.append(before[1])
            world = before[0]
        return steps[::-1]

    def _add(self, world: Any, before: Any, what: str, queue: deque[Any]) -> None:
        if world in self.came_from:
            return
        self.came_from[world] = before, what
        for wrong in self.room.wrong(world):
            self.wrong.setdefault(wrong, world)
        if self.room.over(world):
            for wrong in self.room.wrong_at_rest(world):
                self.wrong.setdefault(wrong, world)
        queue.append(world)

    def _find_stuck(self) -> None:
        back = defaultdict(list)
        for world, edges in self.edges.items():
            for edge in edges:
                if not edge.fault:
                    back[edge.world].append(world)
        reached = {world for world in self.edges if self.room.over(world)}
        queue = deque(reached)
        while queue:
            for world in back[queue.popleft()]:
                if world not in reached:
                    reached.add(world)
                    queue.append(world)
        for world in self.edges:
            if world not in reached:
                self.wrong.setdefault("stuck", world)

    # What can happen in a world

    def moves(self, world: Any) -> Iterator[Edge]:
        for pending in dict.fromkeys(world.works):
            for outcome, after, fault in self.room.options(world, pending.waits):
                if fault and not world.faults:
                    continue
                spent = replace(after, faults=after.faults - fault)
                for ended in self._went_on(spent, pending, outcome):
                    kind = outcome.error or "ok"
                    yield Edge(f"{pending.waits}: {kind}", ended, fault)
        if self.room.over(world):
            return
        for event, now in self.room.events(world):
            for after in self._stepped(world, event, now):
                yield Edge(type(event).__name__, after)
        if not world.faults:
            return
        less = replace(world, faults=world.faults - 1)
        for edge in self.room.happens(less):
            yield Edge(edge.what, edge.world, fault=True)
        if world.writable:
            yield Edge("disk full", replace(less, writable=False), fault=True)
        after, effects = self.room.crashed(replace(less, works=()))
        for begun in self._begun(after, effects):
            yield Edge("crash", begun, fault=True)

    def _driver(self, ports: Ports, now: float) -> tuple[AnyDriver, list[Any], list[Any]]:
        """A driver in the world of `ports`; what it begins, and what it posts."""
        driver = self.room.driver(ports.world, ports, Stopped(now))
        begun: list[Any] = []
        posted: list[Any] = []
        driver.begin = begun.append  # type: ignore[method-assign, assignment]
        driver.post = posted.append  # type: ignore[method-assign, assignment]
        self.mutate(driver)
        return driver, begun, posted

    def _begun(self, world: Any, effects: list[Any]) -> list[Any]:
        """The world when a driver has begun these effects."""
        if world.state is None:
            return [world]
        ports = Ports(self.room, world)
        driver, begun, _ = self._driver(ports, NOW)
        for effect in effects:
            driver.carry_out(effect)
        return self._works(ports.world, begun)

    def _works(self, world: Any, begun: list[Any]) -> list[Any]:
        """The worlds when work has come to its first call, or to its end."""
        worlds = [world]
        for effect in begun:
            worlds = [
                after for one in worlds for after in self._went_on(one, Pending(effect, ""), None)
            ]
        return worlds

    def _went_on(self, world: Any, pending: Pending, outcome: Outcome | None) -> list[Any]:
        had = pending.had if outcome is None else (*pending.had, outcome)
        works = list(world.works)
        if outcome is not None:
            works.remove(pending)
        ports = Ports(self.room, replace(world, works=tuple(works)))
        driver, _, posted = self._driver(ports, NOW)
        ports.script = Script(had)
        waits = run_until_it_waits(driver.work(pending.effect))
        after = ports.world
        if waits:
            waiting = Pending(pending.effect, waits, had)
            return [replace(after, works=tuple(sorted((*after.works, waiting), key=repr)))]
        worlds = [after]
        for event in posted:
            worlds = [then for one in worlds for then in self._stepped(one, event, NOW)]
        return worlds

    def _stepped(self, world: Any, event: Any, now: float) -> list[Any]:
        if world.state is None:
            return [world]
        ports = Ports(self.room, world)
        driver, begun, _ = self._driver(ports, now)
        driver.step(event)
        return self._works(replace(ports.world, state=driver.state), begun)
