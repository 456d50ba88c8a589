"""Measures candidates against each other until one has won.

Each round measures every candidate that is still in the race once at every load, one right after
the other, in random order. A candidate whose backend or load fails is out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from sempervirt.core.errors import CommandFailed, Unavailable
from sempervirt.disk.tuning import plan
from sempervirt.disk.tuning.bounds import Bounds
from sempervirt.disk.tuning.candidates import Candidate
from sempervirt.disk.tuning.figures import Figures, Measured
from sempervirt.disk.tuning.judgement import (
    Decision,
    Standing,
    decide,
    eliminate,
    standings,
)
from sempervirt.disk.tuning.load import Load, measure
from sempervirt.disk.tuning.scratch import Ground
from sempervirt.disk.tuning.served import Server, Target, serving

OVERHEAD_S = 0.15
# Told after each turn: how many there were, about how many there will be, who is next.
Watch = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Race:
    """Everything about one race. `load_threads` is what a guest would have processors."""

    candidates: Sequence[Candidate]
    server: Server
    target: Target
    ground: Ground
    loads: Sequence[Load]
    load_program: str
    load_threads: int
    bounds: Bounds
    budget_s: float
    folder: Path
    seed: int = 1


@dataclass
class Outcome:
    """`measured` has every candidate that was measured, `last` its standing when it left."""

    decision: Decision
    measured: dict[Candidate, dict[int, dict[str, Figures]]]
    last: dict[Candidate, Standing]
    eliminated: dict[Candidate, str] = field(default_factory=dict)
    failed: dict[Candidate, str] = field(default_factory=dict)


async def run(race: Race, watch: Watch) -> Outcome:
    """Carries the race out. Raises Unavailable when no candidate could be measured at all."""
    runner = _Runner(race, watch)
    stages = plan.stages(len(race.candidates))
    last: dict[Candidate, Standing] = {}
    eliminated: dict[Candidate, str] = {}
    present = list(race.candidates)
    for number, stage in enumerate(stages):
        present = await runner.carry_out(present, stages[number:])
        if not present:
            raise Unavailable(
                f"no candidate could be measured: {next(iter(runner.failed.values()))}",
                remedy="see the cause; semper-blkd and its engines may not work on this storage",
            )
        measured = runner.of(present)
        last |= {found.candidate: found for found in standings(measured, race.bounds)}
        if stage is not stages[-1]:
            present, reasons = eliminate(measured, race.bounds, stages[number + 1].keep)
            eliminated |= reasons
    decision = decide(runner.of(present), race.bounds)
    return Outcome(decision, runner.measured, last, eliminated, runner.failed)


class _Runner:
    """Carries out stages, and keeps what was measured."""

    def __init__(self, race: Race, watch: Watch) -> None:
        self.measured: dict[Candidate, dict[int, dict[str, Figures]]] = {}
        self.failed: dict[Candidate, str] = {}
        self._race = race
        self._watch = watch
        self._random = random.Random(race.seed)
        self._deadline = time.monotonic() + race.budget_s
        self._overheads: list[float] = [OVERHEAD_S]
        self._round = 0
        self._turns = 0

    def of(self, candidates: Sequence[Candidate]) -> Measured:
        """What was measured of some; all have the same rounds, because a failure excludes."""
        return {candidate: self.measured[candidate] for candidate in candidates}

    async def carry_out(
        self, present: list[Candidate], stages: Sequence[plan.Stage]
    ) -> list[Candidate]:
        """The rounds of the first of `stages`; who is left of `present`."""
        in_stage = 0
        for _ in range(stages[0].rounds):
            for candidate in self._random.sample(present, len(present)):
                to_come = max(1, plan.turns(len(present), stages) - in_stage)
                self._watch(self._turns, self._turns + to_come, str(candidate))
                await self._turn(candidate, self._slice_s(to_come))
                self._turns += 1
                in_stage += 1
            self._round += 1
            present = [candidate for candidate in present if candidate not in self.failed]
        return present

    def _slice_s(self, to_come: int) -> float:
        return plan.slice_s(
            self._deadline - time.monotonic(),
            to_come,
            len(self._race.loads),
            median(self._overheads),
        )

    async def _turn(self, candidate: Candidate, seconds: float) -> None:
        started = time.monotonic()
        race = self._race
        socket = race.folder / "backend.sock"
        argv = race.server.argv(candidate, race.target, socket)
        figures: dict[str, Figures] = {}
        try:
            await race.ground.write_back(drop=race.loads[0].cold)
            async with serving(argv, socket) as pid:
                for load in race.loads:
                    await race.ground.write_back(drop=False)
                    figures[load.name] = await measure(
                        race.load_program,
                        load,
                        socket=socket,
                        pid=pid,
                        queues=race.target.queues,
                        threads=race.load_threads,
                        seconds=seconds,
                        seed=self._round + 1,
                    )
        except CommandFailed as error:
            self.failed[candidate] = error.tail[-1] if error.tail else error.message
            return
        self.measured.setdefault(candidate, {})[self._round] = figures
        took = time.monotonic() - started
        self._overheads.append(max(0.0, took - seconds * len(race.loads)))
