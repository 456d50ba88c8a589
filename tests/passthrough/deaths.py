"""Deaths of the mediator outside of moves: a guest under verified load, and a spare that goes on.

`python -m tests.passthrough.deaths` (`make mediator-kills`) kills 1,000 times, one in twenty of
them by stopping the process, which its agent has to notice; and once without a spare, as the
control.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from lab.guest import NVME
from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.guest import ProbeClient
from sempervirt.passthrough.answers import SpareState
from sempervirt.passthrough.device import Device
from tests.migration.judge import faults_of
from tests.passthrough.pair import loaded, new_image, side

DEADLINE_S = 60.0
# Until the next death, at most, once a spare is ready.
REST_S = 0.05
STOPS = 20


@dataclass
class Report:
    """What came of it. `served_ms`: from each death to an answer of the process that goes on."""

    seed: int
    deaths: int = 0
    stopped: int = 0
    completions: int = 0
    served_ms: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def wait_ready(device: Device) -> None:
    """Waits for a spare that could go on. Raises TimeoutError."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                if (await device.client.status()).spare is SpareState.READY:
                    return
            except SempervirtError:  # the one that goes on does not listen yet
                pass
            await asyncio.sleep(0.01)  # poll interval


async def wait_served(device: Device, before: int) -> None:
    """Waits until another process than `before` answers. Raises TimeoutError."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                if device.pid != before and (await device.client.status()).pid == device.pid:
                    return
            except SempervirtError:
                pass
            await asyncio.sleep(0.005)  # poll interval


def kill_all(device: Device) -> None:
    """The spare as well: nobody goes on."""
    for pid in (device.spare_pid, device.pid):
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


async def die(device: Device, probe: ProbeClient, report: Report, *, stops: bool = False) -> None:
    """One death; returns when the guest was answered by the spare."""
    await wait_ready(device)
    before, since = device.pid, time.monotonic()
    assert before is not None
    os.kill(before, signal.SIGSTOP if stops else signal.SIGKILL)
    await wait_served(device, before)
    report.served_ms.append((time.monotonic() - since) * 1000)
    done = (await probe.stats(device=NVME)).completions
    try:
        await probe.wait_stats(
            lambda stats: stats.completions > done + 20, device=NVME, deadline_s=DEADLINE_S
        )
    except Unavailable as error:
        report.problems.append(f"death {report.deaths}: the guest waits: {error}")
    report.deaths += 1
    report.stopped += stops


async def campaign(count: int, seed: int, done: Callable[[Report], None]) -> Report:
    """`count` deaths of one guest's mediators, and at last one without a spare."""
    report, chance = Report(seed), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as folder:
        place = Path(folder)
        async with side(place / "a", new_image(place), incoming=False) as here:
            async with loaded(here) as probe:
                for number in range(count):
                    await asyncio.sleep(chance.random() * REST_S)  # poll interval: when is chance
                    stops = number % STOPS == STOPS - 1
                    await die(here.device, probe, report, stops=stops)
                    done(report)
                    if report.problems:
                        return report
                stats = await probe.write_stop(device=NVME)
                report.completions = stats.completions
                report.problems += faults_of(stats)
            async with here.host.probe():
                kill_all(here.device)
                await _wait_gone(here.device, report)
    return report


async def _wait_gone(device: Device, report: Report) -> None:
    """The control: without a spare the device is gone, and that is told."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not device.ailment:  # noqa: ASYNC110 - a process's end, not ours
                await asyncio.sleep(0.01)  # poll interval
    except TimeoutError:
        report.problems.append("the control: nobody tells that the device is gone")


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="make mediator-kills", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="deaths")
    parser.add_argument("--seed", type=int, default=int(time.time()) & 0xFFFF)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    console = Console(stderr=True)
    console.print(f"seed {options.seed}")

    def done(report: Report) -> None:
        if report.deaths % 50 == 0:
            console.print(f"{report.deaths}: {report.problems or 'good'}")

    report = asyncio.run(campaign(options.count, options.seed, done))
    served = sorted(report.served_ms) or [0.0]
    console.print(
        f"{report.deaths} deaths ({report.stopped} of them stopped processes), "
        f"{report.completions:,} requests verified, until the next one answers: median "
        f"{statistics.median(served):.0f} ms, 95% {served[int(len(served) * 0.95) - 1]:.0f} ms; "
        f"{len(report.problems)} problems"
    )
    for problem in report.problems:
        console.print(problem, style="red", markup=False)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "mediator-kills.json"
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
