"""A VM on its way to another host, as the agent and its API see it: driver, ports and watches."""

from __future__ import annotations

import contextlib
import logging
import time
from contextlib import AsyncExitStack
from typing import assert_never

from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster
from sempervirt.core import tallies
from sempervirt.core.errors import SempervirtError, StateConflict
from sempervirt.migration.by_images import ImageTransfer
from sempervirt.migration.messages import MigrationView, MovePolicy, WireView
from sempervirt.migration.peer import DestinationPeer
from sempervirt.migration.source import convergence, decide, watch
from sempervirt.migration.source.adapters import (
    Destination,
    SourceDevices,
    SourceDisks,
    SourceGuest,
    SourceRecord,
    Transfer,
)
from sempervirt.migration.source.convergence import ConvergencePolicy
from sempervirt.migration.source.driver import SourceDriver
from sempervirt.migration.source.figures import Figures
from sempervirt.migration.source.ports import Ports
from sempervirt.migration.source.state import Bounds, Migration, Resolved, Step
from sempervirt.migration.source.steering import Steering
from sempervirt.migration.wire_status import WireStatus
from sempervirt.qemu.state import Request, Runstate
from sempervirt.store.registry import Claim, Registry
from sempervirt.vm.phases import Phase
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Departing

log = logging.getLogger(__name__)

DEADLINE_GRACE_S = 30.0
# The least that QEMU is given for the guest's blackout, whatever the rest of it takes.
LEAST_BLACKOUT_S = 0.02


class SourceMigration:
    """Made by `begin`, or by `resume` after a restart of the agent."""

    def __init__(self, vm: Vm, cluster: Cluster, work: Departing, policy: MovePolicy) -> None:
        self.vm = vm
        self.work = work
        self.figures = Figures(time.time(), memory=vm.spec.memory)
        self._cluster = cluster
        self._policy = policy
        self._claim = _claim_of(vm)
        self._transfer: Transfer | ImageTransfer = (
            ImageTransfer(vm, self._claim, work.destination)
            if work.by_images
            else Transfer(Registry(cluster.store), self._claim, work.destination)
        )
        self._disks = SourceDisks(vm)
        self._guest = SourceGuest(vm, cluster, work, self.figures)
        self._stack = AsyncExitStack()
        self._driver: SourceDriver | None = None

    @classmethod
    async def begin(
        cls, vm: Vm, cluster: Cluster, work: Departing, policy: MovePolicy, stack: AsyncExitStack
    ) -> SourceMigration:
        """Holds the VM, tells the store, and goes to work; `stack` holds what is needed for it.

        Raises StateConflict, Unavailable, OutcomeUnknown: nothing was begun then, or what was told
        to the store is taken back by the next try.
        """
        migration = cls(vm, cluster, work, policy)
        async with AsyncExitStack() as undo:
            await vm.machine.hold(Request.DEPART)
            undo.callback(vm.machine.release, "running" if work.running else "paused")
            vm.begin(work)
            undo.callback(vm.end_work)
            connection = await migration._connect(stack)
            migration._limit(await migration._transfer.begin())
            undo.pop_all()
        migration._stack = stack.pop_all()
        # At the deadline `convergence` decides; the machine's own only catches what hangs.
        bounds = Bounds(policy.deadline_s + DEADLINE_GRACE_S, policy.blackout_max_s)
        begun = decide.begin(bounds, time.monotonic(), devices=bool(vm.devices))
        migration._go(connection, begun)
        return migration

    @classmethod
    async def resume(
        cls, vm: Vm, cluster: Cluster, work: Departing, stack: AsyncExitStack
    ) -> SourceMigration:
        """Goes on from the record of an agent that has ended meanwhile."""
        migration = cls(vm, cluster, work, MovePolicy())
        connection = await migration._connect(stack)
        migration._stack = stack.pop_all()
        if work.phase is not Phase.POSTCOPY:
            await migration._guest.wire.sweep()
        now, devices = time.monotonic(), bool(vm.devices)
        migration._go(connection, decide.recover(work.phase, work.mode, now, devices=devices))
        return migration

    async def _connect(self, stack: AsyncExitStack) -> DestinationPeer:
        connected = peer.connect(self._cluster, self.work.destination, self.work.address)
        return DestinationPeer(await stack.enter_async_context(connected), self.work.id)

    def _go(self, destination: DestinationPeer, begun: Step) -> None:
        vm, host = self.vm, self._cluster.settings.host
        devices = SourceDevices(vm, destination)
        claim, policy, figures = self._claim, self._policy, self.figures
        ports = Ports(
            Destination(destination, vm, host, self.work, claim, policy, figures, devices),
            self._transfer,
            self._guest,
            self._disks,
            devices,
            SourceRecord(vm, self.work),
        )
        state, effects = begun
        driver = self._driver = SourceDriver(vm.name, state, ports, followed=self._followed)
        vm.moving = self
        stream = watch.StreamWatch(driver, vm, self._guest, self.figures)
        vm.machine.listen(stream.heard)
        driver.start(effects)
        driver.keep(self._close_when_over(), "end")
        driver.keep(watch.watch_qemu(driver, vm), "end of QEMU")
        driver.keep(watch.watch_disks(driver, self._disks), "disks")
        driver.keep(
            watch.watch_destination(driver, destination, self.work.destination), "destination"
        )
        driver.keep(stream.run(), "stream")
        if vm.devices:
            driver.keep(watch.follow_devices(driver, devices), "devices")

    async def _close_when_over(self) -> None:
        await self.driver.changes.wait_until(
            lambda: self.driver.over, timeout_s=None, what="the end of the migration"
        )
        self.figures.ended = time.time()
        self._count()
        self.vm.machine.listen(None)
        await self.driver.detach()
        await self._stack.aclose()

    def _count(self) -> None:
        outcome = {Phase.DONE: "moved", Phase.LOST: "lost"}.get(self.phase, "stayed")
        tallies.MIGRATIONS.add(outcome)
        if self.figures.blackout_ms is not None:
            tallies.MIGRATION_BLACKOUTS.record(self.figures.blackout_ms / 1e3)
        if (wire := self._guest.wire.status) is not None:
            tallies.MIGRATION_BYTES.add("stream", wire.stream_bytes)
            tallies.MIGRATION_BYTES.add("wire", wire.wire_bytes_sent)
            content = wire.pages - wire.zero_pages - wire.references
            tallies.MIGRATION_PAGES.add("content", max(0, content))
            tallies.MIGRATION_PAGES.add("zero", wire.zero_pages)
            tallies.MIGRATION_PAGES.add("reference", wire.references)

    async def detach(self) -> None:
        """Leaves everything as it is, for another agent to go on with.

        But while the VM can still stay it does: QEMU would stop the guest, and wait for somebody.
        """
        if self.over:
            return
        if self.driver.state.may_cancel:
            with contextlib.suppress(SempervirtError):
                await self.cancel()
        await self.driver.detach()
        self.vm.machine.listen(None)
        self._guest.wire.forget()
        await self._stack.aclose()

    # What can be asked of it

    @property
    def driver(self) -> SourceDriver:
        """The driver, from `begin` or `resume` on."""
        assert self._driver is not None
        return self._driver

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self.driver.over

    @property
    def phase(self) -> Phase:
        """How far the VM is."""
        return self.driver.state.phase

    async def cancel(self) -> None:
        """See `SourceDriver.cancel`."""
        await self.driver.cancel()

    def resolve(self, resolved: Resolved) -> None:
        """See `SourceDriver.resolve`."""
        self.driver.resolve(resolved)

    async def wait_over(self, timeout_s: float) -> None:
        """See `SourceDriver.wait_over`."""
        await self.driver.wait_over(timeout_s)

    def shown(self) -> tuple[Runstate, str] | None:
        """What the VM is because of the migration, if that is not what QEMU alone would tell."""
        state = self.driver.state
        if self.over or self.vm.run.is_end:
            return None
        match state.phase:
            case Phase.UNKNOWN:
                why = f"whether {self.work.destination} owns it is not known: {state.why}"
                return Runstate.UNKNOWN, why
            case Phase.SWITCHOVER | Phase.COMMIT:
                return Runstate.PAUSED, f"moves to {self.work.destination}"
            case Phase.POSTCOPY:
                return Runstate.PAUSED, f"runs on {self.work.destination}, which fetches its memory"
            case Phase.PREPARE | Phase.PRECOPY | Phase.DONE | Phase.ABANDONED | Phase.LOST:
                return None
            case _:
                assert_never(state.phase)

    def view(self) -> MigrationView:
        """All that is known. Sizes in bytes."""
        state, figures, told = self.driver.state, self.figures, self.figures.told
        track = self._guest.steering.track
        sample = self._guest.steering.reckoned(told.sample) if told and told.sample else None
        expected_s = convergence.expected_blackout_s(sample) if sample else float("inf")
        return MigrationView(
            id=self.work.id,
            vm=self.vm.name,
            source=self._cluster.settings.host,
            destination=self.work.destination,
            phase=state.phase,
            over=self.over,
            mode=state.mode,
            why=state.why,
            may_cancel=state.may_cancel,
            started=figures.started,
            elapsed_s=figures.elapsed_s,
            memory=figures.memory,
            remaining=sample.remaining_bytes if sample else figures.memory,
            passes=sample.passes if sample else 0,
            dirtied=sample.dirtied if sample else 0.0,
            expected_blackout_ms=None if expected_s == float("inf") else expected_s * 1e3,
            limit_ms=track.limit_s * 1e3,
            throttle=track.throttle,
            blackout_ms=figures.blackout_ms,
            timeline_ms=figures.timeline_ms,
            wire=_wire_view(self._guest.wire.status),
        )

    def _followed(self, before: Migration, after: Migration) -> None:
        self.figures.follow(before, after)
        if after.phase is before.phase:
            return
        why = f" ({after.why})" if after.why else ""
        text = f"to {self.work.destination}: {before.phase.value} -> {after.phase.value}{why}"
        self.vm.machine.journal.note(time.time(), "migration", text)
        level = logging.WARNING if after.phase in (Phase.UNKNOWN, Phase.LOST) else logging.INFO
        log.log(level, "migrate vm=%s %s", self.vm.name, text)

    def _limit(self, store_s: float) -> None:
        """Of the guest's blackout the store and the word to the destination take their part."""
        own_s = 2 * store_s
        policy = self._policy
        self._guest.postcopy = policy.postcopy
        self._guest.steering = Steering(
            ConvergencePolicy(
                blackout_s=max(LEAST_BLACKOUT_S, policy.blackout_s - own_s),
                blackout_max_s=max(LEAST_BLACKOUT_S, policy.blackout_max_s - own_s),
                deadline_s=policy.deadline_s,
                throttle_max=policy.throttle_max,
                postcopy=policy.postcopy,
            )
        )


def _claim_of(vm: Vm) -> Claim:
    if vm.record.claim is None:
        raise StateConflict(f"VM {vm.name} is not claimed by this host")
    return vm.record.claim


def _wire_view(status: WireStatus | None) -> WireView | None:
    if status is None:
        return None
    return WireView(
        stream_bytes=status.stream_bytes,
        wire_bytes=status.wire_bytes_sent,
        pages=status.pages,
        zero_pages=status.zero_pages,
        references=status.references,
        mismatches=status.mismatches,
    )
