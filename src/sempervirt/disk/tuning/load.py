"""One measurement: the program semper-load against a backend that serves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import CommandFailed
from sempervirt.disk.tuning.figures import Figures
from sempervirt.host import process
from sempervirt.host.answers import Answer, read_answer

PROGRAM = "semper-load"
REPORT_VERSION = 1
READ_PERCENT = 70
_PATIENCE_S = 10.0
_WARMUP_SHARE = 0.2


class Latency(Answer):
    """Of one request, in microseconds."""

    p99: float


class ProcessorTime(Answer):
    """Of a process during the measurement: seconds, and microseconds for each request."""

    cpu_s: float
    cpu_us_per_io: float


class LoadReport(Answer):
    """What of a report is used here: requests, and how long they took. `backend` is None when the
    program was not told which process that is.
    """

    version: int
    ios: int
    iops: float
    seconds: float
    latency_us: Latency
    backend: ProcessorTime | None


@dataclass(frozen=True)
class Load:
    """Requests of 4 KiB at random offsets, `depth` of them on each queue.

    `cold`: reads of an image that the page cache has forgotten. It must be the first load of a
    backend: the kernel does not forget pages that a process has mapped.
    """

    name: str
    depth: int
    read_percent: int = READ_PERCENT
    cold: bool = False


def loads(*, cached_on_disk: bool, read_only: bool = False) -> list[Load]:
    """The preset load: a quiet guest, a busy one, and a busy one that misses the cache."""
    percent = 100 if read_only else READ_PERCENT
    found = [Load("4k-d1", 1, percent), Load("4k-d32", 32, percent)]
    return [Load("4k-d32-cold", 32, 100, cold=True), *found] if cached_on_disk else found


async def measure(
    program: str,
    load: Load,
    *,
    socket: Path,
    pid: int,
    queues: int,
    threads: int,
    seconds: float,
    seed: int,
) -> Figures:
    """Runs the load for `seconds`, after a part of that as warm-up.

    Raises CommandFailed when a request failed, or the backend died.
    """
    argv = [
        program,
        f"--socket={socket}",
        "--mode=randread" if load.read_percent == 100 else "--mode=mixed",
        f"--read-percent={load.read_percent}",
        f"--depth={load.depth}",
        f"--queues={queues}",
        f"--threads={threads}",
        f"--seconds={seconds:.3f}",
        f"--warmup={0 if load.cold else seconds * _WARMUP_SHARE:.3f}",
        f"--seed={seed}",
        f"--pid={pid}",
        f"--patience={_PATIENCE_S}",
    ]
    answer = await process.run(argv, timeout_s=seconds * 2 + 3 * _PATIENCE_S)
    try:
        report = read_answer(LoadReport, json.loads(answer.stdout), PROGRAM, "a measurement")
    except ValueError as error:
        raise CommandFailed(program, 0, ["a report that is no JSON"]) from error
    if report.version != REPORT_VERSION:
        raise CommandFailed(program, 0, [f"a report of version {report.version}"])
    if report.backend is None:
        raise CommandFailed(program, 0, ["a report without the processor time of the backend"])
    return figures(report, report.backend)


def figures(report: LoadReport, backend: ProcessorTime) -> Figures:
    """What a report of semper-load says.

    A stall of the whole measurement counts as one request that took so long: bad luck once, and
    hopeless if that happens again and again.
    """
    stalled = not report.ios
    return Figures(
        iops=1 / report.seconds if stalled else report.iops,
        p99_us=report.seconds * 1e6 if stalled else max(report.latency_us.p99, 0.01),
        cpu_us=backend.cpu_s * 1e6 if stalled else backend.cpu_us_per_io,
    )
