"""The results for a terminal."""

from rich.console import Console
from rich.table import Table

from bench.markdown import goal_rows, number, ratio_cell
from bench.results import Results, Row
from bench.verdicts import Metric, Verdict, compare

COLORS = {Verdict.BETTER: "green", Verdict.WITHIN_NOISE: "default", Verdict.WORSE: "red"}
RATIOS: tuple[tuple[str, Metric], ...] = (
    ("× IOPS", "iops"),
    ("× p50", "p50_us"),
    ("× CPU", "cpu_us"),
)


def show(results: Results, console: Console) -> None:
    """Print one table for each storage, the goals, and what failed."""
    for storage, label in results.labels.items():
        rows = [row for row in results.rows() if row.storage == storage]
        if rows:
            console.print(_table(label, rows))
    goals = list(goal_rows(results))
    if goals:
        table = Table("goal", "case", "× p50", "× CPU", "× IOPS", title="goals")
        for goal, case, cells in goals:
            seen = [cells.get(metric, "–") for metric in ("p50_us", "cpu_us", "iops")]
            table.add_row(goal.label, case, *seen)
        console.print(table)
    before, after = results.load_average
    console.print(f"load average: {before} before, {after} after; ratios to {results.reference}")
    for one in results.failures:
        console.print(
            f"[red]failed[/]: {one.storage} {one.case} {one.backend} round {one.round}: "
            f"{one.error}",
            soft_wrap=True,
        )


def _table(label: str, rows: list[Row]) -> Table:
    table = Table(title=label)
    table.add_column("case")
    table.add_column("backend")
    for heading in ("IOPS", "p50 µs", "p99 µs", "CPU µs/IO", "switches/IO"):
        table.add_column(heading, justify="right")
    for heading, _ in RATIOS:
        table.add_column(heading, justify="right", no_wrap=True)
    previous = ""
    for row in rows:
        if previous not in ("", row.case):
            table.add_section()
        table.add_row(row.case if row.case != previous else "", row.backend, *_cells(row))
        previous = row.case
    return table


def _cells(row: Row) -> list[str]:
    cells = []
    for metric in ("iops", "p50_us", "p99_us", "cpu_us", "switches"):
        seen = row.absolute(metric)
        cells.append("[red]failed[/]" if seen is None else number(seen.median))
    for _, metric in RATIOS:
        ratios = row.ratios(metric)
        if row.is_reference:
            cells.append("1")
        elif ratios:
            color = COLORS[compare(ratios, metric)]
            cells.append(f"[{color}]{ratio_cell(ratios)}[/]")
        else:
            cells.append("–")
    return cells
