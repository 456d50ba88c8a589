"""What many disks cost on one host, in one agent: ``python -m bench.scale``.

The same fleet of idle disks is run twice, with one queue for each disk and with several, so that
what belongs to a queue can be told from what belongs to a disk.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench import fleet, machine, markdown
from bench.processes import Footprint, footprint
from bench.sections import SCALE, MarkersError

COLUMNS = (
    "process", "queues", "how many", "memory KiB", "own", "programs", "guest memory",
    "threads", "descriptors",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Processes of one kind in a fleet, by the median of each figure."""

    name: str
    queues: int
    processes: int
    typical: Footprint

    def cells(self) -> list[str]:
        """In the order of COLUMNS."""
        one = self.typical
        sizes = [f"{size:.0f}" for size in (one.pss, one.anonymous, one.file, one.shared)]
        counts = [str(one.threads), str(one.descriptors)]
        return [self.name, str(self.queues), str(self.processes), *sizes, *counts]


@dataclass(frozen=True)
class Fleet:
    """What one fleet showed. `io_threads`: of the backend with the most that serve queues."""

    shape: fleet.Shape
    served_s: float
    guarded_s: float
    io_threads: int
    kinds: list[Kind]

    def typical(self, name: str) -> Footprint:
        """The figures of one kind."""
        return next(kind.typical for kind in self.kinds if kind.name == name)


@dataclass(frozen=True)
class Scale:
    """Two fleets that differ in the queues of each disk."""

    few: Fleet
    many: Fleet

    @property
    def disk_kib(self) -> float:
        """A disk with its spare and one queue."""
        return self.few.typical("backend").pss + self.few.typical("spare").pss

    @property
    def queue_kib(self) -> float:
        """What each further queue adds to a disk; its programs are there already."""
        pairs = [(self.many.typical(name), self.few.typical(name)) for name in KINDS]
        added = sum(
            many.anonymous + many.shared - few.anonymous - few.shared for many, few in pairs
        )
        return added / (self.many.shape.queues - self.few.shape.queues)

    def objections(self) -> Iterator[str]:
        """What must not be: threads that nobody asked for."""
        few, many = (one.typical("backend").threads for one in (self.few, self.many))
        if self.many.io_threads >= self.many.shape.queues:
            yield f"{self.many.io_threads} threads serve {self.many.shape.queues} queues"
        if many > few:
            yield f"a backend with more queues has {many} threads instead of {few}"


KINDS = ("backend", "spare")


async def measure(shape: fleet.Shape) -> Fleet:
    """Run a fleet and look at it. Raises FleetError."""
    async with fleet.running(shape) as running:
        return look(running)


def look(running: fleet.Fleet) -> Fleet:
    """What the processes of a fleet hold now."""
    kinds = [
        Kind(name, running.shape.queues, len(pids), typical([footprint(pid) for pid in pids]))
        for name, pids in running.pids.items()
    ]
    threads = max(disk.backend["threads"] for disk in running.disks if disk.backend)
    return Fleet(running.shape, running.served_s, running.guarded_s, threads, kinds)


def typical(seen: list[Footprint]) -> Footprint:
    """The median of each figure."""
    return Footprint(
        anonymous=median(one.anonymous for one in seen),
        file=median(one.file for one in seen),
        shared=median(one.shared for one in seen),
        threads=round(median(one.threads for one in seen)),
        descriptors=round(median(one.descriptors for one in seen)),
    )


def document(scale: Scale, on: dict[str, str]) -> str:
    """For docs/reference/measurements/fleet.md."""
    lines = [f"{markdown.provenance(on)}.\n"]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|---|{'--:|' * (len(COLUMNS) - 1)}"]
    fleets = (scale.few, scale.many)
    lines += [f"| {' | '.join(kind.cells())} |" for one in fleets for kind in one.kinds]
    lines.append(f"\n{summary(scale)}")
    return "\n".join(lines)


def summary(scale: Scale) -> str:
    """What follows, in a few sentences."""
    started = "; ".join(
        f"{one.shape}: all served after {one.served_s:.1f} s, all guarded by a spare after "
        f"{one.guarded_s:.1f} s"
        for one in (scale.few, scale.many)
    )
    return (
        "Memory is the proportional share (PSS), the median over the processes of a kind; guest "
        "memory counts as far as the backend has touched it. "
        f"A disk with its spare costs {scale.disk_kib:.0f} KiB, each further queue "
        f"{scale.queue_kib:.0f} KiB. Threads that serve the queues of a disk: "
        f"{scale.many.io_threads} for {scale.many.shape.queues}. "
        f"From the first request to the agent: {started}."
    )


def main() -> int:
    """Measure, show, keep, judge; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--vms", type=int, default=4)
    parser.add_argument("--disks", type=int, default=16, help="of each VM")
    parser.add_argument("--queues", type=int, default=4, help="of each disk, the second time")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), metavar="DIR")
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the section of FILE")
    options = parser.parse_args()
    try:
        few, many = (
            asyncio.run(measure(fleet.Shape(options.vms, options.disks, queues)))
            for queues in (1, options.queues)
        )
        scale, on = Scale(few, many), machine.fleet_fingerprint()
        options.output.mkdir(parents=True, exist_ok=True)
        kept = {"version": 1, "machine": on, **asdict(scale)}
        (options.output / "scale.json").write_text(json.dumps(kept, indent=1) + "\n")
        if options.update:
            SCALE.write(options.update, document(scale, on))
    except (fleet.FleetError, MarkersError) as error:
        print(f"bench.scale: error: {error}", file=sys.stderr)
        return 2
    table = Table(*COLUMNS, title="scale")
    for kind in (*few.kinds, *many.kinds):
        table.add_row(*kind.cells())
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    console.print(summary(scale))
    objections = list(scale.objections())
    for objection in objections:
        print(f"bench.scale: {objection}", file=sys.stderr)
    return 1 if objections else 0


if __name__ == "__main__":
    sys.exit(main())
