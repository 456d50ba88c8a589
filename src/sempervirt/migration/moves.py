"""Migrations of this host's VMs: how they begin, go on after a restart of the agent, and are
settled by an operator. The rooms `source` and `destination` do the rest.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster, Member
from sempervirt.core.errors import (
    InvalidRequest,
    NotAllowed,
    NotFound,
    SempervirtError,
    StateConflict,
    Unavailable,
    reason,
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
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.store import epoch
from sempervirt.store.records import Custody, Ownership
from sempervirt.store.registry import Claim, Registry
from sempervirt.vm.claims import claim_of, claimed_images
from sempervirt.vm.house import House
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Arriving, Departing

log = logging.getLogger(__name__)

# So long a VM that comes without the store waits for what the store says here.
STORE_S = 2.0


class Receiving(House, Protocol):
    """The agent of a host to which VMs may come."""

    async def receive_vm(self, spec: VmSpec, machine: str, host: str, arrival: Arriving) -> Vm:
        """Starts a VM that is to come from another host. Nothing is left of it when this raises."""
        ...

    async def forget_vm(self, name: str) -> None:
        """Drops a VM that has ended. Raises NotFound, StateConflict."""
        ...


async def find_obstacles(house: House, vm: Vm, cluster: Cluster, member: Member) -> list[Obstacle]:
    """Every reason that would stop a migration of a VM to another host.

    Gives each image an id, if it has none, by a small file beside it.
    """
    host = member.host.name
    found = list(membership_obstacles(member))
    facts = await house.host()
    state = vm.run
    here = await side_of(facts, cluster.settings.host, vm.spec, vm_state=state, source=True)
    found += await obstacles_here(vm)
    if found:
        return found
    try:
        async with peer.connect(cluster, host, member.host.address) as connection:
            there = await host_side(connection, vm.spec)
    except SempervirtError as error:
        return [Obstacle(f"{host} cannot be asked: {error.message}", error.remedy)]
    return obstacles(vm.spec, vm.record.accelerator.kind, here, there)


async def obstacles_here(vm: Vm) -> list[Obstacle]:
    """Every reason on this host itself that would stop a migration of a VM, wherever to."""
    found = [
        Obstacle(
            f"a flush of disk {disk.setup.short_name} has failed: what the guest wrote may be in "
            "this host's memory alone, and the other host would not know",
            f"check the storage; then stop {vm.name}, check its file systems, and run it again",
        )
        for disk in vm.disks.values()
        if disk.flush_failed
    ]
    found += [
        Obstacle(device.ailment, f"end it and run it again: semper vm stop {vm.name}")
        for device in vm.devices.values()
        if device.ailment
    ]
    if vm.record.claim is None:
        what = f"VM {vm.name} was started before this host belonged to a cluster"
        found.append(Obstacle(what, "end it and run it again"))
    return found + [Obstacle(image.cause, image.remedy) for image in await vm.misplaced_images()]


async def depart(
    house: House, name: str, to: str, policy: MovePolicy, known: Member | None = None
) -> SourceMigration:
    """Begins to move a VM to another host. `known` is what the store said of that host before: for
    a host that dies while the store is away; the VM then changes hands by its images.

    Raises NotFound, StateConflict with every reason that stands in the way, Unavailable,
    OutcomeUnknown; the VM runs on here in any case.
    """
    vm = house.vm(name)
    if vm.moving is not None and not vm.moving.over:
        raise StateConflict(f"VM {name} moves already", remedy=f"see: semper vm show {name}")
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster.opened(house.config))
        by_images = False
        try:
            member = await find_destination(cluster, to)
        except Unavailable as error:
            if known is None:
                raise
            log.warning("migrate vm=%s without the store: %s", name, error)
            member, by_images = known, True
        found = await find_obstacles(house, vm, cluster, member)
        if found:
            raise StateConflict(
                f"VM {name} cannot move to {to}: " + "; ".join(item.what for item in found),
                remedy=f"see what can be done: semper vm migrate {name} --to {to} --dry-run",
            )
        if policy.postcopy and vm.devices:
            raise InvalidRequest(
                f"VM {name} has passed-through devices, which in postcopy would write to memory "
                "that is not there yet",
                remedy="move it without --postcopy",
            )
        running = vm.run is Runstate.RUNNING
        address = member.host.address
        work = Departing(secrets.token_hex(16), to, address, running, by_images=by_images)
        return await SourceMigration.begin(vm, cluster, work, policy, stack)


def source_of(vm: Vm) -> SourceMigration:
    """The last migration of a VM from here. Raises NotFound."""
    if not isinstance(vm.moving, SourceMigration):
        raise NotFound(f"VM {vm.name} was not migrated from here")
    return vm.moving


def destination_of(house: House, migration: str, source: str) -> DestinationMigration:
    """A migration to this host from `source`, by its id. Raises NotFound."""
    for vm in house.vms.values():
        moving = vm.moving
        if (
            isinstance(moving, DestinationMigration)
            and moving.work.source == source
            and moving.work.id == migration
        ):
            return moving
    raise NotFound(f"no migration {migration} comes here from {source}")


async def receive(house: Receiving, request: ArrivalRequest, source: str) -> DestinationMigration:
    """Prepares for a VM that comes from the host `source`; returns when all is ready.

    Raises NotAllowed, InvalidRequest, StateConflict or Unavailable; nothing is left then.
    """
    if request.source != source:
        raise InvalidRequest(f"{source} cannot send a VM in the name of {request.source}")
    async with AsyncExitStack() as kept:
        cluster = await kept.enter_async_context(Cluster.opened(house.config))
        settings = cluster.settings
        await _require_sent(cluster, request)
        await _check_images(request)
        images = tuple(request.images.values())
        work = Arriving(
            request.id,
            source,
            request.running,
            request.epoch,
            images,
            by_images=request.by_images,
        )
        vm = await house.receive_vm(request.spec, request.machine, settings.host, work)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(house.forget_vm, vm.name)
            undo.push_async_callback(vm.kill, "its arrival could not be prepared")
            if vm.record.accelerator.kind != request.accelerator:
                raise StateConflict(
                    f"the VM runs with {request.accelerator}, and {settings.host} would run it "
                    f"with {vm.record.accelerator.kind}"
                )
            migration = await DestinationMigration.prepare(
                vm, cluster, work, lambda: house.forget_vm(vm.name), request
            )
            undo.pop_all()
        migration.begin(kept.pop_all())
        return migration


async def require_owned(house: House, spec: VmSpec, host: str) -> None:
    """Raises NotAllowed unless the store says that the VM is of that host; while the store is away,
    unless all images say so that the VM writes. Raises Unavailable where nothing says it.
    """
    try:
        async with asyncio.timeout(STORE_S), Cluster.opened(house.config) as cluster:
            await _find_owned(cluster, spec.name, host)
    except (Unavailable, TimeoutError) as error:
        images = await claimed_images(spec)
        if not images:
            raise Unavailable(
                f"the store does not say whose VM {spec.name} is: {reason(error)}"
            ) from error
        for image in images:
            record = await call_storage(image, partial(_record_of, image))
            if record is None or record.holder != host:
                raise NotAllowed(f"{image} is not of {host}") from error


async def _find_sent(cluster: Cluster, request: ArrivalRequest) -> Ownership | None:
    """What the store says of a VM that moves here; None: it is silent, here and at the source, and
    the images say whose the VM is (`_check_images`). Raises NotAllowed, Unavailable.
    """
    vm, here = request.spec.name, cluster.settings.host
    try:
        async with asyncio.timeout(STORE_S if request.by_images else None):
            owned = await _find_owned(cluster, vm, request.source)
    except (Unavailable, TimeoutError):
        if not request.by_images:
            raise
        return None
    moves_here = owned.custody is Custody.MOVING and owned.destination == here
    # Of a store that does not answer at the source the source cannot have this said.
    if not (moves_here or (request.by_images and owned.custody is Custody.OWNED)):
        raise NotAllowed(f"the store does not say that VM {vm} moves to {here}")
    return owned


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
    vm, owned = request.spec.name, await _find_sent(cluster, request)
    if owned is None and not request.images:
        raise NotAllowed(f"neither the store nor an image says that VM {vm} is of {request.source}")
    if owned is not None and (
        owned.epoch != request.epoch or sorted(owned.images) != sorted(request.images.values())
    ):
        raise NotAllowed(f"the store has other images of VM {vm}, or another epoch")
    images = {disk.name: disk.image for disk in request.spec.imaged if not disk.read_only}
    for name in sorted(images.keys() - request.images.keys()):
        image = images[name]
        if not await call_storage(image, image.is_block_device):
            raise NotAllowed(f"the store knows nothing of disk {name} of VM {vm}")


async def _check_images(request: ArrivalRequest) -> None:
    images = {disk.name: disk.image for disk in request.spec.imaged}
    for name, expected in request.images.items():
        if name not in images:
            raise InvalidRequest(f"the VM has no disk {name}")
        image = images[name]
        record = await call_storage(image, partial(_record_of, image))
        if record is None or record.image != expected:
            raise StateConflict(
                f"disk {name}: {image} is another image here",
                remedy="the hosts have to share the storage; a copy is not enough",
            )
        if request.by_images and (record.holder, record.epoch) != (request.source, request.epoch):
            raise NotAllowed(
                f"disk {name}: the record of {image} says that it is of "
                f"{record.holder or 'nobody'}, under epoch {record.epoch}"
            )


def _record_of(image: Path) -> epoch.EpochRecord | None:
    return epoch.read_epoch(epoch.record_path(image))


async def resume_all(house: Receiving) -> None:
    """Goes on with the migrations that a former agent left. What fails is logged: the VM stays
    held, and the next agent tries again.
    """
    for vm in list(house.vms.values()):
        # An arrival is over when the agent has forgotten the VM, or knows it to be its own.
        if not isinstance(vm.work, Arriving) and (vm.freed or not isinstance(vm.work, Departing)):
            continue
        try:
            await _resume(house, vm)
        except SempervirtError as error:
            log.error("migration vm=%s cannot go on: %s", vm.name, error)  # noqa: TRY400


async def _resume(house: Receiving, vm: Vm) -> None:
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster.opened(house.config))
        if isinstance(vm.work, Departing):
            await SourceMigration.resume(vm, cluster, vm.work, stack)
        elif isinstance(vm.work, Arriving):
            await DestinationMigration.resume(
                vm, cluster, vm.work, stack, lambda: house.forget_vm(vm.name)
            )


async def resolve(house: House, name: str, owner: str, evidence: str) -> str:
    """Gives a VM of which the whereabouts are unknown to `owner`, and tells what became of it.

    The evidence is a sentence that tells how it is known that the VM runs nowhere else. Raises
    StateConflict when there is nothing to settle, NotFound, Unavailable, OutcomeUnknown.
    """
    if not evidence.strip():
        raise InvalidRequest(
            "no evidence was given", remedy="tell how it is known that the VM runs nowhere else"
        )
    async with Cluster.opened(house.config) as cluster:
        try:
            claim = await _resolve_in_store(cluster, name, owner, evidence)
        except Unavailable as error:
            if owner != cluster.settings.host:
                # It could not run there before the store has said so; by then it is settled.
                raise Unavailable(
                    f"only the store can give VM {name} to {owner}: {error.message}",
                    remedy="when the store answers again, the hosts settle it by themselves",
                ) from error
            if not _settle_here(house, name, evidence):
                raise
            return "settled on this host; the store will learn of it when it answers again"
    return f"{owner} owns VM {name} under epoch {claim.epoch}"


def _settle_here(house: House, name: str, evidence: str) -> bool:
    """The VM stays here, whatever the store was asked."""
    vm = house.vms.get(name)
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
