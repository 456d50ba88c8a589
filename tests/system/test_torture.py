"""Kills, crash points, life's other events, and the controls, in their short form.

`make torture` does the same at length. Every trial boots a guest under emulation, so each takes
five to twenty seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sempervirt.demo.trial import TrialSetup
from sempervirt.demo.verdict import Verdict
from sempervirt.qemu.spec import Engine
from tests.faults import trial_backend
from tests.torture import campaigns
from tests.torture.campaigns import PLANS, Life, Plan, chained
from tests.torture.cells import (
    ENGINES,
    EVENT_CELLS,
    POINT_CELLS,
    REBOUND,
    STORAGES,
    Cell,
    few_cells,
)
from tests.torture.peers import controls

# Every engine on each of its storages, with every layout of queues and threads and every load.
KILLS_PER_CELL = 4
# Each engine comes to every kind of point; the long form takes every point with each, one by one.
POINTS = [
    (plan, cell)
    for index, cell in enumerate(POINT_CELLS)
    for plan in chained(PLANS[index :: len(POINT_CELLS)])
]
SHORT_LIFE = Life(pauses=5, reboots=1, resets=2, upgrades=5)


def assert_clean(verdict: Verdict) -> None:
    assert verdict.clean, verdict.as_dict()


@pytest.fixture(scope="session")
def crash_build() -> Path:
    """semper-blkd that can be told to die."""
    return trial_backend()


@pytest.mark.parametrize("cell", few_cells(), ids=str)
async def test_kills_at_random_instants_lose_nothing(cell: Cell) -> None:
    verdict = await campaigns.kills(cell.setup(seed=1), KILLS_PER_CELL, 1, lambda: None)
    assert verdict.kills == KILLS_PER_CELL
    assert_clean(verdict)


@pytest.mark.parametrize("engine", ENGINES)
async def test_kills_while_queues_change_threads_lose_nothing(engine: Engine) -> None:
    setup = Cell(engine, REBOUND, "heavy", STORAGES[engine][-1]).setup(seed=5)
    verdict = await campaigns.kills_while_rebinding(setup, KILLS_PER_CELL, 5, lambda: None)
    assert verdict.kills == KILLS_PER_CELL
    assert verdict.rebindings > KILLS_PER_CELL
    assert_clean(verdict)


@pytest.mark.parametrize("cell", EVENT_CELLS, ids=str)
async def test_pauses_upgrades_resets_and_reboots_lose_nothing(cell: Cell) -> None:
    verdict = await campaigns.events(cell.setup(seed=2), SHORT_LIFE, 2, lambda: None)
    seen = Life(verdict.pauses, verdict.reboots, verdict.resets, verdict.upgrades)
    assert seen == SHORT_LIFE
    assert (verdict.rebindings > 0) == (len(cell.threads) > 1)
    assert_clean(verdict)


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("plan", "cell"), POINTS, ids=[f"{plan.name} {cell.engine}" for plan, cell in POINTS]
)
async def test_a_death_at_each_point_loses_nothing(
    plan: Plan, cell: Cell, crash_build: Path, tmp_path: Path
) -> None:
    setup = cell.setup(seed=3)
    verdict = await campaigns.crash_point(setup, crash_build, plan, tmp_path / "deaths")
    assert_clean(verdict)


# It ends when a loss is seen: after some kills, and after many where the guest gets so little of
# the processors that it seldom has several requests under way.
@pytest.mark.parametrize(
    ("setup", "rebind"),
    [(setup, rebind) for _, setup, rebind in controls(4)],
    ids=[name for name, _, _ in controls(4)],
)
async def test_the_harness_sees_what_backends_without_tracking_lose(
    setup: TrialSetup, rebind: bool
) -> None:
    verdict = await campaigns.control(setup, 200, 4, rebind=rebind)
    assert verdict.lost, verdict.as_dict()
