"""The campaign: moves, each struck once, and a judge after each.

A move is asked for, the strike falls at its phase (and a random moment later), what was cut is
healed and who was killed is started again; then both hosts have to come to one truth by
themselves, and the judge holds it against the evidence. `make migration-kills` runs it at length.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lab.guest import NEWER_QEMU, NVME, VM, Guest
from lab.journal import Journal
from lab.network import GIGABIT, Link
from lab.world import POLL_S, Host, World
from sempervirt.api.schemas import MigrateRequest
from sempervirt.core.errors import SempervirtError
from sempervirt.guest import ProbeGone, ProbeSilent
from sempervirt.store.records import Custody, Ownership
from tests.migration import faults
from tests.migration.judge import QUIET, Judge
from tests.migration.phases import ORDER, Phases

# Seconds after the beginning of a phase within which a strike falls.
WITHIN_S = {"prepare": 0.3, "precopy": 1.0, "switchover": 0.03, "commit": 0.02, "done": 0.3}
# The phases in which there is time to look for a process.
EARLY = ("prepare", "precopy")
PHASE_S = 90.0
SETTLE_S = 180.0
# What the passed-through device is called in the VM (lab.guest).
NVME_DEVICE = "nvme"
# A host may say "running" of a guest that was heard, or will be, this close to it.
HEARD_WITHIN_S = 8.0
LOOK_S = 0.1


@dataclass(frozen=True)
class Strike:
    """One cell of the campaign."""

    phase: str
    victim: str

    def __str__(self) -> str:
        return f"{self.victim} at {self.phase}"


CELLS = tuple(Strike(phase, victim) for phase in ORDER for victim in faults.VICTIMS)


def chosen(count: int, seed: int) -> list[Strike]:
    """`count` strikes, spread evenly over all cells, in a random order."""
    chance = random.Random(seed)
    whole, rest = divmod(count, len(CELLS))
    strikes = [*CELLS] * whole + chance.sample(CELLS, rest)
    chance.shuffle(strikes)
    return strikes


def each_victim(turn: int) -> list[Strike]:
    """Each victim once, in a random order: with two turns that follow each other at two phases, and
    in five turns at each.
    """
    strikes = [
        Strike(ORDER[(index + turn) % len(ORDER)], victim)
        for index, victim in enumerate(faults.VICTIMS)
    ]
    random.Random(turn).shuffle(strikes)
    return strikes


@dataclass
class Outcome:
    """What came of one strike."""

    strike: Strike
    hit: str = ""
    at: str = ""
    home: str = ""
    lost: bool = False
    device_lost: bool = False
    settled_s: float = 0.0
    said: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Statement:
    """What a host said of the VM, when."""

    time: float
    host: Host
    state: str


class Stage:
    """A world with a guest in it, which is made anew when it was lost. Made by `set`."""

    def __init__(
        self, stack: AsyncExitStack, world: World, seed: int, *, passthrough: bool
    ) -> None:
        self._stack = stack
        self._passthrough = passthrough
        self.world = world
        self.chance = random.Random(seed)
        self._scene = AsyncExitStack()
        self._judge: Judge | None = None

    @classmethod
    @asynccontextmanager
    async def set(cls, link: Link, seed: int, *, passthrough: bool = False) -> AsyncIterator[Stage]:
        """A world of its own, for as long as the block lasts; with `passthrough` its guests have an
        NVMe controller beside their disk.
        """
        async with AsyncExitStack() as stack:
            programs = NEWER_QEMU if passthrough else None
            world = await stack.enter_async_context(World.opened(link, programs=programs))
            stage = cls(stack, world, seed, passthrough=passthrough)
            try:
                yield stage
            finally:
                await stage._scene.aclose()

    @property
    def judge(self) -> Judge:
        """Of the guest that is there."""
        assert self._judge is not None
        return self._judge

    @property
    def is_empty(self) -> bool:
        """Whether there is no guest."""
        return self._judge is None

    async def fill(self, host: Host) -> None:
        """Boots a guest there."""
        await self.clear()
        guest = await self._scene.enter_async_context(
            Guest.booted(self.world, host, nvme=self._passthrough)
        )
        journal = self._scene.enter_context(Journal.kept(guest.image, self.world.namespaces))
        client = await self._scene.enter_async_context(guest.outside())
        self._judge = Judge(guest, journal, client)

    async def clear(self) -> None:
        """Ends the guest."""
        await self._scene.aclose()
        self._scene = AsyncExitStack()
        self._judge = None

    async def end_guest(self, home: str) -> None:
        """Ends a guest that is whole no more, on the host of that name."""
        host = next(host for host in self.world.hosts if host.name == home)
        async with host.client() as client:
            await client.kill_vm(VM)

    async def strike(self, strike: Strike) -> Outcome:
        """One move, struck once, and judged."""
        outcome = Outcome(strike)
        judge = self.judge
        source = await judge.guest.wait_beat(*self.world.hosts)
        sides = faults.Sides(self.world, source, self.world.other(source))
        judge.since = time.monotonic()
        statements: list[Statement] = []
        over = asyncio.Event()
        listening = asyncio.create_task(self._listen(statements, over))
        try:
            await self._move_and_strike(sides, outcome)
            await self._settle(sides, outcome)
        finally:
            over.set()
            await listening
        outcome.said = {statement.state for statement in statements}
        outcome.problems += self._untruths(statements)
        return outcome

    async def _move_and_strike(self, sides: faults.Sides, outcome: Outcome) -> None:
        strike = outcome.strike
        phases = Phases(sides.source)
        try:
            await begin_move(sides.source, sides.destination)
            phases.begun()
            aimed: list[int] = []
            if strike.phase not in EARLY:
                await phases.wait("precopy", PHASE_S)
                aimed = await asyncio.to_thread(faults.aim, sides, strike.victim)
            outcome.at = await phases.wait(strike.phase, PHASE_S)
            await asyncio.sleep(self.chance.uniform(0.0, WITHIN_S[strike.phase]))
            outcome.at = phases.look() or outcome.at
            outcome.hit = await faults.strike(sides, strike.victim, aimed, self.chance)
            await asyncio.sleep(self.chance.uniform(*faults.HELD_S))
            await faults.mend(sides, strike.victim)
        finally:
            phases.close()

    async def _settle(self, sides: faults.Sides, outcome: Outcome) -> None:
        """Waits until both hosts and the store say the same, and asks the judge."""
        started = time.monotonic()
        home = await self._wait_truth(sides, outcome)
        outcome.settled_s = time.monotonic() - started
        if home is None:
            return
        outcome.home = home.name
        if outcome.lost:
            killed = outcome.strike.victim.endswith("qemu") and bool(outcome.hit)
            if not (killed and sides.host(outcome.strike.victim) is home):
                outcome.problems.append(f"lost: on {home}, whose QEMU was not killed")
            outcome.problems += self.judge.writers(sides.source, sides.destination)
            return
        devices = self.judge.guest.devices
        victim = outcome.strike.victim
        killed_there = victim in faults.MEDIATORS and sides.host(victim) is home
        if outcome.hit and killed_there and await _device_gone(home):
            # Its spare was not ready, or there was none yet: the guest has to go on without it.
            outcome.device_lost = True
            devices = tuple(device for device in devices if device != NVME)
        outcome.problems += await self.judge.survived(
            sides.source, sides.destination, home, devices
        )
        left = self.world.other(home)
        if await self.judge.said(left) == "crashed" and outcome.strike.victim != "source qemu":
            outcome.problems.append(f"untrue: {left} says crashed of a VM that is on {home}")

    async def _wait_truth(self, sides: faults.Sides, outcome: Outcome) -> Host | None:
        """The host where the VM is, when everybody agrees on it."""
        give_up = time.monotonic() + SETTLE_S
        while True:
            found = await self._look(outcome)
            if isinstance(found, Host):
                return found
            if time.monotonic() > give_up:
                outcome.problems.append(f"not settled within {SETTLE_S:g} s: {found}")
                return None
            await asyncio.sleep(POLL_S)  # poll interval

    async def _look(self, outcome: Outcome) -> Host | str:
        """The host where the VM is, or why that cannot be said yet."""
        since = time.monotonic()
        try:
            owned = await self.world.ownership(VM)
            said = {host.name: await self.judge.said(host) for host in self.world.hosts}
        except SempervirtError as error:
            return str(error)
        words = f"{_words(owned)}; they say {said}"
        if owned.custody is Custody.FREE and set(said.values()) <= set(QUIET):
            outcome.lost = True
            return max(self.world.hosts, key=lambda host: QUIET.index(said[host.name]))
        if owned.custody is not Custody.OWNED:
            return words
        home = next(host for host in self.world.hosts if host.name == owned.owner)
        if said[self.world.other(home).name] not in QUIET:
            return words
        if said[home.name] != "running":
            return words
        try:
            await self.judge.guest.wait_beat(home, deadline_s=HEARD_WITHIN_S)
        except (ProbeSilent, ProbeGone):
            return f"{words}, and no heart was heard since {time.monotonic() - since:.1f} s"
        return home

    async def _listen(self, statements: list[Statement], over: asyncio.Event) -> None:
        """Writes down what the hosts say until it is over."""
        while not over.is_set():
            for host in self.world.hosts:
                try:
                    state = await self.judge.said(host)
                except SempervirtError:
                    continue
                statements.append(Statement(time.monotonic(), host, state))
            await asyncio.sleep(LOOK_S)  # poll interval

    def _untruths(self, statements: Sequence[Statement]) -> list[str]:
        """ "running" that was not so: no heart was heard there about that time."""
        heard = self.judge.guest.heard_about
        false = [
            statement
            for statement in statements
            if statement.state == "running"
            and not heard(statement.host, statement.time, HEARD_WITHIN_S)
        ]
        if not false:
            return []
        first = false[0]
        after_s = first.time - self.judge.since
        said = f"{first.host} said running {after_s:.1f} s after the beginning"
        return [f"untrue: {said}, and {len(false) - 1} times more"]


async def _device_gone(host: Host) -> bool:
    """Whether the host says that the guest's passed-through device is gone."""
    async with host.client() as client:
        return bool((await client.device(f"{VM}/{NVME_DEVICE}")).ailment)


async def begin_move(source: Host, destination: Host) -> None:
    """Asks for a move until it is granted: a host that was silent is known again after a while."""
    give_up = time.monotonic() + PHASE_S
    while True:
        try:
            async with source.client() as client:
                await client.migrate(VM, MigrateRequest(to=destination.name))
        except SempervirtError:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(POLL_S)  # poll interval
        else:
            return


def _words(owned: Ownership) -> str:
    return f"the store says {owned.custody.value}, {owned.owner or 'nobody'}, epoch {owned.epoch}"


async def campaign(
    strikes: Sequence[Strike],
    seed: int,
    done: Callable[[Outcome], None],
    *,
    link: Link = GIGABIT,
    keep: Path | None = None,
    passthrough: bool = False,
) -> list[Outcome]:
    """All strikes, one after the other. After a problem everything is made anew.

    `keep` is a directory for the logs of the agents after a problem.
    """
    outcomes: list[Outcome] = []
    left = list(strikes)
    while left:
        seeded = seed + len(outcomes)
        async with Stage.set(link, seeded, passthrough=passthrough) as stage:
            sound = True
            while left and sound:
                outcome = await _try(stage, left.pop(0))
                outcomes.append(outcome)
                done(outcome)
                sound = not outcome.problems
                if keep is not None and not sound:
                    _keep_logs(stage.world, keep / f"{seed}-{len(outcomes):03}", outcome)
    return outcomes


async def _try(stage: Stage, strike: Strike) -> Outcome:
    """One strike; one that cannot be finished is a problem like any other."""
    try:
        if stage.is_empty:
            await stage.fill(stage.chance.choice(stage.world.hosts))
        outcome = await stage.strike(strike)
        if outcome.device_lost:
            await stage.end_guest(outcome.home)
        if outcome.lost or outcome.device_lost:
            await stage.clear()
    except (SempervirtError, ProbeGone, ProbeSilent, AssertionError, TimeoutError) as error:
        return Outcome(strike, problems=[f"not finished: {error!r}"])
    return outcome


def _keep_logs(world: World, directory: Path, outcome: Outcome) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "outcome").write_text(f"{outcome}\n")
    for host in world.hosts:
        (directory / f"{host}.log").write_bytes(host.log.read_bytes())
