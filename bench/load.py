"""One measurement: the program semper-load against a running backend."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import Case

PATIENCE_S = 10.0


class LoadError(Exception):
    """semper-load failed; the message is what it said."""


@dataclass(frozen=True)
class Figures:
    """What one measurement showed. In µs; CPU and switches are the backend's, for each I/O.
    `flush_us` is the median of flushes.
    """

    iops: float
    mb_per_s: float
    mean_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float
    cpu_us: float
    switches: float
    own_cpu_us: float
    kicks: float
    sleeps: float
    ios: int
    inflight: bool
    flush_us: float = 0.0


def arguments(case: Case, socket: Path, seconds: float, warmup: float, seed: int) -> list[str]:
    """The command line of semper-load for a case, without the program."""
    return [
        f"--socket={socket}",
        f"--mode={case.mode}",
        f"--block-size={case.block_size}",
        f"--depth={case.depth}",
        f"--queues={case.queues}",
        f"--seconds={seconds}",
        f"--warmup={warmup}",
        f"--seed={seed}",
        f"--patience={PATIENCE_S}",
        *(["--poll"] if case.polling else []),
        *([f"--rate={case.rate}"] if case.rate else []),
    ]


def measure(command: list[str], timeout_s: float) -> Figures:
    """Run semper-load with its arguments.

    Raises LoadError if it failed, or said nothing in time.
    """
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"semper-load did not end within {timeout_s:.0f} s") from error
    if result.returncode != 0:
        said = result.stderr.decode(errors="replace").strip()
        raise LoadError(said or f"semper-load ended with status {result.returncode}")
    return figures(json.loads(result.stdout))


def figures(report: dict[str, Any]) -> Figures:
    """Read semper-load's report (version 1)."""
    if report["version"] != 1:
        raise LoadError(f"semper-load's report has version {report['version']}, not 1")
    latency, backend = report["latency_us"], report["backend"] or {}
    return Figures(
        iops=report["iops"],
        mb_per_s=report["mb_per_s"],
        mean_us=latency["mean"],
        p50_us=latency["p50"],
        p90_us=latency["p90"],
        p99_us=latency["p99"],
        p999_us=latency["p99_9"],
        max_us=latency["max"],
        cpu_us=backend.get("cpu_us_per_io", 0.0),
        switches=backend.get("switches_per_io", 0.0),
        own_cpu_us=report["own"]["cpu_us_per_io"],
        kicks=report["kicks_per_io"],
        sleeps=report["sleeps_per_io"],
        ios=report["ios"],
        inflight=report["inflight"],
        flush_us=report["flush_latency_us"]["p50"],
    )
