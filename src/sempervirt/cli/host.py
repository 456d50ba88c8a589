"""`semper host`: what this host offers to VMs, and which hosts belong to its cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, assert_never

import typer

from sempervirt.cli import evacuate
from sempervirt.cli.down import down
from sempervirt.cli.member_state import MemberState
from sempervirt.cli.members import MemberView
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
from sempervirt.cli.session import ask_agent, here, is_here
from sempervirt.core.durations import format_duration
from sempervirt.core.errors import InvalidRequest

if TYPE_CHECKING:
    from sempervirt.api.schemas import HostView
    from sempervirt.cluster.standing import Standing

app = typer.Typer(
    no_args_is_help=True, help="What this host offers, and the cluster of hosts that it belongs to."
)

EtcdFiles = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A directory of the user whom an etcd on this host runs as: host.pem, authority.crt "
        "and revoked.crl are kept there as well, renewed with the host's own.",
        exists=True,
        file_okay=False,
    ),
]
HostName = Annotated[str, typer.Argument(metavar="NAME", help="The host's name.")]
SOON_S = 2 * 86400


@app.command("show", epilog="Example: semper host show")
def show(output: OutputOption = Output.TABLE) -> None:
    """Show the accelerator, found by running a tiny guest, and what QEMU can do.

    Works with or without an agent.
    """
    import asyncio

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
                ("certificate", _certificate(view.certificate)),
                ("out of service", view.out_of_service),
            ]
        )
    )


@app.command("metrics", epilog="Example: semper host metrics")
def metrics() -> None:
    """Print what Prometheus would read of this host, as OpenMetrics."""
    typer.echo(ask_agent(lambda client: client.metrics()), nl=False)


@app.command("audit", epilog="Example: semper host audit")
def audit_host(output: OutputOption = Output.TABLE) -> None:
    """Show what each process of a VM could do on this host, if somebody took it over.

    Works with or without an agent, for VMs of the user who asks.
    """
    from sempervirt.cli import audit

    audit.show(here(), output)


async def _host() -> HostView:
    import asyncio

    from sempervirt.api.client import Client
    from sempervirt.api.views import host_view
    from sempervirt.cluster.service import Service
    from sempervirt.qemu.facts import HostProbe
    from sempervirt.vm.config import AgentConfig
    from sempervirt.vm.groups import why_no_groups
    from sempervirt.vm.user import why_no_users, with_users

    config = AgentConfig.default()
    if config.socket.exists():
        async with Client.connect(config.socket) as client:
            return await client.host()
    found = None
    if config.cluster_file.exists():
        from sempervirt.cli import cluster as work

        found = await asyncio.to_thread(work.standing, config)
    out_of_service = (await asyncio.to_thread(Service.read, config.state_dir)).why_not
    facts_here = await HostProbe(config.qemu, config.state_dir / "cache").facts()
    no_users, no_groups = why_no_users(with_users(config)), why_no_groups(config)
    return host_view(facts_here, found, no_users, no_groups, out_of_service)


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
    certificate_days: Annotated[
        int,
        typer.Option(
            min=1,
            max=398,
            help="How long certificates of hosts are good. Agents renew them from a third of that "
            "before the end; a host that is off for longer joins again: semper host renew.",
        ),
    ] = 7,
    etcd_files: EtcdFiles = None,
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
    import asyncio

    from sempervirt.cli import cluster as work

    config = work.prepared()
    begun = work.begin_cluster(
        config,
        cluster,
        name,
        listen,
        store or (),
        trust_hosts=trust_hosts,
        host_valid=timedelta(days=certificate_days),
        etcd_files=_directory(etcd_files),
    )
    issued = asyncio.run(begun)
    out.print(f"{name} is the first host of the cluster {cluster}", highlight=False)
    until = day(issued.not_after)
    out.print(f"its certificate is good until {until}; its agent renews it", highlight=False)
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

    If NAME is a member already, it joins again (semper host renew), and the certificates that it
    had are refused from then on.
    """
    import asyncio

    from sempervirt.cli import cluster as work

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
    etcd_files: EtcdFiles = None,
) -> None:
    """Make this host a member of the cluster that gave the token out."""
    import asyncio

    from sempervirt.cli import cluster as work

    invitation = work.parse_invitation(_read(token))
    settings = asyncio.run(
        work.join_cluster(work.prepared(), invitation, listen, _directory(etcd_files))
    )
    out.print(f"this host is {settings.host} of the cluster {settings.cluster}", highlight=False)
    out.print("start its agent anew, and it serves the others: semperd")


@app.command("leave", epilog="Example: semper host leave")
def leave(
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also if other hosts need this one's authority, or nobody can tell."
        ),
    ] = False,
) -> None:
    """Make this host one of no cluster, also after a semper host init that failed midway.

    Its agent must have ended, and no VM may be on record. Keys, settings and the store of a single
    host are put aside and not deleted: with an authority in it, keep that directory safe.
    """
    import asyncio

    from sempervirt.agent.lock import agent_lock
    from sempervirt.cli import cluster as work

    config = work.prepared()
    with agent_lock(config.state_dir, config.run_dir):
        left = asyncio.run(work.leave_cluster(config, force=force))
    out.print(f"this host belongs to no cluster; what it had is in {left.aside}", highlight=False)
    if left.host:
        err.print(f"on another host of {left.cluster}: semper host revoke {left.host}")


@app.command("renew", epilog="Example: semper host renew b.token")
def renew(
    token: Annotated[
        typer.FileText, typer.Argument(metavar="FILE", help='The join token; "-": stdin.')
    ],
) -> None:
    """Give this host another certificate, by a token from semper host add.

    Its agent does that by itself. This is for a host that was off until its certificate had ended,
    or was revoked. An agent that runs takes the certificate into use, and VMs are not touched.
    """
    import asyncio

    from sempervirt.cli import cluster as work

    settings = asyncio.run(work.renew(work.parse_invitation(_read(token))))
    out.print(
        f"this host is {settings.host} of the cluster {settings.cluster} again", highlight=False
    )


@app.command("list", epilog="Example: semper host list --output json")
def list_hosts(output: OutputOption = Output.TABLE) -> None:
    """List the hosts of the cluster: whether each agent is heard, and when certificates end.

    A silent host may still run VMs: no VM is taken from a host for being silent.
    """
    import asyncio

    from sempervirt.cli import cluster as work

    views = asyncio.run(work.members())
    if output is Output.JSON:
        print_json(views)
        return
    table = listing("host", "agent", "address", "certificate", *["why"] * _any_out(views))
    for view in views:
        why = [view.out_of_service] if _any_out(views) else []
        table.add_row(view.name, styled(view.state), view.address, _expiry(view), *why)
    out.print(table)


@app.command("level", epilog="Example: semper host level --raise")
def level(
    raised: Annotated[
        bool,
        typer.Option(
            "--raise", help="Raise it to what every host knows. It never sinks: no going back."
        ),
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what every host of the cluster knows to read, and who is behind.

    Until it is raised, each host can go back to the release from which it came.
    """
    import asyncio
    from dataclasses import asdict

    from sempervirt.cli import cluster as work

    found = asyncio.run(work.levels(raised=raised))
    if output is Output.JSON:
        typer.echo(json.dumps({**asdict(found), "known": found.known}, indent=2))
        return
    out.print(f"the cluster's level is {found.level}", highlight=False)
    table = listing("host", "knows", "")
    for one in found.members:
        knows = "?" if one.knows is None else str(one.knows)
        why = "it is silent" * (one.knows is None)
        table.add_row(one.host, knows, why or "behind" * (one in found.behind))
    out.print(table)
    if found.known is not None and found.known > found.level:
        err.print(f"all know {found.known}: semper host level --raise", highlight=False)


app.command("evacuate", epilog="Example: semper host evacuate --dry-run")(evacuate.evacuate)
app.command("return", epilog="Example: semper host return")(evacuate.return_host)
app.command("down", epilog="Example: semper host down --dry-run")(down)


@app.command("revoke", epilog='Example: semper host revoke b --reason "stolen"')
def revoke(
    name: HostName,
    reason: Annotated[str, typer.Option(help="Why; the store keeps the reason.")] = "",
) -> None:
    """Refuse a host from now on: its certificate counts no more. Its VMs are not touched."""
    import asyncio

    from sempervirt.cli import cluster as work

    asyncio.run(work.revoke(name, reason))
    out.print(f"{name} is revoked; to take it back: semper host add {name}", highlight=False)


def _read(token: typer.FileText) -> str:
    try:
        return token.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{token.name} is no join token: {error}",
            remedy=f"make one on the first host: semper host add NAME > {token.name}",
        ) from error


def _any_out(views: Sequence[MemberView]) -> bool:
    return any(view.out_of_service for view in views)


def _directory(path: Path | None) -> str:
    return "" if path is None else str(path.absolute())


def _expiry(view: MemberView) -> str:
    """When a host's certificate ends, and what keeps it from being renewed."""
    if view.state is MemberState.REVOKED:
        return "revoked"
    left_s = view.certificate_ends - time.time()
    again = f"semper host add {view.name} > {view.name}.token; there: semper host renew"
    if left_s <= 0:
        return f"EXPIRED on {day(view.certificate_ends)}; {again} {view.name}.token"
    if view.certificate_trouble:
        return f"NOT RENEWED, ends in {format_duration(left_s)}: {view.certificate_trouble}"
    silent = view.state is MemberState.SILENT and left_s < SOON_S
    why = f", in {format_duration(left_s)}; its agent is silent: start it" if silent else ""
    return f"until {day(view.certificate_ends)}{why}"


def _certificate(found: Standing | None) -> str:
    from sempervirt.cluster.standing import Age

    if found is None:
        return "none: this host belongs to no cluster"
    until = "" if found.ends is None else f"of {found.host}, until {day(found.ends)}"
    match found.age:
        case Age.FRESH:
            return f"{until}; renewed by itself"
        case Age.DUE:
            return f"{until}; due" + (f", not renewed yet: {found.failure}" * bool(found.failure))
        case Age.LATE:
            return f"{until}; NOT RENEWED: {found.failure or 'is the agent running?'}"
        case Age.ENDED:
            return f"{until} ENDED: {found.failure}".strip()
        case _:
            assert_never(found.age)
