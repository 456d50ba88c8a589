"""The campaigns: kills at random instants, life's other events, every named crash point.

Queues may move between threads all the while (`rebinding`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.core.queue_map import ThreadMap
from sempervirt.demo.stall import Cause
from sempervirt.demo.trial import Trial, TrialSetup, running
from sempervirt.demo.verdict import Verdict
from sempervirt.disk.backend import Blkd
from sempervirt.disk.state import STALL_S
from sempervirt.guest.errors import ProbeGone, ProbeSilent
from sempervirt.guest.reports import Stats

Step = Callable[[], None]
# A kill lands in the middle of a take-over now and then: inside a handshake or a replay.
BURST = 0.2
# Seconds between two rebindings: at most.
REBIND_MAX_S = 0.05
# From a backend's hang to the guest's next completion: the time without one that is too long, the
# question that finds it, and the next one, on a machine that may be busy.
HANG_BOUND_MS = 1000 * (STALL_S + 5.0)
# A request of a control that has not come back for so much longer is lost.
LATE_S = 15.0


@asynccontextmanager
async def rebinding(trial: Trial, seed: int) -> AsyncIterator[None]:
    """Moves queues to other threads at random instants until the block is left.

    A rebinding that fails is a problem of the trial: it has to outlive the death of a backend.
    """
    chance = random.Random(seed)
    queues = trial.setup.queues
    left = asyncio.Event()

    async def rebind() -> None:
        while not left.is_set():
            try:
                await trial.rebind(random_map(queues, chance))
            except SempervirtError as error:
                trial.verdict.problems.append(f"rebinding: {error}")
            with suppress(TimeoutError):
                await asyncio.wait_for(left.wait(), chance.uniform(0.0, REBIND_MAX_S))

    task = asyncio.create_task(rebind())
    try:
        yield
    finally:
        left.set()
        await task


def random_map(queues: int, chance: random.Random) -> ThreadMap:
    """Any map of that many queues."""
    limit = chance.randint(1, queues)
    threads = [chance.randrange(limit) for _ in range(queues)]
    order = list(dict.fromkeys(threads))
    return tuple(order.index(thread) for thread in threads)


async def kills(setup: TrialSetup, count: int, seed: int, done: Step) -> Verdict:
    """`count` SIGKILLs at random instants, some of them during the recovery from the last."""
    async with running(setup) as trial:
        await _kill(trial, count, random.Random(seed), done)
        await trial.stop_load()
        return trial.verdict


async def kills_while_rebinding(setup: TrialSetup, count: int, seed: int, done: Step) -> Verdict:
    """The same, while queues move between threads."""
    async with running(setup) as trial:
        async with rebinding(trial, seed):
            await _kill(trial, count, random.Random(seed), done)
        await trial.stop_load()
        return trial.verdict


async def _kill(trial: Trial, count: int, chance: random.Random, done: Step) -> None:
    while trial.verdict.kills < count:
        await asyncio.sleep(chance.uniform(0.0, 0.3))
        if chance.random() < BURST and trial.verdict.kills + 2 <= count:
            await _kill_twice(trial, chance)
            done()
        else:
            await trial.kill_backend()
        done()


async def _kill_twice(trial: Trial, chance: random.Random) -> None:
    """Kills the backend, and its successor within 20 ms of taking over."""
    pid = trial.disk.active_pid
    await trial.kill_active()
    await trial.wait_successor(pid)
    await asyncio.sleep(chance.uniform(0.0, 0.02))
    trial.verdict.kills += 1
    # The stall of the pair is not that of one kill, so it is not counted among them.
    stall = await trial.kill_backend()
    trial.verdict.stalls[-1] = replace(stall, cause=Cause.DOUBLE_KILL)


async def hangs(setup: TrialSetup, count: int, seed: int, done: Step) -> Verdict:
    """`count` backends that stop at random instants and are there all the same."""
    chance = random.Random(seed)
    async with running(setup) as trial:
        for _ in range(count):
            await asyncio.sleep(chance.uniform(0.0, 0.3))
            stall = await trial.hang_backend()
            if stall.ms is None or stall.ms > HANG_BOUND_MS:
                trial.verdict.problems.append(f"a backend that hung stalled for {stall.ms} ms")
            done()
        await trial.stop_load()
        return trial.verdict


@dataclass(frozen=True)
class Life:
    """How often what happens: stop/cont, guest reboots, device resets, upgrades by SIGTERM."""

    pauses: int
    reboots: int
    resets: int
    upgrades: int

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.pauses + self.reboots + self.resets + self.upgrades


async def events(setup: TrialSetup, life: Life, seed: int, done: Step) -> Verdict:
    """Life's events under load, while queues move between threads if there are several."""
    async with running(setup) as trial:
        if setup.queues > 1:
            async with rebinding(trial, seed):
                await _live(trial, life, done)
        else:
            await _live(trial, life, done)
        await trial.stop_load()
        return trial.verdict


async def _live(trial: Trial, life: Life, done: Step) -> None:
    for act, count in (
        (trial.stop_and_continue, life.pauses),
        (trial.terminate_backend, life.upgrades),
        (trial.reset_device, life.resets),
        (trial.reboot, life.reboots),
    ):
        for _ in range(count):
            await act()
            done()


def deaths_in(log: Path) -> int:
    """How many processes wrote their death down."""
    return len(deaths_at(log))


def deaths_at(log: Path) -> list[str]:
    """Where they died."""
    return log.read_text().splitlines() if log.exists() else []


@dataclass(frozen=True)
class Plan:
    """How to come to a crash point: (point, nth passage in its process, deaths) in order."""

    name: str
    steps: tuple[tuple[str, int, int], ...]

    @property
    def deaths(self) -> int:
        """How many processes die."""
        return sum(deaths for _, _, deaths in self.steps)

    def environment(self, log: Path) -> dict[str, str]:
        """For a semper-blkd with crash points."""
        steps = ",".join(f"{point}:{nth}:{deaths}" for point, nth, deaths in self.steps)
        return {"SEMPER_DIE_AT": steps, "SEMPER_DIE_LOG": str(log)}


# Not at the first passage, so that the guest is well under way.
NTH = 300
# The first restarts of a backend come at once; see RESTARTS in disk/state.py.
CHAIN_DEATHS = 9
_LIVE = (
    "pop-start",
    "pop-counter",
    "pop-mark",
    "io-submitted",
    "io-done",
    "status-stored",
    "used-element",
    "batch-next",
    "batch-head",
    "used-index",
    "clear-entry",
    "region-index",
    "call-pending",
)
PLANS = (
    *(Plan(point, ((point, NTH, 3),)) for point in _LIVE),
    # Recovery has something to do only after a death at the right instant; then it is killed
    # itself, and what recovers from that as well.
    Plan("recover-start", (("io-done", NTH, 1), ("recover-start", 1, 3))),
    Plan("recover-clear", (("used-index", NTH, 1), ("recover-clear", 1, 3))),
    Plan("recover-index", (("used-index", NTH, 1), ("recover-index", 1, 1))),
    Plan("replay-submit", (("io-done", NTH, 1), ("replay-submit", 1, 3))),
    Plan("replay-published", (("io-done", NTH, 1), ("replay-published", 1, 1))),
    Plan(
        "replay of a replay",
        (("io-done", NTH, 1), ("io-done", 1, 2), ("used-index", 1, 1), ("recover-clear", 1, 1)),
    ),
)


def chained(plans: Sequence[Plan]) -> list[Plan]:
    """The same deaths in the same order, of fewer guests: as many plans in a row as stay below the
    deaths after which supervision begins to wait longer.
    """
    chains = [plans[0]]
    for plan in plans[1:]:
        last = chains[-1]
        if last.deaths + plan.deaths > CHAIN_DEATHS:
            chains.append(plan)
        else:
            chains[-1] = Plan(f"{last.name}, {plan.name}", last.steps + plan.steps)
    return chains


async def crash_point(setup: TrialSetup, binary: Path, plan: Plan, log: Path) -> Verdict:
    """Processes die as planned; fewer deaths are a problem."""
    assert isinstance(setup.command, Blkd)
    command = replace(setup.command, path=binary, environment=plan.environment(log))
    async with Trial(replace(setup, command=command)) as trial:
        await trial.start_load()
        with suppress(Unavailable):
            await trial.disk.changes.wait_until(
                lambda: deaths_in(log) >= plan.deaths,
                timeout_s=60 + 30 * plan.deaths,
                what="the deaths",
            )
        await trial.wait_guarded()
        await trial.stop_load()
        died = deaths_in(log)
        trial.verdict.kills += died
        if died != plan.deaths:
            trial.verdict.problems.append(
                f"{died} processes died instead of {plan.deaths}: {deaths_at(log)}"
            )
        return trial.verdict


async def control(setup: TrialSetup, count: int, seed: int, *, rebind: bool = False) -> Verdict:
    """As `kills`, for a backend that is expected to lose requests; ends at the first loss."""
    verdict = Verdict()
    try:
        async with running(setup) as trial:
            verdict = trial.verdict
            if rebind:
                async with rebinding(trial, seed):
                    loss = await _kill_until_lost(trial, count, seed)
            else:
                loss = await _kill_until_lost(trial, count, seed)
            if loss is None:
                await trial.stop_load()
            else:  # writers that wait for a lost request would hold the end up
                verdict.add(loss)
    except (SempervirtError, ProbeGone, ProbeSilent) as error:
        verdict.problems.append(str(error))
    return verdict


async def _kill_until_lost(trial: Trial, count: int, seed: int) -> Stats | None:
    """What the guest says when it has seen a loss; None if it saw none in `count` kills."""
    chance = random.Random(seed)
    while (loss := await _loss(trial)) is None and trial.verdict.kills < count:
        await asyncio.sleep(chance.uniform(0.02, 0.1))
        await trial.kill_backend()
    return loss


async def _loss(trial: Trial) -> Stats | None:
    """What the guest says, if it has seen a loss. A request that is late is not lost: unless it
    failed or came to the wrong one, it is waited for.
    """
    stats = await trial.probe.stats()
    if stats.hung:
        with suppress(Unavailable):
            stats = await trial.probe.wait_stats(
                lambda s: not s.hung or _has_failed(s), deadline_s=LATE_S
            )
    return stats if stats.hung or _has_failed(stats) else None


def _has_failed(stats: Stats) -> bool:
    """Whether more was seen than requests that have not come back."""
    verdict = Verdict()
    verdict.add(stats.model_copy(update={"hung": 0}))
    return verdict.lost
