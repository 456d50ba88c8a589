"""Joining a cluster: the new host's side."""

from __future__ import annotations

import time

from cryptography.hazmat.primitives import serialization

from sempervirt.api.client import Client
from sempervirt.cluster.cluster import Settings, check_address, read_settings, write_settings
from sempervirt.core.errors import NotAllowed, OutcomeUnknown, StateConflict
from sempervirt.trust.identity import Identity
from sempervirt.trust.invitation import Invitation
from sempervirt.vm.config import AgentConfig


async def join_cluster(config: AgentConfig, invitation: Invitation, address: str) -> Settings:
    """Makes this host's key, has it certified, and keeps what it was given.

    The key never leaves this host. Raises NotAllowed for a token that expired, was used or
    withdrawn, StateConflict, AgentUnavailable, OutcomeUnknown (the token may be used up).
    """
    present = read_settings(config)
    if present is not None and present.host != invitation.host:
        raise StateConflict(
            f"this host belongs to the cluster {present.cluster} as {present.host} already",
            remedy=f"ask for a token of that name: semper host add {present.host}",
        )
    check_address(address)
    if invitation.expires <= time.time():
        raise NotAllowed(
            "this join token has expired",
            remedy=f"make another one on {invitation.inviter}: semper host add {invitation.host}",
        )
    identity = Identity(config.trust_dir)
    request = identity.request(invitation.host)
    tls = invitation.client_context()
    async with Client.connect_host(invitation.address, invitation.inviter, tls) as client:
        try:
            answer = await client.join(request, address)
        except OutcomeUnknown as error:
            raise OutcomeUnknown(
                f"{invitation.inviter} did not say whether {invitation.host} may join: {error}",
                remedy="was the token used, or its agent stopped? Make another one there: "
                f"semper host add {invitation.host}",
            ) from error
    authority = invitation.authority.public_bytes(serialization.Encoding.PEM).decode()
    identity.keep(answer.certificate, authority)
    settings = Settings(answer.cluster, invitation.host, address, tuple(answer.store))
    write_settings(config, settings)
    return settings
