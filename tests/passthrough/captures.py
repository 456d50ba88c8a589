"""Direct doorbells are captured and given back, again and again, under verified load.

`python -m tests.passthrough.captures` (`make passthrough-captures`) does it 1,000 times: on and
off, with the guest's requests going on meanwhile, and every doorbell captured while it is on.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from lab.guest import NVME
from tests.migration.judge import faults_of
from tests.passthrough.pair import Side, loaded, new_image, side

DEADLINE_S = 60.0
# So often it is looked at whether the guest goes on, and how its doorbells come.
LOOK_EVERY = 25


async def counted(here: Side) -> tuple[int, int]:
    """Doorbells that were captured, and that came directly, as the mediator reckons."""
    counters = (await here.device.client.status()).counters
    return counters.doorbells_captured, counters.doorbells_direct


async def turns(count: int, *, look_every: int = LOOK_EVERY) -> list[str]:
    """Turns it on and off `count` times; what was wrong."""
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as folder:
        place = Path(folder)
        async with (
            side(place / "a", new_image(place), incoming=False) as here,
            loaded(here) as probe,
        ):

            async def goes_on() -> None:
                done = (await probe.stats(device=NVME)).completions
                await probe.wait_stats(
                    lambda stats: stats.completions > done + 20,
                    device=NVME,
                    deadline_s=DEADLINE_S,
                )

            for number in range(count):
                looks = number % look_every == 0
                await here.leaving.arm()
                if looks:
                    captured, direct = await counted(here)
                    await goes_on()
                    now = await counted(here)
                    if now[0] <= captured or now[1] > direct:
                        problems.append(f"turn {number}: on, and {captured, direct} became {now}")
                await here.leaving.take_back()
                if looks:
                    captured, _ = await counted(here)
                    await goes_on()
                    now = await counted(here)
                    if now[0] != captured:
                        problems.append(
                            f"turn {number}: off, and {now[0] - captured} were captured"
                        )
            problems += faults_of(await probe.write_stop(device=NVME))
    return problems


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="make passthrough-captures", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="times on and off")
    options = parser.parse_args()
    since, console = time.monotonic(), Console()
    problems = asyncio.run(turns(options.count))
    spent_s = time.monotonic() - since
    console.print(f"{options.count} times on and off in {spent_s:.0f} s, {len(problems)} problems")
    for problem in problems:
        console.print(problem, style="red", markup=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
