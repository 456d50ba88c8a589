"""Runs all measurements of a bench, one after the other."""

import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench import schedule
from bench.backends import Backend, BackendError, last_words, running
from bench.cases import Case
from bench.load import PATIENCE_S, Figures, LoadError, arguments, measure
from bench.machine import load_average
from bench.results import Results, Sample
from bench.storages import Storage


@dataclass(frozen=True)
class Plan:
    """Everything that is measured, and how long."""

    load: Path
    storages: list[Storage]
    cases: tuple[Case, ...]
    backends: list[Backend]
    rounds: int
    seconds: float
    warmup: float
    seed: int
    pin: str | None = None

    def groups(self) -> list[tuple[tuple[Storage, Case], list[Backend]]]:
        """What is compared with each other, and where."""
        return [
            ((storage, case), [one for one in self.backends if one.serves(storage, case.queues)])
            for storage in self.storages
            for case in self.cases
        ]

    def count(self) -> int:
        """How many measurements there are."""
        return self.rounds * sum(len(backends) for _, backends in self.groups())


Watcher = Callable[[str, Sample | None], None]


def carry_out(plan: Plan, results: Results, watch: Watcher) -> None:
    """Add all samples of the plan to `results`; `watch` hears of each before and after it."""
    before = load_average()
    order = schedule.interleaved(plan.groups(), plan.rounds, plan.seed)
    for number, (storage, case), backend in order:
        watch(f"{storage.label} {case.name} {backend.name}", None)
        load = load_average()
        figures: Figures | None = None
        error: str | None = None
        try:
            figures = _measure(plan, storage, case, backend, plan.seed + number)
        except (BackendError, LoadError) as failure:
            error = str(failure)
        sample = Sample(number, storage.name, case.name, backend.name, load, figures, error)
        results.samples.append(sample)
        results.load_average = (before, load_average())
        storage.settle()
        watch("", sample)


def _measure(plan: Plan, storage: Storage, case: Case, backend: Backend, seed: int) -> Figures:
    with _run_directory() as directory:
        socket, log = Path(directory) / "disk.sock", Path(directory) / "backend.log"
        command = pinned(plan.pin, 0, backend.command(storage, case.queues, socket))
        with running(command, log) as process:
            try:
                load = arguments(case, socket, plan.seconds, plan.warmup, seed)
                return measure(
                    pinned(plan.pin, 1, [str(plan.load), f"--pid={process.pid}", *load]),
                    timeout_s=plan.seconds + plan.warmup + 4 * PATIENCE_S,
                )
            except LoadError as error:
                # If the backend is ending, it has not yet said why.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                raise LoadError(f"{error}; {backend.name}: {last_words(log)}") from error


def pinned(pin: str | None, place: int, command: list[str]) -> list[str]:
    """The command on the processor that `pin` gives to the backend (place 0) or the load (1)."""
    if pin is None:
        return command
    processor = place if pin == "apart" else 0
    return ["taskset", "--cpu-list", str(processor), *command]


def _run_directory() -> AbstractContextManager[str]:
    # A short path: a socket's may have 107 bytes.
    return tempfile.TemporaryDirectory(prefix="semper-bench-", dir="/tmp")
