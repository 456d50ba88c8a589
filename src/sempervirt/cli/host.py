"""`semper host`: what this host offers to VMs, and which hosts belong to its cluster."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import timedelta
from typing import Annotated

import typer

from sempervirt.api.client import Client
from sempervirt.api.schemas import HostView
from sempervirt.api.views import host_view
from sempervirt.cli import audit
from sempervirt.cli.members import MemberState, MemberView
from sempervirt.cli.output import (
    Output,
    OutputOption,
    day,
    echo_secret,
    err,
    facts,
    listing,
    out,
    print_json,
    styled,
)
from sempervirt.cli.session import ask_agent, is_here
from sempervirt.core.durations import format_duration
from sempervirt.qemu.facts import HostProbe
from sempervirt.vm.config import AgentConfig

app = typer.Typer(
    no_args_is_help=True, help="What this host offers, and the cluster of hosts that it belongs to."
)

HostName = Annotated[str, typer.Argument(metavar="NAME", help="The host's name.")]
SOON_S = 30 * 86400


@app.command("show", epilog="Example: semper host show")
def show(output: OutputOption = Output.TABLE) -> None:
    """Show the accelerator, found by running a tiny guest, and what QEMU can do.

    Works with or without an agent.
    """
    view = asyncio.run(_host()) if is_here() else ask_agent(lambda client: client.host())
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
                ("walls that are missing", "; ".join(view.missing_walls) or "none"),
            ]
        )
    )


@app.command("audit", epilog="Example: semper host audit")
def audit_host(output: OutputOption = Output.TABLE) -> None:
    """Show what each process of a VM could do on this host, if somebody took it over.

    Works with or without an agent, for VMs of the user who asks.
    """
    audit.show(AgentConfig.default(), output)


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
    cluster: Annotated[str, typer.Option(help="The name of the cluster.")] = "sempervirt",
    store: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Address of an etcd member; may be repeated. Default: SQLite on this host.",
        ),
    ] = None,
    trust_hosts: Annotated[
        bool,
        typer.Option(
            "--trust-hosts", help="Leave etcd's users alone: each host may change all of the store."
        ),
    ] = False,
) -> None:
    """Begin a cluster: make its certificate authority, and this host's certificate.

    Other hosts can join only if all of them reach the store: give the addresses of etcd. An agent
    that already runs takes part after its next start.
    """
    from sempervirt.cli import cluster as work  # noqa: PLC0415 - certificates take long to import

    config = work.prepared()
    begun = work.begin_cluster(config, cluster, name, listen, store or (), trust_hosts=trust_hosts)
    issued = asyncio.run(begun)
    out.print(f"{name} is the first host of the cluster {cluster}", highlight=False)
    out.print(f"its certificate is good until {day(issued.not_after)}", highlight=False)
    out.print(f"keep this file safe, it is the key to everything: {config.trust_dir}/authority.key")


@app.command("add", epilog="Example: semper host add b > b.token")
def add(
    name: HostName,
    valid: Annotated[
        int,
        typer.Option(
            "--valid",
            metavar="MINUTES",
            help="How long the token is good for.",
            min=1,
            max=7 * 24 * 60,
        ),
    ] = 60,
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST",
            help="An address that the host's certificate is to name, for an etcd on that host.",
        ),
    ] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Print a join token: a secret by which one host may join as NAME, once.

    If NAME is a member already, joining again renews its certificate, and the old certificate is
    refused from then on.
    """
    from sempervirt.cli import cluster as work  # noqa: PLC0415 - certificates take long to import

    invitation = asyncio.run(
        work.invite(name, timedelta(minutes=valid), f"{address}:0" if address else "")
    )
    if output is Output.JSON:
        token = {"host": name, "expires": invitation.expires, "token": invitation.text()}
        echo_secret(json.dumps(token, indent=2))
        return
    echo_secret(invitation.text())
    err.print(
        f"on {name}, within {format_duration(valid * 60)}: semper host join FILE "
        "--listen HOST:PORT, with this token in FILE",
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
    from sempervirt.cli import cluster as work  # noqa: PLC0415 - certificates take long to import

    invitation = work.parse_invitation(token.read())
    settings = asyncio.run(work.join_cluster(work.prepared(), invitation, listen))
    out.print(f"this host is {settings.host} of the cluster {settings.cluster}", highlight=False)
    out.print("start its agent anew, and it serves the others: semperd")


@app.command("list", epilog="Example: semper host list --output json")
def list_hosts(output: OutputOption = Output.TABLE) -> None:
    """List the hosts of the cluster: whether each agent is heard, and when certificates end.

    A silent host may still run VMs: no VM is taken from a host for being silent.
    """
    from sempervirt.cli import cluster as work  # noqa: PLC0415 - certificates take long to import

    views = asyncio.run(work.members())
    if output is Output.JSON:
        print_json(views)
        return
    table = listing("host", "agent", "address", "certificate")
    for view in views:
        table.add_row(view.name, styled(view.state), view.address, _expiry(view))
    out.print(table)


@app.command("revoke", epilog='Example: semper host revoke b --reason "stolen"')
def revoke(
    name: HostName,
    reason: Annotated[str, typer.Option(help="Why; the store keeps the reason.")] = "",
) -> None:
    """Refuse a host from now on: its certificate counts no more. Its VMs are not touched."""
    from sempervirt.cli import cluster as work  # noqa: PLC0415 - certificates take long to import

    asyncio.run(work.revoke(name, reason))
    out.print(f"{name} is revoked; to take it back: semper host add {name}", highlight=False)


def _expiry(view: MemberView) -> str:
    left_s = view.certificate_ends - time.time()
    if view.state is MemberState.REVOKED:
        return "revoked"
    if left_s <= 0:
        return f"EXPIRED on {day(view.certificate_ends)}; semper host add {view.name}"
    soon = f", in {format_duration(left_s)}; renew: semper host add {view.name}"
    return f"until {day(view.certificate_ends)}" + (soon if left_s < SOON_S else "")
