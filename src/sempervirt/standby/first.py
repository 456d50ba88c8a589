"""The VM that standbys are for, as `ports.FirstVm`: watched, judged, and fenced by proof.

Watch ── judgement ──► seen()      running; dead: its rules let a standby take over; or away
LocalFence ── proof ──► fence()    it writes no more, and the locks of its images are ours
                        let_go()   the claim of the standby is on record, or nothing came of it
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import assert_never

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.host.places import Places
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import FOR_STANDBY, Runstate
from sempervirt.standby import network
from sempervirt.standby.adapters import require_possible
from sempervirt.standby.disks import DisksHere, Noted, TakeSnapshot, copied
from sempervirt.standby.evidence import LOOK_S, Sign
from sempervirt.standby.initialised import flush
from sempervirt.standby.local_fence import LocalFence
from sempervirt.standby.means import Impossible, NotYet, Proven
from sempervirt.standby.ports import Snapshot
from sempervirt.standby.rules import GoAhead, Provable, Rules, rules_of
from sempervirt.standby.service import ask_tcp
from sempervirt.standby.state import First
from sempervirt.standby.watching import Watch
from sempervirt.store.records import Ownership
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)


class WatchedFirst:
    """The VM that `current` gives. `snapshot` takes snapshots of its disks; `places` are where its
    processes have their files; its monitor has `monitor_s` for an answer. `noted` is told of
    snapshots that are taken for standbys.
    """

    def __init__(
        self,
        name: str,
        current: Callable[[], Vm | None],
        snapshot: TakeSnapshot,
        places: Callable[[Vm], Places],
        monitor_s: float,
        noted: Noted | None = None,
    ) -> None:
        self._noted = noted
        self._name = name
        self._current = current
        self._snapshot = snapshot
        self._places = places
        self._fence: LocalFence | None = None
        # On this host a proof can always be had.
        self.watch = Watch(
            name, current, self._rules, Provable.YES, self._ask_service, monitor_s=monitor_s
        )

    @property
    def vm(self) -> Vm | None:
        """The VM that is known by that name now."""
        return self._current()

    @property
    def spec(self) -> VmSpec | None:
        """What it has; None when nobody knows it any more."""
        vm = self._current()
        return None if vm is None else vm.spec

    @property
    def fenced(self) -> tuple[Ownership | None, str]:
        """The VM is of this host itself, whoever owned it before."""
        return None, ""

    @property
    def left(self) -> VmSpec | None:
        """It is of this host."""
        return None

    def disks(self) -> DisksHere:
        """Raises Unavailable."""
        return DisksHere(self._require(), self._snapshot)

    async def run(self) -> None:
        """Watches it, until it is cancelled."""
        await self.watch.run()

    def _rules(self) -> Rules:
        vm = self._current()
        return rules_of(vm.spec.standby if vm is not None else None)

    async def _ask_service(self) -> str | None:
        vm = self._current()
        told = vm.spec.standby if vm is not None else None
        if told is None or told.service is None:
            return None
        return await ask_tcp(told.service)

    def seen(self) -> tuple[First, str]:
        """What it is, and why a standby may take over."""
        vm = self._current()
        if vm is None:
            return First.AWAY, "it is not on the list"
        permission = self.watch.look().permission
        if isinstance(permission, GoAhead):
            return First.DEAD, permission.why
        if vm.run is Runstate.RUNNING:
            return First.RUNNING, ""
        return First.AWAY, vm.state.why

    async def changed(self, seen: tuple[First, str]) -> None:
        """Returns when it is, or may be, something else than `seen`."""
        vm = self._current()
        if vm is None:
            await asyncio.sleep(LOOK_S)
            return
        with contextlib.suppress(Unavailable):
            await vm.machine.changes.wait_until(
                lambda: self.seen() != seen, timeout_s=LOOK_S, what="a change"
            )

    async def take(self) -> Snapshot:
        """Takes a snapshot of the disks of which a standby has copies."""
        vm = self._require()
        require_possible(vm)
        network.bridges_of(vm.spec, 0)
        if names := [disk.name for disk in copied(vm.spec)]:
            return await DisksHere(vm, self._snapshot, self._noted).take(names)
        return Snapshot(time.time(), (), "")

    async def fence(self, *, kill: bool, word: str = "") -> None:
        """Returns when it was proved that it writes no more; it is ended for that if `kill` says
        so, or its rules still do. Raises StateConflict for one that is not to be taken over any
        more, also because somebody has ended it or nobody knows it any more; Unavailable while
        there is no proof. On this host nobody's `word` is needed.
        """
        if word:
            log.info("standby vm=%s its processes are looked for all the same", self._name)
        vm = self._current()
        if vm is None:
            raise StateConflict(
                f"VM {self._name} is not on the list, so nobody can tell that it has ended",
                remedy=f"see: semper vm show {self._name}",
            )
        if vm.run is Runstate.STOPPED and vm.state.why != FOR_STANDBY and not kill:
            raise StateConflict(f"VM {self._name} was ended on purpose: {vm.state.why}")
        if not vm.run.is_end and not kill:
            permission = self.watch.look().permission
            if not isinstance(permission, GoAhead) and self._unasked(vm):
                raise Unavailable(f"VM {self._name} was adopted, and its monitor not asked yet")
            if not isinstance(permission, GoAhead):
                raise StateConflict(f"VM {self._name} is {vm.run.value} again: {permission.why}")
        if kill:
            log.info("standby vm=%s is ended: %s", self._name, await flush(vm) or "it does not run")
        self.let_go()
        self._fence = LocalFence(vm, self._places(vm))
        proof = await self._fence.prove()
        match proof:
            case Proven(means, evidence):
                log.info("standby vm=%s fenced means=%s: %s", self._name, means.value, evidence)
            case NotYet(why) | Impossible(why):
                raise Unavailable(f"VM {self._name} may still write: {why}")
            case _:
                assert_never(proof)

    async def prove_anew(self, *, kill: bool, word: str = "") -> None:
        """Here the claim is this host's in any case, and what has its images is what is left of
        the standby itself.
        """

    def let_go(self) -> None:
        """The locks of the fence are free for the standby."""
        if self._fence is not None:
            self._fence.let_go()
            self._fence = None

    def _unasked(self, vm: Vm) -> bool:
        """Whether this agent knows nothing of the VM yet: what another one has seen may stand."""
        return vm.run is Runstate.UNKNOWN and self.watch.evidence.last_heard(Sign.MONITOR) is None

    def _require(self) -> Vm:
        vm = self._current()
        if vm is None:
            raise Unavailable(f"VM {self._name} is not on the list")
        return vm
