"""`make standby`: many take-overs in each tier; how soon, and that nothing was lost.

Each take-over has a standby of its own, which is booted, frozen and waits; then the QEMU of the VM
that is written to is killed. The standby of one take-over is the VM of the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sempervirt.core.errors import SempervirtError
from sempervirt.demo.succession import Succession, Trial
from sempervirt.standby.values import Tier


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def table(done: Sequence[Succession], failures: Sequence[str]) -> str:
    """A row for each tier and figure."""
    lines = ["| tier | figure | median | p99 | worst |", "|---|---|---|---|---|"]
    for tier in Tier:
        mine = [one for one in done if one.tier is tier]
        if not mine:
            continue
        figures: dict[str, list[float]] = {
            "kill to QEMU's end seen": [one.detected_ms for one in mine],
            "kill to the guest runs": [one.running_ms for one in mine],
            "kill to the next acknowledged row": [one.answered_ms for one in mine],
            "boot of a standby (s)": [one.boot_s for one in mine],
        }
        for step in ("loaded", "fenced", "claimed", "running"):
            figures[f"declared to {step}"] = [
                ms for one in mine for name, ms in one.steps if name == step
            ]
        for name, values in figures.items():
            shown = " | ".join(
                f"{value:.1f}" for value in (quantile(values, 0.5), quantile(values, 0.99))
            )
            lines.append(f"| {tier.value} | {name} | {shown} | {max(values):.1f} |")
        rows, lost = sum(one.rows for one in mine), sum(one.lost for one in mine)
        wrong = sum(not one.as_snapshot for one in mine)
        lines.append(
            f"| {tier.value} | {len(mine)} take-overs | {rows} rows acknowledged | {lost} lost | "
            f"{wrong} system disks that are not as the snapshot |"
        )
    lines += [f"failed: {failure}" for failure in failures]
    return "\n".join(lines)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def campaign(tiers: Sequence[Tier], count: int) -> tuple[list[Succession], list[str]]:
    """`count` take-overs in each tier; a trial that breaks off is told, and begun anew."""
    done: list[Succession] = []
    failures: list[str] = []
    for tier in tiers:
        left = count
        while left > 0 and len(failures) < 3:
            try:
                async with Trial(tier) as trial:
                    await trial.begin_rows()
                    while left > 0:
                        one = await trial.kill_first()
                        done.append(one)
                        left -= 1
                        _say(json.dumps({**asdict(one), "tier": tier.value}))
            except (SempervirtError, TimeoutError) as error:
                failures.append(f"{tier.value}: {error}")
                _say(f"failed: {failures[-1]}")
    return done, failures


def main() -> int:
    """The exit status is 0 if every standby went on and nothing was lost."""
    parser = argparse.ArgumentParser(prog="make standby")
    parser.add_argument("--count", type=int, default=100, help="take-overs in each tier")
    parser.add_argument("--tier", choices=[tier.value for tier in Tier], action="append")
    parser.add_argument("--output", type=Path, default=Path("results/standby.json"))
    options = parser.parse_args()
    logging.getLogger("sempervirt").setLevel(logging.ERROR)
    tiers = [Tier(name) for name in options.tier] if options.tier else list(Tier)
    done, failures = asyncio.run(campaign(tiers, options.count))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document = [{**asdict(one), "tier": one.tier.value} for one in done]
    options.output.write_text(json.dumps({"take_overs": document, "failures": failures}, indent=1))
    sys.stdout.write(table(done, failures) + "\n")
    return 0 if done and not failures and all(one.clean for one in done) else 1


if __name__ == "__main__":
    sys.exit(main())
