"""Ends VMs of this host that the store has given to another host: `semper vm resolve` does that,
and a standby that has taken over while this host was cut off.

Only a newer claim says that; silence of the store says nothing, and harms no VM. A claim of this
host that is newer than the store's, given by the images while the store was away, is entered
there. The network comes
first: until its taps have left their bridges, two guests answer on one address, and a QEMU that
waits for a disk may take its time to end. Its disks are safe all the while: the lock, or the
reservation, is the other host's (docs/design/fencing.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from pathlib import Path

from sempervirt.core.errors import NotAllowed, SempervirtError, StateConflict
from sempervirt.host.records import RecordDamaged
from sempervirt.host.storage_call import call_storage
from sempervirt.store import epoch
from sempervirt.store.epoch import Admission
from sempervirt.store.port import Snapshot, Store
from sempervirt.store.proposals import VMS
from sempervirt.store.records import Custody, Ownership, parse
from sempervirt.store.registry import Claim, Registry
from sempervirt.vm.claims import claim_of, claimed_images, put_on_record
from sempervirt.vm.taps import leave_bridges
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)

# So often what the store has said last is compared with this host's VMs once more.
AGAIN_S = 30.0
# So soon the store is asked about a VM that has come here; its own start or move asks at once.
OTHERS_S = 1.0


async def follow_claims(
    store: Store,
    host: str,
    run_dir: Path,
    vms: Callable[[], Mapping[str, Vm]],
    worked: Callable[[], None],
) -> None:
    """Watches who owns the VMs of this host until the store fails, which is raised as
    Unavailable. What becomes of other VMs is told to nobody here: a cluster has thousands. Below
    `run_dir`, the host's, is kept which taps left their bridges.
    """
    refused = set[Ownership]()
    async with aclosing(_followed(store, vms)) as states:
        async for state in states:
            worked()
            # All at once: the taps of each VM leave their bridges before any QEMU is waited for.
            found = await asyncio.gather(
                *(
                    _compare(Registry(store), vm, vm.record.claim, owned, host, run_dir, refused)
                    for owned in _owned(state)
                    if (vm := vms().get(owned.vm)) is not None
                    and vm.record.claim is not None
                    and not vm.freed
                ),
                return_exceptions=True,
            )
            for failure in found:
                if failure is not None:  # the watch begins anew, with what the store says then
                    raise failure


async def _followed(store: Store, vms: Callable[[], Mapping[str, Vm]]) -> AsyncGenerator[Snapshot]:
    """What the store says of the VMs that are claimed here, which come and go."""

    def claimed() -> list[str]:
        known = vms().items()
        return [name for name, vm in known if vm.record.claim is not None and not vm.freed]

    while True:
        followed = claimed()
        if not followed:
            await asyncio.sleep(OTHERS_S)
            continue
        watching = store.watch(*(VMS + name for name in followed))
        states = _repeated(watching, claimed, followed)
        async with aclosing(watching), aclosing(states):
            async for state in states:
                yield state
        if claimed() == followed:
            return


async def _repeated(
    states: AsyncGenerator[Snapshot], claimed: Callable[[], list[str]], followed: list[str]
) -> AsyncGenerator[Snapshot]:
    """Each state, for as long as these are the VMs that are claimed here; and the last one again
    and again: a VM that has just come by its images changes nothing in the store that would be
    heard of, and nor does a move that is over by now.
    """
    news: asyncio.Queue[Snapshot | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async for state in states:
                news.put_nowait(state)
        finally:
            news.put_nowait(None)

    reading = asyncio.create_task(read())
    last: Snapshot | None = None
    said_at = time.monotonic()
    try:
        while claimed() == followed:
            new: Snapshot | None = last
            with suppress(TimeoutError):
                async with asyncio.timeout(min(AGAIN_S, OTHERS_S)):
                    new = await news.get()
                    if new is None:
                        await reading  # raises what the store has said
                        break
            if new is not None and (new is not last or time.monotonic() - said_at >= AGAIN_S):
                yield new
                last, said_at = new, time.monotonic()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def _owned(state: Snapshot) -> list[Ownership]:
    """Who owns which VM. An entry that cannot be read is named, and keeps no other one from being
    heeded: any host can write it.
    """
    found = []
    for key, entry in state.entries.items():
        try:
            found.append(parse(Ownership, key, entry.value))
        except RecordDamaged as error:
            log.error("claim %s", error)  # noqa: TRY400
    return found


async def _compare(
    registry: Registry,
    vm: Vm,
    claim: Claim,
    owned: Ownership,
    host: str,
    run_dir: Path,
    refused: set[Ownership],
) -> None:
    if (owned.epoch, owned.claim) == (claim.epoch, claim.id):
        return
    if vm.moving is not None and not vm.moving.over:
        return  # the machines of the move find out for themselves
    if owned.epoch <= claim.epoch and await _is_on_record(vm, claim):
        await _enter(registry, vm, claim, host, refused)
        return
    if owned.epoch < claim.epoch:
        return
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
    if vm.run.is_end:
        # It has moved there, say. Its QEMU has let go of the taps, to which it may come back.
        return
    whose = owned.owner or "another host"
    log.error("claim vm=%s belongs to %s, epoch %d: ended", vm.name, whose, owned.epoch)
    vm.machine.journal.note(time.time(), "claim", f"given to {whose}: ended here")
    for text in leave_bridges(run_dir, vm.spec):
        vm.machine.journal.note(time.time(), "claim", text)
        log.warning("claim vm=%s %s", vm.name, text)
    try:
        await vm.kill()
    except SempervirtError as error:
        log.error("claim vm=%s is not ended: %s", vm.name, error)  # noqa: TRY400


async def _is_on_record(vm: Vm, claim: Claim) -> bool:
    """Whether the VM's first image says that it is this claim's. A storage that is silent is asked
    again: nobody writes there meanwhile.
    """
    images = await claimed_images(vm.spec)
    if not images:
        return False
    try:
        record = await call_storage(
            images[0], lambda: epoch.read_epoch(epoch.record_path(images[0]))
        )
    except RecordDamaged as error:
        log.error("claim vm=%s %s", vm.name, error)  # noqa: TRY400
        return False
    return record is not None and epoch.admit(record, claim) is Admission.RENEWED


async def _enter(
    registry: Registry, vm: Vm, claim: Claim, host: str, refused: set[Ownership]
) -> None:
    """The VM came by its images, while the store was away: the store gets to know that, unless it
    has `refused` to while it said the same. Raises Unavailable, OutcomeUnknown: to be repeated.
    """
    owned = await registry.find(vm.name)  # as it is now
    if owned in refused:
        return
    if (owned.epoch, owned.claim) == (claim.epoch, claim.id) or owned.epoch > claim.epoch:
        return
    try:
        if owned.custody is Custody.FREE or owned.owner == host:
            # Its former host has let go of it, or an operator has said so: under a claim of the
            # store's own.
            newer = await registry.claim(vm.name, host, claim.images)
            if newer.epoch <= claim.epoch:  # the images have that one already, under another id
                newer = await registry.claim(vm.name, host, claim.images)
            await put_on_record(newer, vm.spec)
            vm.set_claim(newer)
        else:
            await registry.settle(claim)
    except (StateConflict, NotAllowed) as error:
        # Another one has changed the entry, which is heard next; or only that host may change it.
        refused.add(owned)
        log.warning(
            "claim vm=%s runs here by its images, epoch %d; the store says %s: %s",
            vm.name, claim.epoch, owned.owner or "nobody", error,
        )  # fmt: skip
        return
    log.warning("claim vm=%s: the store knows now that it runs here", vm.name)
