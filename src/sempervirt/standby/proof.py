"""The fence, by proof: does the first VM write no more, and how is that known?

    storage_can(image, where) ──► Ability        found out when a standby is enabled, and shown
    Fence.prove()             ──► Proven         it writes no more, and what shows that
                               ├► NotYet         it may still write: ask again
                               └► Impossible     nobody can tell by this storage: an operator has to

What shows it depends on where the first VM ran, and on what the storage of each disk can:

    means          proof
    LOCK_HERE      it ran on this host: its processes are killed, and seen to have ended by pidfd,
                   and the image's lock is ours: the kernel lets go of it after the last request.
    LOCK_REVOKED   it ran elsewhere, and the image's lock is ours: the server has taken it from a
                   client that fell silent, and refuses what that client writes late.
    RESERVATION    it ran elsewhere, and the device has given its reservation to this host
                   (PREEMPT AND ABORT): the device refuses what the other one writes.
    COMMAND        a command of the operator has switched its host off, and the *state* was read
                   back: that it is off counts, whatever the first command answered.
    OWN_HOST       it ran elsewhere, and the agent there has ended it and seen that by pidfd.
    OPERATOR       a person says so.

- The store's compare-and-set says who may try. It is no proof, and nothing here asks the store.
- A lock that proves something is **kept** until `let_go`, which comes when the new claim is on
  record at the image: from then on whoever else gets the lock finds that record, and refuses
  (docs/design/ownership.md). Between the two nobody else can have it.
- A lease on the storage with a watchdog would be one more of `Means`, with one more branch in
  `Fence._one`; so would a hand-over by the first host's own word.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, assert_never

from sempervirt.core.errors import Unavailable
from sempervirt.disk.image_lock import Holder, ImageLock, try_lock
from sempervirt.host.ending import KILL_DEADLINE_S, kill_and_see
from sempervirt.host.procfs import ProcessId, command_name
from sempervirt.host.reservations import Reservations, Status
from sempervirt.host.storage_call import call_storage
from sempervirt.standby.fence_command import FenceCommand, run_fence
from sempervirt.standby.means import (
    Ability,
    Impossible,
    Means,
    NotYet,
    Proof,
    Proven,
    Where,
    together,
)

# How long a file system may take to answer about a lock before the answer is "not yet".
LOCK_ANSWER_S = 5.0
# How long the last requests of a process of this host may take to end.
LAST_REQUEST_S = 4.0


# Reservations


class Reserving(Protocol):
    """A block device's reservations: `host.reservations`."""

    def register(self, key: int) -> Status:
        """See `Reservations`."""

    def reserve(self, key: int) -> Status:
        """See `Reservations`."""

    def preempt_abort(self, old: int, key: int) -> Status:
        """See `Reservations`."""


def key_of(host: str, claim: str) -> int:
    """The key of a host under a claim: both hosts can reckon it from the image's claim."""
    digest = hashlib.sha256(f"{host}/{claim}".encode()).digest()
    return int.from_bytes(digest[:8], "little") or 1


def hold_by_reservation(device: Reserving, key: int) -> bool:
    """What the first host does before its VM writes: from then on it can be fenced. Whether it has
    the reservation. Raises OSError.
    """
    return device.register(key) is Status.DONE and device.reserve(key) is Status.DONE


def prove_by_reservation(device: Reserving, old: int | None, key: int) -> Proof:
    """Takes the reservation from the host with the key `old`; None: that host has never had one.

    Asked again after an answer that was lost, the preemption finds no key `old` any more. That this
    host can reserve the device then proves that it was carried out. Raises OSError.
    """
    if old is None:
        return Impossible(
            "the first host has no reservation of the device: requests of it that are on the way "
            "cannot be ended"
        )
    if device.register(key) is not Status.DONE:
        return NotYet("the device did not take this host's key")
    preempted = device.preempt_abort(old, key)
    if preempted is Status.FAILED:
        return NotYet("whether the device has given the reservation to this host is unknown")
    if device.reserve(key) is not Status.DONE:
        return NotYet("another host has the reservation of the device")
    how = "preempted" if preempted is Status.DONE else "already gone"
    return Proven(Means.RESERVATION, f"the key {old:#x} is {how}, the reservation is {key:#x}'s")


# The fence


@dataclass(frozen=True)
class Target:
    """The VM that has to be fenced.

    `processes` are its QEMU and its backends, if it ran here; `word` is what an operator says of
    it, "" where none did, and `ended` what the host where it ran says of its end; `key` is that of
    its host's reservations, and `own_key` that of this host.
    """

    vm: str
    where: Where
    processes: tuple[ProcessId, ...] = ()
    word: str = ""
    ended: str = ""
    command: FenceCommand | None = None
    key: int | None = None
    own_key: int = 1


class _Attempt:
    """At a lock, by a call that may come back after nobody waits for it any more."""

    def __init__(self, image: Path) -> None:
        self._image = image
        self._mutex = threading.Lock()
        self._abandoned = False
        self._taken: ImageLock | None = None

    def take(self, patience_s: float) -> ImageLock | Holder:
        """In a thread of its own. Raises OSError."""
        taken = try_lock(self._image, patience_s)
        with self._mutex:
            if isinstance(taken, ImageLock):
                self._taken = taken
            if self._abandoned:
                self._close()
        return taken

    def abandon(self) -> None:
        """Nobody will have the lock: it is let go of, now or when it comes."""
        with self._mutex:
            self._abandoned = True
            self._close()

    def _close(self) -> None:
        if self._taken is not None:
            self._taken.close()
            self._taken = None


class Fence:
    """Of the disks of one VM: `images` by their names, with what the storage of each can.

    fence = Fence(first, images)
    proof = await fence.prove()      as often as it says NotYet
    … the new claim is put on record at the images …
    fence.let_go()
    """

    def __init__(
        self,
        first: Target,
        images: Mapping[str, tuple[Path, Ability]],
        open_device: Callable[[Path], Reservations] = Reservations.open,
    ) -> None:
        self._first = first
        self._images = images
        self._open_device = open_device
        self._locks: dict[str, ImageLock] = {}
        self.proofs: dict[str, Proof] = {}

    async def prove(self) -> Proof:
        """One attempt at all disks. What was proved before stays proved while its lock is kept."""
        if (living := await self._end_processes()) is not None:
            return living
        if not self._images and self._first.where is Where.HERE:
            return Proven(Means.LOCK_HERE, self._ended)
        for name, (image, ability) in self._images.items():
            if not isinstance(self.proofs.get(name), Proven):
                self.proofs[name] = await self._one(name, image, ability)
        return together(self._first.vm, self.proofs)

    def let_go(self) -> None:
        """The new claim is on record at the images, or nothing is to be taken over."""
        for lock in self._locks.values():
            lock.close()
        self._locks.clear()
        self.proofs.clear()

    async def _end_processes(self) -> NotYet | None:
        ended = await asyncio.gather(*(kill_and_see(one) for one in self._first.processes))
        for identity, seen in zip(self._first.processes, ended, strict=True):
            if not seen:
                name = command_name(identity.pid)
                return NotYet(
                    f"{name} (pid {identity.pid}) was killed and has not ended in "
                    f"{KILL_DEADLINE_S:.0f} s: it waits in the kernel "
                    f"(/proc/{identity.pid}/stack)"
                )
        return None

    async def _one(self, name: str, image: Path, ability: Ability) -> Proof:
        first = self._first
        match ability.means:
            case Means.LOCK_HERE:
                return await self._by_lock(name, image, Means.LOCK_HERE, self._ended)
            case Means.LOCK_REVOKED:
                return await self._by_lock(name, image, Means.LOCK_REVOKED, ability.why)
            case Means.RESERVATION if not first.ended:
                return await self._by_reservation(image)
            case Means.COMMAND if first.command is not None and not first.ended:
                return await run_fence(first.command)
            case Means.RESERVATION | Means.COMMAND | Means.OWN_HOST | Means.OPERATOR | None:
                if first.ended:
                    return Proven(Means.OWN_HOST, first.ended)
                if first.word:
                    return Proven(Means.OPERATOR, f"an operator says: {first.word}")
                return Impossible(ability.why)
            case _:
                assert_never(ability.means)

    @property
    def _ended(self) -> str:
        pids = ", ".join(str(one.pid) for one in self._first.processes)
        return f"its processes ({pids}) were seen to have ended" if pids else "it has no process"

    async def _by_lock(self, name: str, image: Path, means: Means, why: str) -> Proof:
        attempt = _Attempt(image)
        patience_s = LAST_REQUEST_S if means is Means.LOCK_HERE else 0.0
        try:
            taken = await call_storage(image, partial(attempt.take, patience_s), LOCK_ANSWER_S)
        except (OSError, Unavailable, asyncio.CancelledError) as error:
            attempt.abandon()
            if isinstance(error, asyncio.CancelledError):
                raise
            said = error.message if isinstance(error, Unavailable) else error.strerror
            return NotYet(f"the lock of {image} is not to be had: {said}")
        match taken:
            case Holder():
                return NotYet(f"{image} is locked by {taken}")
            case ImageLock():
                self._locks[name] = taken
                return Proven(means, f"{why}; the lock of {image} is ours")
            case _:
                assert_never(taken)

    async def _by_reservation(self, image: Path) -> Proof:
        def prove() -> Proof:
            with contextlib.closing(self._open_device(image)) as device:
                return prove_by_reservation(device, self._first.key, self._first.own_key)

        try:
            return await call_storage(image, prove, LOCK_ANSWER_S)
        except (OSError, Unavailable) as error:
            said = error.message if isinstance(error, Unavailable) else error.strerror
            return NotYet(f"the reservation of {image} is not to be had: {said}")
