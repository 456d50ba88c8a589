"""What this host does for another one that keeps standbys of its VMs (`standby.messages`).

Only for the host that the store names as the keeper of the VM's standbys: that was written there by
the host of the VM, when its operator asked for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

from sempervirt.cluster.cluster import Cluster
from sempervirt.core.errors import NotAllowed, SempervirtError, StateConflict, Unavailable, reason
from sempervirt.host.changes import Changes
from sempervirt.host.places import Places
from sempervirt.qemu.state import Runstate
from sempervirt.standby.adapters import require_possible
from sempervirt.standby.disks import DisksHere, TakeSnapshot, give_up
from sempervirt.standby.initialised import flush
from sempervirt.standby.local_fence import LocalFence
from sempervirt.standby.means import Impossible, NotYet, Proven
from sempervirt.standby.messages import FirstTold, GiveUpFirst
from sempervirt.standby.ports import Snapshot
from sempervirt.standby.rules import rules_of
from sempervirt.standby.service import ask_tcp
from sempervirt.standby.watching import answer_of, dead_guest, seen_of
from sempervirt.store.registry import Registry
from sempervirt.vm.house import House
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Departing

log = logging.getLogger(__name__)

# The keeper of standbys has no more patience for an answer (`messages.LOOK_ANSWER_S`).
STORE_S = 2.0
# It asks once a second, and says each time whether one could take over.
READY_S = 30.0
BEGUN_S = 5.0
NEXT_S = 3.0


class Offer:
    """Of the VMs of `house`."""

    def __init__(self, house: House, snapshot: TakeSnapshot) -> None:
        self._house = house
        self._snapshot = snapshot
        # What was taken for a keeper, by VM and disk: also what one that died has never heard of.
        self._taken: dict[tuple[str, str], set[int]] = {}
        # By VM: who could take it over, and when that was said.
        self._ready: dict[str, tuple[str, float]] = {}
        self._falling: dict[str, str] = {}
        # By VM: since when its monitor is silent, as its keeper was told.
        self._silent: dict[str, float] = {}
        self._began = time.monotonic()
        self._said = Changes()

    def keeper(self, name: str) -> str | None:
        """The host that has said lately that it could take that VM over; None: no host has."""
        keeper, said = self._ready.get(name, ("", 0.0))
        return keeper if keeper and time.monotonic() - said <= READY_S else None

    async def find_keeper(self, name: str) -> str | None:
        """As `keeper`. An agent that has just begun gives other hosts the time to say so, and one
        that keeps standbys gets the time for its next question.
        """
        now = time.monotonic()
        left_s = self._began + BEGUN_S - now
        if name in self._ready and now - self._ready[name][1] <= READY_S:
            left_s = max(left_s, NEXT_S)
        with contextlib.suppress(Unavailable):
            await self._said.wait_until(
                lambda: self.keeper(name) is not None, timeout_s=max(0.0, left_s), what="a keeper"
            )
        return self.keeper(name)

    def let_fall(self, name: str) -> str:
        """This host is about to die, and `keeper` is asked to take the VM over: from now on that
        host is answered without the store as well. Raises StateConflict when none could.
        """
        keeper = self.keeper(name)
        if keeper is None:
            raise StateConflict(f"no other host has a standby of VM {name} that could take over")
        self._falling[name] = keeper
        return keeper

    async def look(self, name: str, keeper: str, *, ready: bool = False) -> FirstTold:
        """What that host is told; `ready`: it has a standby that could take over now. Raises
        NotFound, NotAllowed, Unavailable.
        """
        try:
            vm = await self._kept(name, keeper)
        except Unavailable:
            # The store is away here. Who asks is who was said to keep them.
            if ready and self._ready.get(name, ("", 0.0))[0] == keeper:
                self._ready[name] = (keeper, time.monotonic())
            raise
        self._ready[name] = (keeper if ready else "", time.monotonic())
        self._said.notify()
        self._note_silence(vm)
        claim = vm.record.claim
        epoch = claim.epoch if claim is not None else 0
        return FirstTold(
            life=f"{vm.record.started:.3f}/{epoch}/{vm.state.qemu}/{vm.state.resets}",
            seen=seen_of(vm),
            spec=vm.pinned_spec,
            accelerator=vm.record.accelerator.kind,
            served=frozenset(vm.disks),
        )

    async def snapshot(self, name: str, keeper: str, disks: tuple[str, ...]) -> Snapshot:
        """Raises as `snapshot_disks`, NotFound, NotAllowed."""
        vm = await self._kept(name, keeper)
        require_possible(vm)
        names = [disk.name for disk in vm.spec.disks if disk.name in disks]
        return await DisksHere(vm, self._snapshot, partial(self._note, name)).take(names)

    def _note(self, name: str, numbers: Mapping[str, int]) -> None:
        for disk, number in numbers.items():
            self._taken.setdefault((name, disk), set()).add(number)

    async def give_up(self, name: str, keeper: str, asked: GiveUpFirst) -> str:
        """Why the snapshot stays. Raises NotFound, NotAllowed."""
        vm = await self._kept(name, keeper)
        disk = vm.disks.get(asked.disk)
        if disk is None:
            raise Unavailable(f"VM {name} has no disk {asked.disk} of which there are snapshots")
        with contextlib.suppress(SempervirtError):  # a reader that came to its end is there no more
            await disk.active().unpin(asked.snapshot, asked.reader)
        taken = self._taken.get((name, asked.disk), set())
        note = await give_up(disk, asked.snapshot, {*asked.ours, *taken})
        if not note:
            taken -= {number for number in taken if number <= asked.snapshot}
        return note

    async def end(
        self, name: str, keeper: str, places: Callable[[Vm], Places], *, kill: bool
    ) -> str:
        """Has the VM end, which a standby on `keeper` follows: what was seen. `places` are where
        the processes of a VM have their files. Raises StateConflict for one that is not to be
        ended, or that another host has by now; NotAllowed for one that is not to be ended yet;
        Unavailable while it may still write.
        """
        vm = await self._kept(name, keeper)
        if isinstance(vm.work, Departing):
            # Its end here says nothing of the host that it goes to, perhaps by its images alone.
            raise StateConflict(f"VM {name} moves to {vm.work.destination}")
        if not kill and not vm.run.is_end and not dead_guest(vm):
            await self._require_silent(vm)
        flushed = await flush(vm) if kill else ""
        fence = LocalFence(vm, places(vm))
        try:
            proof = await fence.prove()
        finally:
            fence.let_go()
        match proof:
            case Proven(_, evidence):
                vm.machine.journal.note(time.time(), "standby", f"ended for a standby on {keeper}")
                log.warning("standby vm=%s ended for %s: %s", name, keeper, evidence)
                return "; ".join(part for part in (evidence, flushed) if part)
            case NotYet(why) | Impossible(why):
                raise Unavailable(f"VM {name} may still write: {why}")

    def _note_silence(self, vm: Vm) -> None:
        if vm.run is Runstate.UNKNOWN:
            self._silent.setdefault(vm.name, time.monotonic())
        else:
            self._silent.pop(vm.name, None)

    async def _require_silent(self, vm: Vm) -> None:
        """A VM whose QEMU is there is ended for a silence that its own file takes for a reason, and
        that this host notices as well. Raises StateConflict for one that lives; NotAllowed while
        nobody can tell that: its monitor is silent, or was not asked yet.
        """
        rules, told = rules_of(vm.spec.standby), vm.spec.standby
        self._note_silence(vm)
        if rules.service_silent_s is not None and told is not None and told.service is not None:
            silent = await answer_of(partial(ask_tcp, told.service))
            if silent:
                log.warning("standby vm=%s its service is silent: %s", vm.name, silent)
                return
            raise StateConflict(f"the service of VM {vm.name} answers its host")
        since = self._silent.get(vm.name)
        if since is None:
            raise StateConflict(f"VM {vm.name} is {vm.run.value} on its host")
        silent_s = time.monotonic() - since
        if rules.monitor_silent_s is None or silent_s < rules.monitor_silent_s:
            raise NotAllowed(
                f"whether VM {vm.name} lives is not known yet: {vm.state.why}; its monitor is "
                f"silent to its host for {silent_s:.0f} s"
            )

    async def _kept(self, name: str, keeper: str) -> Vm:
        try:
            vm = self._house.vm(name)
        except StateConflict as error:  # it is there, and unknown
            raise Unavailable(error.message, remedy=error.remedy) from error
        try:
            async with asyncio.timeout(STORE_S), Cluster.opened(self._house.config) as cluster:
                named = (await Registry(cluster.store).find(name)).standby
        except (Unavailable, TimeoutError) as error:
            if self._falling.get(name) != keeper:
                raise Unavailable(
                    f"the store does not say who keeps standbys of VM {name}: {reason(error)}"
                ) from error
            named = keeper
        if self._falling.get(name, named) != named:  # it keeps them no more
            del self._falling[name]
        if named != keeper:
            raise NotAllowed(f"the store does not say that {keeper} keeps standbys of VM {name}")
        return vm
