"""Requests in a second of a passed-through NVMe, of QEMU's own, and of a vhost-user disk.

`python -m tests.passthrough.rates` (`make bench-passthrough`): three guests with the same load on
images of one size, of which one runs at a time, in turn; so each meets the same machine. What is
told of the machine's load belongs to the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab.guest import NEWER_QEMU, NVME
from lab.plain_qemu import QMP_S, PlainHost, wait_running
from sempervirt.guest import ProbeClient
from sempervirt.host.procfs import PROC, find_by_argument
from sempervirt.qemu.qmp import Monitor
from tests.migration.judge import faults_of
from tests.passthrough.pair import LOAD, new_image, side

OURS, QEMUS, VHOST = "semper-vfiod", "QEMU's nvme", "semper-blkd (vhost-user)"
# Until the guest has its pace again, and for how long it is measured, in seconds.
SETTLE_S, MEASURE_S = 0.5, 3.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Guest:
    """One of the three. `pids`: all processes that serve it, QEMU first."""

    name: str
    device: str
    monitor: Monitor
    probe: ProbeClient
    pids: Callable[[], list[int]]


@dataclass
class Sample:
    """One turn: requests in a second, and processor time of each, in all and beside QEMU."""

    rate: float
    cpu_us: float
    beside_us: float


@dataclass
class Report:
    """What was measured of one guest."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def qemu_of(host: PlainHost) -> int:
    """Its process."""
    (pid,) = find_by_argument(re.compile(rf"unix:{re.escape(str(host.path('qmp')))},.*"))
    return pid


@asynccontextmanager
async def ours(place: Path) -> AsyncIterator[Guest]:
    """Behind our mediator."""
    async with (
        side(place / "a", new_image(place), incoming=False) as here,
        here.host.probe() as (probe, _),
    ):

        def pids() -> list[int]:
            return [qemu_of(here.host), *([here.device.pid] if here.device.pid else [])]

        yield Guest(OURS, NVME, here.monitor, probe, pids)


@asynccontextmanager
async def plain(place: Path, name: str) -> AsyncIterator[Guest]:
    """Behind QEMU's own nvme, or behind our backend of disks."""
    directory = place / ("b" if name == QEMUS else "c")
    await asyncio.to_thread(directory.mkdir)
    image = new_image(directory)
    host = PlainHost(directory, image, program=str(NEWER_QEMU / "qemu-system-x86_64"))
    async with AsyncExitStack() as stack:
        disk, pids = None, []
        if name == QEMUS:
            disk = (
                f"-drive file={image},format=raw,if=none,id=n,cache=writeback "
                "-device nvme,drive=n,serial=n"
            )
        else:
            pids.append(stack.enter_context(host.backend()).pid)
            await host.wait_backend("state", "listening")
        stack.enter_context(host.qemu(disk=disk))
        monitor = await stack.enter_async_context(host.monitor())
        probe, _ = await stack.enter_async_context(host.probe())
        device = NVME if name == QEMUS else "vda"
        yield Guest(name, device, monitor, probe, lambda: [qemu_of(host), *pids])


def processor_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


async def turn(guest: Guest) -> Sample:
    """Lets the guest run, and measures it."""
    await guest.monitor.execute("cont", timeout_s=QMP_S)
    await wait_running(guest.monitor)
    await asyncio.sleep(SETTLE_S)  # poll interval: the guest finds its pace
    pids = guest.pids()
    first = (await guest.probe.stats(device=guest.device)).completions
    since, before = time.monotonic(), [processor_s(pid) for pid in pids]
    await asyncio.sleep(MEASURE_S)  # poll interval: what is measured
    done = (await guest.probe.stats(device=guest.device)).completions - first
    spent_s = time.monotonic() - since
    used = [processor_s(pid) - at for pid, at in zip(pids, before, strict=True)]
    await guest.monitor.execute("stop", timeout_s=QMP_S)
    per = 1e6 / max(done, 1)
    return Sample(done / spent_s, sum(used) * per, sum(used[1:]) * per)


async def measure(rounds: int, seed: int) -> dict[str, Report]:
    """All three, in a new order each round."""
    chance, reports = random.Random(seed), {name: Report() for name in (OURS, QEMUS, VHOST)}
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as folder:
        place = Path(folder)
        async with ours(place) as one, plain(place, QEMUS) as two, plain(place, VHOST) as three:
            guests = [one, two, three]
            for guest in guests:
                await guest.probe.write_start(guest.device, **LOAD)
                await guest.probe.wait_stats(lambda s: s.completions > 200, device=guest.device)
                await guest.monitor.execute("stop", timeout_s=QMP_S)
            for _ in range(rounds):
                chance.shuffle(guests)
                for guest in guests:
                    reports[guest.name].samples.append(await turn(guest))
            for guest in guests:
                await guest.monitor.execute("cont", timeout_s=QMP_S)
                stats = await guest.probe.write_stop(device=guest.device)
                reports[guest.name].problems += faults_of(stats)
    return reports


def table(reports: dict[str, Report]) -> Table:
    """One line for each guest; ratios are of the same round."""
    drawn = Table(title=f"4 writers, 4 KiB, verified; load {os.getloadavg()[0]:.0f}")
    drawn.add_column("device")
    for name in ("requests/s", "beside QEMU's", "processor µs each", "of these beside QEMU"):
        drawn.add_column(name, justify="right")
    base = [sample.rate for sample in reports[QEMUS].samples]
    for name, report in reports.items():
        rates = [sample.rate for sample in report.samples]
        ratios = [rate / of for rate, of in zip(rates, base, strict=True)]
        drawn.add_row(
            name,
            spread(rates, 0),
            spread(ratios, 2),
            spread([sample.cpu_us for sample in report.samples], 0),
            spread([sample.beside_us for sample in report.samples], 0),
        )
    return drawn


def spread(values: list[float], digits: int) -> str:
    """Median and, in brackets, the least and the most."""
    middle = statistics.median(values)
    return f"{middle:,.{digits}f} [{min(values):,.{digits}f}, {max(values):,.{digits}f}]"


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="make bench-passthrough", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()) & 0xFFFF)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    reports = asyncio.run(measure(options.rounds, options.seed))
    Console(width=150).print(table(reports))
    options.results.mkdir(parents=True, exist_ok=True)
    document = {name: asdict(report) for name, report in reports.items()}
    path = options.results / "passthrough-rates.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    problems = [problem for report in reports.values() for problem in report.problems]
    for problem in problems:
        print(problem)  # noqa: T201
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
