"""The port of the store: a few small values that change only by compare-and-set.

Keys are paths ("vms/web"), values short texts. Every commit has a *revision*, which only grows;
an entry carries the revision of the commit that wrote it. A commit states, for each key that it
depends on or writes, the revision at which it saw it (0: absent). If one is another by now,
nothing is written. There is no write without such a statement, so no update can be lost.

A *part* of the store is a key, or a folder: "vms/" is all that stands below it. Who reads or
watches names the parts that concern him, and pays for no others: a cluster has thousands of VMs,
and some questions are asked while a guest stands still.

A *lease* ends unless it is renewed, and its entries go with it. It says that a host is alive
and nothing else: a host whose lease has ended may still run, and may still write. What keeps it
from doing harm is the epoch that its images check (see `epoch`), never the lease.

    Outdated        something else was committed in between: read again, decide again
    LeaseEnded      the lease is over: grant another one
    Unavailable     known not done: the store does not answer, is full, …
    OutcomeUnknown  a commit was sent and its answer was lost: read, and look for what was written
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sempervirt.core.errors import StateConflict


class Outdated(StateConflict):
    """An entry is not at the expected revision any more. Nothing was written."""


class LeaseEnded(StateConflict):
    """The lease has ended, and the entries under it are gone. Nothing was written."""


@dataclass(frozen=True)
class Entry:
    """A value, and the revision of the commit that wrote it."""

    value: str
    revision: int


@dataclass(frozen=True)
class Snapshot:
    """The entries of the parts that were asked for, at one revision of the store."""

    revision: int = 0
    entries: Mapping[str, Entry] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    def revision_of(self, key: str) -> int:
        """The revision to expect when `key` is written; 0 when it is absent.

        Raises ValueError for a key that was not asked for: nobody knows whether that is absent.
        """
        if not is_within(key, self.parts):
            raise ValueError(f"{key} is not of what was read: {', '.join(self.parts)}")
        entry = self.entries.get(key)
        return entry.revision if entry else 0


@dataclass(frozen=True)
class Lease:
    """Entries that were written under a lease go when the lease ends.

    `deadline` is on this host's boot clock, counted from before the request was sent: whoever
    stops then stops before the store, or anybody who reads it, takes the lease to be over.
    """

    id: int
    ttl_s: float
    deadline: float


@dataclass(frozen=True)
class Put:
    """Writes a value, under a lease if one is given."""

    key: str
    value: str
    lease: Lease | None = None


@dataclass(frozen=True)
class Delete:
    """Removes an entry."""

    key: str


Write = Put | Delete


class Store(Protocol):
    """See the module. Every method may raise Unavailable."""

    async def read(self, *parts: str) -> Snapshot:
        """The entries of these parts at one instant, all entries if none is named: never older
        than what was acknowledged.
        """
        ...

    async def commit(self, writes: Sequence[Write], *, expect: Mapping[str, int]) -> int:
        """Writes all or nothing, and returns the new revision.

        `expect` has to name every key that is written (ValueError). Raises Outdated,
        LeaseEnded, OutcomeUnknown.
        """
        ...

    def watch(self, *parts: str) -> AsyncGenerator[Snapshot]:
        """The present state of these parts first, then each later one; states that pass quickly may
        be left out. What one commit wrote in several parts may be told one after the other.

        Ends with Unavailable when the store is lost; begin again then.
        """
        ...

    async def grant(self, ttl_s: float) -> Lease:
        """A new lease of at least that length."""
        ...

    async def renew(self, lease: Lease) -> Lease:
        """The same lease, counted anew. Raises LeaseEnded."""
        ...

    async def revoke(self, lease: Lease) -> None:
        """Ends a lease and removes its entries; does nothing for a lease that has ended."""
        ...

    async def close(self) -> None:
        """Lets go of files and connections."""
        ...


def boot_clock_s() -> float:
    """Seconds since boot, time asleep included: a lease goes on while its host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def is_within(key: str, parts: Sequence[str]) -> bool:
    """Whether an entry is of one of these parts; of no parts, every entry is."""
    return not parts or any(
        key.startswith(part) if part.endswith("/") else key == part for part in parts
    )


def check_writes(writes: Sequence[Write], expect: Mapping[str, int]) -> None:
    """Refuses a write that nothing is compared for: it could lose somebody's update."""
    blind = [write.key for write in writes if write.key not in expect]
    if blind:
        raise ValueError(f"written without an expected revision: {', '.join(blind)}")


def outdated(keys: Sequence[str]) -> Outdated:
    """Somebody else was faster."""
    return Outdated(
        f"{', '.join(keys)} changed in the meantime", remedy="look at it again, then decide"
    )
