"""Where nobody can know who owns a VM, it is called unknown, it runs nowhere, and it is settled."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import BinaryIO

import pytest

from lab.client import INTERVAL_S
from lab.guest import VM, Guest
from lab.journal import Journal
from lab.network import UNLIMITED, Link
from lab.world import DEADLINE_S, POLL_S, Host, World
from sempervirt.store.records import Custody
from tests.migration.judge import QUIET, Judge
from tests.migration.kills import begin_move
from tests.migration.phases import Phases

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.slow]
UNKNOWN = "unknown"
# What the source asks of etcd when it hands over: a transaction that writes. Others only read.
COMMIT = b'"request_put"'
UNAVAILABLE = 6
# Much longer than any blackout: a guest that is not heard for so long stands still.
STILL_S = 3.0
# Far enough that the destination's last word to QEMU is on its way for a while.
DISTANT = Link("100 ms", delay_ms=100.0)
PROMISE_S = 0.0005


@asynccontextmanager
async def moving(link: Link = UNLIMITED) -> AsyncIterator[tuple[Judge, Phases]]:
    """A guest that is at home on host a; hosts that reach etcd through a relay."""
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(World.opened(link, relayed=True))
        guest = await stack.enter_async_context(Guest.booted(world, world.a))
        journal = stack.enter_context(Journal.kept(guest.image, world.namespaces))
        client = await stack.enter_async_context(guest.outside())
        phases = Phases(world.a)
        stack.callback(phases.close)
        await begin_move(world.a, world.b)
        yield Judge(guest, journal, client), phases


async def wait_said(judge: Judge, host: Host, *states: str) -> None:
    """Until a host says one of these of the VM."""
    async with asyncio.timeout(DEADLINE_S):
        while await judge.said(host) not in states:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)  # poll interval


async def wait_owned(judge: Judge, host: Host) -> None:
    """Until the store says that a host owns the VM, and that nothing moves."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            owned = await judge.guest.world.ownership(VM)
            if (owned.custody, owned.owner) == (Custody.OWNED, host.name):
                return
            await asyncio.sleep(POLL_S)  # poll interval


async def stands_still(guest: Guest) -> bool:
    """Whether nobody hears the guest any more. What it has said before may be heard late."""
    begun = since = time.monotonic()
    while time.monotonic() < since + STILL_S:
        if any(guest.beats_on(host, since) for host in guest.world.hosts):
            if since > begun + STILL_S:
                return False
            since = time.monotonic()
        await asyncio.sleep(INTERVAL_S)  # poll interval
    return True


@pytest.mark.parametrize("how", ["deafen", "freeze"])
async def test_a_lost_answer_is_unknown_until_the_store_is_back(how: str) -> None:
    """The hand-over arrives and its answer does not; or it is on its way, and arrives late."""
    async with moving() as (judge, phases):
        guest, world = judge.guest, judge.guest.world
        await phases.wait("precopy", DEADLINE_S)
        world.relay.when(COMMIT, getattr(world.relay, how))
        await wait_said(judge, world.a, UNKNOWN)
        assert await judge.said(world.b) != "running"
        assert await stands_still(guest)
        world.relay.heal()
        home = await guest.wait_beat(*world.hosts)
        await wait_said(judge, home, "running")
        await wait_said(judge, world.other(home), *QUIET)
        await wait_owned(judge, home)
        assert home is world.b or how == "freeze"
        assert await judge.survived(world.a, world.b, home) == []


@pytest.mark.parametrize("owner", ["a", "b"])
async def test_an_operator_with_evidence_settles_it(owner: str) -> None:
    """The hand-over never arrived, and never will; the store stays away until it is settled.

    For the source this is settled there and then. The destination could not run without the
    store anyway: so this is refused, and both settle it when the store is back.
    """
    async with moving() as (judge, phases):
        guest, world = judge.guest, judge.guest.world
        await phases.wait("precopy", DEADLINE_S)
        world.relay.when(COMMIT, world.relay.freeze)
        await wait_said(judge, world.a, UNKNOWN)
        world.relay.drop()
        evidence = ("--evidence", "nothing is on its way to etcd: its host was looked at")
        resolve = ("vm", "resolve", VM, "--owner", owner, *evidence)
        if owner == "a":
            await world.a.semper(*resolve)
            assert await guest.wait_beat(*world.hosts) is world.a
        else:
            assert "only the store can give" in await world.a.semper(*resolve, code=UNAVAILABLE)
            assert await stands_still(guest)
        world.relay.heal()
        assert await guest.wait_beat(*world.hosts) is world.a
        await wait_said(judge, world.a, "running")
        await wait_said(judge, world.b, *QUIET)
        await wait_owned(judge, world.a)
        assert await judge.survived(world.a, world.b, world.a) == []


async def test_a_guest_that_qemu_itself_lets_go_on_is_not_given_away() -> None:
    """The wire dies when the destination has everything, and QEMU has not heard of it: then its
    migration has failed, and it lets the guest run on by itself.
    """
    async with moving(DISTANT) as (judge, phases):
        guest, world = judge.guest, judge.guest.world
        with world.b.log.open("rb") as log:
            log.seek(0, os.SEEK_END)
            await phases.wait("precopy", DEADLINE_S)
            (wire,) = await wait_wire(world.a)
            # The store is slow, so that the guest has time to do harm.
            world.relay.when(COMMIT, world.relay.freeze)
            await wait_promise(log)
        os.kill(wire, signal.SIGKILL)
        await phases.wait("commit", STILL_S)
        world.relay.heal()
        home = await guest.wait_beat(*world.hosts)
        await wait_said(judge, home, "running")
        await wait_said(judge, world.other(home), *QUIET)
        assert await judge.survived(world.a, world.b, home) == []


async def wait_wire(host: Host) -> list[int]:
    """The wire's end on a host, when it is there."""
    async with asyncio.timeout(DEADLINE_S):
        while not (found := host.processes("semper-wired")):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)  # poll interval
    return found


async def wait_promise(log: BinaryIO) -> None:
    """Until the destination's log says that it has everything."""
    seen = b""
    async with asyncio.timeout(DEADLINE_S):
        while b"-> promised" not in seen:
            seen += log.read()
            await asyncio.sleep(PROMISE_S)  # poll interval
