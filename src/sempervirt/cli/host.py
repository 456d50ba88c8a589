"""`semper host`: what this host offers to VMs, and which hosts belong to its cluster."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import timedelta
from typing import Annotated

import typer
from pydantic import BaseModel

from sempervirt.agent.cluster import Cluster, Member, begin_cluster
from sempervirt.agent.config import AgentConfig
from sempervirt.agent.host import HostProbe
from sempervirt.agent.joining import join_cluster
from sempervirt.agent.wiring import prepare_directories
from sempervirt.api.client import Client
from sempervirt.api.schemas import HostView
from sempervirt.api.views import host_view
from sempervirt.cli.output import (
    Output,
    OutputOption,
    err,
    facts,
    listing,
    out,
    print_json,
    styled,
)
from sempervirt.core.durations import format_duration
from sempervirt.trust.invitation import Invitation, parse_invitation

app = typer.Typer(no_args_is_help=True, help="This host and its cluster.")

HostName = Annotated[str, typer.Argument(metavar="NAME", help="The host's name.")]
SOON_S = 30 * 86400


@app.command("show", epilog="Example: semper host show")
def show(output: OutputOption = Output.TABLE) -> None:
    """Show the accelerator, found by running a tiny guest, and what QEMU can do.

    Works with or without an agent.
    """
    view = asyncio.run(_host())
    if output is Output.JSON:
        print_json(view)
        return
    out.print(
        facts(
            [
                ("accelerator", f"{view.accelerator} ({view.accelerator_reason})"),
                ("qemu", f"{view.qemu_version} ({view.qemu})"),
                ("machines", ", ".join(view.machines)),
                ("networks", ", ".join(view.networks)),
                ("binds queues to threads", ", ".join(view.thread_maps) or "no"),
                ("reconnects disks after", view.reconnect),
                ("sandbox", "yes" if view.sandbox else "no"),
            ]
        )
    )


async def _host() -> HostView:
    config = AgentConfig.default()
    if config.socket.exists():
        async with Client.connect(config.socket) as client:
            return await client.host()
    return host_view(await HostProbe(config.qemu, config.state_dir / "cache").facts())


@app.command("init", epilog="Example: semper host init a --listen 10.0.0.1:7443")
def init(
    name: HostName,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the agent serves the other hosts.")
    ],
    cluster: Annotated[str, typer.Option(help="A name for the whole.")] = "sempervirt",
    store: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="etcd; once for each member. Left out: SQLite, here."),
    ] = None,
) -> None:
    """Begin a cluster: make its certificate authority, and this host's certificate.

    Other hosts need a store that all of them reach: give etcd's addresses. An agent that runs
    takes part after its next start.
    """
    config = _prepared()
    issued = asyncio.run(begin_cluster(config, cluster, name, listen, store or ()))
    out.print(f"{name} is the first host of the cluster {cluster}", highlight=False)
    out.print(f"its certificate is good until {_day(issued.not_after)}", highlight=False)
    out.print(f"keep this safe, it is the key to everything: {config.trust_dir}/authority.key")


@app.command("add", epilog="Example: semper host add b > b.token")
def add(
    name: HostName,
    valid: Annotated[
        int, typer.Option("--valid", metavar="MINUTES", help="How long.", min=1, max=7 * 24 * 60)
    ] = 60,
    output: OutputOption = Output.TABLE,
) -> None:
    """Print a join token: with it, one host may join as NAME, once.

    It is a secret until then. For a host that is a member already it renews the certificate;
    the old one counts no more.
    """
    invitation = asyncio.run(_invite(name, timedelta(minutes=valid)))
    if output is Output.JSON:
        token = {"host": name, "expires": invitation.expires, "token": invitation.text()}
        typer.echo(json.dumps(token, indent=2))
        return
    typer.echo(invitation.text())
    err.print(
        f"on {name}, within {format_duration(valid * 60)}: semper host join FILE "
        "--listen HOST:PORT, with this word in FILE",
        highlight=False,
    )


@app.command("join", epilog="Example: semper host join b.token --listen 10.0.0.2:7443")
def join(
    token: Annotated[
        typer.FileText, typer.Argument(metavar="FILE", help='The join token; "-": stdin.')
    ],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where this host's agent serves the others.")
    ],
) -> None:
    """Make this host a member of the cluster that gave the token out."""
    invitation = parse_invitation(token.read())
    settings = asyncio.run(join_cluster(_prepared(), invitation, listen))
    out.print(f"this host is {settings.host} of the cluster {settings.cluster}", highlight=False)
    out.print("start its agent anew, and it serves the others: semperd")


@app.command("list", epilog="Example: semper host list --output json")
def list_hosts(output: OutputOption = Output.TABLE) -> None:
    """List the hosts of the cluster: who is there, and until when their certificates are good.

    A silent host may still run its VMs: nothing is taken from it for being silent.
    """
    members = asyncio.run(_members())
    if output is Output.JSON:
        print_json([_member_view(member) for member in members])
        return
    table = listing("host", "agent", "address", "certificate")
    for member in members:
        view = _member_view(member)
        table.add_row(view.name, styled(view.state), view.address, _expiry(view))
    out.print(table)


@app.command("revoke", epilog='Example: semper host revoke b --reason "stolen"')
def revoke(
    name: HostName,
    reason: Annotated[str, typer.Option(help="Why; it is kept.")] = "",
) -> None:
    """Make a host a stranger: its certificate counts no more. Its VMs are not touched."""
    asyncio.run(_revoke(name, reason))
    out.print(f"{name} is revoked; to take it back: semper host add {name}", highlight=False)


def _prepared() -> AgentConfig:
    config = AgentConfig.default()
    prepare_directories(config)
    return config


async def _invite(name: str, valid: timedelta) -> Invitation:
    async with Cluster.opened(AgentConfig.default()) as cluster:
        return await cluster.invite(name, valid)


async def _members() -> list[Member]:
    async with Cluster.opened(AgentConfig.default()) as cluster:
        return await cluster.members()


async def _revoke(name: str, reason: str) -> None:
    async with Cluster.opened(AgentConfig.default()) as cluster:
        await cluster.revoke(name, reason)


class MemberView(BaseModel):
    """A host as it is printed. `certificate_ends` is in seconds since the epoch."""

    name: str
    state: str
    address: str
    certificate_ends: float
    boot_id: str | None
    agent_pid: int | None


def _member_view(member: Member) -> MemberView:
    state = "revoked" if member.revoked else "alive" if member.presence else "silent"
    return MemberView(
        name=member.host.name,
        state=state,
        address=member.host.address,
        certificate_ends=member.host.not_after,
        boot_id=member.presence and member.presence.boot_id,
        agent_pid=member.presence and member.presence.pid,
    )


def _expiry(view: MemberView) -> str:
    left_s = view.certificate_ends - time.time()
    if view.state == "revoked":
        return "revoked"
    if left_s <= 0:
        return f"EXPIRED on {_day(view.certificate_ends)}; semper host add {view.name}"
    soon = f", in {format_duration(left_s)}; renew: semper host add {view.name}"
    return f"until {_day(view.certificate_ends)}" + (soon if left_s < SOON_S else "")


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(moment))
