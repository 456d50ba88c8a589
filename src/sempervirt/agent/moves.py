"""Migrations of this host's VMs: how they begin, go on after a restart of the agent, and are
settled by an operator. The rooms `migration.source` and `migration.destination` do the rest.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from sempervirt.agent.agent import Agent
from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster, Member
from sempervirt.core.errors import (
    InvalidRequest,
    NotAllowed,
    NotFound,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.host.storage_call import call_storage
from sempervirt.migration.destination.migration import DestinationMigration
from sempervirt.migration.events import Side
from sempervirt.migration.messages import ArrivalRequest, MovePolicy
from sempervirt.migration.obstacles import Obstacle, obstacles
from sempervirt.migration.peer import host_side
from sempervirt.migration.sides import find_destination, membership_obstacles, side_of
from sempervirt.migration.source.migration import SourceMigration
from sempervirt.migration.source.state import Resolved
from sempervirt.qemu.state import Runstate
from sempervirt.store import epoch
from sempervirt.store.records import Custody, Ownership
from sempervirt.store.registry import Claim, Registry
from sempervirt.vm.claims import claim_of
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Arriving, Departing

log = logging.getLogger(__name__)


async def find_obstacles(agent: Agent, vm: Vm, cluster: Cluster, member: Member) -> list[Obstacle]:
    """Every reason that would stop a migration of a VM to another host.

    Gives each image an id, if it has none, by a small file beside it.
    """
    host = member.host.name
    found = list(membership_obstacles(member))
    facts = await agent.host()
    state = vm.run
    here = await side_of(facts, cluster.settings.host, vm.spec, vm_state=state, source=True)
    found.extend(
        Obstacle(
            f"a flush of disk {disk.setup.short_name} has failed: what the guest wrote may be in "
            "this host's memory alone, and the other host would not know",
            f"check the storage; then stop {vm.name}, check its file systems, and run it again",
        )
        for disk in vm.disks.values()
        if disk.flush_failed
    )
    if vm.record.claim is None:
        what = f"VM {vm.name} was started before this host belonged to a cluster"
        found.append(Obstacle(what, "end it and run it again"))
    found += [Obstacle(image.cause, image.remedy) for image in await vm.misplaced_images()]
    if found:
        return found
    try:
        async with peer.connect(cluster, host, member.host.address) as connection:
            there = await host_side(connection, vm.spec)
    except SempervirtError as error:
        return [Obstacle(f"{host} cannot be asked: {error.message}", error.remedy)]
    return obstacles(vm.spec, vm.record.accelerator.kind, here, there)


async def depart(agent: Agent, name: str, to: str, policy: MovePolicy) -> SourceMigration:
    """Begins to move a VM to another host.

    Raises NotFound, StateConflict with every reason that stands in the way, Unavailable,
    OutcomeUnknown; the VM runs on here in any case.
    """
    vm = agent.vm(name)
    if vm.moving is not None and not vm.moving.over:
        raise StateConflict(f"VM {name} moves already", remedy=f"see: semper vm show {name}")
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster.opened(agent.config))
        member = await find_destination(cluster, to)
        found = await find_obstacles(agent, vm, cluster, member)
        if found:
            raise StateConflict(
                f"VM {name} cannot move to {to}: " + "; ".join(item.what for item in found),
                remedy=f"see what can be done: semper vm migrate {name} --to {to} --dry-run",
            )
        running = vm.run is Runstate.RUNNING
        work = Departing(secrets.token_hex(16), to, member.host.address, running)
        return await SourceMigration.begin(vm, cluster, work, policy, stack)


def source_of(vm: Vm) -> SourceMigration:
    """The last migration of a VM from here. Raises NotFound."""
    if not isinstance(vm.moving, SourceMigration):
        raise NotFound(f"VM {vm.name} was not migrated from here")
    return vm.moving


def destination_of(agent: Agent, migration: str, source: str) -> DestinationMigration:
    """A migration to this host from `source`, by its id. Raises NotFound."""
    for vm in agent.vms.values():
        moving = vm.moving
        if (
            isinstance(moving, DestinationMigration)
            and moving.work.source == source
            and moving.work.id == migration
        ):
            return moving
    raise NotFound(f"no migration {migration} comes here from {source}")


async def receive(agent: Agent, request: ArrivalRequest, source: str) -> DestinationMigration:
    """Prepares for a VM that comes from the host `source`; returns when all is ready.

    Raises NotAllowed, InvalidRequest, StateConflict or Unavailable; nothing is left then.
    """
    if request.source != source:
        raise InvalidRequest(f"{source} cannot send a VM in the name of {request.source}")
    async with AsyncExitStack() as kept:
        cluster = await kept.enter_async_context(Cluster.opened(agent.config))
        settings = cluster.settings
        await _require_sent(cluster, request)
        await _check_images(request)
        images = tuple(request.images.values())
        work = Arriving(request.id, source, request.running, request.epoch, images)
        vm = await agent.receive_vm(request.spec, request.machine, settings.host, work)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(agent.forget_vm, vm.name)
            undo.push_async_callback(vm.kill, "its arrival could not be prepared")
            if vm.record.accelerator.kind != request.accelerator:
                raise StateConflict(
                    f"the VM runs with {request.accelerator}, and {settings.host} would run it "
                    f"with {vm.record.accelerator.kind}"
                )
            migration = await DestinationMigration.prepare(
                vm, cluster, work, lambda: agent.forget_vm(vm.name), postcopy=request.postcopy
            )
            undo.pop_all()
        migration.begin(kept.pop_all())
        return migration


async def require_owned(agent: Agent, vm: str, host: str) -> None:
    """Raises NotAllowed unless the store says that the VM is of that host, Unavailable."""
    async with Cluster.opened(agent.config) as cluster:
        await _find_owned(cluster, vm, host)


async def _find_owned(cluster: Cluster, vm: str, host: str) -> Ownership:
    try:
        owned = await Registry(cluster.store).find(vm)
    except NotFound:
        owned = None
    if owned is None or owned.owner != host or owned.custody is Custody.FREE:
        raise NotAllowed(f"the store does not say that VM {vm} is of {host}")
    return owned


async def _require_sent(cluster: Cluster, request: ArrivalRequest) -> None:
    """Raises NotAllowed unless the store says that the VM moves here, with just these images."""
    vm, here = request.spec.name, cluster.settings.host
    owned = await _find_owned(cluster, vm, request.source)
    if owned.custody is not Custody.MOVING or owned.destination != here:
        raise NotAllowed(f"the store does not say that VM {vm} moves to {here}")
    if owned.epoch != request.epoch or sorted(owned.images) != sorted(request.images.values()):
        raise NotAllowed(f"the store has other images of VM {vm}, or another epoch")
    unnamed = {disk.name for disk in request.spec.disks if not disk.read_only} - {*request.images}
    for name in sorted(unnamed):
        image = request.spec.disk(name).image
        if not await call_storage(image, image.is_block_device):
            raise NotAllowed(f"the store knows nothing of disk {name} of VM {vm}")


async def _check_images(request: ArrivalRequest) -> None:
    for name, expected in request.images.items():
        try:
            image = request.spec.disk(name).image
        except (KeyError, StopIteration, ValueError) as error:
            raise InvalidRequest(f"the VM has no disk {name}") from error
        record = await call_storage(image, partial(_record_of, image))
        if record is None or record.image != expected:
            raise StateConflict(
                f"disk {name}: {image} is another image here",
                remedy="the hosts have to share the storage; a copy is not enough",
            )


def _record_of(image: Path) -> epoch.EpochRecord | None:
    return epoch.read_epoch(epoch.record_path(image))


async def resume_all(agent: Agent) -> None:
    """Goes on with the migrations that a former agent left. What fails is logged: the VM stays
    held, and the next agent tries again.
    """
    for vm in list(agent.vms.values()):
        if vm.freed or not isinstance(vm.work, Departing | Arriving):
            continue
        try:
            await _resume(agent, vm)
        except SempervirtError as error:
            log.error("migration vm=%s cannot go on: %s", vm.name, error)  # noqa: TRY400


async def _resume(agent: Agent, vm: Vm) -> None:
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster.opened(agent.config))
        if isinstance(vm.work, Departing):
            await SourceMigration.resume(vm, cluster, vm.work, stack)
        elif isinstance(vm.work, Arriving):
            await DestinationMigration.resume(
                vm, cluster, vm.work, stack, lambda: agent.forget_vm(vm.name)
            )


async def resolve(agent: Agent, name: str, owner: str, evidence: str) -> str:
    """Gives a VM of which the whereabouts are unknown to `owner`, and tells what became of it.

    The evidence is a sentence that tells how it is known that the VM runs nowhere else. Raises
    StateConflict when there is nothing to settle, NotFound, Unavailable, OutcomeUnknown.
    """
    if not evidence.strip():
        raise InvalidRequest(
            "no evidence was given", remedy="tell how it is known that the VM runs nowhere else"
        )
    async with Cluster.opened(agent.config) as cluster:
        try:
            claim = await _resolve_in_store(cluster, name, owner, evidence)
        except Unavailable as error:
            if owner != cluster.settings.host:
                # It could not run there before the store has said so; by then it is settled.
                raise Unavailable(
                    f"only the store can give VM {name} to {owner}: {error.message}",
                    remedy="when the store answers again, the hosts settle it by themselves",
                ) from error
            if not _settle_here(agent, name, evidence):
                raise
            return "settled on this host; the store will learn of it when it answers again"
    return f"{owner} owns VM {name} under epoch {claim.epoch}"


def _settle_here(agent: Agent, name: str, evidence: str) -> bool:
    """The VM stays here, whatever the store was asked."""
    vm = agent.vms.get(name)
    moving = vm.moving if vm else None
    if not isinstance(moving, SourceMigration) or moving.over:
        return False
    moving.resolve(Resolved(Side.SOURCE, evidence))
    return True


async def _resolve_in_store(cluster: Cluster, name: str, owner: str, evidence: str) -> Claim:
    registry = Registry(cluster.store)
    members = {member.host.name: member for member in await cluster.members()}
    if owner not in members or members[owner].revoked:
        raise NotFound(f"there is no host {owner}", remedy="semper host list")
    present = await registry.find(name)
    holder = members.get(present.owner)
    if present.custody in (Custody.OWNED, Custody.MOVING):
        if holder is not None and holder.presence is not None and not holder.revoked:
            raise StateConflict(
                f"VM {name} belongs to {present.owner}, whose agent is alive: nothing is unknown",
                remedy=f"ask there: semper vm show {name}",
            )
        await registry.mark_unknown(claim_of(present), f"host {present.owner} is silent")
    return await registry.resolve(name, owner, evidence)
