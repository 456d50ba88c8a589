"""The guest's I/O across its moves, as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sempervirt.demo.figure import new_figure
from sempervirt.demo.plots import rebin


def draw(
    completions: Sequence[tuple[float, int]], blackouts: Sequence[tuple[float, float]], path: Path
) -> None:
    """A picture; the ending of `path` chooses the format (png, svg, pdf). `completions` are
    (seconds, how many), `blackouts` the times in seconds in which the guest stood still.

    Raises Unavailable without matplotlib, OSError.
    """
    seconds, iops = rebin(completions)
    figure = new_figure(11, 4.5)
    axes = figure.add_subplot()
    axes.fill_between(seconds, iops, step="post", color="#3b7d4f", alpha=0.35, linewidth=0)
    axes.step(seconds, iops, where="post", color="#3b7d4f", linewidth=0.8)
    for index, (start, end) in enumerate(blackouts):
        label = f"the guest moves ({len(blackouts)})" if index == 0 else None
        axes.axvspan(start, end, color="red", alpha=0.6, label=label)
    axes.set(
        xlabel="seconds",
        ylabel="requests per second in the guest",
        title="A passed-through NVMe controller while its guest moves",
        xlim=(0, max(seconds, default=1)),
        ylim=(0, None),
    )
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
