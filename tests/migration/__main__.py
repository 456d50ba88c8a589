"""`python -m tests.migration` (`make migration-kills`): the campaign of kills at length."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lab.network import FAR, GIGABIT, UNLIMITED
from tests.migration.faults import VICTIMS
from tests.migration.kills import Outcome, campaign, chosen
from tests.migration.phases import ORDER

# A move that fails by itself just before the strike is over, too.
PHASES = (*ORDER, "abandoned")
LINKS = {"unlimited": UNLIMITED, "gigabit": GIGABIT, "far": FAR}


def table(outcomes: Sequence[Outcome]) -> Table:
    """Victims by the phases in which the strikes fell, and how many of these ended the VM, which
    only the death of its own QEMU may.
    """
    drawn = Table(title="Strikes (of which ended the VM)", title_justify="left")
    drawn.add_column("victim")
    for name in (*PHASES, "nobody there", "problems", "settled within, s"):
        drawn.add_column(name, justify="right")
    for victim in VICTIMS:
        of_victim = [outcome for outcome in outcomes if outcome.strike.victim == victim]
        hit = [outcome for outcome in of_victim if outcome.hit]
        cells = [_count([o for o in hit if o.at == phase]) for phase in PHASES]
        settled = max((outcome.settled_s for outcome in of_victim), default=0.0)
        drawn.add_row(
            victim,
            *cells,
            str(len(of_victim) - len(hit)),
            str(sum(bool(outcome.problems) for outcome in of_victim)),
            f"{settled:.1f}",
        )
    return drawn


def _count(outcomes: Sequence[Outcome]) -> str:
    lost = sum(outcome.lost for outcome in outcomes)
    return f"{len(outcomes)}{f' ({lost})' if lost else ''}"


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="make migration-kills", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="strikes that must fall")
    parser.add_argument("--seed", type=int, default=int(time.time()) & 0xFFFF)
    parser.add_argument("--link", choices=LINKS, default="gigabit")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    console = Console(stderr=True)
    console.print(f"seed {options.seed}")
    keep = options.results / "migration-kills"
    started = time.monotonic()
    outcomes: list[Outcome] = []
    with Progress(console=console) as bar, suppress(KeyboardInterrupt):
        task = bar.add_task("strikes", total=options.count)

        def done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if outcome.hit:
                bar.advance(task)
            for problem in outcome.problems:
                console.print(f"{outcome.strike}: {problem}", style="red", markup=False)

        # Some strikes find nobody: a wire that is not there yet, or not any more.
        while (fallen := sum(bool(outcome.hit) for outcome in outcomes)) < options.count:
            seed = options.seed + len(outcomes)
            strikes = chosen(options.count - fallen, seed)
            asyncio.run(campaign(strikes, seed, done, link=LINKS[options.link], keep=keep))
    out = Console() if sys.stdout.isatty() else Console(width=150)
    out.print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.problems]
    told = sum("unknown" in outcome.said for outcome in outcomes)
    out.print(
        f"{len(outcomes)} moves, {sum(bool(o.hit) for o in outcomes)} strikes, "
        f"{sum(o.lost for o in outcomes)} VMs ended by the death of their QEMU, "
        f"{told} times a host said unknown, {len(failed)} problems"
    )
    document = {
        "seed": options.seed,
        "seconds": round(time.monotonic() - started),
        "outcomes": [{**asdict(o), "said": sorted(o.said)} for o in outcomes],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "migration-kills.json").write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
