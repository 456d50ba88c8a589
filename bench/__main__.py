"""The program: measure, keep, show, judge."""

import argparse
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import driver, machine, markdown, parity, plot, table
from bench.backends import Backend, Blkd, Peer, QemuStorageDaemon
from bench.cases import BY_NAME
from bench.options import parse
from bench.results import Results, ResultsError, Sample
from bench.storages import StorageError, prepared

ROOT = Path(__file__).resolve().parent.parent
SUBJECT = "blkd"


class MissingError(Exception):
    """Something the bench needs is not there; the message says what to do."""


def main() -> int:
    """Do what the command line says; the exit status."""
    options = parse()
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width, and a table cut to 80 columns says nothing
    try:
        results = Results.read(options.earlier) if options.earlier else _measure(options, console)
        if options.update:
            markdown.update(options.update, results)
    except (MissingError, StorageError, ResultsError, markdown.MarkersError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    table.show(results, console)
    if not options.check:
        return 1 if results.failures else 0
    objections = list(parity.objections(results, SUBJECT))
    for objection in objections:
        print(f"bench: check: {objection}", file=sys.stderr)
    console.print("check: failed" if objections else "check: not slower than the reference")
    return 1 if objections else 0


def _measure(options: argparse.Namespace, console: Console) -> Results:
    blkd = _program(options.program, "semper-blkd")
    load = _program(options.load, "semper-load")
    backends = _backends(options, blkd)
    places = (options.directory, options.memory)
    console.print(f"writing {len(options.storages)} images of {options.size} MiB")
    with prepared(tuple(options.storages), *places, options.size << 20) as storages:
        plan = driver.Plan(
            load=load,
            storages=storages,
            cases=tuple(BY_NAME[name] for name in options.cases),
            backends=backends,
            rounds=options.rounds,
            seconds=options.seconds,
            warmup=options.warmup,
            seed=options.seed,
            pin=options.pin,
        )
        results = Results(
            reference=options.reference,
            machine=machine.fingerprint(str(blkd)),
            settings={
                "subject": SUBJECT,
                "rounds": plan.rounds,
                "seconds": plan.seconds,
                "warmup": plan.warmup,
                "seed": plan.seed,
                "size_mib": options.size,
                "pin": plan.pin,
            },
            labels={storage.name: storage.label for storage in storages},
        )
        _carry_out(plan, results, console)
    name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    results.write(options.output / f"{name}.json")
    for kind in ("svg", "png"):
        plot.draw(results, options.output / f"{name}.{kind}")
    (options.output / f"{name}.md").write_text(markdown.document(results) + "\n")
    console.print(f"wrote {options.output / name}.json, .md, .svg and .png")
    return results


def _program(given: Path | None, name: str) -> Path:
    path: Path = given or ROOT / "target/release" / name
    if not path.is_file():
        raise MissingError(f"{path} is not there; run `make bench`, which builds it")
    return path.resolve()


def _backends(options: argparse.Namespace, blkd: Path) -> list[Backend]:
    program = (str(blkd),)
    known: list[Backend] = [
        Blkd(SUBJECT, program),
        Blkd("blkd-sync", program, "sync"),
        Blkd("blkd-uring", program, "uring"),
        QemuStorageDaemon("qsd-uring", "io_uring"),
        QemuStorageDaemon("qsd-threads", "threads"),
        QemuStorageDaemon("qsd-native", "native"),
    ]
    for given in options.blkds:
        name, _, command = given.partition("=")
        known.append(Blkd(name, tuple(shlex.split(command)), engine=None))
    for given in options.peers:
        label, _, command = given.partition("=")
        name, _, storages = label.partition("@")
        where = {"storages": tuple(storages.split(","))} if storages else {}
        known.append(Peer(name, command, **where))
    wanted = dict.fromkeys([options.reference, *options.backends])
    names = {backend.name: backend for backend in known}
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise MissingError(f"no backend {', '.join(unknown)}; there are {', '.join(names)}")
    return [names[name] for name in wanted]


def _carry_out(plan: driver.Plan, results: Results, console: Console) -> None:
    """Measure with a progress bar on a terminal, with a line for each round elsewhere."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
    )
    total = plan.count()
    each = plan.seconds + plan.warmup + 0.3
    console.print(f"{total} measurements, about {total * each / 60:.0f} minutes")
    with bar:
        task = bar.add_task("", total=total)
        rounds_done = 0

        def watch(description: str, done: Sample | None) -> None:
            nonlocal rounds_done
            if done is None:
                bar.update(task, description=description)
                return
            bar.advance(task)
            if done.error:
                console.print(f"{done.storage} {done.case} {done.backend}: {done.error}")
            finished = len(results.samples) * plan.rounds // total
            if finished > rounds_done and not console.is_terminal:
                console.print(f"round {finished} of {plan.rounds}")
            rounds_done = finished

        driver.carry_out(plan, results, watch)


if __name__ == "__main__":
    sys.exit(main())
