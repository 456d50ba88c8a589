"""The tables that stand in docs/reference/measurements."""

from collections.abc import Iterator

from bench.ratios import spread
from bench.results import Results, Row
from bench.suites import SUITES
from bench.verdicts import Goal, Metric, Verdict, compare

PINNED = {
    None: "Nothing was pinned to a processor.",
    "together": "Load and backend were pinned to the same processor.",
    "apart": "Load and backend were pinned to a processor each.",
}


def document(results: Results) -> str:
    """Everything between the markers."""
    return "\n".join(_lines(results))


def provenance(machine: dict[str, str]) -> str:
    """On which machine, and with what, something was measured."""
    return (
        f"Measured {machine['date'][:10]} on {machine['processors']} × {machine['processor']} "
        f"(hypervisor: {machine['hypervisor']}), {int(machine['memory_mib']) >> 10} GiB, "
        f"Linux {machine['kernel']}, {machine['qemu']}, {machine['semper_blkd']} at commit "
        f"{machine['commit']}"
    )


def _lines(results: Results) -> Iterator[str]:
    machine = results.machine
    rounds = results.settings["rounds"]
    yield (
        f"{provenance(machine)}; load average {results.load_average[0]} before, "
        f"{results.load_average[1]} after. {rounds} rounds in random order, "
        f"{results.settings['seconds']} s each. Medians; the ratios are to {results.reference} in "
        "the same round, with their quartiles. CPU is the backend's, in µs for each I/O. "
        + PINNED[results.settings.get("pin")]
    )
    for storage, label in results.labels.items():
        rows = [row for row in results.rows() if row.storage == storage]
        if rows:
            yield f"\n**{label}**\n"
            yield "| case | backend | IOPS | p50 µs | p99 µs | CPU µs | × IOPS | × p50 | × CPU |"
            yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
            yield from (_row(row) for row in rows)
    yield from _goals(results)
    if results.failures:
        yield "\nMeasurements that failed:\n"
        for one in results.failures:
            yield f"- {one.storage} {one.case} {one.backend}, round {one.round}: {one.error}"


def _row(row: Row) -> str:
    cells = [row.case, row.backend]
    for metric in ("iops", "p50_us", "p99_us", "cpu_us"):
        seen = row.absolute(metric)
        cells.append("failed" if seen is None else number(seen.median))
    ratios = (row.ratios("iops"), row.ratios("p50_us"), row.ratios("cpu_us"))
    cells.extend("1" if row.is_reference else ratio_cell(ratio) for ratio in ratios)
    return f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Three significant digits: 12 300, 456, 7.89."""
    if value >= 1000:
        digits = len(str(int(value))) - 3
        return f"{round(value / 10**digits) * 10**digits:,}".replace(",", " ")
    return f"{value:.3g}"


def ratio_cell(ratios: list[float]) -> str:
    """`2.31 (2.2-2.4)`: the median and the quartiles."""
    if not ratios:
        return "–"
    seen = spread(ratios)
    return f"{seen.median:.2f} ({seen.q1:.2f}–{seen.q3:.2f})"


def mark(ratios: list[float], metric: Metric, bound: float) -> str:
    """Whether the median keeps the bound, and whether the noise lets one say so."""
    median = spread(ratios).median
    word = "reached" if (median >= bound if metric == "iops" else median <= bound) else "missed"
    noise = compare(ratios, metric, bound) is Verdict.WITHIN_NOISE
    return f"{word} (noise)" if noise else word


def goal_rows(results: Results) -> Iterator[tuple[Goal, str, dict[str, str]]]:
    """The goals that were measured: (goal, case, what was seen by metric)."""
    for goal in SUITES[results.suite].goals:
        for case in goal.cases:
            row = Row(results, goal.storage, case, results.settings["subject"])
            cells: dict[str, str] = {}
            for metric, bound in goal.bounds():
                ratios = row.ratios(metric)
                if ratios:
                    sign = "≥" if metric == "iops" else "≤"
                    verdict = mark(ratios, metric, bound)
                    cells[metric] = f"{ratio_cell(ratios)} {sign} {bound:g}: {verdict}"
            if cells:
                yield goal, case, cells


def _goals(results: Results) -> Iterator[str]:
    rows = list(goal_rows(results))
    if rows:
        yield f"\n**Goals for {results.settings['subject']}**\n"
        yield "| goal | case | × p50 | × CPU | × IOPS |"
        yield "|---|---|---|---|---|"
        for goal, case, cells in rows:
            seen = [cells.get(metric, "–") for metric in ("p50_us", "cpu_us", "iops")]
            yield f"| {goal.label} | {case} | {' | '.join(seen)} |"
