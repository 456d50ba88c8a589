"""The command line of the bench of layers: measure, keep, show, judge."""

import argparse
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from bench import machine, program
from bench.layers import show
from bench.layers.beside import Shape, Sizes, merge, pause
from bench.layers.figures import Results, Seen, answers
from bench.layers.served import Place, Programs
from bench.layers.speed import FAILURES, chain, plain
from bench.sections import LAYERS
from bench.storages import file_system

PLACES = ("tmpfs", "cached", "direct")
PARTS = ("plain", "chain", "pause", "merge")
BARE = program.ROOT / "target/release/semper-blkd-undecorated"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; ends the program on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench --suite layers",
        description="What snapshots cost a guest: the code that knows layers beside a build that "
        "knows none, a chain of four beside a plain disk and QEMU's qcow2, the pause of a "
        "snapshot, a merge beside a guest.",
    )
    add = parser.add_argument
    add("--part", action="append", choices=PARTS, dest="parts")
    add("--place", action="append", choices=PLACES, dest="places")
    add("--engine", action="append", dest="engines", help="of the chain; default: what "
        "semper-blkd chooses; of no layer always each")  # fmt: skip
    add("--rounds", type=int, default=3, metavar="N")
    add("--seconds", type=float, default=0.3, metavar="S", help="of each load")
    add("--size", type=int, default=256, metavar="MIB", help="of each image")
    add("--snapshots", type=int, default=1000, metavar="N", help="of each image")
    add("--quick", action="store_true", help="see that it works, in some seconds")
    add("--check", action="store_true", help="fail if a bound is not kept")
    program.add_images(add)
    add("--bare", type=Path, default=BARE, help="semper-blkd with the feature undecorated")
    program.add_results(add)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds, options.size, options.snapshots = 1, 0.03, 16, 5
        options.places = options.places or ["cached"]
    options.parts = options.parts or list(PARTS)
    options.places = options.places or list(PLACES)
    if options.rounds < 1 or options.size < 16 or options.snapshots < 5:
        parser.error("--rounds, --size or --snapshots is too small")
    return options


def main(arguments: list[str]) -> int:
    """Do what the command line says; the exit status."""
    options = parse(arguments)
    console = program.console()
    measure = partial(_measure, options, console)
    results = program.obtain(options, Results, measure, show.document, LAYERS, OSError)
    if results is None:
        return 2
    show.show(results, console)
    for one in results.failures:
        print(f"bench: {one.where} {one.what} {one.by}: {one.error}", file=sys.stderr)
    missed = [one for one in answers(results) if not one.kept] if options.check else []
    return int(bool(results.failures or missed))


def _measure(options: argparse.Namespace, console: Console) -> Results:
    bare = options.bare.resolve() if options.bare.is_file() else None
    programs = Programs(options.program.resolve(), options.load.resolve(), bare)
    if bare is None and "plain" in options.parts:
        console.print(f"going on without {options.bare}: `make bench-layers` builds it")
    results = Results(
        machine=machine.fingerprint(str(programs.blkd)),
        settings={
            "suite": "layers", "rounds": options.rounds, "seconds": options.seconds,
            "size_mib": options.size, "snapshots": options.snapshots,
        },
    )  # fmt: skip
    keeper = program.Keeper(options.output, "layers")
    began = datetime.now(UTC)
    for what, seen in _everything(options, programs):
        part, where = what
        try:
            for one in seen:
                results.seen.append(one)
        except FAILURES as error:
            results.seen.append(Seen(part, where, "all", "blkd", 0, {}, str(error)))
        keeper.keep(results)
        console.print(f"{(datetime.now(UTC) - began).seconds:4} s: {part} {where}")
    keeper.stem.with_suffix(".md").write_text(show.document(results) + "\n")
    console.print(f"wrote {keeper.stem}.json and .md")
    return results


def _everything(
    options: argparse.Namespace, programs: Programs
) -> Iterator[tuple[tuple[str, str], Iterator[Seen]]]:
    """Each measurement by its part and place; round by round, so that all have the same machine."""
    size = options.size << 20
    places = [_place(options, name) for name in options.places]
    for number in range(options.rounds):
        for place in places:
            for engine in place.engines[: 1 if options.quick else None]:
                if "plain" in options.parts:
                    yield (
                        ("plain", f"{place.name} {engine}"),
                        plain(programs, place, engine, number, size, options.seconds),
                    )
            for engine in options.engines or place.engines[:1]:
                if "chain" in options.parts and engine in place.engines:
                    yield (
                        ("chain", f"{place.name} {engine}"),
                        chain(programs, place, engine, number, size, options.seconds),
                    )
    sizes = Sizes(
        image=size,
        snapshots=options.snapshots,
        extents=3_000 if options.quick else 300_000,
        merged=8 << 20 if options.quick else 1 << 30,
        window_s=0.1 if options.quick else 1.5,
    )
    for place in places:
        shapes = list(Shape) if place.name == "cached" else [Shape.DENSE]
        for shape in shapes if "pause" in options.parts else ():
            yield (
                ("pause", f"{place.name}, {shape.value}"),
                pause(programs, place, shape, 0, sizes, 4 * options.seconds),
            )
        if "merge" in options.parts and place.name != "tmpfs":
            yield ("merge", place.name), merge(programs, place, 0, sizes)


def _place(options: argparse.Namespace, name: str) -> Place:
    folder = options.memory if name == "tmpfs" else options.directory
    folder.mkdir(parents=True, exist_ok=True)
    kind = file_system(folder)
    if (kind == "tmpfs") != (name == "tmpfs"):
        raise OSError(f"{folder} is {kind}; choose another with --memory or --directory")
    return Place(name, folder.resolve(), name == "direct")
