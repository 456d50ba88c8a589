"""What a refresh costs the VM that it is for: how long its writes take, and its processor time.

    turns, one after the other:  nothing ─ refresh ─ refresh ─ nothing ─ …   (A, B, B, A)
                                 and after each second one: a program that only counts
    a row is written and flushed in the guest all the while, one after the other

The program that counts shares nothing with the VM but the machine: caches, and the core where two
processors are threads of one. It is the control: what it costs the VM, any second guest costs. A
refresh is also told by its phases.

`python -m tests.standby.refresh [--turns 12]` (`make standby-refresh`).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from bench.processes import processor_ns
from sempervirt.demo.succession import BLOCK, NAME, ROWS_MAX, Trial, row_of
from sempervirt.host.places import Places
from sempervirt.standby.values import Tier
from sempervirt.vm.processes import living_of
from tests.standby.__main__ import quantile

PAUSE_S, COUNT_S = 0.005, 10.0
# The goals of the issue.
ADDED_MS_MAX, PROCESSOR_SHARE_MAX = 5.0, 0.10


@dataclass
class Turn:
    """Of one kind: how long each row took, and what the VM's processes took of the processors; the
    same for each phase that a standby was in meanwhile: rows, seconds, processor time.
    """

    rows_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    processor_s: float = 0.0
    phases: dict[str, tuple[int, float, float]] = field(default_factory=dict)

    def note(self, phase: str, seconds: float, processor_s: float) -> None:
        """One row more in that phase."""
        rows, before_s, used_s = self.phases.get(phase, (0, 0.0, 0.0))
        self.phases[phase] = rows + 1, before_s + seconds, used_s + processor_s


def processes(places: Places) -> list[int]:
    """The VM's QEMU and backends."""
    return [one.pid for one in living_of(places, NAME).all]


def processor_s(pids: list[int]) -> float:
    """What they have taken so far."""
    return sum(map(processor_ns, pids)) / 1e9


async def count() -> None:
    """As long as a refresh takes, more or less, of one processor."""
    program = f"import time\nend = time.monotonic() + {COUNT_S}\nwhile time.monotonic() < end: pass"
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    await child.wait()


class Writing:
    """Rows, one after the other, each flushed before the next."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._last = 0

    async def during(self, places: Places, turn: Turn, what: Callable[[], Awaitable[None]]) -> None:
        """Writes while `what` goes on."""
        work = asyncio.ensure_future(what())
        pids = await asyncio.to_thread(processes, places)
        begun, used = time.monotonic(), processor_s(pids)
        at, had = begun, used
        while not work.done():
            self._last = self._last % ROWS_MAX + 1
            before = time.monotonic()
            await self.trial.probe.write_raw("serial:data", self._last * BLOCK, row_of(self._last))
            turn.rows_ms.append((time.monotonic() - before) * 1e3)
            await asyncio.sleep(PAUSE_S)  # poll interval: of whoever writes
            making = self.trial.driver.state.making
            now, has = time.monotonic(), processor_s(pids)
            turn.note(making.life.value if making else "none", now - at, has - had)
            at, had = now, has
        turn.seconds += time.monotonic() - begun
        turn.processor_s += processor_s(pids) - used
        await work


def table(
    tier: Tier, plain: Turn, busy: Turn, counting: Turn, lengths: list[float]
) -> tuple[str, bool]:
    """The figures, and whether the goals are reached."""
    rows = [
        f"tier {tier.value}: {len(lengths)} refreshes, median {statistics.median(lengths):.1f} s"
    ]
    rows.append("| | rows | median ms | p99 ms | worst ms | processor |")
    rows.append("|---|---|---|---|---|---|")
    kinds = (
        ("without", plain),
        ("during a refresh", busy),
        ("beside a program that counts", counting),
    )
    for name, turn in kinds:
        median, p99 = (quantile(turn.rows_ms, share) for share in (0.5, 0.99))
        share = turn.processor_s / turn.seconds
        rows.append(
            f"| {name} | {len(turn.rows_ms)} | {median:.1f} | {p99:.1f} | "
            f"{max(turn.rows_ms):.1f} | {share:.0%} |"
        )
    added = quantile(busy.rows_ms, 0.99) - quantile(plain.rows_ms, 0.99)
    more, control = (
        turn.processor_s / turn.seconds / (plain.processor_s / plain.seconds) - 1
        for turn in (busy, counting)
    )
    rows.append(
        f"added to p99: {added:.1f} ms; processor time of the VM: {more:+.0%}, beside a program "
        f"that counts {control:+.0%}"
    )
    rows += [
        f"{phase}: {many} rows in {seconds:.1f} s, {used / seconds:.0%} of a processor, "
        f"{used / many * 1e3:.2f} ms a row"
        for turn in (plain, busy, counting)
        for phase, (many, seconds, used) in turn.phases.items()
    ]
    return "\n".join(rows), added <= ADDED_MS_MAX and more <= PROCESSOR_SHARE_MAX


async def measure(tier: Tier, turns: int) -> tuple[str, bool]:
    """A VM with its standby, refreshed again and again."""
    plain, busy, counting, lengths = Turn(), Turn(), Turn(), list[float]()
    async with Trial(tier) as trial:
        await trial.wait_ready()
        writing, places = Writing(trial), trial.places
        for turn in range(turns):
            if turn % 4 in (1, 2):
                begun = time.monotonic()
                await writing.during(places, busy, trial.driver.refresh)
                lengths.append(time.monotonic() - begun)
            else:
                length = statistics.median(lengths) if lengths else 10.0
                await writing.during(places, plain, partial(asyncio.sleep, length))
            if turn % 2:
                await writing.during(places, counting, count)
    return table(tier, plain, busy, counting, lengths)


def main() -> int:
    """The exit status is 0 if each tier reaches the goals."""
    parser = argparse.ArgumentParser(prog="make standby-refresh")
    parser.add_argument("--turns", type=int, default=12, help="half of them with a refresh")
    parser.add_argument("--tier", choices=[tier.value for tier in Tier], action="append")
    options = parser.parse_args()
    logging.getLogger("sempervirt").setLevel(logging.ERROR)
    reached = True
    for tier in [Tier(name) for name in options.tier] if options.tier else list(Tier):
        said, well = asyncio.run(measure(tier, options.turns))
        reached &= well
        sys.stdout.write(f"{said}\n\n")
        sys.stdout.flush()
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
