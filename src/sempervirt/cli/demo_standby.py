"""`semper demo standby`: a guest whose QEMU is killed, and the standby that goes on."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sempervirt.cli.output import Output, OutputOption, progress_console
from sempervirt.core.errors import Unavailable
from sempervirt.standby.values import Tier

if TYPE_CHECKING:
    from sempervirt.demo.succession import Succession, Trial

BIN_S = 0.05
ROWS = 5


async def _run(tier: Tier, kills: int, console: Console) -> tuple[Trial, list[Succession]]:
    from sempervirt.demo.succession import Trial

    done = []
    console.print("booting a guest, and a standby of it …", style="dim")
    async with Trial(tier) as trial:
        await trial.begin_rows()
        for number in range(1, kills + 1):
            one = await trial.kill_first()
            done.append(one)
            console.print(
                f"{number}. QEMU killed: seen after {one.detected_ms:g} ms, the standby runs after "
                f"{one.running_ms:g} ms, the next row is acknowledged after "
                f"{one.answered_ms:g} ms; {one.rows} rows before, {one.lost} lost",
                highlight=False,
            )
    return trial, done


def standby(
    kills: Annotated[int, typer.Option(help="How often QEMU is killed.", min=1)] = 2,
    tier: Annotated[Tier, typer.Option(help="How the standby waits.")] = Tier.READY,
    plot: Annotated[
        Path, typer.Option(help="Where the picture of the service's answers is written.")
    ] = Path("semper-standby.png"),
    output: OutputOption = Output.TABLE,
) -> None:
    """Kill the QEMU of a guest that is written to, and see its standby go on.

    A client writes numbered rows to a data disk of the guest. A standby is booted from a snapshot,
    frozen, and goes on when QEMU is killed. Afterwards every row that was acknowledged is read
    back, and the system disk has to be as the snapshot has it.

    The exit status is 0 only if each standby went on and nothing was lost.
    """
    import asyncio

    logging.getLogger("sempervirt").setLevel(logging.ERROR)
    console = progress_console(output)
    trial, done = asyncio.run(_run(tier, kills, console))
    answers, killed = trial.client.answers, trial.kills
    drawn: str | None = str(plot)
    try:
        _draw_file(answers, killed, plot)
    except (Unavailable, OSError) as error:
        drawn = None
        console.print(f"[yellow]{error}[/]")
    clean = all(one.clean for one in done)
    if output is Output.JSON:
        document = {
            "tier": tier.value,
            "clean": clean,
            "plot": drawn,
            "take_overs": [
                {
                    "detected_ms": one.detected_ms,
                    "running_ms": one.running_ms,
                    "answered_ms": one.answered_ms,
                    "boot_s": one.boot_s,
                    "rows": one.rows,
                    "lost": one.lost,
                    "as_snapshot": one.as_snapshot,
                    "steps": dict(one.steps),
                }
                for one in done
            ],
        }
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        print(draw_terminal(answers, killed[-1], min(console.width, 110)))
        console.print(f"picture: {drawn or 'none'}")
    if not clean:
        console.print("[red bold]Something was lost.[/]")
        raise typer.Exit(1)
    console.print("[green bold]Nothing was lost that was not said to be.[/]")


def around(answers: list[float], killed: float, before_s: float, after_s: float) -> list[float]:
    """The answers around a kill, in seconds from it."""
    return [at - killed for at in answers if -before_s <= at - killed <= after_s]


def draw_terminal(answers: list[float], killed: float, width: int) -> str:
    """A chart of characters: answers of the service around the last kill."""
    from sempervirt.demo.plots import EIGHTHS

    shown = around(answers, killed, 1.0, 3.0)
    columns = max(10, min(width - 2, int(4.0 / BIN_S)))
    counts = [0] * columns
    for at in shown:
        counts[min(columns - 1, int((at + 1.0) / 4.0 * columns))] += 1
    top = max(counts) or 1
    rows = []
    for row in reversed(range(ROWS)):
        filled = (max(0.0, min(1.0, count / top * ROWS - row)) for count in counts)
        rows.append("".join(EIGHTHS[round(share * 8)] for share in filled))
    mark = int(columns / 4)
    rows.append(" " * mark + "K")
    rows.append("rows acknowledged, from 1 s before the last kill (K) to 3 s after it")
    return "\n".join(rows)


def _draw_file(answers: list[float], killed: list[float], path: Path) -> None:
    """A picture. Raises Unavailable without matplotlib."""
    from sempervirt.demo.figure import new_figure

    figure = new_figure(11, 1.2 + 1.6 * len(killed))
    figure.supxlabel("seconds from the kill; each line is a row that the guest acknowledged")
    for index, at in enumerate(killed):
        axes = figure.add_subplot(len(killed), 1, index + 1)
        shown = around(answers, at, 1.0, 3.0)
        axes.eventplot([shown], colors="#3b7d4f", linelengths=0.8)
        axes.axvline(0.0, color="red", linewidth=1.0, label="QEMU killed")
        axes.set(xlim=(-1.0, 3.0), yticks=[], ylabel=f"kill {index + 1}")
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
