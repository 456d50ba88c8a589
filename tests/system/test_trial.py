"""Trials themselves: what they do when the emulator falls over."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import pytest

from sempervirt.demo.trial import VM, Trial
from sempervirt.guest.errors import ProbeGone
from tests.torture.cells import Cell

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120)]

LIGHT = Cell("sync", (0,), "light", "tmpfs")
STARTED_S = 30.0


async def end_first_boot(trial: Trial, number: signal.Signals) -> int:
    """Ends QEMU by a signal while its guest boots; its pid."""
    async with asyncio.timeout(STARTED_S):
        while True:
            with suppress(AssertionError):
                assert trial.probe is not None  # raises while there is no connection
                pid = trial.agent.vms[VM].pid
                assert pid is not None
                os.kill(pid, number)
                return pid
            await asyncio.sleep(0.01)  # poll interval


async def test_a_guest_whose_emulator_fell_over_is_booted_again() -> None:
    trial = Trial(LIGHT.setup(seed=6))
    first = asyncio.create_task(end_first_boot(trial, signal.SIGABRT))
    async with trial:
        assert trial.agent.vms[VM].pid != await first
        await trial.start_load()
        await trial.stop_load()
    assert trial.verdict.clean, trial.verdict.as_dict()


async def test_any_other_end_during_the_boot_is_an_error() -> None:
    trial = Trial(LIGHT.setup(seed=7))
    first = asyncio.create_task(end_first_boot(trial, signal.SIGKILL))
    with pytest.raises(ProbeGone):
        await trial.__aenter__()
    await first
