"""The figures of a run: tables for the terminal and docs/reference/measurements, and a picture."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.markdown import number, provenance, ratio_cell
from bench.migration.figures import BEST, GOALS, Judgement, Metric, Results, judgements
from bench.ratios import spread

COLUMNS: tuple[tuple[str, Metric], ...] = (
    ("MB on the wire", "wire_mb"),
    ("total s", "total_s"),
    ("migration s", "migrate_s"),
    ("blackout ms", "blackout_ms"),
    ("stopped ms", "stopped_ms"),
    ("echo silent ms", "echo_ms"),
    ("CPU s", "cpu_s"),
)
# To whichever other way was the best in the same round.
RATIOS: tuple[tuple[str, Metric, str], ...] = (
    ("bytes × best", "wire_mb", BEST),
    ("blackout × best", "blackout_ms", BEST),
    ("total × best", "total_s", BEST),
)
HEADINGS = ("guest", "way", *(heading for heading, _ in COLUMNS), *(name for name, _, _ in RATIOS))


def rows(results: Results, link: str) -> Iterator[list[str]]:
    """The rows of a link's table, in the order of HEADINGS."""
    for guest in results.present("guest"):
        for way in results.present("way"):
            cells = [results.labels[guest], results.labels[way]]
            for _, metric in COLUMNS:
                seen = results.absolute(link, guest, way, metric)
                cells.append("–" if seen is None else number(seen.median))
            for _, metric, reference in RATIOS:
                ratios = results.ratios(link, guest, way, metric, reference)
                cells.append(ratio_cell(ratios))
            yield cells


def show(results: Results, console: Console) -> None:
    """Print a table for each link, the goals, and what failed."""
    for link in results.present("link"):
        table = Table(title=link)
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if index < 2 else "right")
        for cells in rows(results, link):
            table.add_row(*cells)
        console.print(table)
    goals = Table("goal", "link", "guest", "seen", title="goals")
    for judgement in judgements(results):
        goals.add_row(*_goal_cells(results, judgement))
    console.print(goals)
    for one in results.failures:
        where = f"{one.link}, {one.guest}, {one.way}, round {one.round}"
        console.print(f"[red]failed[/]: {where}: {one.error}", soft_wrap=True)


def _goal_cells(results: Results, judgement: Judgement) -> list[str]:
    word = "reached" if judgement.reached else "missed"
    seen = f"{ratio_cell(judgement.ratios)} ≤ {judgement.goal.bound:g}: {word}"
    return [judgement.goal.label, judgement.link, results.labels[judgement.guest], seen]


def document(results: Results) -> str:
    """Everything between the markers of docs/reference/measurements/moves.md."""
    return "\n".join(_lines(results))


def _lines(results: Results) -> Iterator[str]:
    settings = results.settings
    before, after = results.load_average
    yield (
        f"{provenance(results.machine)}; load average {before} before, {after} after. "
        f"{settings['rounds']} rounds in random order; guests of {settings['memory_mib']} MiB. "
        "Medians; ratios are of the same round, with their quartiles."
    )
    for link in results.present("link"):
        yield f"\n**{link}**\n"
        yield f"| {' | '.join(HEADINGS)} |"
        yield f"|---|---|{'--:|' * (len(HEADINGS) - 2)}"
        for cells in rows(results, link):
            yield f"| {' | '.join(cells)} |"
    yield from _goal_lines(results)
    if results.failures:
        yield "\nMoves that failed:\n"
        for one in results.failures:
            yield f"- {one.link}, {one.guest}, {one.way}, round {one.round}: {one.error}"


def _goal_lines(results: Results) -> Iterator[str]:
    judged = list(judgements(results))
    yield "\n**Goals**\n"
    yield "| goal | reached | worst |"
    yield "|---|--:|---|"
    for goal in GOALS:
        its = [judgement for judgement in judged if judgement.goal == goal]
        if not its:
            continue
        worst = max(its, key=lambda judgement: spread(judgement.ratios).median)
        reached = sum(judgement.reached for judgement in its)
        seen = f"{ratio_cell(worst.ratios)}: {results.labels[worst.guest]}, {worst.link}"
        yield f"| {goal.label} (≤ {goal.bound:g}) | {reached} of {len(its)} | {seen} |"


def draw(results: Results, path: Path) -> None:
    """Write a picture of bytes and blackouts; its format follows from the file's name."""
    links, guests, ways = (results.present(name) for name in ("link", "guest", "way"))
    metrics: tuple[tuple[str, Metric], ...] = (
        ("MB on the wire", "wire_mb"),
        ("blackout, ms", "blackout_ms"),
        ("total, s", "total_s"),
    )
    figure = Figure(figsize=(13, 3.0 * len(links) + 0.8))
    panels = figure.subplots(len(links), len(metrics), squeeze=False)
    for line, link in zip(panels, links, strict=True):
        for panel, (title, metric) in zip(line, metrics, strict=True):
            for index, way in enumerate(ways):
                seen = [results.absolute(link, guest, way, metric) for guest in guests]
                heights = [0.0 if one is None else one.median for one in seen]
                width = 0.81 / len(ways)
                places = [
                    place + (index - (len(ways) - 1) / 2) * width for place in range(len(seen))
                ]
                panel.bar(places, heights, width=width * 0.93, label=results.labels[way])
            panel.set_xticks(range(len(guests)), guests, fontsize=8)
            panel.set_title(f"{link}: {title}", fontsize=9)
            panel.grid(axis="y", linewidth=0.3)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
