"""The tables of layers, for a terminal and for docs/reference/measurements."""

import statistics
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.layers.figures import Results, answers
from bench.markdown import number, provenance, ratio_cell

FIGURES = ("iops", "p50_us", "p99_us", "cpu_us", "flush_us")
TITLES = {
    "plain": "No layer, beside a build that knows none",
    "chain": "Four layers",
    "pause": "The pause of a snapshot",
    "merge": "A merge beside a guest",
}
HEADINGS = ("where", "load", "figure", "of", "to", "seen", "asked", "")


def bounds(results: Results) -> Iterator[tuple[str, list[str]]]:
    """Each bound, with the part that it is in."""
    for one in answers(results):
        part, where, what = one.case
        bound = f"{'≥' if one.asked.more else '≤'} {one.asked.bound:.3g}"
        yield part, [where, what, one.asked.figure, one.asked.by, one.asked.to or "–",
                     ratio_cell(one.ratios), bound,
                     "kept" if one.kept else "**missed**"]  # fmt: skip


def _medians(results: Results, part: str) -> Iterator[list[str]]:
    for case in results.cases():
        if case[0] != part:
            continue
        names = dict.fromkeys(
            one.by for one in results.seen if (one.part, one.where, one.what) == case
        )
        for by in names:
            found = (
                (figure, list(results.values(case, by, figure).values())) for figure in FIGURES
            )
            cells = [number(statistics.median(seen)) if seen else "–" for _, seen in found]
            if any(cell != "–" for cell in cells):
                yield [case[1], case[2], by, *cells]


def _others(results: Results, part: str) -> Iterator[str]:
    for one in results.seen:
        if one.part == part and not one.figures.keys() & set(FIGURES):
            figures = ", ".join(f"{name} {number(value)}" for name, value in one.figures.items())
            yield f"- {one.where}, {one.what}: {figures}"


def document(results: Results) -> str:
    """Everything between the markers."""
    before, after = results.load_average
    text = (
        f"{provenance(results.machine)}; load average {before} before, {after} after. "
        f"{results.settings['rounds']} rounds, images of {results.settings['size_mib']} MiB, "
        f"{results.settings['seconds']} s each. Ratios are of one round, with their quartiles; a "
        "bound is held against the median. CPU is the backend's, in µs for each I/O."
    )
    lines = [text]
    told = list(bounds(results))
    for part, title in TITLES.items():
        rows, medians, others = (
            [row for at, row in told if at == part],
            list(_medians(results, part)),
            list(_others(results, part)),
        )
        if not (rows or medians or others):
            continue
        lines += [f"\n**{title}**\n", *others]
        if rows:
            lines += [f"\n| {' | '.join(HEADINGS)} |", f"|{'---|' * 5}--:|--:|---|"]
            lines += [f"| {' | '.join(row)} |" for row in rows]
        if medians:
            lines += ["\n| where | load | of | IOPS | p50 µs | p99 µs | CPU µs | flush µs |",
                      "|---|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
            lines += [f"| {' | '.join(row)} |" for row in medians]
    lines += [f"\nFailed: {one.where} {one.what} {one.by}: {one.error}" for one in results.failures]
    return "\n".join(lines)


def show(results: Results, console: Console) -> None:
    """Print the bounds, and what was seen."""
    table = Table(*HEADINGS, title="layers")
    for _, row in bounds(results):
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for part in TITLES:
        for line in _others(results, part):
            console.print(line, soft_wrap=True, markup=False)
