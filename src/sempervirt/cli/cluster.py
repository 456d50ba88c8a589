"""What `semper host` does in a cluster. A module apart, since certificates take long to import."""

from __future__ import annotations

from datetime import timedelta

from sempervirt.cli.members import MemberState, MemberView
from sempervirt.cluster.cluster import Cluster, Member, begin_cluster
from sempervirt.cluster.joining import join_cluster
from sempervirt.trust.invitation import Invitation, parse_invitation
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.setup import prepare_directories

__all__ = ["begin_cluster", "invite", "join_cluster", "members", "parse_invitation", "prepared"]


def prepared() -> AgentConfig:
    """This user's configuration; its directories are there."""
    config = AgentConfig.default()
    prepare_directories(config)
    return config


async def invite(name: str, valid: timedelta) -> Invitation:
    """See `Cluster.invite`."""
    async with Cluster.opened(AgentConfig.default()) as cluster:
        return await cluster.invite(name, valid)


async def members() -> list[MemberView]:
    """See `Cluster.members`."""
    async with Cluster.opened(AgentConfig.default()) as cluster:
        return [_member_view(member) for member in await cluster.members()]


async def revoke(name: str, reason: str) -> None:
    """See `Cluster.revoke`."""
    async with Cluster.opened(AgentConfig.default()) as cluster:
        await cluster.revoke(name, reason)


def _member_view(member: Member) -> MemberView:
    heard = MemberState.ALIVE if member.presence else MemberState.SILENT
    return MemberView(
        name=member.host.name,
        state=MemberState.REVOKED if member.revoked else heard,
        address=member.host.address,
        certificate_ends=member.host.not_after,
        boot_id=member.presence and member.presence.boot_id,
        agent_pid=member.presence and member.presence.pid,
    )
