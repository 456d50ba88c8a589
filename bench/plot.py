"""The results as a picture: ratios to the reference with their quartiles, on log scales."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.ratios import spread
from bench.results import Results, Row
from bench.suites import SUITES
from bench.verdicts import Goal, Metric

PANELS: tuple[tuple[Metric, str], ...] = (
    ("iops", "IOPS (more is better)"),
    ("p50_us", "p50 latency (less is better)"),
    ("cpu_us", "backend CPU per I/O (less is better)"),
)
MARKERS = "osD^vPX*"


def draw(results: Results, path: Path) -> None:
    """Write a picture; its format follows from the file's name."""
    rows = [row for row in results.rows() if not row.is_reference]
    lines = list(dict.fromkeys((row.storage, row.case) for row in rows))
    backends = sorted({row.backend for row in rows})
    height = 1.6 + 0.34 * max(len(lines), 1)
    figure = Figure(figsize=(14, height))
    axes = figure.subplots(1, len(PANELS), sharey=True, squeeze=False)
    for panel, (metric, title) in zip(axes[0], PANELS, strict=True):
        _panel(panel, metric, results, rows, lines, backends)
        panel.set_title(title, fontsize=10)
    first = axes[0][0]
    first.set_yticks(range(len(lines)), [f"{results.labels[s]}  {case}" for s, case in lines])
    first.invert_yaxis()
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=9, frameon=False)
    machine = results.machine
    figure.suptitle(
        f"× {results.reference}, same round: median and quartiles of "
        f"{results.settings['rounds']} rounds "
        f"({machine['processors']} × {machine['processor']}, {machine['date'][:10]})",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.5 / height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(
    panel: Axes,
    metric: Metric,
    results: Results,
    rows: list[Row],
    lines: list[tuple[str, str]],
    backends: list[str],
) -> None:
    panel.axvline(1, color="black", linewidth=0.8)
    for index, backend in enumerate(backends):
        shift = 0.5 * ((index + 0.5) / len(backends) - 0.5)
        xs, ys, left, right = [], [], [], []
        for row in rows:
            ratios = row.ratios(metric)
            if row.backend == backend and ratios and min(ratios) > 0:
                seen = spread(ratios)
                xs.append(seen.median)
                ys.append(lines.index((row.storage, row.case)) + shift)
                left.append(seen.median - seen.q1)
                right.append(seen.q3 - seen.median)
        marker = MARKERS[index % len(MARKERS)]
        panel.errorbar(
            xs, ys, xerr=[left, right], fmt=marker, markersize=4, linewidth=1, label=backend
        )
    _goal_ticks(panel, metric, lines, SUITES[results.suite].goals)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(LogLocator(base=2))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(axis="x", linewidth=0.3)
    for line in range(1, len(lines)):
        if lines[line][0] != lines[line - 1][0]:
            panel.axhline(line - 0.5, color="grey", linewidth=0.8)


def _goal_ticks(
    panel: Axes, metric: Metric, lines: list[tuple[str, str]], goals: tuple[Goal, ...]
) -> None:
    xs, ys = [], []
    for goal in goals:
        bound = dict(goal.bounds()).get(metric)
        for case in goal.cases:
            if bound is not None and (goal.storage, case) in lines:
                xs.append(bound)
                ys.append(lines.index((goal.storage, case)))
    if xs:
        panel.plot(xs, ys, "|", color="red", markersize=11, label="goal")
