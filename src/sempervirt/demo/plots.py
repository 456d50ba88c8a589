"""The guest's I/O over time with what happened marked, in the terminal and as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sempervirt.demo.figure import new_figure
from sempervirt.demo.script import Act, Deed

BIN_S = 0.05
ROWS = 10
LABEL_WIDTH = 10
EIGHTHS = " ▁▂▃▄▅▆▇█"
COLOURS = {Deed.KILL: "red", Deed.PAUSE: "orange", Deed.UPGRADE: "blue"}


def rebin(completions: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    """(seconds, requests per second) in bins of BIN_S, from the probe's finer ones."""
    sums: dict[int, int] = {}
    for second, count in completions:
        if second >= 0:
            sums[int(second / BIN_S)] = sums.get(int(second / BIN_S), 0) + count
    if not sums:
        return [], []
    bins = range(max(sums) + 1)
    return [b * BIN_S for b in bins], [sums.get(b, 0) / BIN_S for b in bins]


def draw_terminal(
    completions: Sequence[tuple[float, int]], acts: Sequence[Act], start_ns: int, width: int
) -> str:
    """A chart of characters: bars, and under them a letter for each act (K, P, U)."""
    seconds, iops = rebin(completions)
    if not seconds:
        return "no request was completed"
    columns = max(1, min(width - LABEL_WIDTH, len(seconds)))
    per_column = len(seconds) / columns
    # The lowest bin of a column: an average would hide the very stalls that this is about.
    lows = [
        min(iops[int(c * per_column) : max(int((c + 1) * per_column), int(c * per_column) + 1)])
        for c in range(columns)
    ]
    top = max(iops)
    rows = []
    for row in reversed(range(ROWS)):
        filled = (max(0.0, min(1.0, low / top * ROWS - row)) for low in lows)
        label = f"{top * (row + 1) / ROWS:>{LABEL_WIDTH - 2},.0f} ┤"
        rows.append(label + "".join(EIGHTHS[round(share * 8)] for share in filled))
    marks = [" "] * columns
    for act in acts:
        column = int((act.at_ns - start_ns) / 1e9 / BIN_S / per_column)
        marks[min(max(column, 0), columns - 1)] = act.deed.value[0].upper()
    rows.append(" " * LABEL_WIDTH + "".join(marks))
    rows.append(
        f"requests per second in the guest over {seconds[-1]:.0f} s, the lowest "
        f"{BIN_S * 1000:.0f} ms of each column  (K killed, P paused, U upgraded)"
    )
    return "\n".join(rows)


def draw_file(
    completions: Sequence[tuple[float, int]], acts: Sequence[Act], start_ns: int, path: Path
) -> None:
    """A picture; the ending of `path` chooses the format (png, svg, pdf).

    Raises Unavailable without matplotlib.
    """
    seconds, iops = rebin(completions)
    figure = new_figure(11, 4.5)
    axes = figure.add_subplot()
    axes.fill_between(seconds, iops, step="post", color="#3b7d4f", alpha=0.35, linewidth=0)
    axes.step(seconds, iops, where="post", color="#3b7d4f", linewidth=0.8)
    for deed, colour in COLOURS.items():
        done = [act for act in acts if act.deed is deed]
        for index, act in enumerate(done):
            axes.axvline(
                (act.at_ns - start_ns) / 1e9,
                color=colour,
                linewidth=0.9,
                alpha=0.8,
                label=f"{deed.value} ({len(done)})" if index == 0 else None,
            )
    axes.set(
        xlabel="seconds",
        ylabel="requests per second in the guest",
        title="A guest's disk while its backend is killed",
        xlim=(0, max(seconds, default=1)),
        ylim=(0, None),
    )
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
