"""What is decided about a move: postcopy, a deadline, giving it up, a host that is gone."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from lab.guest import VM, Guest
from lab.network import FAR, UNLIMITED, Link
from lab.world import DEADLINE_S, POLL_S, Host, World
from sempervirt.api.schemas import MigrateRequest
from sempervirt.core.errors import ImageLocked, NotAllowed, StateConflict
from sempervirt.host.http import Connection
from sempervirt.migration.messages import MigrationView, MovePolicy
from sempervirt.migration.peer import DestinationPeer
from sempervirt.qemu.state import Runstate
from sempervirt.vm.phases import Arrival, Mode, Phase
from tests.migration import faults
from tests.migration.judge import faults_of
from tests.migration.phases import Phases

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.slow]
LOST = 10
# Too short for all of the memory to be there: then something has to be decided.
SOON_POSTCOPY = MovePolicy(deadline_s=1.0, throttle_max=0, postcopy=True)


@asynccontextmanager
async def at_home(link: Link) -> AsyncIterator[Guest]:
    """A guest on host a that writes and verifies."""
    async with World.opened(link) as world, Guest.booted(world, world.a) as guest:
        yield guest


async def begin(guest: Guest, policy: MovePolicy) -> None:
    """Asks for a move from a to b."""
    async with guest.world.a.client() as client:
        await client.migrate(VM, MigrateRequest(to="b", policy=policy))


async def until(host: Host, *phases: Phase, over: bool = True) -> MigrationView:
    """Waits until a migration is in one of these phases, and over."""
    async with host.client() as client, asyncio.timeout(DEADLINE_S):
        while True:
            view = await client.migration(VM)
            if view.phase in phases and view.over >= over:
                return view
            assert not view.over, view
            await asyncio.sleep(POLL_S)  # poll interval


async def goes_on(guest: Guest, host: Host) -> None:
    """The guest is on that host, the same boot, and its requests are answered."""
    assert await guest.wait_beat(host) is host
    probe = await guest.probe_on(host)
    assert probe.nonce == guest.nonce
    before = (await probe.stats()).completions
    await probe.wait_stats(lambda stats: stats.completions > before + 100)


async def unharmed(guest: Guest, host: Host) -> None:
    """`goes_on`, and all that it wrote is there."""
    await goes_on(guest, host)
    assert faults_of(await guest.judged(host)) == []


async def test_a_guest_that_cannot_be_moved_in_time_stays_and_one_that_is_called_back_too() -> None:
    """Without leave for postcopy there is none; a move is given up until the store was asked."""
    async with at_home(FAR) as guest, guest.outside() as outside:
        a, b = guest.world.hosts
        complaint = await a.semper(
            "vm", "migrate", VM, "--to", "b", "--deadline", "1", "--throttle", "0", code=6
        )
        assert re.search(r"stays on a: it did not converge in 1 s: .* MB/s", complaint)
        async with a.client() as client, b.client() as other:
            view = await client.migration(VM)
            assert (view.phase, view.mode) == (Phase.ABANDONED, Mode.PRECOPY)
            assert await other.vms() == []
        await goes_on(guest, a)
        await begin(guest, MovePolicy())
        await until(a, Phase.PRECOPY, over=False)
        async with a.client() as client:
            view = await client.cancel_migration(VM)
        assert (view.phase, view.why, view.over) == (Phase.ABANDONED, "cancelled", True)
        # It is too late for another one, and early enough for another move.
        await a.semper("vm", "migrate", VM, "--cancel", code=5)
        await a.semper("vm", "migrate", VM, "--to", "b")
        assert outside.alive
        await unharmed(guest, b)


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
async def test_postcopy_brings_the_rest_of_the_memory_later(broken: bool) -> None:
    """Also when the way between the hosts breaks: the stream is taken up again."""
    async with at_home(FAR) as guest:
        world = guest.world
        phases = Phases(world.a)
        await begin(guest, SOON_POSTCOPY)
        await phases.wait("postcopy", DEADLINE_S)
        phases.close()
        if broken:  # as soon as it runs there; before that QEMU cannot take a stream up again
            await guest.wait_beat(world.b)
            for pid in world.a.processes("semper-wired"):
                os.kill(pid, signal.SIGKILL)
        view = await until(world.a, Phase.DONE)
        assert view.mode is Mode.POSTCOPY
        # It ran there long before the rest had come.
        assert view.blackout_ms is not None
        assert view.blackout_ms / 1e3 < view.elapsed_s / 2
        await unharmed(guest, world.b)


@pytest.mark.parametrize("victim", ["a", "b"])
async def test_a_vm_that_postcopy_lost_is_said_to_be_lost_and_begins_again(victim: str) -> None:
    """Either QEMU dies while each has a part of the memory: neither host keeps the VM."""
    async with at_home(FAR) as guest:
        a, b = guest.world.hosts
        phases = Phases(a)
        options = ("--to", "b", "--deadline", "1", "--throttle", "0", "--postcopy")
        moving = asyncio.create_task(a.semper("vm", "migrate", VM, *options, code=LOST))
        await phases.wait("postcopy", DEADLINE_S)
        phases.close()
        for pid in (a if victim == "a" else b).processes("qemu-system-x86"):
            os.kill(pid, signal.SIGKILL)
        complaint = " ".join((await moving).split())
        assert f"VM {VM} is lost: part of its memory was on a and part on b" in complaint
        assert f"b owns them; there: semper vm kill {VM}, then semper vm run FILE" in complaint
        assert "the VM is lost" in " ".join((await a.semper("vm", "show", VM)).split())
        # The remedy that was named.
        await b.semper("vm", "kill", VM)
        async with b.client() as client:
            assert (await client.run_vm(guest.spec)).state is Runstate.RUNNING


async def test_a_host_that_is_gone_loses_its_vm_by_evidence_only() -> None:
    """Before that nobody gets it; afterwards the host that comes back does not keep it."""
    async with at_home(UNLIMITED) as guest:
        a, b = guest.world.hosts
        evidence = ("--evidence", "it is switched off, and stands beside me")
        refused = await b.semper("vm", "resolve", VM, "--owner", "b", *evidence, code=5)
        assert "whose agent is alive" in refused
        a.kill_agent()
        async with asyncio.timeout(DEADLINE_S):
            while "silent" not in await b.semper("host", "list"):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)  # poll interval
        async with b.client() as client:
            with pytest.raises(StateConflict, match="owned by a"):
                await client.run_vm(guest.spec)
        assert "b owns VM" in await b.semper("vm", "resolve", VM, "--owner", "b", *evidence)
        # Its guest still runs there: the evidence was wrong, and the image's lock knows it.
        async with b.client() as client:
            with pytest.raises(ImageLocked, match="in use by semper-blkd"):
                await client.run_vm(guest.spec)
        await a.start_agent()
        async with a.client() as client, asyncio.timeout(DEADLINE_S):
            while (await client.vm(VM)).end is None:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)  # poll interval


@pytest.mark.parametrize("ended_first", [True, False], ids=["ended-first", "ended-by-the-next"])
async def test_an_arrival_that_was_given_up_while_its_agent_was_away_leaves_nothing(
    ended_first: bool,
) -> None:
    """The VM has not crashed there: it never ran there. The next agent forgets it, whether its QEMU
    has ended by then or not, and the same move is possible again.
    """
    async with at_home(FAR) as guest:
        a, b = guest.world.hosts
        await begin(guest, MovePolicy())
        await until(a, Phase.PRECOPY, over=False)
        pids = faults.aim(faults.Sides(guest.world, a, b), "destination qemu")
        b.kill_agent()
        async with a.client() as client:
            assert (await client.cancel_migration(VM)).phase is Phase.ABANDONED
        if ended_first:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        await b.start_agent()
        async with b.client() as client, asyncio.timeout(DEADLINE_S):
            while views := await client.vms():
                assert [view.state for view in views] != [Runstate.CRASHED]
                await asyncio.sleep(POLL_S)  # poll interval
        await goes_on(guest, a)
        await a.semper("vm", "migrate", VM, "--to", "b")
        await unharmed(guest, b)
        # The control: one that ran there has crashed, also for an agent that was away.
        b.kill_agent()
        for pid in faults.aim(faults.Sides(guest.world, b, a), "source qemu"):
            os.kill(pid, signal.SIGKILL)
        await b.start_agent()
        async with b.client() as client:
            assert (await client.vm(VM)).state is Runstate.CRASHED


async def refused(peer: DestinationPeer) -> None:
    """By none of the doors."""
    for ask in (
        peer.look(Arrival.INCOMING, 0.0),
        peer.run(2, "0" * 32),
        peer.abort("because"),
        peer.promise(),
        peer.recover(),
    ):
        with pytest.raises(NotAllowed, match="is for: host"):
            await ask


async def test_an_agent_that_is_told_to_end_leaves_no_guest_in_between() -> None:
    """Nobody would let it go on when QEMU stops it for the switchover. And a VM comes from another
    host only: never from who has this host's own socket.
    """
    async with at_home(FAR) as guest:
        a, _ = guest.world.hosts
        async with Connection.to_socket(a.config.socket, "") as connection:
            await refused(DestinationPeer(connection, "0" * 32))
        await begin(guest, MovePolicy())
        await until(a, Phase.PRECOPY, over=False)
        await a.end_agent()
        await unharmed(guest, a)
        await a.start_agent()
        async with a.client() as client:
            assert (await client.vm(VM)).state is Runstate.RUNNING
        await a.semper("vm", "migrate", VM, "--to", "b")
