"""Ownership of VMs and images, kept in a `Store`.

A *claim* gives a host one VM with its writable images, under a new *epoch*: greater than every
epoch that the VM or any of the images ever had. It also has a random id, by which a claim of
which the answer was lost is found again, and two claims of equal epoch (a store that was
restored from a backup) are told apart. The epoch is what the images check (`epoch`); the
store alone keeps nobody from writing.

        claim                begin_move                   hand_over
    FREE ────► OWNED (A, 7) ───────────► MOVING (A→B, 7) ───────────► OWNED (B, 8)
     ▲           │   ▲                      │      │
     └─ release ─┘   └────── end_move ──────┘      │
                     ▲                             │
                     └── resolve ──── UNKNOWN ◄────┘ mark_unknown
                        (new epoch, for whom the evidence names)

Everything a holder does names its claim, and a claim that is not the newest is refused
(`StaleClaim`). `hand_over` is the one instant at which ownership moves: it and `end_move`
compare the same entry, so of a source that gives up and a hand-over only one can win.

A commit whose answer was lost is looked for at once. If it stands, all is well; if it does not, or
the store cannot be asked, OutcomeUnknown is passed on: nothing may be started then, and nothing
resumed, before the store was asked again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sempervirt.core.errors import NotFound, OutcomeUnknown, StateConflict, Unavailable
from sempervirt.store.port import Entry, Put, Snapshot, Store, Write
from sempervirt.store.records import Custody, ImageClaim, Ownership, parse


class StaleClaim(StateConflict):
    """The claim is not the newest one. Whoever holds it must not write any more."""


@dataclass(frozen=True)
class Claim:
    """The right to run a VM and to write the images of the VM. `id` is 32 hexadecimal digits."""

    vm: str
    host: str
    epoch: int
    id: str
    images: tuple[str, ...] = ()


class Registry:
    """See the module. All methods raise Unavailable; those that change, OutcomeUnknown."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def find(self, vm: str) -> Ownership:
        """The owner of a VM. Raises NotFound for a VM that was never claimed."""
        found = _ownership(await self._store.read(_vm_key(vm)), vm)
        if found is None:
            raise NotFound(f"no host ever owned a VM {vm}")
        return found

    async def all(self) -> list[Ownership]:
        """Every VM that was ever claimed, by name."""
        entries = (await self._store.read("vms/")).entries
        return [parse(Ownership, key, entry.value) for key, entry in entries.items()]

    async def claim(self, vm: str, host: str, images: Sequence[str] = ()) -> Claim:
        """Takes a VM that nobody owns, or `host` itself: only it can tell that it does not run it.

        Raises StateConflict, naming the owner.
        """
        state = await self._store.read()
        present = _ownership(state, vm)
        if present is not None and not _may_claim(present, host):
            raise StateConflict(
                f"VM {vm} is {_described(present)}",
                remedy=f"end it there first, or settle it with evidence: semper vm resolve {vm}"
                if present.custody is Custody.UNKNOWN
                else "move it, or end it there first",
            )
        return await self._give(state, vm, host, images)

    async def check(self, claim: Claim) -> Ownership:
        """The VM's entry, if `claim` is the newest. Raises StaleClaim."""
        return _require(await self._store.read(_vm_key(claim.vm)), claim)

    async def release(self, claim: Claim) -> None:
        """Makes the VM free: the VM has ended, and its images are closed. Raises StaleClaim."""
        state = await self._store.read()
        present = _require(state, claim)
        freed = Ownership(
            vm=claim.vm,
            custody=Custody.FREE,
            epoch=claim.epoch,
            claim=claim.id,
            images=present.images,
        )
        images = (_image(state, image) for image in claim.images)
        released = [image.model_copy(update={"vm": ""}) for image in images if image is not None]
        await self._commit(state, [freed, *released])

    async def begin_move(self, claim: Claim, destination: str) -> None:
        """`destination` begins to prepare. Raises StaleClaim, StateConflict."""
        state = await self._store.read(_vm_key(claim.vm))
        present = _require(state, claim)
        if present.custody is not Custody.OWNED:
            raise StateConflict(f"VM {claim.vm} is {_described(present)}")
        update = {"custody": Custody.MOVING, "destination": destination}
        await self._commit(state, [present.model_copy(update=update)])

    async def end_move(self, claim: Claim) -> None:
        """The move is given up; the owner keeps the VM. Raises StaleClaim when it was too late."""
        state = await self._store.read(_vm_key(claim.vm))
        update = {"custody": Custody.OWNED, "destination": ""}
        await self._commit(state, [_require(state, claim).model_copy(update=update)])

    async def hand_over(self, claim: Claim) -> Claim:
        """Gives the VM to the destination of its move, under a new epoch.

        For the source, once its processors stand still and its backends have let go of the images.
        Raises StaleClaim, StateConflict when no move is under way.
        """
        state = await self._store.read()
        present = _require(state, claim)
        if present.custody is not Custody.MOVING:
            raise StateConflict(f"VM {claim.vm} is {_described(present)}, and not moving")
        return await self._give(state, claim.vm, present.destination, claim.images)

    async def mark_unknown(self, claim: Claim, why: str) -> None:
        """Nobody can tell who runs the VM. Raises StaleClaim."""
        state = await self._store.read(_vm_key(claim.vm))
        update = {"custody": Custody.UNKNOWN, "why": why}
        await self._commit(state, [_require(state, claim).model_copy(update=update)])

    async def resolve(self, vm: str, host: str, evidence: str) -> Claim:
        """Gives a VM of unknown whereabouts to `host`, under a new epoch.

        The evidence (a sentence, kept in the entry) is what shows that it runs nowhere else.
        Raises NotFound, StateConflict.
        """
        state = await self._store.read()
        present = _ownership(state, vm)
        if present is None:
            raise NotFound(f"no host ever owned a VM {vm}")
        if present.custody is not Custody.UNKNOWN:
            raise StateConflict(f"VM {vm} is {_described(present)}: there is nothing to settle")
        return await self._give(state, vm, host, present.images, why=f"settled: {evidence}")

    async def _give(
        self, state: Snapshot, vm: str, host: str, images: Iterable[str], why: str = ""
    ) -> Claim:
        """A new claim, whose epoch is greater than every earlier one of the VM and the images."""
        images = tuple(images)
        present = _ownership(state, vm)
        epochs = [present.epoch if present else 0]
        for image in images:
            held = _image(state, image)
            if held is None:
                continue
            if held.vm not in ("", vm):
                raise StateConflict(
                    f"image {image} belongs to VM {held.vm}", remedy=f"end VM {held.vm} first"
                )
            epochs.append(held.epoch)
        claim = Claim(vm, host, max(epochs) + 1, secrets.token_hex(16), images)
        owned = Ownership(
            vm=vm,
            custody=Custody.OWNED,
            owner=host,
            epoch=claim.epoch,
            claim=claim.id,
            images=images,
            why=why,
        )
        held_images = [
            ImageClaim(image=image, epoch=claim.epoch, claim=claim.id, vm=vm) for image in images
        ]
        await self._commit(state, [owned, *held_images])
        return claim

    async def _commit(self, state: Snapshot, values: Sequence[Ownership | ImageClaim]) -> None:
        writes: list[Write] = [Put(_key(value), value.text()) for value in values]
        expect = {write.key: state.revision_of(write.key) for write in writes}
        try:
            await self._store.commit(writes, expect=expect)
        except OutcomeUnknown as unknown:
            # That it stands is certain; that it does not would not be: it may still arrive.
            try:
                now = (await self._store.read()).entries
            except Unavailable:
                raise unknown from None
            if not all(value.text() == _text(now, _key(value)) for value in values):
                raise


def _may_claim(present: Ownership, host: str) -> bool:
    own = present.custody in (Custody.OWNED, Custody.MOVING) and present.owner == host
    return own or present.custody is Custody.FREE


def _text(entries: Mapping[str, Entry], key: str) -> str:
    return entries[key].value if key in entries else ""


def _vm_key(vm: str) -> str:
    return f"vms/{vm}"


def _key(value: Ownership | ImageClaim) -> str:
    return _vm_key(value.vm) if isinstance(value, Ownership) else f"images/{value.image}"


def _ownership(state: Snapshot, vm: str) -> Ownership | None:
    entry = state.entries.get(_vm_key(vm))
    return parse(Ownership, _vm_key(vm), entry.value) if entry else None


def _image(state: Snapshot, image: str) -> ImageClaim | None:
    entry = state.entries.get(f"images/{image}")
    return parse(ImageClaim, f"images/{image}", entry.value) if entry else None


def _require(state: Snapshot, claim: Claim) -> Ownership:
    present = _ownership(state, claim.vm)
    if present is None or (present.epoch, present.claim) != (claim.epoch, claim.id):
        now = f"now it is {_described(present)}" if present else "it is not known"
        raise StaleClaim(
            f"the claim of {claim.host} on VM {claim.vm} (epoch {claim.epoch}) is stale: {now}",
            remedy="stop what still runs of it here; it must not write",
        )
    if present.custody is Custody.FREE:
        raise StaleClaim(f"VM {claim.vm} was released under this claim")
    return present


def _described(present: Ownership) -> str:
    match present.custody:
        case Custody.FREE:
            return f"free (last epoch {present.epoch})"
        case Custody.OWNED:
            return f"owned by {present.owner} (epoch {present.epoch})"
        case Custody.MOVING:
            move = f"from {present.owner} to {present.destination}"
            return f"being moved {move} (epoch {present.epoch})"
        case Custody.UNKNOWN:
            return f"unknown ({present.why}; last owner {present.owner}, epoch {present.epoch})"
