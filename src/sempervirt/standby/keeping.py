"""Standbys on another host: how they are asked for, shown and given up by the host of the VM.

    A: the VM runs here                                B: the standbys are kept here
    hand_to ── the store: B keeps them ──► keep ─────► keep_for: can that be?  ─► Standbys.keep
    take_back ─ the store: nobody does ────────────────► sees that, and removes them
    it is about to die (evacuation) ───► take_over ────► take_over_for: one takes over, by A's word

The store's entry is what counts: by it A answers B's questions, and B may take over.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster, read_settings
from sempervirt.core.errors import (
    InvalidRequest,
    NotAllowed,
    NotFound,
    SempervirtError,
    StateConflict,
)
from sempervirt.core.names import suggest
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.spec import VmSpec
from sempervirt.standby import network
from sempervirt.standby.adapters import require_possible
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.messages import TAKE_OVER_S, FirstPeer, KeepStandby
from sempervirt.standby.standbys import Standbys
from sempervirt.standby.state import Step
from sempervirt.standby.values import Policy
from sempervirt.store import epoch
from sempervirt.store.records import Ownership
from sempervirt.store.registry import Registry
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.vm import Vm


async def hand_to(standbys: Standbys, config: AgentConfig, vm: Vm, policy: Policy, to: str) -> Any:
    """Has host `to` keep standbys of a VM of this host; what that host shows of them. Raises
    NotFound, InvalidRequest, StateConflict, Unavailable: nothing has changed then.
    """
    require_possible(vm)
    claim = vm.record.claim
    if claim is None or vm.freed:
        raise StateConflict(
            f"VM {vm.name} does not run by a claim of the cluster's store",
            remedy="start it in the cluster, and enable its standbys then",
        )
    if standbys.find(vm.name) is not None:
        raise StateConflict(
            f"standbys of VM {vm.name} are kept on this host",
            remedy=f"first: semper standby disable {vm.name}",
        )
    async with Cluster.opened(config) as cluster:
        address = await _address_of(cluster, to)
        registry = Registry(cluster.store)
        before = (await registry.find(vm.name)).standby
        if before not in ("", to):
            raise StateConflict(
                f"host {before} keeps standbys of VM {vm.name}",
                remedy=f"first: semper standby disable {vm.name}",
            )
        await registry.name_standby(claim, to)
        try:
            async with peer.connect(cluster, to, address) as connection:
                return await FirstPeer(connection, vm.name).keep(vm.pinned_spec, policy)
        except SempervirtError:
            if not before:
                await registry.name_standby(claim, "")
            raise


async def keep_for(
    standbys: Standbys, config: AgentConfig, owner: str, asked: KeepStandby
) -> StandbyDriver:
    """Keeps standbys of a VM of the host `owner`. Raises NotAllowed, InvalidRequest, StateConflict
    when none could be made here, Unavailable.
    """
    spec = asked.spec
    async with Cluster.opened(config) as cluster:
        owned = await Registry(cluster.store).find(spec.name)
        own = cluster.settings.host
    if (owned.owner, owned.standby) != (owner, own):
        raise NotAllowed(
            f"the store does not say that {own} keeps standbys of {owner}'s VM {spec.name}"
        )
    network.bridges_of(spec, 0)
    for file in spec.files:
        if not await call_storage(file, file.exists):
            raise StateConflict(f"{file} of VM {spec.name} is not there on host {own}")
    for disk in spec.disks:
        if not disk.read_only:
            await _require_same(owned, own, disk.name, disk.image)
    return await standbys.keep(spec, asked.policy)


async def take_over_for(
    standbys: Standbys, config: AgentConfig, owner: str, name: str
) -> StandbyDriver:
    """Has a standby take over a VM of the host `owner`, which asks for it since it is about to die;
    returns when its guest runs. The fence asks that host for the VM's end. May be repeated.

    Raises NotFound, NotAllowed, StateConflict when none can, Unavailable.
    """
    async with Cluster.opened(config) as cluster:
        owned = await Registry(cluster.store).find(name)
        own = cluster.settings.host
    if owned.standby != own or owned.owner not in (owner, own):
        raise NotAllowed(f"the store does not say that {own} keeps standbys of {owner}'s VM {name}")
    driver = standbys.require(name)
    if owned.owner == owner and driver.state.take_over is None:
        await driver.failover(force=True, cause=f"host {owner} asked for it: it is about to end")
        return driver
    await driver.changes.wait_until(
        lambda: driver.state.take_over is None, timeout_s=TAKE_OVER_S, what="the take-over"
    )
    past = driver.state.past
    if past is None or past.step is Step.FAILED:
        why = past.trouble if past is not None else "nothing has taken over"
        raise StateConflict(f"no standby of VM {name} has taken over: {why}")
    return driver


async def _require_same(owned: Ownership, own: str, name: str, image: Path) -> None:
    if await call_storage(image, image.is_block_device):
        return
    record = await call_storage(image, partial(_record_of, image))
    if record is None or record.image not in owned.images:
        raise StateConflict(
            f"disk {name}: {image} is another image on host {own}",
            remedy="the hosts have to share the storage; a copy is not enough",
        )


def _record_of(image: Path) -> epoch.EpochRecord | None:
    return epoch.read_epoch(epoch.record_path(image))


async def keeper_of(config: AgentConfig, name: str) -> str:
    """The host that keeps standbys of a VM, by the store; "" where it is this one, or none does, or
    nobody can tell.
    """
    settings = read_settings(config)
    if settings is None:
        return ""
    try:
        async with Cluster.opened(config) as cluster:
            keeper = (await Registry(cluster.store).find(name)).standby
    except SempervirtError:
        return ""
    return "" if keeper == settings.host else keeper


async def show_there(config: AgentConfig, name: str, keeper: str) -> Any:
    """What the host that keeps standbys of a VM shows of them. Raises as `FirstPeer`."""
    async with Cluster.opened(config) as cluster:
        address = await _address_of(cluster, keeper)
        async with peer.connect(cluster, keeper, address) as connection:
            return await FirstPeer(connection, name).standby(name)


async def take_back(config: AgentConfig, vm: Vm) -> None:
    """No other host keeps standbys of a VM any more. Raises StateConflict, Unavailable."""
    claim = vm.record.claim
    if claim is None:
        raise StateConflict(f"VM {vm.name} is not this host's")
    async with Cluster.opened(config) as cluster:
        await Registry(cluster.store).name_standby(claim, "")


async def _address_of(cluster: Cluster, host: str) -> str:
    members = {member.host.name: member for member in await cluster.members()}
    if host not in members:
        raise NotFound(
            f"there is no host {host}", remedy=suggest(host, members) or "semper host list"
        )
    member = members[host]
    if host == cluster.settings.host:
        raise InvalidRequest(f"{host} is this host", remedy="leave --on out")
    if member.revoked or not member.host.address:
        raise StateConflict(
            f"host {host} is revoked, or listens nowhere", remedy="semper host list"
        )
    return member.host.address


def require_spec(spec: VmSpec, name: str) -> None:
    """Raises InvalidRequest when a message speaks of another VM than its address."""
    if spec.name != name:
        raise InvalidRequest(f"VM {name} cannot be called {spec.name}")
