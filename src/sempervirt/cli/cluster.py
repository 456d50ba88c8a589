"""What `semper host` does in a cluster. A module apart, since certificates take long to import."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from sempervirt.cli.member_state import MemberState
from sempervirt.cli.members import MemberView
from sempervirt.cli.session import here
from sempervirt.cluster import operators as operators_of_cluster
from sempervirt.cluster.certificate import read_standing
from sempervirt.cluster.cluster import Cluster, Member, Settings, begin_cluster, read_settings
from sempervirt.cluster.joining import join_cluster
from sempervirt.cluster.leaving import leave_cluster
from sempervirt.cluster.level import Levels, raise_level, read_levels
from sempervirt.cluster.standing import Standing
from sempervirt.core.errors import SempervirtError, StateConflict, Unavailable
from sempervirt.core.roles import Role
from sempervirt.host.places import Places
from sempervirt.store.records import Operator
from sempervirt.trust.invitation import Invitation, parse_invitation
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.setup import prepare_directories

__all__ = [
    "begin_cluster",
    "invite",
    "join_cluster",
    "leave_cluster",
    "members",
    "parse_invitation",
    "prepared",
]


def prepared() -> AgentConfig:
    """This user's configuration; its directories are there."""
    config = here()
    prepare_directories(config)
    return config


async def invite(name: str, valid: timedelta, names: str) -> Invitation:
    """See `Cluster.invite`."""
    async with Cluster.opened(here()) as cluster:
        return await cluster.invite(name, valid, names=names)


async def renew(invitation: Invitation) -> Settings:
    """See `join_cluster`, at the address that this host has. Raises StateConflict for a host that
    belongs to no cluster.
    """
    config = prepared()
    settings = read_settings(config)
    if settings is None:
        raise StateConflict(
            "this host belongs to no cluster, so there is nothing to renew",
            remedy="join one: semper host join FILE --listen HOST:PORT",
        )
    return await join_cluster(config, invitation, settings.address)


def standing(config: Places) -> Standing | None:
    """See `read_standing`."""
    return read_standing(config)


async def members() -> list[MemberView]:
    """See `Cluster.members`."""
    async with Cluster.opened(here()) as cluster:
        return [_member_view(member) for member in await cluster.members()]


async def levels(*, raised: bool) -> Levels:
    """See `cluster.level`."""
    async with Cluster.opened(here()) as cluster:
        return await (raise_level(cluster) if raised else read_levels(cluster))


async def revoke(name: str, reason: str) -> None:
    """See `Cluster.revoke`."""
    async with Cluster.opened(here()) as cluster:
        await cluster.revoke(name, reason)


async def add_operator(name: str, role: str, valid: timedelta, to: Path) -> None:
    """See `cluster.operators.add_operator`; writes the key to `to`, which must not be there.

    Raises StateConflict, Unavailable for a file that cannot be written.
    """
    try:
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise StateConflict(f"{to} exists", remedy="choose another file") from error
    except OSError as error:
        raise Unavailable(f"cannot write {to}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        try:
            async with Cluster.opened(here()) as cluster:
                made = await operators_of_cluster.add_operator(cluster, name, Role(role), valid)
        except SempervirtError:
            to.unlink(missing_ok=True)  # noqa: ASYNC240 - a local file
            raise
        file.write(made.text())


async def operators() -> list[Operator]:
    """See `cluster.operators.operators`."""
    async with Cluster.opened(here()) as cluster:
        return await operators_of_cluster.operators(cluster)


async def revoke_operator(name: str, reason: str) -> None:
    """See `cluster.operators.revoke_operator`."""
    async with Cluster.opened(here()) as cluster:
        await operators_of_cluster.revoke_operator(cluster, name, reason)


def _member_view(member: Member) -> MemberView:
    heard = MemberState.ALIVE if member.presence else MemberState.SILENT
    out = member.presence.out_of_service if member.presence else ""
    if out:
        heard = MemberState.OUT_OF_SERVICE
    return MemberView(
        name=member.host.name,
        state=MemberState.REVOKED if member.revoked else heard,
        address=member.host.address,
        certificate_ends=member.host.not_after,
        certificate_trouble=member.presence.certificate if member.presence else "",
        boot_id=member.presence and member.presence.boot_id,
        agent_pid=member.presence and member.presence.pid,
        out_of_service=out,
    )


def own_name(config: Places) -> str:
    """The name of this host in its cluster. Raises StateConflict."""
    settings = read_settings(config)
    if settings is None:
        raise StateConflict("this host belongs to no cluster", remedy="semper host join")
    return settings.host
