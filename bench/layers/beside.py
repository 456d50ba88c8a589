"""Snapshots and merges beside a guest: how long it stands still, and what it notices of a merge."""

import asyncio
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.backends import BackendError
from bench.layers.figures import Seen
from bench.layers.served import (
    BLOCK,
    QUEUES,
    Place,
    Programs,
    Served,
    beside,
    image,
    serving,
    snapshot,
    wait_layers,
)
from bench.layers.speed import FAILURES
from bench.processes import footprint
from sempervirt.disk.answers import Layers
from sempervirt.disk.client import BackendClient

# Blocks that the guest of the snapshots writes: more would be a measurement of merges.
SPREAD = 2048
FAST = 8 << 30


class Shape(Enum):
    """What an image is like."""

    DENSE = "dense"
    SPARSE = "sparse, 1 TiB"
    FRAGMENTED = "300,000 extents"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    image: int
    snapshots: int
    extents: int
    merged: int
    window_s: float


def _made(folder: Path, shape: Shape, sizes: Sizes) -> Path:
    match shape:
        case Shape.DENSE:
            return image(folder, "disk", sizes.image)
        case Shape.SPARSE:
            return image(folder, "disk", 1 << 40, filled=False)
        case Shape.FRAGMENTED:
            path = image(folder, "disk", 2 * sizes.extents * BLOCK, filled=False)
            with path.open("r+b", buffering=0) as file:
                for extent in range(sizes.extents):
                    os.posix_fallocate(file.fileno(), 2 * extent * BLOCK, BLOCK)
                os.fsync(file.fileno())
            return path


@contextmanager
def _guest(served: Served, seconds: float, *options: str) -> Iterator[None]:
    """A guest that goes on until the end of the block, with a new connection now and then."""
    over = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while not over.is_set():
                served.load(*options, f"--seconds={seconds}", "--warmup=0")
        except FAILURES as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]


def pause(
    programs: Programs, place: Place, shape: Shape, number: int, sizes: Sizes, seconds: float
) -> Iterator[Seen]:
    """Snapshots in a row, each merged, of a disk that four queues with 32 writes each keep busy."""
    engine = place.engines[0]
    where = f"{place.name} {engine}, {shape.value}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=place.folder)))
        path = _made(folder, shape, sizes)
        blocks = path.stat().st_size // BLOCK
        served = stack.enter_context(serving(programs, programs.blkd, place, path, engine, "blkd"))
        stride = max(1, blocks // SPREAD)
        load = ("--mode=randwrite", f"--queues={QUEUES}", "--depth=32", f"--stride={stride}")
        served.load(*load, f"--seconds={seconds}", "--warmup=0")
        alone = served.load(*load, f"--seconds={seconds}", "--warmup=0")
        with _guest(served, 2 * sizes.window_s, *load):
            rows = asyncio.run(_take(served, sizes.snapshots))
        pauses = sorted(row.pause_ms for row in rows)
        # Of 128 requests in flight, the slowest.
        slowest_ms = alone.p999_us / 1000
        seen = {
            "count": float(len(rows)),
            "p50_ms": statistics.median(pauses),
            "p99_ms": pauses[int(len(pauses) * 0.99)],
            "max_ms": pauses[-1],
            "slowest_ms": slowest_ms,
            "beyond_ms": pauses[int(len(pauses) * 0.99)] - slowest_ms,
        }
        yield Seen("pause", where, "snapshots", "blkd", number, seen)
        yield Seen("pause", where, "growth", "blkd", number, _growth(rows))
        if shape is Shape.SPARSE:
            yield Seen("pause", where, "map", "blkd", number, _map(served, blocks))


@dataclass(frozen=True)
class _Row:
    """One snapshot, and what the process held when it was merged."""

    pause_ms: float
    anonymous_kib: float
    descriptors: int
    files: int


async def _take(served: Served, count: int) -> list[_Row]:
    rows = []
    for _ in range(count):
        taken = await snapshot(served.client)
        await _merge(served.client, taken.snapshot)
        held = footprint(served.process.pid)
        files = len(beside(served.image))
        rows.append(_Row(taken.pause_us / 1000, held.anonymous, held.descriptors, files))
    return rows


async def _merge(client: BackendClient, through: int) -> None:
    await client.merge(through, FAST)
    # The first snapshot leaves one layer as well.
    await wait_layers(client, lambda told: len(told.layers) == 1 and told.kept == 0)


def _growth(rows: list[_Row]) -> dict[str, float]:
    """The last fifth beside the second."""
    fifth = len(rows) // 5
    early, late = rows[fifth : 2 * fifth], rows[-fifth:]

    def ratio(name: str) -> float:
        first = statistics.median(getattr(row, name) for row in early)
        return float(statistics.median(getattr(row, name) for row in late) / max(first, 1e-9))

    return {
        "memory": ratio("anonymous_kib"),
        "files": ratio("files"),
        "descriptors": ratio("descriptors"),
        "pause": ratio("pause_ms"),
    }


def _map(served: Served, blocks: int) -> dict[str, float]:
    """Memory of the map of a layer when every part of the disk was written."""
    part = (64 << 20) // BLOCK
    before = asyncio.run(served.client.layers()).map_bytes
    served.snapshot()
    served.fill(f"--stride={part}", count=blocks // part)
    told = asyncio.run(served.client.layers())
    return {"mib_per_tib": (told.map_bytes - before) / 2**20 * (2**40 / (blocks * BLOCK))}


def _is_over(told: Layers) -> bool:
    return told.task is None and len(told.layers) == 1


def merge(programs: Programs, place: Place, number: int, sizes: Sizes) -> Iterator[Seen]:
    """Scattered blocks are merged while a guest writes, at the rate that merges have."""
    engine, every = place.engines[0], 4
    where = f"{place.name} {engine}"
    count = sizes.merged // BLOCK
    loads = {
        "write 2k/s": ("--mode=randwrite", "--depth=32", "--rate=2000"),
        "write d32": ("--mode=randwrite", "--depth=32"),
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=place.folder)))
        path = image(folder, "disk", every * sizes.merged, filled=False)
        served = stack.enter_context(serving(programs, programs.blkd, place, path, engine, "blkd"))
        served.snapshot()
        served.fill(f"--stride={every}", count=count)
        last = served.snapshot()
        # What the guest writes is in the highest layer already.
        span = min(64 << 20, every * sizes.merged // 4)
        served.fill(f"--span={span}", count=span // BLOCK)
        served.settle()

        def windows(rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
            for _ in range(rounds):
                for what, options in loads.items():
                    seen = served.load(
                        *options, f"--span={span}", f"--seconds={sizes.window_s}", "--warmup=0.1"
                    )
                    yield what, {"p50_us": seen.p50_us, "p99_us": seen.p99_us, "iops": seen.iops}

        at_rest = list(windows(2))
        began = time.monotonic()
        asyncio.run(served.client.merge(last.snapshot, None))
        during: list[tuple[str, dict[str, float]]] = []
        while not _is_over(told := asyncio.run(served.client.layers())):
            if told.last_error is not None:
                raise BackendError(told.last_error)
            more = list(windows(1))
            # In the last one the guest may have been alone.
            if not during or not _is_over(asyncio.run(served.client.layers())):
                during += more
        took = time.monotonic() - began
        at_rest += windows(2)
        for what in loads:
            for by, rows in (("at rest", at_rest), ("merging", during)):
                kept = [figures for of, figures in rows if of == what]
                if kept:
                    median = {
                        name: statistics.median(one[name] for one in kept) for name in kept[0]
                    }
                    yield Seen("merge", where, what, by, number, median)
        figures = {"count": float(len(told.layers)), "seconds": took}
        yield Seen("merge", where, "layers left", "blkd", number, figures)
