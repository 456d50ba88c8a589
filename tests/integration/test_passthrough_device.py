"""A device with its mediator, under a guest's stock driver: moved, given back, captured, and what
is seen when a part of a move is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from lab.guest import NVME
from lab.plain_qemu import wait_migration
from sempervirt.core.errors import ImageLocked, Unavailable
from sempervirt.guest import ProbeClient, ProbeSilent
from sempervirt.guest.reports import Stats
from sempervirt.migration import stream
from sempervirt.passthrough.answers import MediatorState
from sempervirt.passthrough.device import Device
from sempervirt.passthrough.ports import PortSpace
from tests.migration.judge import faults_of
from tests.passthrough.captures import turns
from tests.passthrough.deaths import kill_all
from tests.passthrough.pair import Side, begin, end, loaded, move, new_image, side

pytestmark = [pytest.mark.guest, pytest.mark.slow]
# `make passthrough-captures` does it 1,000 times.
TURNS = 50
STALLED_S = 5.0
DEADLINE_S = 90.0


@pytest.fixture
async def pair(place: Path) -> AsyncIterator[tuple[Side, Side]]:
    image = new_image(place)
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(side(place / "a", image, incoming=False))
        there = await stack.enter_async_context(side(place / "b", image, incoming=True))
        yield here, there


async def goes_on(side: Side) -> Stats:
    """The writers' figures, once more requests were answered. Raises Unavailable when none are."""
    path = side.host.path("probe")
    async with await ProbeClient.connect(path, deadline_s=STALLED_S) as probe:
        await probe.wait_hello(deadline_s=STALLED_S)
        before = (await probe.stats(device=NVME)).completions
        return await probe.wait_stats(
            lambda stats: stats.completions > before + 200, device=NVME, deadline_s=STALLED_S
        )


async def problems_of(side: Side) -> list[str]:
    """What the guest finds wrong with its device, which may have stopped to answer."""
    try:
        problems = faults_of(await goes_on(side))
        async with side.host.probe() as (probe, _):
            return problems + faults_of(await probe.write_stop(device=NVME))
    except (Unavailable, ProbeSilent) as error:
        return [str(error)]


async def test_a_guest_goes_on_with_its_device_on_the_other_side(pair: tuple[Side, Side]) -> None:
    here, there = pair
    async with loaded(here) as probe:
        nonce = probe.nonce
        await move(here, there)
        before = (await here.device.client.status()).counters.requests_done
    async with there.host.probe() as (probe, now):
        assert now == nonce
        await probe.wait_stats(lambda stats: stats.completions > before + 200, device=NVME)
        stats = await probe.write_stop(device=NVME)
        assert faults_of(stats) == []
        assert stats.writes > 0
    status = await there.device.client.status()
    assert status.state is MediatorState.RUNNING
    assert status.counters.requests_done > 0


async def test_a_move_that_is_given_up_leaves_the_device_where_it_was(
    pair: tuple[Side, Side],
) -> None:
    here, there = pair
    async with loaded(here) as probe:
        await begin(here, there)
        await wait_migration(here.monitor, "pre-switchover")
        await here.leaving.move()
        assert (await here.device.client.status()).state is MediatorState.QUIESCED
        await here.leaving.take_back()
        await here.leaving.take_back()  # an agent that began anew does it again
        await stream.cancel(here.execute, DEADLINE_S)
        await here.execute("cont")
        before = (await probe.stats(device=NVME)).completions
        await probe.wait_stats(lambda stats: stats.completions > before + 200, device=NVME)
        assert faults_of(await probe.write_stop(device=NVME)) == []
    assert (await here.device.client.status()).state is MediatorState.RUNNING


async def test_capturing_on_and_off_under_load() -> None:
    """Every doorbell of the guest is seen while it is on, and none when it is off."""
    assert await turns(TURNS) == []


async def test_pages_that_are_not_shipped_are_missed(pair: tuple[Side, Side]) -> None:
    """The negative control of the captured DMA: the guest finds old data, or breaks."""
    here, there = pair
    async with loaded(here):
        await begin(here, there, unseen=True)
        await wait_migration(here.monitor, "pre-switchover")
        await there.arriving.receive(await here.leaving.move())
        await end(here, there)
    assert await problems_of(there)


async def test_register_writes_that_are_not_replayed_are_missed(pair: tuple[Side, Side]) -> None:
    """The negative control of the registers: the device stalls."""
    here, there = pair
    async with loaded(here):
        await begin(here, there)
        await wait_migration(here.monitor, "pre-switchover")
        moved = (await here.leaving.move())["nvme"]
        await there.ask("import", state=moved.state, registers="replayed")
        await end(here, there)
    assert await problems_of(there)


async def test_a_mediator_that_ends_is_told_and_the_guest_goes_on(pair: tuple[Side, Side]) -> None:
    here, _ = pair
    pid = here.device.pid
    assert pid is not None
    async with here.host.probe():
        kill_all(here.device)
        async with asyncio.timeout(DEADLINE_S):
            while not here.device.ailment:  # noqa: ASYNC110 - a process's end, not ours
                await asyncio.sleep(0.01)  # poll interval
        assert "killed by SIGKILL" in here.device.ailment
        with pytest.raises(Unavailable, match="is gone"):
            await here.device.client.status()
        await here.leaving.take_back()  # nothing is left to be taken back
        async with PortSpace(here.execute).standing_still():
            pass


async def test_another_mediator_of_the_same_image_is_refused(place: Path) -> None:
    image = new_image(place)
    async with side(place / "a", image, incoming=False) as here:
        files = here.device.setup.files
        adopted = await Device.adopt(here.device.setup)
        assert adopted.pid == here.device.pid
        adopted.detach()
        with pytest.raises(ImageLocked):
            async with side(place / "b", image, incoming=False):
                pass
        assert files.control.exists()
