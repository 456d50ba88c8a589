"""Kills, crash points, life's other events, and the controls, in their short form.

`make torture` does the same at length. Every trial boots a guest under emulation, so each takes
five to twenty seconds.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tests.torture import campaigns
from tests.torture.campaigns import PLANS, Plan
from tests.torture.cells import Cell, cells
from tests.torture.peers import StorageDaemon, without_region

from sempervirt.demo.trial import Load
from sempervirt.demo.verdict import Verdict
from sempervirt.disk.backend import BackendCommand

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).resolve().parents[2]
# 16 combinations of engine, queues, load and storage: 64 kills in all.
KILLS_PER_CELL = 4
# Each engine comes to every kind of point; the long form takes every point with both.
PLAN_ENGINES = [(plan, ("sync", "uring")[index % 2]) for index, plan in enumerate(PLANS)]


def assert_clean(verdict: Verdict) -> None:
    assert verdict.clean, verdict.as_dict()


@pytest.fixture(scope="session")
def crash_build() -> Path:
    """semper-blkd that can be told to die."""
    target = ROOT / "target/crash-points"
    subprocess.run(
        [
            *("cargo", "build", "--release", "--quiet", "--package", "semper-blkd"),
            *("--features", "crash-points", "--target-dir", str(target)),
        ],
        cwd=ROOT,
        check=True,
        timeout=600,
    )
    return target / "release/semper-blkd"


@pytest.mark.parametrize("cell", cells(), ids=str)
async def test_kills_at_random_instants_lose_nothing(cell: Cell) -> None:
    verdict = await campaigns.kills(cell.setup(seed=1), KILLS_PER_CELL, 1, lambda: None)
    assert verdict.kills == KILLS_PER_CELL
    assert_clean(verdict)


@pytest.mark.parametrize(
    "cell",
    [Cell("sync", 1, "heavy", "tmpfs"), Cell("uring", 4, "heavy", "ext4-direct")],
    ids=str,
)
async def test_pauses_upgrades_resets_and_reboots_lose_nothing(cell: Cell) -> None:
    verdict = await campaigns.events(
        cell.setup(seed=2), pauses=5, reboots=1, resets=2, upgrades=5, done=lambda: None
    )
    assert (verdict.pauses, verdict.reboots, verdict.resets, verdict.upgrades) == (5, 1, 2, 5)
    assert_clean(verdict)


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("plan", "engine"), PLAN_ENGINES, ids=[f"{plan.name} {engine}" for plan, engine in PLAN_ENGINES]
)
async def test_a_death_at_each_point_loses_nothing(
    plan: Plan, engine: str, crash_build: Path, tmp_path: Path
) -> None:
    storage = "tmpfs" if engine == "sync" else "ext4-direct"
    setup = Cell(engine, 2, "heavy", storage).setup(seed=3)
    verdict = await campaigns.crash_point(setup, crash_build, plan, tmp_path / "deaths")
    assert_clean(verdict)


@pytest.mark.parametrize(
    "command",
    [StorageDaemon(), without_region()],
    ids=["qemu-storage-daemon", "semper-blkd without the region"],
)
async def test_the_harness_sees_what_backends_without_tracking_lose(
    command: BackendCommand,
) -> None:
    # Many flushes: they take longest, so that requests end in another order than they came.
    load = Load(writers=16, depth=2, flush_every=3, hang_s=5)
    setup = Cell("uring", 1, "heavy", "ext4-direct").setup(seed=4)
    verdict = await campaigns.control(replace(setup, load=load, command=command), 60, 4)
    assert verdict.lost, verdict.as_dict()
