"""Ends VMs of this host that the store has given to another host, as `semper vm resolve` does.

Only a newer claim says that; silence of the store says nothing, and harms no VM.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing

from sempervirt.core.errors import SempervirtError
from sempervirt.store.port import Store
from sempervirt.store.records import Ownership, parse
from sempervirt.store.registry import Claim
from sempervirt.vm.claims import claim_of, put_on_record
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)


async def follow_claims(
    store: Store, host: str, vms: Callable[[], Mapping[str, Vm]], worked: Callable[[], None]
) -> None:
    """Watches who owns which VM until the store fails, which is raised as Unavailable."""
    async with aclosing(store.watch("vms/")) as states:
        async for state in states:
            worked()
            for key, entry in state.entries.items():
                owned = parse(Ownership, key, entry.value)
                vm = vms().get(owned.vm)
                if vm is not None and vm.record.claim is not None and not vm.freed:
                    await _compare(vm, vm.record.claim, owned, host)


async def _compare(vm: Vm, claim: Claim, owned: Ownership, host: str) -> None:
    if (owned.epoch, owned.claim) == (claim.epoch, claim.id) or owned.epoch < claim.epoch:
        return
    if vm.moving is not None and not vm.moving.over:
        return  # the machines of the move find out for themselves
    if owned.owner == host:
        newer = claim_of(owned)
        log.warning("claim vm=%s was renewed, epoch %d", vm.name, newer.epoch)
        try:
            await put_on_record(newer, vm.spec)
        except SempervirtError as error:
            log.error("claim vm=%s %s", vm.name, error)  # noqa: TRY400
            return
        vm.set_claim(newer)
        return
    whose = owned.owner or "another host"
    log.error("claim vm=%s belongs to %s, epoch %d: ended", vm.name, whose, owned.epoch)
    vm.machine.journal.note(time.time(), "claim", f"given to {whose}: ended here")
    try:
        await vm.kill()
    except SempervirtError as error:
        log.error("claim vm=%s is not ended: %s", vm.name, error)  # noqa: TRY400
