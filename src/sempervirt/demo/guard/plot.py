"""The picture of a guest's counts across the death of its host's kernel and its move."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sempervirt.demo.figure import new_figure
from sempervirt.demo.guard.counter import TICK_S
from sempervirt.demo.guard.trial import Outcome

WIDTH = 64
SHOWN_S = 2.0


def line_of(outcome: Outcome, width: int = WIDTH) -> list[str]:
    """A line of time in characters: what was heard on host a above, on host b below."""
    if not outcome.here.times or not outcome.there.times:
        return []
    begin = max(outcome.here.times[0], outcome.asked - SHOWN_S)
    end = min(outcome.there.times[-1], outcome.there.times[0] + SHOWN_S)
    step_s = max((end - begin) / width, TICK_S)
    rows = []
    for name, times in (("a", outcome.here.times), ("b", outcome.there.times)):
        filled = {int((time - begin) / step_s) for time in times if begin <= time <= end}
        cells = "".join("█" if cell in filled else "·" for cell in range(width))
        rows.append(f"host {name} {cells}")
    mark = min(width - 1, max(0, int((outcome.asked - begin) / step_s)))
    rows.append(f"{' ' * (7 + mark)}▲ the kernel of host a dies")
    return rows


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Counts over time, one curve for each host. Raises Unavailable without matplotlib, OSError."""
    figure = new_figure(9, 2.6 * len(outcomes))
    axes = figure.subplots(len(outcomes), 1, squeeze=False)
    for axis, outcome in zip(axes[:, 0], outcomes, strict=True):
        zero = outcome.asked
        for heard, colour, label in (
            (outcome.here, "tab:blue", "guest, heard on host a"),
            (outcome.there, "tab:green", "guest, heard on host b"),
        ):
            times = [time - zero for time in heard.times]
            axis.plot(times, [count.number for count in heard.counts], ".", color=colour,
                      markersize=4, label=label)  # fmt: skip
        axis.axvline(0, color="tab:red", label=f"host a's kernel dies: {outcome.death}")
        axis.set_xlim(-SHOWN_S, max(SHOWN_S, outcome.asked_to_running_s + SHOWN_S))
        axis.set_xlabel("seconds")
        axis.set_ylabel("count")
        axis.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=120)
