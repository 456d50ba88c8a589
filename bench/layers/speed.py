"""Requests beside a disk without layers: of the code that knows them, and of a chain of four."""

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.backends import BackendError
from bench.layers.figures import Seen
from bench.layers.served import (
    BLOCK,
    Place,
    Programs,
    Served,
    image,
    make_overlay,
    serving,
    serving_qcow2,
)
from bench.load import Figures, LoadError
from sempervirt.core.errors import SempervirtError

FAILURES = (BackendError, LoadError, SempervirtError, OSError, ValueError)
CHAIN = 4
# One block in five is in the image, and one in each of four layers.
SHARES = CHAIN + 1
DEPTHS = {"d1": ("--depth=1",), "d32": ("--depth=32",), "4×d32": ("--depth=32", "--queues=4")}


def _kept(seen: Figures) -> dict[str, float]:
    return {
        "iops": seen.iops, "p50_us": seen.p50_us, "p99_us": seen.p99_us, "cpu_us": seen.cpu_us,
        "flush_us": seen.flush_us,
    }  # fmt: skip


def _measured(key: tuple[str, str, str], served: Served, number: int, *load: str) -> Seen:
    try:
        return Seen(*key, served.name, number, _kept(served.load(*load)))
    except FAILURES as error:
        return Seen(*key, served.name, number, {}, str(error))


def _shuffled(dice: random.Random, disks: list[Served]) -> list[Served]:
    return dice.sample(disks, len(disks))


def plain(
    programs: Programs, place: Place, engine: str, number: int, size: int, seconds: float
) -> Iterator[Seen]:
    """The code that knows layers on a disk that has none, beside a build without that code."""
    if programs.bare is None:
        return
    dice = random.Random(f"{place.name} {engine} {number}")
    where = f"{place.name} {engine}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=place.folder)))
        disks = []
        for name, program in (("no layer", programs.blkd), ("bare", programs.bare)):
            path = image(folder, name.replace(" ", "-"), size)
            served = stack.enter_context(serving(programs, program, place, path, engine, name))
            if not place.direct:
                served.warm(size)
            disks.append(served)
        time = (f"--seconds={seconds}", f"--warmup={seconds / 4}")
        for kind in ("read", "write"):
            for depth, options in DEPTHS.items():
                key = ("plain", where, f"{kind} {depth}")
                # There and back, so that what gets slower with time is not the same one's.
                order = _shuffled(dice, disks)
                for half, served in enumerate((*order, *reversed(order))):
                    yield _measured(
                        key,
                        served,
                        2 * number + half // 2,
                        f"--mode=rand{kind}",
                        *options,
                        *time,
                    )
                    served.settle()


def chain(
    programs: Programs, place: Place, engine: str, number: int, size: int, seconds: float
) -> Iterator[Seen]:
    """A chain of four layers beside a disk without, and beside QEMU's qcow2."""
    dice = random.Random(f"{place.name} {engine} {number}")
    where = f"{place.name} {engine}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=place.folder)))

        def served(name: str) -> Served:
            path = image(folder, name.replace(" ", "-"), size)
            return stack.enter_context(serving(programs, programs.blkd, place, path, engine, name))

        none, four, one = served("no layer"), served("four layers"), served("one layer")
        each = size // BLOCK // SHARES
        for share in range(1, SHARES):
            four.snapshot()
            four.fill(f"--stride={SHARES}", f"--first={share}", count=each)
        one.snapshot()
        one.fill("--stride=2", count=size // BLOCK // 2)
        qcow2 = _qcow2(programs, place, folder, size, stack)
        for disk in (none, four, one, qcow2):
            disk.settle()
            if not place.direct:
                disk.warm(size)
        yield from _settled(where, number, dice, [none, four], qcow2, one, seconds)
        yield from _new(where, number, dice, [none, four], qcow2, each)


def _qcow2(programs: Programs, place: Place, folder: Path, size: int, stack: ExitStack) -> Served:
    """Written as the chain of layers is."""
    base, overlays = image(folder, "qcow2-base", size), []
    each = size // BLOCK // SHARES
    for share in range(1, SHARES):
        overlay = folder / f"overlay-{share}"
        make_overlay(overlay, size)
        overlays.append(overlay)
        with serving_qcow2(programs, place, base, overlays) as served:
            served.fill(f"--stride={SHARES}", f"--first={share}", count=each)
    return stack.enter_context(serving_qcow2(programs, place, base, overlays))


def _settled(
    where: str,
    number: int,
    dice: random.Random,
    pair: list[Served],
    qcow2: Served,
    one: Served,
    seconds: float,
) -> Iterator[Seen]:
    """Reads and rewrites: no block is new to the highest layer."""
    time = (f"--seconds={seconds}", f"--warmup={seconds / 4}")
    highest = (f"--stride={SHARES}", f"--first={CHAIN}")
    loads: list[tuple[str, list[Served], tuple[str, ...]]] = [
        ("read d1", pair, ("--mode=randread", *DEPTHS["d1"])),
        ("read d32", [*pair, qcow2], ("--mode=randread", *DEPTHS["d32"])),
        ("rewrite d1", pair, ("--mode=randwrite", *highest, *DEPTHS["d1"])),
        ("rewrite d32", [*pair, qcow2], ("--mode=randwrite", *highest, *DEPTHS["d32"])),
        ("flush", pair, ("--mode=randwrite", *highest, *DEPTHS["d1"], "--flush-every=1")),
        ("64k read, alternating", [pair[0], one],
         ("--mode=randread", "--block-size=64k", "--depth=1")),
        ("64k read, of five files", pair, ("--mode=randread", "--block-size=64k", "--depth=1")),
    ]  # fmt: skip
    for what, disks, options in loads:
        for served in _shuffled(dice, disks):
            yield _measured(("chain", where, what), served, number, *options, *time)
            served.settle()


def _new(
    where: str, number: int, dice: random.Random, pair: list[Served], qcow2: Served, each: int
) -> Iterator[Seen]:
    """First writes: each block is new to the highest layer, and written once."""
    flushes = min(each, 400)
    loads: list[tuple[str, list[Served], int, int, tuple[str, ...]]] = [
        ("first d1", pair, 0, each, DEPTHS["d1"]),
        ("first d32", [*pair, qcow2], 1, each, DEPTHS["d32"]),
        ("flush, new", pair, 2, flushes, (*DEPTHS["d1"], "--flush-every=1")),
    ]
    for what, disks, share, count, options in loads:
        for served in _shuffled(dice, disks):
            which = ("--mode=write", f"--stride={SHARES}", f"--first={share}")
            load = (*which, f"--count={count}", "--warmup=0", *options)
            yield _measured(("chain", where, what), served, number, *load)
            served.settle()
