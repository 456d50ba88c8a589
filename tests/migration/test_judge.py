"""The judge sees a second writer: backends that pass lock and epoch by must not go unnoticed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lab.guest import Guest
from lab.journal import Journal
from lab.namespaces import within
from lab.network import UNLIMITED
from lab.world import DEADLINE_S, POLL_S, World, program
from tests.migration.judge import Judge

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.slow]
MIB = 1 << 20


@asynccontextmanager
async def under_judgement() -> AsyncIterator[Judge]:
    """A guest at home on host a, whose writers have been seen to write."""
    async with World.opened(UNLIMITED) as world, Guest.booted(world, world.a) as guest:
        with Journal.kept(guest.image, world.namespaces) as journal:
            async with guest.outside() as client:
                judge = Judge(guest, journal, client)
                async with asyncio.timeout(DEADLINE_S):
                    # A thread keeps the journal, with no event to wait for.
                    while judge.journal.order(judge.since) != ["a"]:  # noqa: ASYNC110
                        await asyncio.sleep(POLL_S)  # poll interval
                yield judge


async def test_a_second_writer_is_found_by_the_image_and_by_the_journal() -> None:
    """A program on the other host that asks neither for the lock nor for the epoch."""
    async with under_judgement() as judge:
        world = judge.guest.world
        write = ("write", "--device", str(judge.guest.image), "--seconds", "1", "--writers", "1")
        process = await asyncio.create_subprocess_exec(
            *within(world.b.namespace, program("semper-probe"), *write, "--span-bytes", str(MIB)),
            stdout=asyncio.subprocess.DEVNULL,
        )
        await process.wait()
        problems = await judge.survived(world.a, world.b, world.a)
    assert any(problem.startswith("two writers: the image") for problem in problems), problems
    assert any(problem.startswith("two writers: a b a") for problem in problems), problems


async def test_a_guest_that_is_left_alone_is_found_well_and_a_late_write_is_found() -> None:
    """What a backend that was given up writes at last: blocks as they were a moment ago."""
    async with under_judgement() as judge:
        world, image = judge.guest.world, judge.guest.image
        late = image.read_bytes()[:MIB]
        assert await judge.survived(world.a, world.b, world.a) == []
        assert judge.journal.order(judge.since) == ["a"]
        assert await judge.said(world.a) == "running"
        assert await judge.said(world.b) == "absent"
        await asyncio.to_thread(overwrite, image, late)
        problems = await judge.survived(world.a, world.b, world.a)
    assert any(problem.startswith("two writers: the image") for problem in problems), problems


def overwrite(image: Path, data: bytes) -> None:
    """Writes the beginning of an image."""
    descriptor = os.open(image, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, data, 0)
    finally:
        os.close(descriptor)
