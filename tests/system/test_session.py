"""A real QEMU that connects again late or never, and backends that die under it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sempervirt.demo.trial import running
from sempervirt.disk.backend import Blkd
from sempervirt.qemu import command_line
from tests.torture.cells import Cell

pytestmark = [pytest.mark.guest, pytest.mark.timeout(180)]

HEAVY = Cell("mmap", (0, 1), "heavy", "tmpfs")
NEVER, LATE_MS = 0, 5000


@pytest.mark.parametrize("reconnect_ms", [NEVER, LATE_MS])
async def test_a_qemu_that_does_not_connect_again_notices_no_death(
    reconnect_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "RECONNECT_MS", reconnect_ms)
    async with running(HEAVY.setup(seed=11)) as trial:
        for _ in range(4):
            await trial.kill_backend()
        await trial.upgrade()
        await trial.stop_load()
        verdict = trial.verdict
    assert verdict.clean, verdict.as_dict()
    assert verdict.kept == len(verdict.stalls) == 5
    assert verdict.stall.max < LATE_MS / 5


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
