"""`python -m tests.torture`: the long form of what the tests prove in short."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sempervirt.core.errors import SempervirtError
from sempervirt.demo import report
from sempervirt.demo.stall import Cause
from sempervirt.demo.verdict import Verdict
from sempervirt.guest.errors import ProbeGone, ProbeSilent
from tests.torture import campaigns, pictures
from tests.torture.cells import (
    EVENT_CELLS,
    POINT_CELLS,
    REBOUND,
    Cell,
    cells,
    engines_and_storages,
)
from tests.torture.peers import controls

console = Console(stderr=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    with Progress(console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def judged(trial: Coroutine[Any, Any, Verdict]) -> Verdict:
    """Runs a trial; one that cannot be finished is a problem like any other."""
    try:
        return asyncio.run(trial)
    except (SempervirtError, ProbeGone, ProbeSilent) as error:
        notes = getattr(error, "__notes__", [])
        return Verdict(problems=["; ".join([f"not finished: {error}", *notes])])


def run_kills(total: int, seed: int, keeps: bool) -> list[tuple[str, Verdict]]:
    """`total` kills, spread evenly over all cells."""
    rows = []
    chosen = [replace(cell, keeps_connection=keeps) for cell in cells()]
    share = -(-total // len(chosen))
    with progress("kills", share * len(chosen)) as done:
        for index, cell in enumerate(chosen):
            setup = cell.setup(seed + index)
            rows.append((str(cell), judged(campaigns.kills(setup, share, seed + index, done))))
    return rows


def run_rebinding(total: int, seed: int, keeps: bool) -> list[tuple[str, Verdict]]:
    """`total` kills while queues move between threads, over all engines and storages."""
    rows = []
    chosen = engines_and_storages()
    share = -(-total // len(chosen))
    with progress("kills while rebinding", share * len(chosen)) as done:
        for index, (engine, storage) in enumerate(chosen):
            cell = Cell(engine, REBOUND, "heavy", storage, keeps)
            setup = cell.setup(seed + index)
            trial = campaigns.kills_while_rebinding(setup, share, seed + index, done)
            rows.append((f"rebinding {cell}", judged(trial)))
    return rows


def run_hangs(total: int, seed: int, keeps: bool) -> list[tuple[str, Verdict]]:
    """`total` backends that hang, over all engines and storages."""
    rows = []
    chosen = engines_and_storages()
    share = -(-total // len(chosen))
    with progress("hangs", share * len(chosen)) as done:
        for index, (engine, storage) in enumerate(chosen):
            setup = Cell(engine, (0, 1, 0, 1), "heavy", storage, keeps).setup(seed + index)
            trial = campaigns.hangs(setup, share, seed + index, done)
            rows.append((f"hangs {engine} {storage}", judged(trial)))
    return rows


def run_events(scale: float, seed: int, keeps: bool) -> list[tuple[str, Verdict]]:
    """The life of a VM: 100 pauses, 100 upgrades, 20 resets, 20 reboots, times `scale`."""
    full = {"pauses": 100, "reboots": 20, "resets": 20, "upgrades": 100}
    life = campaigns.Life(**{name: max(1, round(n * scale)) for name, n in full.items()})
    rows = []
    with progress("events", life.total * len(EVENT_CELLS)) as done:
        for index, cell in enumerate(EVENT_CELLS):
            setup = replace(cell, keeps_connection=keeps).setup(seed + index)
            verdict = judged(campaigns.events(setup, life, seed + index, done))
            rows.append((f"events {cell}", verdict))
    return rows


def run_points(binary: Path, folder: Path, seed: int, keeps: bool) -> list[tuple[str, Verdict]]:
    """Each named crash point, with every engine."""
    rows = []
    with progress("crash points", len(campaigns.PLANS) * len(POINT_CELLS)) as done:
        for cell in POINT_CELLS:
            for plan in campaigns.PLANS:
                log = (folder / f"deaths-{cell.engine}-{plan.name.replace(' ', '-')}.log").resolve()
                log.unlink(missing_ok=True)
                setup = replace(cell, keeps_connection=keeps).setup(seed)
                trial = campaigns.crash_point(setup, binary.resolve(), plan, log)
                rows.append((f"{plan.name} {cell.engine}", judged(trial)))
                done()
    return rows


def run_controls(seed: int) -> list[tuple[str, Verdict]]:
    """Backends that lose requests. Each of these rows must *not* be clean."""
    rows = []
    for name, setup, rebind in controls(seed):
        verdict = asyncio.run(campaigns.control(setup, 40, seed, rebind=rebind))
        rows.append((f"control: {name}", verdict))
    return rows


def table(rows: list[tuple[str, Verdict]]) -> Table:
    """One line for each trial."""
    drawn = Table(title="Torture", title_justify="left")
    drawn.add_column("trial")
    for name in (
        "kills",
        "hangs",
        "events",
        "rebound",
        "replayed",
        "verified",
        "errors",
        "hung",
        "wrong",
        "other",
        "stall p50",
        "p99",
        "max",
    ):
        drawn.add_column(name, justify="right")
    for name, verdict in rows:
        stall = verdict.stall_of(Cause.HANG) if verdict.hangs else verdict.stall
        cells_ = [
            verdict.kills,
            verdict.hangs,
            verdict.pauses + verdict.reboots + verdict.resets + verdict.upgrades,
            verdict.rebindings,
            verdict.replayed,
            f"{verdict.verified:,}",
            verdict.guest_errors,
            verdict.hung,
            verdict.wrong,
            len(verdict.kernel_lines) + len(verdict.problems) + verdict.unverified,
            *(
                f"{value:.1f}" if value == value else "–"
                for value in (stall.p50, stall.p99, stall.max)
            ),
        ]
        drawn.add_row(name, *map(str, cells_), style="" if verdict.clean else "yellow")
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="SIGKILLs over all combinations")
    parser.add_argument(
        "--rebinding", type=int, default=160, help="further SIGKILLs while queues change threads"
    )
    parser.add_argument("--hangs", type=int, default=100, help="backends that are stopped")
    parser.add_argument(
        "--events",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="1 = 100 stop/cont, 100 upgrades, 20 resets, 20 reboots, twice",
    )
    parser.add_argument(
        "--points-binary",
        type=Path,
        metavar="FILE",
        help="semper-blkd built with the feature crash-points",
    )
    parser.add_argument(
        "--without-session", action="store_true", help="QEMU has to connect to each successor"
    )
    parser.add_argument("--no-controls", action="store_true", help="leave the controls out")
    parser.add_argument("--seed", type=int, default=int(time.time()) & 0xFFFF)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    logging.getLogger("sempervirt").setLevel(logging.ERROR)
    options.results.mkdir(parents=True, exist_ok=True)
    console.print(f"seed {options.seed}")
    started = time.monotonic()
    keeps = not options.without_session
    proven: list[tuple[str, Verdict]] = []
    if options.kills:
        proven += run_kills(options.kills, options.seed, keeps)
    if options.rebinding:
        proven += run_rebinding(options.rebinding, options.seed, keeps)
    if options.hangs:
        proven += run_hangs(options.hangs, options.seed, keeps)
    if options.events:
        proven += run_events(options.events, options.seed, keeps)
    if options.points_binary:
        proven += run_points(options.points_binary, options.results, options.seed, keeps)
    blind_if_clean = [] if options.no_controls else run_controls(options.seed)
    total = Verdict()
    for _, verdict in proven:
        total.merge(verdict)
    out = Console()
    if not out.is_terminal:
        out.width = 150  # a file has no width
    out.print(table(proven + blind_if_clean))
    out.print(report.stalls(total))
    failed = [name for name, verdict in proven if not verdict.clean]
    blind = [name for name, verdict in blind_if_clean if not verdict.lost]
    for name, verdict in proven:
        for line in report.problems(verdict):
            out.print(f"[red]{name}: {line}[/]")
    document = {
        "seed": options.seed,
        "seconds": round(time.monotonic() - started),
        "total": total.as_dict() if proven else None,
        "trials": {name: verdict.as_dict() for name, verdict in proven},
        "controls": {name: verdict.as_dict() for name, verdict in blind_if_clean},
    }
    (options.results / "torture.json").write_text(json.dumps(document, indent=1) + "\n")
    pictures.draw_stalls(total, options.results / "stalls.png")
    for name in blind:
        out.print(f"[red bold]{name} lost nothing: the harness may be blind[/]")
    out.print(
        f"{len(proven) + len(blind_if_clean) - len(failed) - len(blind)} passed, "
        f"{len(failed) + len(blind)} failed"
    )
    return 1 if failed or blind else 0


if __name__ == "__main__":
    sys.exit(main())
