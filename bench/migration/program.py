"""The command line of the migration bench: measure, keep, show."""

import argparse
import asyncio
from functools import partial
from pathlib import Path

from rich.console import Console

from bench import machine, program, schedule
from bench.migration import show
from bench.migration.figures import Results, Sample
from bench.migration.guests import GUESTS, Guest
from bench.migration.trial import Setting, measure
from bench.migration.waiting import MoveError
from bench.migration.ways import WAYS, Way
from bench.sections import MIGRATE
from lab.network import FAR, GIGABIT, UNLIMITED, Link
from sempervirt.core.errors import NotFound
from sempervirt.guest import debian

LINKS = {"unlimited": UNLIMITED, "1gbit": GIGABIT, "100mbit": FAR}
# QEMU's emulator falls over in one boot of a hundred: a measurement may be tried again.
ATTEMPTS = 2


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; ends the program on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench --suite migrate",
        description="A guest moves between two hosts (network namespaces; needs root): stock QEMU, "
        "QEMU's multifd with zstd, both also steered as semper-wired is, and semper-wired, "
        "interleaved.",
    )
    add = parser.add_argument
    add("--link", action="append", choices=list(LINKS), dest="links")
    add("--guest", action="append", choices=list(GUESTS), dest="guests")
    add("--way", action="append", choices=list(WAYS), dest="ways")
    add("--rounds", type=int, default=3, metavar="N")
    add("--seed", type=int, default=1, metavar="N", help="of the order")
    add("--memory", type=int, default=512, metavar="MIB", help="of each guest")
    add("--tree", type=Path, metavar="FILE",
        help="a disk with files for the page cache, beside the guest's own")  # fmt: skip
    program.add_results(add)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.memory < 128:
        parser.error("--rounds or --memory is too small")
    return options


def main(arguments: list[str]) -> int:
    """Do what the command line says; the exit status."""
    options = parse(arguments)
    console = program.console()
    measure = partial(_measure, options, console)
    results = program.obtain(options, Results, measure, show.document, MIGRATE, NotFound)
    if results is None:
        return 2
    show.show(results, console)
    return int(bool(results.failures))


def _measure(options: argparse.Namespace, console: Console) -> Results:
    setting = Setting(debian(), options.tree and options.tree.resolve(), options.memory)
    links = [LINKS[name] for name in options.links or LINKS]
    guests = [GUESTS[name] for name in options.guests or GUESTS]
    ways = [WAYS[name] for name in options.ways or WAYS]
    results = Results(
        machine=machine.fleet_fingerprint(),
        settings={
            "suite": "migrate",
            "rounds": options.rounds,
            "seed": options.seed,
            "memory_mib": options.memory,
            "links": [link.name for link in links],
            "guests": [guest.name for guest in guests],
            "ways": [way.name for way in ways],
        },
        labels={
            **{guest.name: guest.label for guest in guests},
            **{way.name: way.label for way in ways},
        },
    )
    groups = [((link, guest), ways) for link in links for guest in guests]
    keeper = program.Keeper(options.output, "migrate")
    for number, (link, guest), way in schedule.interleaved(groups, options.rounds, options.seed):
        sample = _sample(setting, number, link, guest, way)
        results.samples.append(sample)
        keeper.keep(results)
        console.print(_line(sample), soft_wrap=True)
    keeper.stem.with_suffix(".md").write_text(show.document(results) + "\n")
    show.draw(results, keeper.stem.with_suffix(".svg"))
    console.print(f"wrote {keeper.stem}.json, .md and .svg")
    return results


def _sample(setting: Setting, number: int, link: Link, guest: Guest, way: Way) -> Sample:
    load = machine.load_average()
    error = ""
    for _ in range(ATTEMPTS):
        try:
            figures, told = asyncio.run(measure(setting, link, guest, way))
        except MoveError as failure:
            error = str(failure)
        else:
            return Sample(number, link.name, guest.name, way.name, load, figures, told)
    return Sample(number, link.name, guest.name, way.name, load, None, {}, error)


def _line(sample: Sample) -> str:
    where = f"round {sample.round}: {sample.link}: {sample.guest}, {sample.way}"
    seen = sample.figures
    if seen is None:
        return f"{where}: failed: {sample.error}"
    return (
        f"{where}: {seen.wire_mb:.1f} MB, {seen.total_s:.1f} s, blackout {seen.blackout_ms:.0f} ms"
    )
