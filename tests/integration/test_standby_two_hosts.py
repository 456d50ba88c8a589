"""A standby on another host: it goes on when that host is gone, by a proof of the storage.

Everything is real but the file server, which revokes locks (`tests.revoking_server`).
"""

from __future__ import annotations

import os
import shutil

import pytest

from lab.world import QEMU
from sempervirt.evacuation.messages import EvacuateRequest
from sempervirt.evacuation.values import Fate as Outcome
from sempervirt.guard.signs import SignId
from sempervirt.standby.state import First
from tests.standby.two_hosts import VM, Fate, Trial, until

pytestmark = [
    pytest.mark.guest,
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="only root can make two hosts"
    ),
]


async def test_a_standby_goes_on_when_its_host_is_gone_and_not_before() -> None:
    async with Trial.opened() as trial:
        a, b = trial.world.hosts
        view = await trial.begin()
        assert view.host == "b"
        assert {*view.fences} == {"root", "data"}
        assert all(how.startswith("lock-revoked") for how in view.fences.values()), view.fences
        # What waits waits for the next agent of b as well.
        b.kill_agent()
        await b.start_agent()
        view = await trial.wait_ready(b)
        assert [one.number for one in view.generations] == [1]
        # Without its agent its lease ends: a suspicion. Its backends have the locks, so it waits.
        a.kill_agent()
        trouble = await trial.wait_refused(b)
        assert "may still write" in trouble, trouble
        seen = len(trial.rows.acknowledged)
        await trial.rows.wait(seen + 5)
        assert (await trial.world.ownership(VM)).owner == "a"
        # Then the host dies, and the server takes its locks away.
        trial.strike(Fate.KILLED)
        view = await trial.wait_taken_over(b)
        assert view.last_take_over is not None
        assert view.first is First.RUNNING
        found = await trial.rows_on(b, view.last_take_over.number)
        assert found == trial.rows.acknowledged, "an acknowledged row is lost"
        owned = await trial.world.ownership(VM)
        assert (owned.owner, owned.why.startswith("taken over: ")) == ("b", True)
        # What the VM before had on its system disk is kept where it is, and named.
        async with b.client() as client:
            (loss,) = await client.losses(VM)
        assert [disk.image.name for disk in loss.disks] == ["root.raw"]
        assert not await trial.goes_on_as_any_vm(b, view.last_take_over.number)
        assert "owned by b" in await trial.come_back(Fate.KILLED)
        assert "lacks what was written since" in await trial.ended_there()


async def test_a_host_that_dies_leaves_a_vm_that_it_cannot_move_to_its_standby() -> None:
    """By its own word: it has killed the VM, and seen it end."""
    async with Trial.opened() as trial:
        a, b = trial.world.hosts
        await trial.begin()
        async with b.client() as client:  # no VM moves there any more
            await client.evacuate_host(EvacuateRequest(why="its fan is loud"))
        async with a.client() as client:
            await client.simulate_sign(SignId.MODULE_PANIC, act=True)
            view = await trial.wait_taken_over(b)
            await until(
                lambda: "evacuate is over" in a.log_tail(1000), 180.0, "the evacuation ends"
            )
            (vm,) = (await client.evacuation()).vms
        assert (vm.fate, vm.host) == (Outcome.STANDBY, "b"), vm
        assert view.last_take_over is not None
        assert view.last_take_over.cause.startswith("host a asked for it")
        found = await trial.rows_on(b, view.last_take_over.number)
        assert found == trial.rows.acknowledged, "an acknowledged row is lost"
        assert (await trial.world.ownership(VM)).owner == "b"
        assert not a.processes(QEMU)
