"""The distribution of the stalls, drawn."""

from __future__ import annotations

from pathlib import Path

from sempervirt.demo.report import STEP_NAMES
from sempervirt.demo.stall import Cause
from sempervirt.demo.verdict import Verdict


def draw_stalls(verdict: Verdict, path: Path) -> None:
    """For the stall and for each step before it: which share of the kills was done by when."""
    from matplotlib.figure import Figure

    kills = [stall for stall in verdict.stalls if stall.cause is Cause.KILL]
    if not kills:
        return
    curves = [
        (STEP_NAMES[step], [s.steps_ms[step] for s in kills if step in s.steps_ms])
        for step in STEP_NAMES
    ]
    curves.append(("the guest's next completion", [s.ms for s in kills if s.ms is not None]))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves:
        if values:
            ordered = sorted(values)
            share = [(index + 1) / len(ordered) for index in range(len(ordered))]
            axes.step(ordered, share, where="post", label=name)
    axes.set(
        xlabel="milliseconds from SIGKILL",
        ylabel="share of the kills",
        title=f"Take-over after SIGKILL, {len(kills)} kills",
        xscale="log",
        ylim=(0, 1),
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
