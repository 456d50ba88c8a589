"""The program: measure, keep, show, judge."""

import argparse
import shlex
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import driver, machine, markdown, parity, plot, table
from bench.backends import (
    AIOS,
    CONTRIB,
    Backend,
    Blkd,
    Peer,
    QemuStorageDaemon,
    blkd_variants,
    contrib,
)
from bench.cases import BY_NAME
from bench.cold.program import check as check_cold
from bench.cold.program import main as cold
from bench.kept import KeptError
from bench.layers.program import main as layers
from bench.migration.program import main as migrate
from bench.options import parse
from bench.results import Results, Sample
from bench.sections import MarkersError
from bench.storages import StorageError, prepared
from bench.suites import PEERS, SUITES, Suite

ROOT = Path(__file__).resolve().parent.parent


class MissingError(Exception):
    """Something the bench needs is not there; the message says what to do."""


def main() -> int:
    """Do what the command line says; the exit status."""
    match sys.argv[1:]:
        # Nothing of it is like the others: hosts and guests, not backends and loads.
        case ["--suite", "migrate", *rest] | ["--suite=migrate", *rest]:
            return migrate(rest)
        case ["--suite", "cold", *rest] | ["--suite=cold", *rest]:
            return cold(rest)
        case ["--suite", "layers", *rest] | ["--suite=layers", *rest]:
            return layers(rest)
        case _:
            pass
    options = parse()
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width, and a table cut to 80 columns says nothing
    try:
        if options.earlier:
            measured = [Results.read(options.earlier)]
        else:
            measured = [_measure(options, SUITES[name], console) for name in options.suites]
        if options.update:
            for results in measured:
                section = SUITES[results.suite].section
                section.write(options.update, markdown.document(results))
    except (MissingError, StorageError, KeptError, MarkersError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    for results in measured:
        table.show(results, console)
    failed = any(results.failures for results in measured)
    if not options.check:
        return int(failed)
    slower = _judge(measured, console)
    # Last: it is short, and a suite of its own.
    return slower or check_cold(options.program, options.load)


def _judge(measured: list[Results], console: Console) -> int:
    """The exit status of --check."""
    peers = next((results for results in measured if results.suite == PEERS.name), None)
    if peers is None:
        print("bench: error: --check is about the suite peers", file=sys.stderr)
        return 2
    objections = list(parity.objections(peers, PEERS.subject))
    for objection in objections:
        print(f"bench: check: {objection}", file=sys.stderr)
    console.print("check: failed" if objections else "check: not slower than the reference")
    return 1 if objections else 0


def _measure(options: argparse.Namespace, suite: Suite, console: Console) -> Results:
    """Measure one suite and keep what was seen."""
    console.rule(suite.title)
    blkd = _program(options.program, "semper-blkd")
    load = _program(options.load, "semper-load")
    peers = suite is PEERS
    reference = (options.reference if peers else None) or suite.reference
    backends = _backends(options, suite, reference, blkd, console)
    wanted = tuple((options.storages if peers else None) or suite.storages)
    cases = (options.cases if peers else None) or suite.cases
    console.print(f"writing {len(wanted)} images of {options.size} MiB")
    with prepared(wanted, options.directory, options.memory, options.size << 20) as storages:
        plan = driver.Plan(
            load=load,
            storages=storages,
            cases=tuple(BY_NAME[name] for name in cases),
            backends=backends,
            rounds=options.rounds * suite.rounds,
            seconds=options.seconds,
            warmup=options.warmup,
            seed=options.seed,
            pin=options.pin,
        )
        results = Results(
            reference=reference,
            machine=machine.fingerprint(str(blkd)),
            settings={
                "suite": suite.name,
                "subject": suite.subject,
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
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{suite.name}"
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


def _backends(
    options: argparse.Namespace, suite: Suite, reference: str, blkd: Path, console: Console
) -> list[Backend]:
    """What is compared, the reference first. Raises MissingError for an unknown name."""
    program = (str(blkd),)
    known: list[Backend] = [
        *blkd_variants(program),
        *(QemuStorageDaemon(f"qsd-{aio.replace('io_', '')}", aio) for aio in AIOS),
        contrib(ROOT / ".cache/peers/vhost-user-blk"),
    ]
    names = [reference, *suite.backends]
    if suite is PEERS:
        for given in options.blkds:
            name, _, command = given.partition("=")
            known.append(Blkd(name, tuple(shlex.split(command)), engine=None))
        for given in options.peers:
            label, _, command = given.partition("=")
            name, _, storages = label.partition("@")
            peer = Peer(name, command)
            known.append(replace(peer, storages=tuple(storages.split(","))) if storages else peer)
        names = [reference, *(options.backends or suite.backends), *options.added]
    by_name = {backend.name: backend for backend in known}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise MissingError(f"no backend {', '.join(unknown)}; there are {', '.join(by_name)}")
    wanted = dict.fromkeys(names)
    if CONTRIB in wanted and (reason := _build_contrib()):
        if CONTRIB not in options.optional:
            raise MissingError(reason)
        console.print(f"going on without {CONTRIB}: {reason}")
        del wanted[CONTRIB]
    return [by_name[name] for name in wanted]


def _build_contrib() -> str | None:
    """Build the second peer if it is not there; why it cannot be, if so."""
    result = subprocess.run(
        [ROOT / "scripts/peer"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        return None
    return result.stderr.strip() or f"scripts/peer ended with status {result.returncode}"


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
