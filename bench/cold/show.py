"""The tables of the first second, for a terminal and for docs/reference/measurements."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from bench.cold.figures import Results, Window, asked
from bench.markdown import mark, number, provenance, ratio_cell
from bench.ratios import spread

COLUMNS: tuple[tuple[str, Window], ...] = (
    ("start: first 100 ms", "start_100"),
    ("first second", "start_second"),
    ("0.5 s later", "start_half"),
    ("steady", "steady"),
    ("take-over: first 100 ms", "over_100"),
    ("first second", "over_second"),
    ("0.5 s later", "over_half"),
)
HEADINGS = (
    "load", "engine", "steady IOPS", *(name for name, _ in COLUMNS), "stall ms", "0.9 back ms",
    "first µs", "warm µs", "beside µs",
)  # fmt: skip


def rows(results: Results) -> Iterator[tuple[str, list[str]]]:
    """Each engine in each case, with the label of its storage."""
    for storage, mode in results.cases():
        for engine in results.engines():
            cells = [mode.removeprefix("rand"), engine]
            cells.append(_median(results, storage, mode, engine, "steady"))
            shares = (results.shares(storage, mode, engine, window) for _, window in COLUMNS)
            cells.extend(ratio_cell(share) for share in shares)
            others = ("stall_ms", "back_ms", "first_us", "warm_us", "beside_us")
            cells.extend(_median(results, storage, mode, engine, name) for name in others)
            yield results.labels[storage], cells


def _median(results: Results, storage: str, mode: str, engine: str, name: str) -> str:
    values = list(results.values(storage, mode, engine, name).values())
    return number(spread(values).median) if values else "–"


def document(results: Results) -> str:
    """Everything between the markers."""
    before, after = results.load_average
    text = (
        f"{provenance(results.machine)}; load average {before} before, {after} after. "
        f"{results.settings['rounds']} rounds in random order. Medians with quartiles, as shares "
        "of the best engine's steady IOPS in the same round. `auto` is `mmap` on all of these. "
        "Stall, and return of nine tenths of its own throughput: from SIGKILL. The last three are "
        "processor time for a request: of the threads that serve, among the first 35 000 and when "
        "all is warm; and of the thread that searches, for each of the first."
    )
    lines, label = [text], ""
    for storage, cells in rows(results):
        if storage != label:
            label = storage
            lines += [f"\n**{label}**\n", f"| {' | '.join(HEADINGS)} |"]
            lines.append(f"|---|---|{'--:|' * (len(HEADINGS) - 2)}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "\n**What is asked of `auto`**\n",
        "| storage | load | what | seen | least |",
        "|---|---|---|--:|--:|",
    ]
    for storage, mode in results.cases():
        for what, ratios, bound in asked(results, storage, mode):
            cells = [
                results.labels[storage],
                mode.removeprefix("rand"),
                what.replace("_", " "),
                f"{ratio_cell(ratios)}: {mark(ratios, 'iops', bound)}",
                f"{bound:g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for one in results.failures:
        lines.append(
            f"\nFailed: {one.storage} {one.mode} {one.engine}, round {one.round}: {one.error}"
        )
    return "\n".join(lines)


def show(results: Results, console: Console) -> None:
    """Print the rows."""
    table = Table("storage", *HEADINGS, title="the first second")
    for storage, cells in rows(results):
        table.add_row(storage, *cells)
    console.print(table)
