"""Trials themselves: what they do when the emulator falls over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sempervirt.demo import report
from sempervirt.demo.peer import kill_until_lost, with_peer
from sempervirt.demo.trial import VM, Load, Trial, TrialSetup
from sempervirt.guest.errors import ProbeGone
from tests.hanging_medium import HangingMedium, hanging_medium
from tests.torture.cells import Cell

pytestmark = pytest.mark.guest

LIGHT = Cell("sync", (0,), "light", "tmpfs")
STARTED_S = 120.0


@pytest.fixture
def medium(tmp_path: Path) -> Iterator[HangingMedium]:
    """Where one request can be held back while others are answered."""
    with hanging_medium(tmp_path, 32 << 20) as made:
        yield made


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


async def test_the_demo_counts_what_is_done_again_and_shows_what_its_peer_loses(
    medium: HangingMedium,
) -> None:
    """Our own backend, with the same load, kills and judge, is the control.

    Each kill falls while one request has not been answered that more than a queue full of later
    ones have overtaken. Whoever goes on where the used index stands never comes back to it.
    """

    async def kill(trial: Trial) -> None:
        medium.hold_a_read()
        await asyncio.to_thread(medium.wait_overtaken)
        await trial.kill_active()
        # The dead process keeps its descriptors, hence its lock, until its last call returned.
        medium.let_go()

    def say(_said: str) -> None: ...

    load = Load(writers=32, depth=4, flush_every=3)
    setup = TrialSetup(image=medium.image, size_mib=32, engine="uring", direct=True, load=load)
    ours = await kill_until_lost(setup, 3, 1, say, kill=kill)
    assert ours.clean, ours.as_dict()
    assert ours.kills == ours.kills_in_flight == 3
    assert ours.replayed >= ours.kills_in_flight
    theirs = await kill_until_lost(with_peer(setup), 1, 1, say, kill=kill, aftermath_s=0.5)
    assert theirs.lost, theirs.as_dict()
    console = Console(width=120, file=StringIO())
    console.print(report.counts(ours, theirs), *report.losses(theirs))
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert "(then it was over)" in shown
    assert "with qemu-storage-daemon the guest says:" in shown
