"""A host dies and its VM is moved: the trial of `sempervirt.demo.guard`, with the crasher."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tests.guard.machine import KERNELS, ROOT, available, module_file
from tests.guard.trial import Result

DEATHS = ("direct-panic", "null", "hard-irq", "soft-lockup", "hard-lockup")
# A boot of the host, its agent, and what each death takes, on a machine with other work.
BOOT_S = 150.0
DEATH_S = 60.0


def run(series: str, *options: str, bound_s: float) -> dict[str, Any]:
    """What `sempervirt.demo.guard.run` says: "outcomes", and "failure" of the trial itself."""
    assert series in available(), "no kernels; run scripts/guard-kernels"
    command = [
        sys.executable, "-m", "sempervirt.demo.guard.run",
        "--tree", str(KERNELS / series), "--disk", str(KERNELS / "host.raw"),
        "--module", str(module_file(series, "kernel/semper_guard", "semper_guard")),
        "--crasher", str(module_file(series, "tests/guard/crasher", "semper_crash")),
        "--etcd", str(ROOT / ".cache/etcd/etcd"), *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=bound_s, check=False)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        raise AssertionError(f"{done.returncode}: {done.stdout}{done.stderr}") from None
    assert isinstance(said, dict)
    return said


def moved(series: str, times: int) -> Iterator[Result]:
    """Each death so many times, all of one kind in one boot; then the median of its times."""
    for death in DEATHS:
        bound_s = BOOT_S + DEATH_S * times
        try:
            said = run(series, "--death", death, "--times", str(times), bound_s=bound_s)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            yield Result(f"{death}, VM moved", str(error), bound_s)
            continue
        outcomes = said["outcomes"]
        wrong = said["failure"] or "; ".join(one["wrong"] for one in outcomes if one["wrong"])
        if not wrong and len(outcomes) != times:
            wrong = f"{len(outcomes)} of {times} were tried"
        seconds = [one["event_to_running_s"] for one in outcomes if not one["wrong"]]
        middle = statistics.median(seconds) if seconds else 0.0
        name = f"{death}, VM moved {len(seconds)}x, at most {max(seconds, default=0.0):.1f} s"
        yield Result(name, wrong, middle)
