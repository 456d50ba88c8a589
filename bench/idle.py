"""What disks without I/O cost: ``python -m bench.idle``.

Guests under emulation start every queue of their disks and then leave them alone; meanwhile the
processor time of each backend, of each spare and of the agent is taken from its own clock. The
agent asks backends less and less often when nothing happens, so they are left alone for a while
first.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import fleet, machine, markdown
from bench.processes import processor_ns
from bench.sections import IDLE, MarkersError

LIMIT_PERCENT = 0.1


@dataclass(frozen=True)
class Use:
    """Processor time of some processes of one kind, in per cent of one processor."""

    kind: str
    processes: int
    all_percent: float
    worst_percent: float


@dataclass(frozen=True)
class Idleness:
    """What was seen."""

    shape: fleet.Shape
    seconds: float
    uses: list[Use]

    def objections(self) -> Iterator[str]:
        """Why it is too much: all backends together, or all spares, may use so much."""
        for use in self.uses:
            if use.kind != "agent" and use.all_percent >= LIMIT_PERCENT:
                yield f"{use.processes} × {use.kind}: {use.all_percent:.3f} % of a processor"


async def measure(shape: fleet.Shape, settle_s: float, seconds: float) -> Idleness:
    """Run a fleet, let it come to rest, and watch it. Raises FleetError."""
    async with fleet.running(shape) as running:
        await asyncio.sleep(settle_s)
        return await watch(running, seconds)


async def watch(running: fleet.Fleet, seconds: float) -> Idleness:
    """What the processes of a fleet use in so many seconds from now on."""
    before = {pid: processor_ns(pid) for pids in running.pids.values() for pid in pids}
    start = time.monotonic_ns()
    await asyncio.sleep(seconds)
    after = {pid: processor_ns(pid) for pid in before}
    length = time.monotonic_ns() - start
    percent = {pid: (after[pid] - before[pid]) / length * 100 for pid in before}
    uses = []
    for kind, pids in running.pids.items():
        shares = [percent[pid] for pid in pids]
        uses.append(Use(kind, len(pids), sum(shares), max(shares)))
    return Idleness(running.shape, length / 1e9, uses)


def document(seen: Idleness, on: dict[str, str]) -> str:
    """For docs/reference/measurements/fleet.md."""
    shape = seen.shape
    lines = [
        f"{markdown.provenance(on)}. {shape}, no I/O, {seen.seconds:.0f} s.\n",
        "| process | how many | all together, % of a processor | the busiest of them |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| {use.kind} | {use.processes} | {use.all_percent:.3f} | {use.worst_percent:.4f} |"
        for use in seen.uses
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, show, keep, judge; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__)
    parser.add_argument("--vms", type=int, default=2)
    parser.add_argument("--disks", type=int, default=10, help="of each VM")
    parser.add_argument("--queues", type=int, default=2, help="of each disk")
    parser.add_argument("--settle", type=float, default=30.0, metavar="S", help="before measuring")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="measured")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), metavar="DIR")
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the section of FILE")
    options = parser.parse_args()
    shape = fleet.Shape(options.vms, options.disks, options.queues)
    try:
        seen = asyncio.run(measure(shape, options.settle, options.seconds))
        on = machine.fleet_fingerprint()
        options.output.mkdir(parents=True, exist_ok=True)
        kept = {"version": 1, "machine": on, **asdict(seen)}
        (options.output / "idle.json").write_text(json.dumps(kept, indent=1) + "\n")
        if options.update:
            IDLE.write(options.update, document(seen, on))
    except (fleet.FleetError, MarkersError) as error:
        print(f"bench.idle: error: {error}", file=sys.stderr)
        return 2
    table = Table("process", "how many", "all, %", "busiest, %", title="idle: % of a processor")
    for use in seen.uses:
        cells = (f"{use.all_percent:.4f}", f"{use.worst_percent:.4f}")
        table.add_row(use.kind, str(use.processes), *cells)
    Console().print(table)
    objections = list(seen.objections())
    for objection in objections:
        print(f"bench.idle: more than {LIMIT_PERCENT} %: {objection}", file=sys.stderr)
    return 1 if objections else 0


if __name__ == "__main__":
    sys.exit(main())
