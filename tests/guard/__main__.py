"""`make torture-guard`: every kind on every kernel, each with its control; then a storm."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.guard.health import faults
from tests.guard.kinds import ALONE, FATAL, SURVIVED, Kind
from tests.guard.machine import Image, NoAnswerError, available, build
from tests.guard.trial import Result, die, die_unguarded, guarded, survive

STORM = 100
# These return also without the guard, or need its own detector to be deadly at all.
HARMLESS_ALONE = {"loop-irqs-off"}


def _chosen(kinds: tuple[Kind, ...], names: list[str]) -> list[Kind]:
    return [kind for kind in kinds if not names or kind.name in names]


def survived(image: Image, folder: Path, names: list[str]) -> Iterator[Result]:
    """All that is survived, in as few boots as that takes: a failure ends its boot."""
    left = _chosen(SURVIVED, names)
    boot = 0
    while left:
        boot += 1
        with guarded(image, folder / f"boot-{boot}", "irq-restart") as machine:
            while left:
                result = survive(machine, left.pop(0))
                yield result
                if result.wrong:
                    break
    for kind in _chosen(ALONE, names):
        with guarded(image, folder / kind.name, "irq-restart") as machine:
            yield survive(machine, kind)


def fatal(image: Image, folder: Path, names: list[str]) -> Iterator[Result]:
    """What the policy lets happen."""
    for policy, kind in FATAL:
        if not names or kind.name in names:
            with guarded(image, folder / f"{policy}-{kind.name}", policy) as machine:
                result = die(machine, kind)
                yield Result(f"{kind.name} under {policy}", result.wrong, result.seconds)


def controls(image: Image, folder: Path, names: list[str]) -> Iterator[Result]:
    """Without the guard: dead."""
    for kind in _chosen((*SURVIVED, *ALONE), names):
        if kind.name not in HARMLESS_ALONE:
            result = die_unguarded(image, folder / f"control-{kind.name}", kind)
            yield Result(f"{kind.name}, no guard", result.wrong, result.seconds)


def storm(image: Image, folder: Path) -> Result:
    """A hundred panics in one boot, on two processors."""
    begin = time.monotonic()
    with guarded(image, folder / "storm", "strict") as machine:
        try:
            machine.do(
                f"for i in $(seq {STORM}); do (echo panic >/proc/semper_crash)& done; sleep 3"
            )
            parked = int(machine.do("dmesg | grep -c 'semper_guard: parked'"))
            wrong = "; ".join(faults(machine))
            if parked != STORM:
                wrong += f" {parked} threads parked, not {STORM}"
        except NoAnswerError as error:
            wrong = str(error)
    return Result(f"storm of {STORM}", wrong, time.monotonic() - begin)


def main() -> int:
    """Runs the campaign; the status is 1 when anything is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.guard", description=__doc__)
    parser.add_argument("--series", action="append", choices=available(), default=[])
    parser.add_argument("--kind", action="append", default=[], help="only these")
    parser.add_argument("--no-controls", action="store_true", help="only with the guard")
    options = parser.parse_args()
    bad = done = 0
    with tempfile.TemporaryDirectory(prefix="torture-guard-") as name:
        for series in options.series or available():
            folder = Path(name) / series
            folder.mkdir()
            image = build(series, folder)
            parts = [survived(image, folder, options.kind), fatal(image, folder, options.kind)]
            if not options.no_controls:
                parts.append(controls(image, folder, options.kind))
            if not options.kind:
                parts.append(iter([storm(image, folder)]))
            for part in parts:
                for result in part:
                    done += 1
                    bad += bool(result.wrong)
                    said = f"FAILED: {result.wrong}" if result.wrong else "ok"
                    sys.stdout.write(
                        f"{series:5} {result.name:34} {result.seconds:5.1f} s {said}\n"
                    )
                    sys.stdout.flush()
    sys.stdout.write(f"{done} tried, {bad} not as they must be\n")
    return 1 if bad or not done else 0


if __name__ == "__main__":
    sys.exit(main())
