"""The level of a cluster: what every member of it knows to read, so that others may write it.

    1   the first
    2   fields that a later release has put into an entry stay there when others change it

A release knows all levels up to its own (`records.LEVEL`). Each agent says it in its entry below
alive/, and an agent of an earlier release says nothing, which is 1. The level of the cluster is one
entry. It never sinks, and is raised by a person, when every member has said that it knows the
next one: until then any of them can go back to the release from which it came. What a release
writes that an earlier one does not read, it writes from the level on that is named for it.

A member that is off has not said what it knows, and so holds the level. To be rid of it: revoke it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sempervirt.cluster.cluster import LEVEL_KEY, Cluster, level_of
from sempervirt.core.errors import StateConflict
from sempervirt.store.port import Put, Snapshot
from sempervirt.store.records import LEVEL, ClusterLevel


@dataclass(frozen=True)
class MemberLevel:
    """Of one host. `knows` is None for one that is silent: nobody knows what it would say."""

    host: str
    knows: int | None


@dataclass(frozen=True)
class Levels:
    """Of a cluster, and of the hosts that are not revoked."""

    level: int
    members: tuple[MemberLevel, ...]

    @property
    def known(self) -> int | None:
        """The level that all know; None while one is silent."""
        known = [member.knows for member in self.members if member.knows is not None]
        return min(known) if known and len(known) == len(self.members) else None

    @property
    def behind(self) -> tuple[MemberLevel, ...]:
        """Who holds the level below what others know, or below what the silent ones may know."""
        most = max((one.knows for one in self.members if one.knows is not None), default=self.level)
        return tuple(one for one in self.members if one.knows is None or one.knows < most)


async def read_levels(cluster: Cluster) -> Levels:
    """What the hosts say now. Raises Unavailable."""
    return await _levels(cluster, await cluster.store.read(LEVEL_KEY))


async def _levels(cluster: Cluster, state: Snapshot) -> Levels:
    members = [member for member in await cluster.members() if not member.revoked]
    return Levels(
        level_of(state),
        tuple(
            MemberLevel(one.host.name, None if one.presence is None else one.presence.level)
            for one in members
        ),
    )


async def raise_level(cluster: Cluster) -> Levels:
    """Raises the level to what all members know, as far as this release does.

    Raises StateConflict, which names who is behind, while it cannot be raised; NotAllowed where
    only the host with the authority may write, Unavailable, OutcomeUnknown: it may be repeated.
    """
    state = await cluster.store.read(LEVEL_KEY)
    found = await _levels(cluster, state)
    new = min(found.known or 0, LEVEL)
    if new <= found.level:
        behind = ", ".join(_described(one) for one in found.behind)
        raise StateConflict(
            f"the cluster's level is {found.level}, and not every member knows a higher one: "
            f"{behind or f'all know {found.level}'}",
            remedy="start the agents of a newer release there; one that is gone for good: "
            "semper host revoke NAME"
            if behind
            else "install a newer release on all hosts first",
        )
    put = Put(LEVEL_KEY, ClusterLevel(level=new).text())
    await cluster.store.commit([put], expect={LEVEL_KEY: state.revision_of(LEVEL_KEY)})
    return Levels(new, found.members)


def _described(member: MemberLevel) -> str:
    said = "is silent" if member.knows is None else f"knows {member.knows}"
    return f"{member.host} {said}"
