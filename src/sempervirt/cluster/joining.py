"""Joining a cluster: the new host's side."""

from __future__ import annotations

import time

from cryptography.hazmat.primitives import serialization
from pydantic import BaseModel, Field, TypeAdapter

from sempervirt.cluster.cluster import (
    Settings,
    check_address,
    lend,
    read_settings,
    write_credentials,
    write_settings,
)
from sempervirt.core.errors import NotAllowed, OutcomeUnknown, StateConflict
from sempervirt.host.http import Connection, understood
from sempervirt.host.places import Places
from sempervirt.store.etcd import Credentials
from sempervirt.store.records import LEVEL
from sempervirt.trust.identity import Identity, KeyRequest
from sempervirt.trust.invitation import Invitation


class JoinRequest(BaseModel):
    """What a host that joins hands over: its signing request, and where it will listen."""

    request: str = Field(max_length=8192, description="a certificate signing request, PEM")
    address: str = Field(max_length=256, description='"HOST:PORT"')
    level: int = Field(default=1, ge=1, description="what its release knows (semper host level)")


class JoinView(BaseModel):
    """What it gets: its certificate (PEM), and where the cluster keeps its state."""

    certificate: str
    cluster: str
    store: list[str]
    store_user: str = Field(default="", description='who the host is to etcd; "": nobody is asked')
    store_password: str = ""
    doors: str = Field(default="", description="the authority of invitations and operators, PEM")


async def ask_to_join(connection: Connection, request: str, address: str) -> JoinView:
    """Has a signing request (PEM) certified, over a connection that shows an invitation.

    Raises NotAllowed, InvalidRequest, OutcomeUnknown.
    """
    body = JoinRequest(request=request, address=address, level=LEVEL).model_dump()
    answer = await connection.call("POST", "/join", body=body)
    return understood(TypeAdapter(JoinView), answer, "POST /join")


async def join_cluster(
    config: Places, invitation: Invitation, address: str, etcd_files: str = ""
) -> Settings:
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
    asked = KeyRequest.made(invitation.host)
    tls = invitation.client_context()
    async with Connection.to_host(invitation.address, invitation.inviter, tls) as connection:
        try:
            answer = await ask_to_join(connection, asked.text, address)
        except OutcomeUnknown as error:
            raise OutcomeUnknown(
                f"{invitation.inviter} did not say whether {invitation.host} may join: {error}",
                remedy="was the token used, or its agent stopped? Make another one there: "
                f"semper host add {invitation.host}",
            ) from error
    authority = invitation.authority.public_bytes(serialization.Encoding.PEM).decode()
    identity.keep(asked, answer.certificate, authority, answer.doors)
    if answer.store_user:
        write_credentials(config, Credentials(answer.store_user, answer.store_password))
    etcd_files = etcd_files or (present.etcd_files if present else "")
    settings = Settings(
        answer.cluster,
        invitation.host,
        address,
        tuple(answer.store),
        etcd_files=etcd_files,
    )
    write_settings(config, settings)
    lend(identity, settings)
    return settings
