"""Moves of a guest with a passed-through NVMe controller, in turn with the same guest without it.

`python -m tests.passthrough.moves` (`make passthrough-moves`) makes 50 of each and prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lab.guest import NEWER_QEMU, NVME, VM, Guest
from lab.network import UNLIMITED
from lab.world import DEADLINE_S, QEMU, Host, World
from sempervirt.api.schemas import DeviceView
from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.migration.messages import MigrationView
from tests.migration.judge import faults_of
from tests.migration.moves import wait_gone

MEDIATOR = "semper-vfiod"
PROGRAMS = (QEMU, "semper-blkd", "semper-wired", MEDIATOR)
# What a driver writes into the guest's log when its device does not answer, or is set up anew.
COMPLAINTS = ("timeout", "reset controller", "Abort", "I/O error", "controller is down")


@dataclass(frozen=True)
class Move:
    """One of them, in milliseconds: how long the guest's heart was silent, how long the guest stood
    still as the source says, and what it waited for.
    """

    total_s: float
    silence_ms: float
    blackout_ms: float
    timeline_ms: dict[str, float]
    captured: int


@dataclass
class Report:
    """All moves of one of the two guests, and what was wrong."""

    passthrough: bool
    moves: list[Move] = field(default_factory=list)
    writes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@asynccontextmanager
async def stage(*, passthrough: bool) -> AsyncIterator[tuple[World, Guest]]:
    """Two hosts with a QEMU that is new enough, and the guest on host a."""
    async with (
        World.opened(UNLIMITED, programs=NEWER_QEMU) as world,
        Guest.booted(world, world.a, nvme=passthrough) as guest,
    ):
        yield world, guest


async def device_on(host: Host) -> DeviceView:
    """The guest's passed-through device, as the host tells."""
    async with host.client() as client:
        return await client.device(f"{VM}/nvme")


async def move(guest: Guest, here: Host, there: Host) -> Move:
    """Moves the guest, and returns when its heart is heard there."""
    captured = 0
    since = time.monotonic()
    if guest.spec.passthrough:
        moving = asyncio.create_task(here.semper("vm", "migrate", VM, "--to", there.name))
        captured = await _captured(here, moving)
        await moving
    else:
        await here.semper("vm", "migrate", VM, "--to", there.name)
    total_s = time.monotonic() - since
    await guest.wait_beat(there)
    view = await last_move(here)
    return Move(
        total_s, guest.silence_ms(since), view.blackout_ms or 0.0, view.timeline_ms, captured
    )


async def last_move(host: Host) -> MigrationView:
    """What the host tells of the guest's last move from there."""
    async with host.client() as client:
        return await client.migration(VM)


async def _captured(host: Host, moving: asyncio.Task[Any]) -> int:
    """How many doorbells were captured while the guest moved, as far as that was seen."""
    seen = 0
    while not moving.done():
        try:
            view = await device_on(host)
        except SempervirtError:  # the device is gone from here already
            break
        seen = max(seen, (view.mediator or {}).get("counters", {}).get("doorbells_captured", 0))
        await asyncio.wait([moving], timeout=0.1)
    return seen


async def problems_of(guest: Guest, here: Host, there: Host) -> list[str]:
    """What is wrong after a move from `here` to `there`."""
    problems = []
    probe = await guest.probe_on(there)
    if probe.nonce != guest.nonce:
        problems.append("the guest booted anew")
    problems += [f"{what} is left on {here}" for what in await wait_gone(here, PROGRAMS)]
    for device in guest.devices:
        problems += [f"{device}: {fault}" for fault in faults_of(await probe.stats(device=device))]
    for line in await probe.dmesg():
        if any(complaint in line.text for complaint in COMPLAINTS):
            problems.append(f"the guest's kernel: {line.text}")
    if guest.spec.passthrough:
        before = (await probe.stats(device=NVME)).completions
        try:
            await probe.wait_stats(
                lambda stats: stats.completions > before + 100, device=NVME, deadline_s=DEADLINE_S
            )
        except Unavailable as error:
            problems.append(f"the device does not go on: {error}")
    return problems


async def finish(guest: Guest, host: Host, report: Report) -> None:
    """Reads every block of every disk back."""
    probe = await guest.probe_on(host)
    for device in guest.devices:
        stats = await probe.write_stop(device=device)
        report.writes[device] = stats.writes
        report.problems += [f"{device}: {fault}" for fault in faults_of(stats)]


async def there_and_back(count: int, done: Callable[[], None], *, passthrough: bool) -> Report:
    """Moves one guest `count` times, alternately."""
    report = Report(passthrough)
    async with stage(passthrough=passthrough) as (world, guest):
        here, there = world.hosts
        for _ in range(count):
            report.moves.append(await move(guest, here, there))
            report.problems += await problems_of(guest, here, there)
            here, there = there, here
            done()
        await finish(guest, here, report)
    return report


async def interleaved(count: int, done: Callable[[], None]) -> tuple[Report, Report]:
    """Two guests in two worlds, moved in turn, so that both meet the same load of the machine."""
    reports = Report(passthrough=True), Report(passthrough=False)
    async with (
        stage(passthrough=True) as with_device,
        stage(passthrough=False) as without,
    ):
        for number in range(count):
            for report, (world, guest) in zip(reports, (with_device, without), strict=True):
                here, there = world.hosts if number % 2 == 0 else world.hosts[::-1]
                report.moves.append(await move(guest, here, there))
                report.problems += await problems_of(guest, here, there)
            done()
        for report, (world, guest) in zip(reports, (with_device, without), strict=True):
            await finish(guest, world.hosts[count % 2], report)
    return reports


def table(reports: Sequence[Report]) -> Table:
    """One line for each guest."""
    drawn = Table(title="Moves there and back", title_justify="left")
    drawn.add_column("guest")
    columns = ("moves", "errors", "writes verified", "seconds", "blackout, ms", "silence, ms")
    for name in (*columns, "doorbells captured"):
        drawn.add_column(name, justify="right")
    for report in reports:
        moves = report.moves
        drawn.add_row(
            "with an NVMe passed through" if report.passthrough else "without",
            str(len(moves)),
            str(len(report.problems)),
            f"{sum(report.writes.values()):,}",
            _spread([one.total_s for one in moves], digits=1),
            _spread([one.blackout_ms for one in moves]),
            _spread([one.silence_ms for one in moves]),
            f"{sum(one.captured for one in moves):,}" if report.passthrough else "-",
        )
    return drawn


def _spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and, in brackets, the least and the most."""
    if not values:
        return "-"
    middle = statistics.median(values)
    return f"{middle:.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="make passthrough-moves", description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="moves of each guest")
    parser.add_argument("--alone", action="store_true", help="only the guest with the device")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    with Progress(console=Console(stderr=True)) as bar:
        advance = partial(bar.advance, bar.add_task("moves", total=options.count))
        reports: Sequence[Report]
        if options.alone:
            reports = [asyncio.run(there_and_back(options.count, advance, passthrough=True))]
        else:
            reports = asyncio.run(interleaved(options.count, advance))
    out = Console() if sys.stdout.isatty() else Console(width=170)
    out.print(table(reports))
    problems = [problem for report in reports for problem in report.problems]
    for problem in problems:
        out.print(problem, style="red", markup=False)
    options.results.mkdir(parents=True, exist_ok=True)
    document = [asdict(report) for report in reports]
    (options.results / "passthrough-moves.json").write_text(json.dumps(document, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
