"""A real QEMU that connects again never, or late, and backends that die under it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.demo.trial import Trial, running
from sempervirt.disk.backend import Blkd
from sempervirt.qemu import command_line
from tests.torture.cells import Cell

pytestmark = pytest.mark.guest

HEAVY = Cell("mmap", (0, 1), "heavy", "tmpfs")
NEVER, LATE_MS = 0, 5000


def no_core(trial: Trial) -> bool:
    limits = Path(f"/proc/{trial.disk.active_pid}/limits").read_text()
    return re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE) is not None


async def test_a_qemu_that_does_not_connect_again_notices_no_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command_line, "RECONNECT_MS", NEVER)
    async with running(HEAVY.setup(seed=11)) as trial:
        for _ in range(4):
            await trial.kill_backend()
        for _ in range(2):  # no core file is written, so they take no longer
            assert no_core(trial)
            await trial.kill_backend(trial.abort_active)
        await trial.upgrade()
        await trial.stop_load()
        verdict = trial.verdict
    assert verdict.clean, verdict.as_dict()
    assert verdict.kept == len(verdict.stalls) == 7
    # By far: a QEMU that had to connect again would never do so.
    assert verdict.stall.max < LATE_MS * 4
    assert verdict.stall.p50 < LATE_MS / 5


async def test_without_the_session_the_guest_waits_for_qemu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command_line, "RECONNECT_MS", LATE_MS)
    setup = replace(HEAVY.setup(seed=12), command=Blkd(keeps_connection=False))
    async with running(setup) as trial:
        stall = await trial.kill_backend()
        await trial.stop_load()
        verdict = trial.verdict
    assert verdict.clean, verdict.as_dict()
    assert verdict.kept == 0
    assert stall.ms is not None
    assert stall.ms > LATE_MS / 2
