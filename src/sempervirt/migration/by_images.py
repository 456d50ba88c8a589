"""A VM changes hands by its images alone, while the store is away and the host is about to die.

    the record of the VM's first image         holder a, epoch 7 ──────► holder b, epoch 8
                                                  the source, once, with the record locked

The record beside an image is what every backend has to show its claim to, so it can say whose a VM
is as well: the source changes the record of the first image, with that file locked and only if the
record is still its own. That is the instant of the hand-over; the other images follow. A source
that gives up looks at the same record under the same lock, so of both only one can win. The
destination reads whose the VM is where it asks the store otherwise.

The store has an older claim afterwards; `vm.fencing` enters the newer one when the store answers
again. What the store has given to somebody else meanwhile (`semper vm resolve`) is not on record at
the images, which refuse it, or was there first, and then the hand-over was refused.

A VM without an image that it writes has no such record, and stays until the store answers.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sempervirt.core.errors import OutcomeUnknown, StateConflict, Unavailable
from sempervirt.host.records import RecordDamaged
from sempervirt.host.storage_call import call_storage
from sempervirt.migration.destination.state import OwnershipSeen
from sempervirt.migration.events import Side
from sempervirt.store import epoch
from sempervirt.store.epoch import Admission, EpochRecord
from sempervirt.store.registry import Claim, StaleClaim
from sempervirt.vm.claims import claimed_images
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Arriving

RECORD_S = 5.0


class ImageTransfer:
    """The claim on a VM, on its way to the host `destination`: in place of
    `source.adapters.Transfer`.
    """

    def __init__(self, vm: Vm, claim: Claim, destination: str) -> None:
        self.claim = claim
        self._vm = vm
        self._destination = destination
        self._given_up = False

    async def begin(self) -> float:
        """Whether the images say that the VM is this host's; gives the seconds that this took.

        Raises StaleClaim, StateConflict for a VM without such an image, Unavailable.
        """
        before = time.monotonic()
        self._given_up = False
        for path in await _records(self._vm):
            await call_storage(path, partial(_require, path, self.claim), RECORD_S)
        return time.monotonic() - before

    async def hand_over(self) -> Claim:
        """Gives the VM to the other host. Raises StaleClaim, StateConflict; OutcomeUnknown when the
        storage does not say whether it was done.
        """
        claim = self.claim
        paths = await _records(self._vm)
        following = Claim(
            claim.vm,
            self._destination,
            claim.epoch + 1,
            secrets.token_hex(16),
            claim.images,
        )
        change = partial(self._pass_on, paths, following)
        try:
            await call_storage(paths[0], change, RECORD_S)
        except Unavailable as error:
            raise OutcomeUnknown(f"whether the VM was handed over: {error.message}") from error
        return following

    def _pass_on(self, paths: list[Path], following: Claim) -> None:
        with epoch.held(paths[0], self.claim) as replace:
            if self._given_up:
                raise StateConflict("the move was given up meanwhile")
            replace(following)
        for path in paths[1:]:
            # It is decided. What fails here is done by the destination, before its disks write.
            try:
                with epoch.held(path, self.claim) as replace:
                    replace(following)
            except (StaleClaim, Unavailable, RecordDamaged):
                continue

    async def withdraw(self) -> None:
        """Has the VM stay, unless it was handed over (StaleClaim). Raises Unavailable."""
        path = (await _records(self._vm))[0]
        await call_storage(path, partial(self._give_up, path), RECORD_S)

    def _give_up(self, path: Path) -> None:
        # A hand-over that still waits for the lock finds this when it has the lock.
        with epoch.held(path, self.claim):
            self._given_up = True

    async def make_certain(self) -> Claim | None:
        """By which claim the other host has the VM; None when somebody else has. Raises
        Unavailable, OutcomeUnknown.
        """
        path = (await _records(self._vm))[0]
        record = await call_storage(path, partial(_read, path), RECORD_S)
        claim = self.claim
        if epoch.admit(record, claim) is Admission.RENEWED:
            self._given_up = False
            return await self.hand_over()
        if record.holder != self._destination or record.epoch <= claim.epoch:
            return None
        return Claim(claim.vm, record.holder, record.epoch, record.claim, claim.images)


class ImageWord:
    """Whose a VM is that comes as `work` says, by its images: in place of the store."""

    def __init__(self, vm: Vm, host: str, work: Arriving) -> None:
        self._vm = vm
        self._host = host
        self._work = work

    async def look(self) -> OwnershipSeen:
        """Raises Unavailable."""
        work = self._work
        path = (await _records(self._vm))[0]
        record = await call_storage(path, partial(_read, path), RECORD_S)
        if record.image not in work.images:
            raise Unavailable(f"{path} is the record of another image now")
        if record.holder == self._host and record.epoch > work.epoch:
            claim = Claim(self._vm.name, self._host, record.epoch, record.claim, work.images)
            return OwnershipSeen(Side.DESTINATION, claim=claim)
        same = record.epoch == work.epoch and record.holder == work.source
        return OwnershipSeen(Side.SOURCE, moving=same)


async def _records(vm: Vm) -> list[Path]:
    """Beside each image of a VM that it writes; the first one decides. Raises StateConflict."""
    images = await claimed_images(vm.spec)
    if not images:
        raise StateConflict(
            f"VM {vm.name} writes no image, so without the store nothing says whose it is",
            remedy="it can move when the store answers again",
        )
    found: list[Path] = []
    for image in images:
        path: Callable[[], Path] = partial(epoch.record_path, image)
        found.append(await call_storage(image, path, RECORD_S))
    return found


def _require(path: Path, claim: Claim) -> None:
    with epoch.held(path, claim):
        pass


def _read(path: Path) -> EpochRecord:
    record = epoch.read_epoch(path)
    if record is None:
        raise Unavailable(f"{path} is gone: nothing says whose the VM is")
    return record
