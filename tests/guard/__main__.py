"""`make torture-guard`: every kind on every kernel, each with its control.

Then a storm of panics, a module that comes and goes under load, a device that is misused, what the
hooks cost, ordinary hours, a crash kernel, and half an hour of life after deaths.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sempervirt.demo.guard.emulated import NoAnswerError
from tests.guard.dumps import dumps
from tests.guard.health import faults
from tests.guard.kinds import ALONE, FATAL, SURVIVED, Kind
from tests.guard.machine import Image, Machine, available, build
from tests.guard.moved import moved
from tests.guard.ordinary import ordinary
from tests.guard.survival import survival
from tests.guard.trial import Result, die, die_unguarded, guarded, survive

PARTS = (
    "survived", "fatal", "controls", "storm", "churn", "cost", "ordinary", "dumps", "survival",
    "moved",
)  # fmt: skip
STORM = 100
GUARD = "/lib/semper_guard.ko"
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


def storm(image: Image, folder: Path) -> Iterator[Result]:
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
    yield Result(f"storm of {STORM}", wrong, time.monotonic() - begin)


def churn(image: Image, folder: Path, loads: int, calls: int) -> Iterator[Result]:
    """The module comes and goes while one processor is busy; then its device is misused."""
    busy = "(while [ ! -e /tmp/quiet ]; do head -c 4m /dev/zero | md5sum; done)"
    with Machine(image, folder / "churn") as machine:
        for name, command in (
            (f"{loads} loads and unloads", f"insmod {GUARD} && rmmod semper_guard"),
            (f"{calls} calls of the device", ""),
        ):
            begin = time.monotonic()
            try:
                if command:
                    machine.do(f"{busy} >/dev/null 2>&1 &")
                    for _ in range(loads):
                        machine.do(command)
                    machine.do("touch /tmp/quiet; insmod /lib/semper_crash.ko")
                else:
                    machine.do(f"insmod {GUARD}")
                    machine.do(f"/bin/misuse {calls}", deadline_s=600)
                    machine.do("[ $(cat /proc/modules | grep -c '^semper_guard.* 0 ') = 1 ]")
                    machine.do("rmmod semper_guard")
                    machine.do(f"insmod {GUARD}")
                wrong = "" if command else "; ".join(faults(machine))
                log = machine.log.read_text(errors="replace")
                if any(word in log for word in ("WARNING", "BUG:")):
                    wrong += machine.tail()
            except NoAnswerError as error:
                wrong = str(error)
            yield Result(name, wrong, time.monotonic() - begin)
            if wrong:
                break


def cost(image: Image, folder: Path, rounds: int) -> Iterator[Result]:
    """What the hooks cost a system call and a switch of processes: with the module and without, in
    turns.

    Wrong is a median of the turns that is slower with the module by more than the spread of those
    without: half of what lies between their quartiles, and at least 2 %.
    """
    begin = time.monotonic()
    without: list[list[float]] = []
    loaded: list[list[float]] = []
    with Machine(image, folder / "cost") as machine:
        for turn in range(rounds * 2):
            # A, B, B, A: whatever drifts meanwhile meets both alike.
            guarded_turn = turn % 4 in (1, 2)
            if guarded_turn:
                machine.do(f"insmod {GUARD}")
            said = machine.do("taskset 1 /bin/cost 300")
            if guarded_turn:
                machine.do("rmmod semper_guard")
            (loaded if guarded_turn else without).append([float(word) for word in said.split()])
    for at, name in enumerate(("system call", "switch of processes")):
        plain = sorted(turn[at] for turn in without)
        hooked = sorted(turn[at] for turn in loaded)
        low, middle, high = statistics.quantiles(plain, n=4)
        with_module = statistics.median(hooked)
        allowed = max((high - low) / 2, middle * 0.02)
        told = f"{name}: {middle:.0f} ns ({low:.0f} to {high:.0f}), with it {with_module:.0f} ns"
        wrong = (
            "" if with_module <= middle + allowed else f"slower by {with_module - middle:.0f} ns"
        )
        yield Result(told, wrong, time.monotonic() - begin)


def main() -> int:
    """Runs the campaign; the status is 1 when anything is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.guard", description=__doc__)
    parser.add_argument("--series", action="append", choices=available(debug=True), default=[])
    parser.add_argument("--kind", action="append", default=[], help="only these")
    parser.add_argument("--part", action="append", choices=PARTS, default=[], help="by default all")
    parser.add_argument("--loads", type=int, default=1000, help="of the module, under load")
    parser.add_argument("--times", type=int, default=10, help="each death with a VM that is moved")
    parser.add_argument("--hours", type=int, default=24, help="of ordinary troubles")
    parser.add_argument("--survival-s", type=float, default=1800.0, help="after survived deaths")
    parser.add_argument("--rounds", type=int, default=20, help="of what the hooks cost")
    parser.add_argument("--calls", type=int, default=1_000_000, help="of the device, misused")
    options = parser.parse_args()
    bad = done = 0
    with tempfile.TemporaryDirectory(prefix="torture-guard-") as name:
        for series in options.series or available():
            folder = Path(name) / series
            folder.mkdir()
            image = build(series, folder)
            chosen = options.part or PARTS
            dumping = (
                build(series, folder / "dump", crash_kernel=True) if "dumps" in chosen else image
            )
            parts = {
                "survived": survived(image, folder, options.kind),
                "fatal": fatal(image, folder, options.kind),
                "controls": controls(image, folder, options.kind),
                "storm": storm(image, folder),
                "churn": churn(image, folder, options.loads, options.calls),
                "cost": cost(image, folder, options.rounds),
                "ordinary": ordinary(image, folder, options.hours),
                "dumps": dumps(dumping, folder),
                "survival": survival(image, folder, options.survival_s),
                "moved": moved(series, options.times),
            }
            for part in chosen:
                for result in parts[part]:
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
