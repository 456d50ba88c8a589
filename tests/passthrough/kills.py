"""Moves of a guest with a passed-through device, each struck once: what the moves of other guests
suffer, and the deaths of both mediators.

`python -m tests.passthrough.kills` strikes 100 times; the device has to be as good as the guest
afterwards, wherever that is, or the VM says that the device is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tests.migration import faults
from tests.migration.kills import Outcome, Strike, campaign
from tests.migration.phases import ORDER

VICTIMS = (
    *faults.MEDIATORS,
    "source qemu",
    "destination qemu",
    *faults.AGENTS,
    "link",
)
CELLS = tuple(Strike(phase, victim) for phase in ORDER for victim in VICTIMS)


def chosen(count: int, seed: int) -> list[Strike]:
    """`count` strikes, spread evenly over all cells, in a random order."""
    chance = random.Random(seed)
    whole, rest = divmod(count, len(CELLS))
    strikes = [*CELLS] * whole + chance.sample(CELLS, rest)
    chance.shuffle(strikes)
    return strikes


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="make passthrough-kills", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="strikes that must fall")
    parser.add_argument("--seed", type=int, default=int(time.time()) & 0xFFFF)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    console = Console(stderr=True)
    console.print(f"seed {options.seed}")
    outcomes: list[Outcome] = []

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        console.print(f"{len(outcomes)}: {outcome.strike}: {outcome.problems or 'good'}")

    keep = options.results / "passthrough-kills"
    while (fallen := sum(bool(one.hit) for one in outcomes)) < options.count:
        seed = options.seed + len(outcomes)
        strikes = chosen(options.count - fallen, seed)
        asyncio.run(campaign(strikes, seed, done, keep=keep, passthrough=True))
    failed = [one for one in outcomes if one.problems]
    console.print(
        f"{len(outcomes)} moves, {fallen} strikes, {sum(one.lost for one in outcomes)} VMs ended "
        f"by the death of their QEMU, {sum(one.device_lost for one in outcomes)} devices by that "
        f"of their mediator, {len(failed)} problems"
    )
    options.results.mkdir(parents=True, exist_ok=True)
    document = {
        "seed": options.seed,
        "outcomes": [{**asdict(one), "said": sorted(one.said)} for one in outcomes],
    }
    (options.results / "passthrough-kills.json").write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
