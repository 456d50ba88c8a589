"""`semper operator`: people who ask the agents of a cluster from elsewhere, and their roles."""

from __future__ import annotations

import time
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sempervirt.cli.output import Output, OutputOption, day, err, listing, out, print_json
from sempervirt.core.durations import format_duration

SOON_S = 7 * 86400

app = typer.Typer(
    no_args_is_help=True,
    help="People who ask the agents of the cluster from elsewhere, each with a role.",
)

OperatorName = Annotated[str, typer.Argument(metavar="NAME", help="The operator's name.")]


class OperatorRole(Enum):
    """What an operator may do; `api.rights` has the table."""

    ADMIN = "admin"
    OPERATOR = "operator"
    VIEWER = "viewer"


@app.command("add", epilog="Example: semper operator add alice --role viewer --to alice.pem")
def add(
    name: OperatorName,
    role: Annotated[OperatorRole, typer.Option(help="What the operator may do.")],
    to: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to write the key and the certificate.")
    ],
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long they are good.")] = 30,
) -> None:
    """Make an operator's key, on the host that has the authority. An earlier key counts no more."""
    import asyncio

    from sempervirt.cli import cluster as work

    asyncio.run(work.add_operator(name, role.value, timedelta(days=days), to))
    out.print(f"{name} is {role.value}, for {days} days; the key is in {to}", highlight=False)
    err.print(
        f"with that file: semper --host HOST@ADDRESS:PORT --key {to.name} vm list", highlight=False
    )


@app.command("list", epilog="Example: semper operator list --output json")
def list_operators(output: OutputOption = Output.TABLE) -> None:
    """List the operators, their roles, and when their certificates end."""
    import asyncio

    from sempervirt.cli import cluster as work
    from sempervirt.cli.members import OperatorView

    found = asyncio.run(work.operators())
    views = [
        OperatorView(name=one.name, role=one.role, certificate_ends=one.not_after) for one in found
    ]
    if output is Output.JSON:
        print_json(views)
        return
    table = listing("operator", "role", "certificate")
    for view in views:
        left_s = view.certificate_ends - time.time()
        until = ("EXPIRED on " if left_s <= 0 else "until ") + day(view.certificate_ends)
        if 0 < left_s < SOON_S:
            until += f", in {format_duration(left_s)}"
        table.add_row(view.name, view.role, until)
    out.print(table)


@app.command("revoke", epilog='Example: semper operator revoke alice --reason "has left"')
def revoke(
    name: OperatorName,
    reason: Annotated[str, typer.Option(help="Why; the store keeps the reason.")] = "",
) -> None:
    """Refuse an operator from now on, on every host."""
    import asyncio

    from sempervirt.cli import cluster as work

    asyncio.run(work.revoke_operator(name, reason))
    out.print(f"{name} is revoked; to take the operator back: semper operator add {name}")
