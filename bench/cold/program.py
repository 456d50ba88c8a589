"""The command line of the cold bench: measure, keep, show, judge."""

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from bench import machine, program, schedule
from bench.backends import BackendError
from bench.cold import effort, show, trial
from bench.cold.figures import Effort, Figures, Results, Sample, objections
from bench.sections import COLD
from bench.storages import Storage, StorageError, prepared
from sempervirt.core.errors import SempervirtError

STORAGES = ("tmpfs", "tmpfs-sparse", "cached", "cached-sparse")
ENGINES = ("auto", "mmap", "sync", "nowait", "uring")
MODES = ("randread", "randwrite")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; ends the program on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench --suite cold",
        description="The first second of semper-blkd after a start, and after a kill and the "
        "take-over by its spare: requests of 4 KiB, 32 in flight. Sparse images are only read.",
    )
    add = parser.add_argument
    add("--storage", action="append", choices=STORAGES, dest="storages")
    add("--engine", action="append", choices=ENGINES, dest="engines",
        help="beside auto; default sync and nowait")  # fmt: skip
    add("--mode", action="append", choices=MODES, dest="modes")
    add("--only", choices=("clock", "effort"), help="IOPS by the clock on the wall, or the "
        "processor time of a request, which a busy machine does not change")  # fmt: skip
    add("--rounds", type=int, default=7, metavar="N")
    add("--seed", type=int, default=1, metavar="N", help="of the order and the offsets")
    add("--size", type=int, default=1024, metavar="MIB", help="of each image that is not sparse")
    add("--check", action="store_true", help="fail if less is reached than is asked for")
    program.add_images(add)
    program.add_results(add)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.size < 64:
        parser.error("--rounds or --size is too small")
    options.storages = options.storages or list(STORAGES)
    options.engines = ["auto", *(options.engines or ["sync", "nowait"])]
    options.modes = options.modes or list(MODES)
    return options


def main(arguments: list[str]) -> int:
    """Do what the command line says; the exit status."""
    options = parse(arguments)
    console = program.console()
    measure = partial(_measure, options, console)
    results = program.obtain(options, Results, measure, show.document, COLD, StorageError)
    if results is None:
        return 2
    show.show(results, console)
    found = list(objections(results)) if options.check else results.failures
    for objection in found:
        print(f"bench: check: {objection}", file=sys.stderr)
    return int(bool(found))


def check(program: Path | None, load: Path | None) -> int:
    """What `--check` of the whole bench asks of the first second; the exit status."""
    given = [("--program", program), ("--load", load)]
    named = [f"{name}={path}" for name, path in given if path is not None]
    short = ["--rounds=5", "--only=effort", "--engine=sync"]
    places = ["--storage=tmpfs", "--storage=tmpfs-sparse"]
    return main([*named, *short, *places, "--check"])


def _measure(options: argparse.Namespace, console: Console) -> Results:
    programs = (options.program.resolve(), options.load.resolve())
    names = tuple(options.storages)
    with prepared(names, options.directory, options.memory, options.size << 20) as places:
        results = Results(
            machine=machine.fingerprint(str(programs[0])),
            settings={
                "suite": "cold",
                "rounds": options.rounds,
                "seed": options.seed,
                "size_mib": options.size,
            },
            labels={place.name: place.label for place in places},
        )
        groups = [
            ((place, mode), options.engines)
            for place in places
            for mode in options.modes
            if not (place.sparse and mode == "randwrite")
        ]
        keeper = program.Keeper(options.output, "cold")
        order = schedule.interleaved(groups, options.rounds, options.seed)
        for number, (place, mode), engine in order:
            sample = _sample(options, programs, place, mode, engine, number)
            results.samples.append(sample)
            keeper.keep(results)
            console.print(_line(sample), soft_wrap=True)
    keeper.stem.with_suffix(".md").write_text(show.document(results) + "\n")
    console.print(f"wrote {keeper.stem}.json and .md")
    return results


def _sample(
    options: argparse.Namespace,
    programs: tuple[Path, Path],
    place: Storage,
    mode: str,
    engine: str,
    number: int,
) -> Sample:
    load, seed = machine.load_average(), options.seed + number
    seen: Figures | None = None
    spent: Effort | None = None
    error: str | None = None
    try:
        if options.only != "effort":
            seen = trial.measure(programs, place, engine, mode, seed)
            place.settle()
        if options.only != "clock":
            spent = effort.measure(programs, place, engine, mode, seed)
    except (BackendError, SempervirtError, OSError, ValueError) as failure:
        error = str(failure)
    place.settle()
    return Sample(number, place.name, mode, engine, load, seen, spent, error)


def _line(sample: Sample) -> str:
    parts = []
    if sample.figures is not None:
        seen = sample.figures
        back = "not" if seen.back_ms is None else f"after {seen.back_ms:.0f} ms"
        parts.append(
            f"{seen.start_100:.0f} in the first 100 ms, {seen.steady:.0f} steady, "
            f"{seen.over_100:.0f} after the take-over, stall {seen.stall_ms:.1f} ms, back {back}"
        )
    if sample.effort is not None:
        spent = sample.effort
        parts.append(
            f"{spent.first_us:.2f} µs each of the first, {spent.warm_us:.2f} warm, "
            f"{spent.beside_us:.2f} beside"
        )
    if sample.error is not None:
        parts.append(f"failed: {sample.error}")
    where = f"round {sample.round}: {sample.storage} {sample.mode} {sample.engine}"
    return f"{where}: {'; '.join(parts)}"
