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

    OWNED (A, 7), or FREE ── take_over, by the host B that keeps its standbys ──► OWNED (B, 8)

Everything a holder does names its claim, and a claim that is not the newest is refused
(`StaleClaim`). `hand_over` is the one instant at which ownership moves: it and `end_move`
compare the same entry, so of a source that gives up and a hand-over only one can win.

While the store is away, a VM may leave a host that dies by its images' records alone. Its claim is
then newer than the store's, and `settle` brings the store up to date.

A commit whose answer was lost is looked for at once. If it stands, all is well; if it does not, or
the store cannot be asked, OutcomeUnknown is passed on: nothing may be started then, and nothing
resumed, before the store was asked again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sempervirt.core.errors import NotFound, OutcomeUnknown, StateConflict, Unavailable
from sempervirt.store.port import Entry, Outdated, Put, Snapshot, Store, Write
from sempervirt.store.proposals import IMAGES, VMS
from sempervirt.store.records import Custody, ImageClaim, Ownership, parse

# What depends on nothing but a claim is looked at anew so often when the entry has changed.
TRIES = 5
# Of the images that standbys have left behind, the newest are known.
LEFT_MAX = 256


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
        found = _ownership(await self._read(vm), vm)
        if found is None:
            raise NotFound(f"no host ever owned a VM {vm}")
        return found

    async def claim(
        self, vm: str, host: str, images: Sequence[str] = (), *, leaving: bool = False
    ) -> Claim:
        """Takes a VM that nobody owns, or `host` itself: only it can tell that it does not run it.
        `leaving`: for a standby, which leaves the images behind that are not among `images`.

        Raises StateConflict, naming the owner, or an image that a standby has left behind.
        """
        state = await self._read(vm, images)
        present = _ownership(state, vm)
        _require_claimable(present, vm, host)
        if present is not None and (old := set(present.left).intersection(images)):
            raise StateConflict(
                f"a standby of VM {vm} has taken over, and left image {', '.join(sorted(old))}"
            )
        return await self._give(state, vm, host, images, leaving=leaving)

    async def knows(self, vm: str, image: str, epoch: int, claim: str) -> bool:
        """Whether the store knows of a claim that is on record at an image, or of a later one of
        the VM or the image.
        """
        state = await self._read(vm, [image])
        known = [one for one in (_ownership(state, vm), _image(state, image)) if one is not None]
        return any(epoch < one.epoch or (epoch, claim) == (one.epoch, one.claim) for one in known)

    async def left(self, vm: str, host: str) -> frozenset[str]:
        """The images that standbys have left behind of a VM which `host` is about to claim. Raises
        StateConflict, naming the owner.
        """
        found = _ownership(await self._read(vm), vm)
        _require_claimable(found, vm, host)
        return frozenset(found.left if found is not None else ())

    async def forget_left(self, vm: str, host: str) -> bool:
        """From now on the VM may be run with images that standbys have left behind; whether there
        were any. Raises StateConflict while another host owns it.
        """
        state = await self._read(vm)
        present = _ownership(state, vm)
        if present is None or not present.left:
            return False
        _require_claimable(present, vm, host)
        await self.release(await self._give(state, vm, host, (), forgetting=True))
        return True

    async def check(self, claim: Claim) -> Ownership:
        """The VM's entry, if `claim` is the newest. Raises StaleClaim."""
        return _require(await self._read(claim.vm), claim)

    async def release(self, claim: Claim) -> None:
        """Makes the VM free: the VM has ended, and its images are closed. Raises StaleClaim."""
        state = await self._read(claim.vm, claim.images)
        present = _require(state, claim)
        nobodys = {"custody": Custody.FREE, "owner": "", "destination": "", "why": ""}
        freed = present.model_copy(update=nobodys)
        images = (_image(state, image) for image in claim.images)
        released = [image.model_copy(update={"vm": ""}) for image in images if image is not None]
        await self._commit(state, [freed, *released])

    async def begin_move(self, claim: Claim, destination: str) -> None:
        """`destination` begins to prepare. Raises StaleClaim, StateConflict."""
        state = await self._read(claim.vm)
        present = _require(state, claim)
        if present.custody is not Custody.OWNED:
            raise StateConflict(f"VM {claim.vm} is {_described(present)}")
        update = {"custody": Custody.MOVING, "destination": destination}
        await self._commit(state, [present.model_copy(update=update)])

    async def end_move(self, claim: Claim) -> None:
        """The move is given up; the owner keeps the VM. Raises StaleClaim when it was too late."""
        state = await self._read(claim.vm)
        update = {"custody": Custody.OWNED, "destination": ""}
        await self._commit(state, [_require(state, claim).model_copy(update=update)])

    async def hand_over(self, claim: Claim) -> Claim:
        """Gives the VM to the destination of its move, under a new epoch.

        For the source, once its processors stand still and its backends have let go of the images.
        Raises StaleClaim, StateConflict when no move is under way.
        """
        state = await self._read(claim.vm, claim.images)
        present = _require(state, claim)
        if present.custody is not Custody.MOVING:
            raise StateConflict(f"VM {claim.vm} is {_described(present)}, and not moving")
        return await self._give(state, claim.vm, present.destination, claim.images)

    async def settle(self, claim: Claim) -> None:
        """Has the store know a claim that is newer than what the store has: the VM was handed over
        by its images while the store was away (docs/design/ownership.md), or the store was restored
        from a backup. Does nothing if the store knows. Raises StaleClaim for a claim that is older,
        NotAllowed where only the host that the store names may change the entry.
        """
        state = await self._read(claim.vm, claim.images)
        present = _ownership(state, claim.vm)
        if present is not None and (present.epoch, present.claim) == (claim.epoch, claim.id):
            return
        entries = (_image(state, image) for image in claim.images)
        others = [image for image in entries if image is not None]
        newest = max((one.epoch for one in (present, *others) if one is not None), default=0)
        if newest >= claim.epoch or any(one.vm not in ("", claim.vm) for one in others):
            raise StaleClaim(
                f"the claim of {claim.host} on VM {claim.vm} (epoch {claim.epoch}) is not newer "
                "than what the store has"
            )
        await self._enter(state, claim, "handed over by its images while the store was away")

    async def mark_unknown(self, claim: Claim, why: str) -> None:
        """Nobody can tell who runs the VM. Raises StaleClaim."""
        state = await self._read(claim.vm)
        update = {"custody": Custody.UNKNOWN, "why": why}
        await self._commit(state, [_require(state, claim).model_copy(update=update)])

    async def resolve(self, vm: str, host: str, evidence: str) -> Claim:
        """Gives a VM of unknown whereabouts to `host`, under a new epoch.

        The evidence (a sentence, kept in the entry) is what shows that it runs nowhere else.
        Raises NotFound, StateConflict.
        """
        images: tuple[str, ...] = ()
        for _ in range(TRIES):
            state = await self._read(vm, images)
            present = _ownership(state, vm)
            if present is None:
                raise NotFound(f"no host ever owned a VM {vm}")
            if present.custody is not Custody.UNKNOWN:
                raise StateConflict(f"VM {vm} is {_described(present)}: there is nothing to settle")
            if present.images == images:
                return await self._give(state, vm, host, images, why=f"settled: {evidence}")
            # Its entry says which images are its own, and that may have changed since.
            images = present.images
        raise Unavailable(f"the images of VM {vm} change again and again")

    async def name_standby(self, claim: Claim, host: str) -> None:
        """From now on `host` keeps standbys of the VM, and may take it over; "": nobody else does.
        Raises StaleClaim.
        """
        state = await self._read(claim.vm)
        present = _require(state, claim)
        await self._commit(state, [present.model_copy(update={"standby": host})])

    async def take_over(
        self, seen: Ownership, host: str, images: Sequence[str], evidence: str
    ) -> Claim:
        """Gives a VM to `host`, which keeps its standbys, under a new epoch. `evidence` is what has
        shown that the owner which was `seen` writes no more: of another one it says nothing.

        May be repeated after an answer that was lost. Raises StaleClaim, StateConflict.
        """
        for _ in range(TRIES):
            with suppress(Outdated):  # its host has released it meanwhile, after its end, say
                return await self._take_over(seen, host, images, evidence)
        raise Unavailable(f"the entry of VM {seen.vm} changes again and again")

    async def _take_over(
        self, seen: Ownership, host: str, images: Sequence[str], evidence: str
    ) -> Claim:
        state = await self._read(seen.vm, images)
        present = _ownership(state, seen.vm)
        if present is not None and present.owner == host and present.epoch > seen.epoch:
            return Claim(present.vm, host, present.epoch, present.claim, present.images)
        same = present is not None and (present.epoch, present.claim) == (seen.epoch, seen.claim)
        if present is None or not same or not present.custody.is_certain:
            now = _described(present) if present else "not known"
            raise StaleClaim(
                f"what was proved is of the owner of epoch {seen.epoch}, and VM {seen.vm} is {now}"
            )
        if present.standby != host:
            raise StateConflict(f"{present.standby or 'no host'} keeps standbys of VM {seen.vm}")
        why = f"taken over: {evidence}"
        return await self._give(state, seen.vm, host, images, why, leaving=True)

    async def _give(
        self,
        state: Snapshot,
        vm: str,
        host: str,
        images: Iterable[str],
        why: str = "",
        *,
        leaving: bool = False,
        forgetting: bool = False,
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
        left = () if present is None or forgetting else present.left
        if present is not None and leaving:
            left = (*left, *present.images)
        left = tuple(one for one in dict.fromkeys(left) if one not in images)
        await self._enter(state, claim, why, left[-LEFT_MAX:])
        return claim

    async def _enter(
        self, state: Snapshot, claim: Claim, why: str, left: tuple[str, ...] | None = None
    ) -> None:
        """What a later release keeps in the entries stays there."""
        vm, new = claim.vm, {"epoch": claim.epoch, "claim": claim.id}
        present = _ownership(state, vm) or Ownership(vm=vm, custody=Custody.FREE, epoch=0)
        owned = {
            "custody": Custody.OWNED,
            "owner": claim.host,
            "images": claim.images,
            "destination": "",
            "why": why,
            "left": present.left if left is None else left,
        }
        values: list[Ownership | ImageClaim] = [present.model_copy(update={**new, **owned})]
        for image in claim.images:
            held = _image(state, image)
            if held is None:
                held = ImageClaim(image=image, epoch=claim.epoch, claim=claim.id, vm=vm)
            values.append(held.model_copy(update={**new, "vm": vm}))
        await self._commit(state, values)

    async def _read(self, vm: str, images: Iterable[str] = ()) -> Snapshot:
        """The entries of a VM and of images, and no others."""
        return await self._store.read(_vm_key(vm), *map(_image_key, images))

    async def _commit(self, state: Snapshot, values: Sequence[Ownership | ImageClaim]) -> None:
        writes: list[Write] = [Put(_key(value), value.text()) for value in values]
        expect = {write.key: state.revision_of(write.key) for write in writes}
        try:
            await self._store.commit(writes, expect=expect)
        except OutcomeUnknown as unknown:
            # That it stands is certain; that it does not would not be: it may still arrive.
            try:
                now = (await self._store.read(*expect)).entries
            except Unavailable:
                raise unknown from None
            if not all(value.text() == _text(now, _key(value)) for value in values):
                raise


def _may_claim(present: Ownership, host: str) -> bool:
    own = present.custody in (Custody.OWNED, Custody.MOVING) and present.owner == host
    return own or present.custody is Custody.FREE


def _require_claimable(present: Ownership | None, vm: str, host: str) -> None:
    if present is not None and not _may_claim(present, host):
        raise StateConflict(
            f"VM {vm} is {_described(present)}",
            remedy=f"end it there first, or settle it with evidence: semper vm resolve {vm}"
            if present.custody is Custody.UNKNOWN
            else "move it, or end it there first",
        )


def _text(entries: Mapping[str, Entry], key: str) -> str:
    return entries[key].value if key in entries else ""


def _vm_key(vm: str) -> str:
    return VMS + vm


def _image_key(image: str) -> str:
    return IMAGES + image


def _key(value: Ownership | ImageClaim) -> str:
    return _vm_key(value.vm) if isinstance(value, Ownership) else _image_key(value.image)


def _ownership(state: Snapshot, vm: str) -> Ownership | None:
    entry = state.entries.get(_vm_key(vm))
    return parse(Ownership, _vm_key(vm), entry.value) if entry else None


def _image(state: Snapshot, image: str) -> ImageClaim | None:
    entry = state.entries.get(_image_key(image))
    return parse(ImageClaim, _image_key(image), entry.value) if entry else None


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
