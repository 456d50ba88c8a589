"""The command line of ``python -m bench``."""

import argparse
from pathlib import Path

from bench import cases, storages
from bench.backends import CONTRIB
from bench.suites import PEERS, SUITES

DESCRIPTION = """\
semper-blkd and its peers side by side: every case with every backend in each round, in random
order; ratios to qemu-storage-daemon with aio=io_uring in the same round.

Exit status: 0 all was measured (and, with --check, semper-blkd is not slower); 1 it is slower, or a
measurement failed; 2 wrong usage, or something that is needed is missing.

`python -m bench --suite migrate --help` is about moving guests; it is a program of its own.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; ends the program on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--quick", action="store_true", help="5 short rounds of the cases that --check needs"
    )
    what.add_argument(
        "--check",
        action="store_true",
        help="fail if semper-blkd is slower than the reference beyond the noise at depth 1 and 32 "
        "on tmpfs and with O_DIRECT; measures only that, unless told otherwise",
    )
    what.add_argument(
        "--suite",
        action="append",
        choices=list(SUITES),
        dest="suites",
        help="peers: semper-blkd beside other backends; cost: semper-blkd beside itself without "
        "in-flight tracking and without the page/block map; look: what its --poll-us buys with "
        "O_DIRECT; default: all, or peers alone with "
        "--quick, --check or a choice of storages, cases or backends",
    )
    what.add_argument("--storage", action="append", choices=storages.NAMES, dest="storages")
    what.add_argument(
        "--case",
        action="append",
        choices=list(cases.BY_NAME),
        dest="cases",
        metavar="CASE",
        help=f"one of {', '.join(cases.BY_NAME)}; may be repeated",
    )
    what.add_argument(
        "--backend",
        action="append",
        dest="backends",
        metavar="NAME",
        help="one of blkd (the engine that it chooses itself), blkd-sync, blkd-nowait, "
        "blkd-uring, blkd-mmap, qsd-uring, qsd-threads, qsd-native, qemu-contrib; "
        "may be repeated; the reference and what --blkd and --peer name always run",
    )
    what.add_argument(
        "--blkd",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        dest="blkds",
        help="one more semper-blkd, such as another build, or one with further options",
    )
    what.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        dest="peers",
        help="any other backend; in its command {socket}, {image}, {queues}, {direct} are filled; "
        "NAME@tmpfs,direct=COMMAND limits it to these storages",
    )
    what.add_argument("--reference", metavar="NAME", help=f"default {PEERS.reference}")
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=int, metavar="N", help="default 7 (--quick: 5)")
    how.add_argument("--seconds", type=float, metavar="S", help="of each; default 1 (--quick: 0.5)")
    how.add_argument("--warmup", type=float, metavar="S", help="default 0.3 (--quick: 0.2)")
    how.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of the order and the offsets"
    )
    how.add_argument("--size", type=int, default=1024, metavar="MIB", help="of each image")
    how.add_argument(
        "--pin",
        choices=("together", "apart"),
        help="put load and backend on one processor, or on two; default: leave it to the kernel",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--directory", type=Path, default=Path(".cache/bench"), help="on a disk")
    where.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="on tmpfs")
    where.add_argument("--program", type=Path, help="semper-blkd; default: the one built here")
    where.add_argument("--load", type=Path, help="semper-load; default: the one built here")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--output", type=Path, default=Path("results/bench"), metavar="DIR")
    out.add_argument(
        "--from",
        type=Path,
        dest="earlier",
        metavar="FILE",
        help="measure nothing, show this file of an earlier run (of one suite)",
    )
    out.add_argument(
        "--update", type=Path, metavar="FILE", help="put the tables between the markers of FILE"
    )
    options = parser.parse_args(arguments)
    _fill_defaults(options)
    if options.rounds < 1 or options.seconds <= 0 or options.warmup < 0 or options.size < 64:
        parser.error("--rounds, --seconds, --warmup or --size is too small")
    for given in (*options.blkds, *options.peers):
        if "=" not in given:
            parser.error(f"{given!r} is not NAME=COMMAND")
    return options


def name(given: str) -> str:
    """The name in NAME=COMMAND or NAME@STORAGE,…=COMMAND."""
    return given.partition("=")[0].partition("@")[0]


def _fill_defaults(options: argparse.Namespace) -> None:
    short = options.quick or options.check
    options.rounds = options.rounds or (5 if options.quick else 7)
    options.seconds = options.seconds or (0.5 if options.quick else 1.0)
    if options.warmup is None:
        options.warmup = 0.2 if options.quick else 0.3
    added = [name(given) for given in (*options.blkds, *options.peers)]
    chosen = options.storages or options.cases or options.backends or added or options.reference
    if options.suites is None:
        options.suites = [PEERS.name] if short or chosen else list(SUITES)
    if short:
        options.cases = options.cases or [case.name for case in cases.PARITY]
        options.storages = options.storages or ["tmpfs", "direct"]
        options.backends = options.backends or ["blkd", PEERS.reference]
    # Named by the user, or taken because it may be there: the latter does not have to be.
    options.optional = [] if options.backends else [CONTRIB]
    options.added = added
