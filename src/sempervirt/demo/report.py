"""What a trial showed, for people: tables."""

from __future__ import annotations

from collections.abc import Callable

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


def counts(verdict: Verdict, peer: Verdict | None = None) -> Table:
    """Everything that was counted; what must be zero is green or red. `peer` is what the guest saw
    with qemu-storage-daemon in the place of semper-blkd.
    """
    table = Table(title="What the guest saw", show_header=peer is not None, title_justify="left")
    table.add_column(style="bold")
    table.add_column("semper-blkd", justify="right")
    if peer is not None:
        table.add_column("qemu-storage-daemon", justify="right")
    both = [verdict] if peer is None else [verdict, peer]

    def row(name: str, ours: str, theirs: str = "–") -> None:
        table.add_row(name, *(ours, theirs)[: len(both)])

    def zero(name: str, count: Callable[[Verdict], int]) -> None:
        values = map(count, both)
        table.add_row(name, *(f"[{'red bold' if n else 'green'}]{n}[/]" for n in values))

    until = " (then it was over)" if peer is not None and peer.lost else ""
    row("backends killed", str(verdict.kills), f"{peer.kills if peer else 0}{until}")
    row("… while requests were in flight", str(verdict.kills_in_flight), "not known")
    row("requests done again", str(verdict.replayed), "none")
    row("take-overs that QEMU did not notice", f"{verdict.kept} of {len(verdict.stalls)}", "none")
    row("backends upgraded", str(verdict.upgrades))
    row("VM stopped and continued", str(verdict.pauses))
    table.add_row("requests of the guest", *(f"{v.writes + v.reads:,}" for v in both))
    table.add_row("blocks verified", *(f"{v.verified:,}" for v in both))
    zero("I/O errors", lambda v: v.guest_errors)
    zero("hung requests", lambda v: v.hung)
    zero("wrong blocks", lambda v: v.wrong)
    zero("complaints of the guest's kernel", lambda v: len(v.kernel_lines))
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
    row("nine tenths of the throughput are back", verdict.back)
    return table


def losses(peer: Verdict) -> list[str]:
    """What the guest saw with the peer, in its kernel's own words; at most five lines."""
    if not peer.lost:
        return ["qemu-storage-daemon lost nothing this time"]
    lines = dict.fromkeys([*peer.kernel_lines, *peer.problems])
    return ["with qemu-storage-daemon the guest says:", *(f"  {line}" for line in list(lines)[:5])]


def problems(verdict: Verdict) -> list[str]:
    """One line for each thing that went wrong; at most twenty."""
    lines = [*verdict.kernel_lines, *verdict.problems]
    if verdict.unverified:
        lines.append("the disk could not be read back as a whole")
    if verdict.verified == 0:
        lines.append("no block was verified, so nothing is proven")
    return lines[:20]
