"""The ports of an evacuation (`ports`) on a real host: the cluster's hosts, this host's VMs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster, Member
from sempervirt.cluster.service import Service
from sempervirt.core.errors import (
    AgentUnavailable,
    NotFound,
    SempervirtError,
    StateConflict,
    Unavailable,
    reason,
)
from sempervirt.evacuation.peacetime import Peacetime
from sempervirt.evacuation.placement import Need, Room
from sempervirt.evacuation.plan import Absent, Survey
from sempervirt.evacuation.state import (
    Checked,
    MoveOver,
    StandbyRuns,
    Surveyed,
    Way,
    Word,
)
from sempervirt.evacuation.values import EvacuationOrder
from sempervirt.host.http import READ_TIMEOUT_S, Connection, Unanswered
from sempervirt.migration.messages import MovePolicy
from sempervirt.migration.obstacles import HostSide, Obstacle, obstacles, obstacles_to_start
from sempervirt.migration.peer import DestinationPeer, host_side
from sempervirt.migration.sides import membership_obstacles, side_of
from sempervirt.migration.source.migration import SourceMigration
from sempervirt.qemu.accel import AcceleratorKind
from sempervirt.qemu.facts import HostFacts
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.standby.driver import StandbyDriver
from sempervirt.store.records import Custody
from sempervirt.store.registry import Registry
from sempervirt.vm.house import House
from sempervirt.vm.phases import Arrival, Phase
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Departing

log = logging.getLogger(__name__)

# Questions to one host at a time; each reads images there.
QUESTIONS = 8
# What a host that ends waits for the store, and for another host, before it goes by what was known.
STORE_S = 5.0
PRESSED_S = 3.0
# QEMU samples pages for so long to tell how fast the guest changes memory.
DIRTY_S = 1
# No guest changes more in a second.
DIRTY_MIB_MAX = 1 << 20
MIB = 1 << 20
PAGE_BYTES = 4096
PROC = Path("/proc")
# What a guest may suffer where the alternative is its end.
PRESSING = MovePolicy(blackout_s=2.0, blackout_max_s=30.0, throttle_max=99)

T = TypeVar("T")
Depart = Callable[[str, str, MovePolicy, Member | None], Awaitable[SourceMigration]]
HereAgainst = Callable[[Vm], Awaitable[list[Obstacle]]]
FindObstacles = Callable[[VmSpec, AcceleratorKind, HostSide, HostSide], list[Obstacle]]


class OwnService:
    """Whether this host takes VMs. `began`: when the evacuation was ordered, in seconds since the
    epoch.
    """

    def __init__(self, service: Service, order: EvacuationOrder, began: float) -> None:
        self._service = service
        self._order = order
        self._began = began

    async def mark(self, why: str) -> None:
        """See `Service.take_out`."""
        await self._service.take_out(why, without_records=self._order.without_records)

    async def unmark(self) -> None:
        """See `Service.put_in`. A host that was out of service before the order stays so."""
        absence = self._service.absence
        if absence is None or absence.since >= self._began:
            await self._service.put_in()
        else:
            log.info("service stays out: it was before the evacuation, %s", absence.why)


class ClusterFleet:
    """`against` finds what stands in the way of a VM on this host itself. `measured`: each guest's
    pace of changing memory is measured, which takes DIRTY_S. `peacetime`: what was known before, of
    a host that ends and waits for nobody; None: store and hosts have to answer. `broken`: VMs of
    which a thread never runs again. Their moves would hang; they are not begun where another host
    keeps a standby (`elsewhere`). `starting`: what stands in the way is that of VMs which would be
    started elsewhere, and not moved.
    """

    def __init__(
        self,
        house: House,
        against: HereAgainst,
        *,
        measured: bool,
        peacetime: Peacetime | None = None,
        broken: Collection[str] = (),
        elsewhere: Elsewhere | None = None,
        starting: bool = False,
    ) -> None:
        self._starting = starting
        self._house = house
        self._against = against
        self._measured = measured
        self._peacetime = peacetime
        self._broken = broken
        self._elsewhere: Elsewhere = elsewhere or NoneElsewhere()

    async def look(self, destinations: tuple[str, ...], only: str | None = None) -> Surveyed:
        """Asks all hosts that can be asked about each VM, or about that one. Raises Unavailable
        when the store does not answer, and nothing is known of peacetime.
        """
        house = self._house
        async with Cluster.opened(house.config) as cluster:
            members = await self._members(cluster)
            own = cluster.settings.host
            asked = destinations or tuple(name for name in members if name != own)
            absent = [found for name in asked if (found := _absent(name, members.get(name)))]
            away = {one.host for one in absent}
            here = [vm for vm in house.vms.values() if not vm.freed and not vm.run.is_end]
            vms = [vm for vm in here if only is None or vm.name == only]
            leaving = {vm.name: vm.work.destination for vm in vms if isinstance(vm.work, Departing)}
            leaving = {} if self._starting else leaving
            staying = [vm for vm in vms if vm.name not in leaving]
            facts = await house.host()
            own_sides = await _each(staying, lambda vm: self._look_here(vm, facts, own))
            answers = await asyncio.gather(
                *(
                    _ask(cluster, members[name], staying, self._peacetime)
                    for name in asked
                    if name not in away
                )
            )
        absent += [answer.absent for answer in answers if answer.absent is not None]
        heard = [answer for answer in answers if answer.absent is None]
        sides = zip(staying, own_sides, strict=True)
        against = obstacles_to_start if self._starting else obstacles
        needs = [_need(vm, own_side, heard, against) for vm, own_side in sides]
        needs += [
            Need(name, 0, stuck=f"it is unknown: {one.cause.message}")
            for name, one in house.unknown.items()
            if one.end is None
        ]
        # They were begun before the host was out of service.
        needs += [Need(name, 0, stuck="it is being started") for name in house.launching]
        rooms = tuple(answer.room for answer in heard)
        return Surveyed(
            Survey(rooms, tuple(needs), tuple(absent)), moving=tuple(sorted(leaving.items()))
        )

    async def _members(self, cluster: Cluster) -> Mapping[str, Member]:
        """By the store; while that is away, as they were in peace. Raises Unavailable."""
        try:
            async with asyncio.timeout(STORE_S if self._peacetime is not None else None):
                return {one.host.name: one for one in await cluster.members()}
        except (Unavailable, TimeoutError) as error:
            known = self._peacetime
            if known is None or not known.members:
                raise Unavailable(
                    f"the store does not say which hosts there are: {reason(error)}"
                ) from error
            log.warning(
                "evacuate without the store, by what was known %.0f s ago: %s",
                known.age_s,
                reason(error),
            )
            return known.members

    async def _look_here(self, vm: Vm, facts: HostFacts, own: str) -> _Here:
        if self._starting:
            try:
                return _Here(await side_of(facts, own, vm.spec, vm_state=vm.run, source=True))
            except (SempervirtError, OSError) as error:  # of this VM alone
                return _Here(stuck=_not_seen(error))
        if vm.run not in (Runstate.RUNNING, Runstate.PAUSED):
            return _Here(stuck=f"it is {vm.run.value}: {vm.state.why}".rstrip(": "))
        broken = vm.name in self._broken
        if broken and (keeper := await self._elsewhere.keeper(vm.name)) is not None:
            said = f"a thread of its QEMU never runs again; its standby on {keeper} takes over"
            return _Here(stuck=said)
        try:
            found = await self._against(vm)
            if found:
                return _Here(stuck="; ".join(obstacle.what for obstacle in found))
            dirtied = await _dirtied(vm) if self._measured else 0.0
            side = await side_of(facts, own, vm.spec, vm_state=vm.run, source=True)
        except (SempervirtError, OSError) as error:  # of this VM alone: the others leave
            return _Here(stuck=_not_seen(error))
        return _Here(side, dirtied, await asyncio.to_thread(_resident, vm.pid))


@dataclass(frozen=True)
class _Here:
    """What this host says of one of its VMs."""

    side: HostSide | None = None
    dirtied: float = 0.0
    resident_bytes: int | None = None
    stuck: str = ""


def _not_seen(error: Exception) -> str:
    return f"it cannot be looked at: {error}"


@dataclass(frozen=True)
class _Answer:
    """What another host says of all VMs; what it cannot say of one is in words."""

    room: Room
    sides: Mapping[str, HostSide | str]
    absent: Absent | None = None


def _absent(name: str, member: Member | None) -> Absent | None:
    if member is None:
        return Absent(name, "there is no host of that name")
    found = membership_obstacles(member)
    return Absent(name, "; ".join(one.what for one in found)) if found else None


async def _ask(
    cluster: Cluster, member: Member, vms: Sequence[Vm], peacetime: Peacetime | None = None
) -> _Answer:
    """What a host says. On a host that ends no question waits for longer than PRESSED_S, and what
    the other host has said in peace counts where it is silent now.
    """
    name, silent = member.host.name, list[str]()
    patience_s = READ_TIMEOUT_S if peacetime is None else PRESSED_S

    async def ask(vm: Vm) -> HostSide | str:
        # One question that is not answered takes long; a host that hangs is not asked all of them.
        said = silent[0] if silent else await _side(connection, vm, silent, patience_s)
        if peacetime is None:
            return said
        if isinstance(said, HostSide):
            peacetime.note(name, vm.name, said)
        return peacetime.side(name, vm.name) or said if silent else said

    async with peer.connect(cluster, name, member.host.address) as connection:
        sides = dict(zip((vm.name for vm in vms), await _each(vms, ask), strict=True))
    answered = [side for side in sides.values() if isinstance(side, HostSide)]
    if not answered:
        why = next((side for side in sides.values() if isinstance(side, str)), "")
        absent = Absent(name, f"it cannot be asked: {why}") if why else None
        return _Answer(Room(name, 0), sides, absent)
    memory = min(side.memory_available for side in answered)
    return _Answer(Room(name, memory, answered[0].processors), sides)


async def _side(
    connection: Connection, vm: Vm, silent: list[str], patience_s: float
) -> HostSide | str:
    """What a host says of a VM, or why it says nothing; `silent` gets that if it does not answer
    at all.
    """
    try:
        return await host_side(connection, vm.spec, patience_s)
    except (AgentUnavailable, Unanswered) as error:
        silent.append(error.message)
        return error.message
    except SempervirtError as error:
        return error.message


def _need(vm: Vm, here: _Here, answers: Iterable[_Answer], obstacles: FindObstacles) -> Need:
    against: dict[str, tuple[str, ...]] = {}
    for answer in answers:
        there = answer.sides[vm.name]
        if isinstance(there, str):
            against[answer.room.host] = (f"it cannot be asked: {there}",)
        elif here.side is not None:
            # Memory is the plan's: it is given to several VMs.
            there = replace(there, memory_available=max(there.memory_available, vm.spec.memory))
            found = obstacles(vm.spec, vm.record.accelerator.kind, here.side, there)
            against[answer.room.host] = tuple(obstacle.what for obstacle in found)
    return Need(
        vm.name,
        vm.spec.memory,
        vm.spec.ha.priority,
        here.resident_bytes,
        here.dirtied,
        vm.spec.vcpus,
        {host: found for host, found in against.items() if found},
        here.stuck,
    )


async def _dirtied(vm: Vm) -> float:
    """How many bytes per second the guest changes; 0.0 where QEMU does not say."""
    execute = vm.machine.execute
    try:
        await execute("calc-dirty-rate", {"calc-time": DIRTY_S})
        await asyncio.sleep(DIRTY_S)
        for _ in range(10):
            match await execute("query-dirty-rate"):
                # QEMU may be a hostile guest's by now: nothing but a number is taken for one.
                case {"status": "measured", "dirty-rate": int(rate)}:
                    return float(min(max(rate, 0), DIRTY_MIB_MAX)) * MIB
                case {"status": "measured"}:
                    return 0.0
                case _:  # it still measures
                    pass
            await asyncio.sleep(DIRTY_S / 10)  # poll interval
    except SempervirtError as error:
        log.debug("evacuate vm=%s its pace is not known: %s", vm.name, error)
    return 0.0


def _resident(pid: int | None) -> int | None:
    """The memory of a process that is there, in bytes. Not by `smaps`, which waits for a lock that
    a task of the process may hold for ever.
    """
    if pid is None:
        return None
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return None


async def _each(items: Iterable[Vm], ask: Callable[[Vm], Awaitable[T]]) -> list[T]:
    """What `ask` gives for each, QUESTIONS at a time."""
    places = asyncio.Semaphore(QUESTIONS)

    async def one(item: Vm) -> T:
        async with places:
            return await ask(item)

    return list(await asyncio.gather(*(one(item) for item in items)))


class ClusterMoves:
    """Moves by the migration; `depart` begins one. `peacetime` as of `ClusterFleet`."""

    def __init__(
        self,
        house: House,
        depart: Depart,
        order: EvacuationOrder,
        peacetime: Peacetime | None = None,
    ) -> None:
        self._house = house
        self._depart = depart
        self._order = order
        self._peacetime = peacetime

    async def move(self, vm: str, host: str, deadline_s: float, *, pressing: bool) -> MoveOver:
        """Moves a VM, and waits for the end. One that moves already, as an operator wants it, is
        followed.
        """
        policy = PRESSING if pressing else MovePolicy()
        present = self._house.vms.get(vm)
        moving = None if present is None else present.moving
        if isinstance(moving, SourceMigration) and not moving.over:
            return await _over(vm, moving)
        if present is not None and self._order.without_records:
            present.ledger.excuse()
        try:
            policy = policy.model_copy(update={"deadline_s": deadline_s})
            known = self._peacetime.members.get(host) if self._peacetime is not None else None
            migration = await self._depart(vm, host, policy, known)
        except SempervirtError:
            if (ended := _ended(vm, self._house.vms.get(vm))) is not None:
                return ended
            raise
        return await _over(vm, migration)

    async def follow(self, vm: str, host: str) -> MoveOver:
        """Of a move that an operator began, or an earlier agent."""
        present = self._house.vms.get(vm)
        if present is not None and isinstance(present.moving, SourceMigration):
            return await _over(vm, present.moving)
        if present is None or present.freed:
            return MoveOver(vm, Way.MOVED, f"to {host}, as far as this host knows")
        if isinstance(present.work, Departing):
            raise Unavailable("its move cannot go on; the agent's log tells why")
        return MoveOver(vm, Way.STAYED, "its move ended before this agent began")

    async def cancel(self, vm: str) -> None:
        """See `SourceMigration.cancel`."""
        present = self._house.vms.get(vm)
        if present is not None and isinstance(present.moving, SourceMigration):
            await present.moving.cancel()

    async def check(self, vm: str, host: str) -> Checked:
        """Asks the store and the destination."""
        async with Cluster.opened(self._house.config) as cluster:
            moving = None if (there := self._house.vms.get(vm)) is None else there.moving
            # Of a VM that went by its images the store knows nothing, or what was before.
            by_images = isinstance(moving, SourceMigration) and moving.work.by_images
            owner, arrival = await asyncio.gather(
                _nobody() if by_images else _owner(cluster, vm), self._arrival(cluster, vm, host)
            )
            return judge(vm, cluster.settings.host, host, owner, arrival)

    async def _arrival(self, cluster: Cluster, vm: str, host: str) -> Arrival | None:
        """What the destination says; None: nothing, or nothing that can be understood."""
        present = self._house.vms.get(vm)
        moving = present.moving if present is not None else None
        if not isinstance(moving, SourceMigration) or moving.work.destination != host:
            return None
        try:
            async with peer.connect(cluster, host, moving.work.address) as connection:
                return (
                    await DestinationPeer(connection, moving.work.id).look(Arrival.RUNNING, 0)
                ).phase
        except SempervirtError as error:
            log.info("evacuate vm=%s %s does not say where it is: %s", vm, host, error)
            return None


def judge(vm: str, here: str, host: str, owner: str | None, arrival: Arrival | None) -> Checked:
    """Where a VM is that is said to have moved from `here` to `host`. `owner` is what the store
    says, None when it is silent; `arrival` what the destination says.

    Raises Unavailable when neither says enough: ask again.
    """
    if owner is not None and (owner != host or not owner):
        if owner == here:
            return Checked(vm, Word.HERE, "the store says that it is still here")
        return Checked(vm, Word.ELSEWHERE, f"the store says that its owner is {owner or 'nobody'}")
    if arrival in (Arrival.ABORTED, Arrival.LOST):
        return Checked(vm, Word.ELSEWHERE, f"{host} says that its arrival is {arrival.value}")
    if arrival is Arrival.RUNNING:
        silent = "" if owner else f"{host} says that it runs there; the store did not answer"
        return Checked(vm, Word.THERE, silent)
    if arrival is not None:
        raise Unavailable(f"{host} has it, and does not let it run yet")
    if owner is None:
        raise Unavailable(f"neither the store nor {host} says where it is")
    return Checked(vm, Word.THERE, f"the store says so; {host} itself does not answer")


async def _nobody() -> str | None:
    """Nothing is known."""
    return None


async def _owner(cluster: Cluster, vm: str) -> str | None:
    """Who owns a VM, "" for nobody; None when the store does not say."""
    try:
        found = await Registry(cluster.store).find(vm)
    except NotFound:
        return ""
    except SempervirtError as error:
        log.info("evacuate vm=%s the store does not say whose it is: %s", vm, error)
        return None
    return found.owner if found.custody in (Custody.OWNED, Custody.MOVING) else ""


async def _over(vm: str, migration: SourceMigration) -> MoveOver:
    await migration.driver.changes.wait_until(
        lambda: migration.over, timeout_s=None, what="the end of the migration"
    )
    state, host = migration.driver.state, migration.work.destination
    match state.phase:
        case Phase.DONE:
            return MoveOver(vm, Way.MOVED, host=host)
        case Phase.LOST:
            return MoveOver(vm, Way.LOST, state.why, host)
        case _:  # a migration that is over, and has not moved the VM, was abandoned
            return _ended(vm, migration.vm) or MoveOver(vm, Way.STAYED, state.why, host)


def _ended(vm: str, present: Vm | None) -> MoveOver | None:
    """That a VM has ended here or was moved away, or that nobody can do anything with it; None
    otherwise.
    """
    if present is None:
        return MoveOver(vm, Way.ENDED, "it was removed")
    moved = present.moving
    if isinstance(moved, SourceMigration) and moved.over and moved.phase is Phase.DONE:
        return MoveOver(vm, Way.MOVED, host=moved.work.destination)
    match present.run:
        case Runstate.STOPPED:
            return MoveOver(vm, Way.ENDED, present.state.why)
        case Runstate.CRASHED:
            return MoveOver(vm, Way.CRASHED, f"it has crashed: {present.state.why}")
        case Runstate.UNKNOWN:
            return MoveOver(vm, Way.CRASHED, f"its QEMU does not answer: {present.state.why}")
        case _:
            return None


class Elsewhere(Protocol):
    """Standbys that other hosts keep of VMs of this one."""

    async def keeper(self, vm: str) -> str | None:
        """The host that keeps one which could take over now; None: no host does."""
        ...

    async def take_over(self, vm: str) -> None:
        """Ends what runs of the VM here, and returns when the standby's guest runs there. May be
        repeated. Raises StateConflict when none can take over, OutcomeUnknown when nobody knows
        whether it has.
        """
        ...


class NoneElsewhere:
    """No other host keeps any."""

    async def keeper(self, vm: str) -> str | None:
        """None."""
        del vm
        return None

    async def take_over(self, vm: str) -> None:
        """Raises StateConflict."""
        raise StateConflict(f"no other host keeps a standby of VM {vm}")


class HostStandbys:
    """Warm standbys. `standbys_of` gives the owner of those of a VM that are on this host as well,
    `elsewhere` has those that are on others.
    """

    def __init__(
        self,
        house: House,
        standbys_of: Callable[[str], StandbyDriver | None],
        own: str,
        elsewhere: Elsewhere,
    ) -> None:
        self._house = house
        self._standbys_of = standbys_of
        self._own = own
        self._elsewhere = elsewhere

    async def fall(self, vm: str) -> StandbyRuns:
        """A standby on another host is safe, and takes over whatever the VM does. One on this host
        helps only a VM that does not run: that of another one would end with the host, as the VM
        does. Nor does a VM fall that moves: it may run elsewhere by now.
        """
        standbys, present = self._standbys_of(vm), self._house.vms.get(vm)
        if present is not None and isinstance(present.work, Departing):
            raise StateConflict(f"its move to {present.work.destination} is not over")
        if (keeper := await self._elsewhere.keeper(vm)) is not None:
            await self._elsewhere.take_over(vm)
            return StandbyRuns(vm, keeper)
        if standbys is None:
            raise NotFound("it has no warm standby")
        runs = present is not None and present.run in (Runstate.RUNNING, Runstate.PAUSED)
        if runs and standbys.state.serving is None:
            raise NotFound("its warm standby is on this host as well")
        if not runs:
            await standbys.failover(force=True)
        return StandbyRuns(vm, self._own, here=True)
