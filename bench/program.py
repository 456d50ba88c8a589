"""What suites share that are programs of their own: options, and the way of results into files."""

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from bench import machine
from bench.kept import Kept, KeptError
from bench.sections import MarkersError, Section

ROOT = Path(__file__).resolve().parents[1]
Add = Callable[..., object]
Results = TypeVar("Results", bound=Kept)


def add_images(add: Add) -> None:
    """Options: where images are, and which programs serve and load them."""
    add("--directory", type=Path, default=Path(".cache/bench"), help="on a disk")
    add("--memory", type=Path, default=Path("/dev/shm"), help="on tmpfs")
    add("--program", type=Path, default=ROOT / "target/release/semper-blkd", help="semper-blkd")
    add("--load", type=Path, default=ROOT / "target/release/semper-load", help="semper-load")


def add_results(add: Add) -> None:
    """Options: where results go, and where they may come from."""
    add("--output", type=Path, default=Path("results/bench"), metavar="DIR")
    add("--from", type=Path, dest="earlier", metavar="FILE",
        help="measure nothing, show this file of an earlier run")  # fmt: skip
    add("--update", type=Path, metavar="FILE", help="put the tables between the markers of FILE")


def console() -> Console:
    """Standard output; a file has no width, and a table cut to 80 columns says nothing."""
    made = Console()
    if not made.is_terminal:
        made.width = 200
    return made


def obtain(
    options: argparse.Namespace,
    kind: type[Results],
    measure: Callable[[], Results],
    document: Callable[[Results], str],
    section: Section,
    *errors: type[Exception],
) -> Results | None:
    """What was measured now, or earlier, and has been put into the document if that was asked for.
    None, with a line to standard error, after one of these errors and those of files.
    """
    expected: tuple[type[Exception], ...] = (KeptError, MarkersError, *errors)
    try:
        results = kind.read(options.earlier) if options.earlier else measure()
        if options.update:
            section.write(options.update, document(results))
    except expected as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return None
    return results


class Keeper:
    """Keeps the results of a run that has just begun, again and again: a run is long."""

    def __init__(self, folder: Path, suite: str) -> None:
        self.stem = folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{suite}"
        self._before = machine.load_average()

    def keep(self, results: Kept) -> None:
        """Replaces what was kept before."""
        results.load_average = (self._before, machine.load_average())
        results.write(self.stem.with_suffix(".json"))
