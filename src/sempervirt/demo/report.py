"""What a trial showed, for people: tables."""

from __future__ import annotations

from rich.table import Table

from sempervirt.demo.stall import STEPS, Spread
from sempervirt.demo.verdict import Verdict

STEP_NAMES = {
    "lock_acquired": "image lock passed to the spare",
    "accepted": "the spare has QEMU's connection",
    "started": "queues started",
    "replayed": "unfinished requests done again",
    "first_completion": "first answer to the guest",
}


def _ms(value: float) -> str:
    return "–" if value != value else f"{value:.1f}"


def counts(verdict: Verdict) -> Table:
    """Everything that was counted; what must be zero is green or red."""
    table = Table(title="What the guest saw", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")

    def zero(name: str, value: int) -> None:
        table.add_row(name, f"[{'red bold' if value else 'green'}]{value}[/]")

    table.add_row("backends killed", str(verdict.kills))
    table.add_row("backends upgraded", str(verdict.upgrades))
    table.add_row("VM stopped and continued", str(verdict.pauses))
    table.add_row("take-overs that QEMU did not notice", f"{verdict.kept} of {len(verdict.stalls)}")
    table.add_row("requests done again", str(verdict.replayed))
    table.add_row("requests of the guest", f"{verdict.writes + verdict.reads:,}")
    table.add_row("blocks verified", f"{verdict.verified:,}")
    zero("I/O errors", verdict.guest_errors)
    zero("hung requests", verdict.hung)
    zero("wrong blocks", verdict.wrong)
    zero("complaints of the guest's kernel", len(verdict.kernel_lines))
    return table


def stalls(verdict: Verdict) -> Table:
    """Where the time of a take-over goes."""
    table = Table(
        title="From SIGKILL, in milliseconds", title_justify="left", caption_justify="left"
    )
    table.add_column("until")
    for name in ("p50", "p99", "max"):
        table.add_column(name, justify="right")

    def row(name: str, spread: Spread, style: str = "") -> None:
        cells = (_ms(spread.p50), _ms(spread.p99), _ms(spread.max))
        table.add_row(name, *cells, style=style)

    for step in STEPS:
        row(STEP_NAMES[step], verdict.steps[step])
    row("the guest's next completion (the stall)", verdict.stall, "bold")
    return table


def problems(verdict: Verdict) -> list[str]:
    """One line for each thing that went wrong; at most twenty."""
    lines = [*verdict.kernel_lines, *verdict.problems]
    if verdict.unverified:
        lines.append("the disk could not be read back as a whole")
    if verdict.verified == 0:
        lines.append("no block was verified, so nothing is proven")
    return lines[:20]
