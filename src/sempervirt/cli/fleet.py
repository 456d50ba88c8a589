"""`semper cluster`: the hosts of a cluster taken together."""

from __future__ import annotations

from typing import Annotated

import typer

from sempervirt.cli.output import Output, OutputOption, listing, out, print_json
from sempervirt.cli.session import ask_agent

app = typer.Typer(no_args_is_help=True, help="The hosts of a cluster taken together.")
# As of a plan in which VMs would stay.
NO_ROOM = 5


@app.callback()
def cluster() -> None:
    """The hosts of a cluster taken together."""


@app.command("capacity", epilog="Example: semper cluster capacity --lost 2")
def capacity(
    lost: Annotated[
        int, typer.Option(metavar="N", min=1, max=3, help="How many hosts are lost together.")
    ] = 1,
    output: OutputOption = Output.TABLE,
) -> None:
    """Tell whether the VMs of the cluster have room when N of its hosts are lost.

    Every host is asked, and asks all others about each of its VMs. Exit code 5: some VMs would stay
    down.
    """
    found = ask_agent(lambda client: client.capacity(lost))
    if output is Output.JSON:
        print_json(found)
    else:
        table = listing("lost", "vms", "stay down")
        for loss in found.losses:
            down = "; ".join(f"{one.vm}: {one.why}" for one in loss.down)
            table.add_row(" and ".join(loss.hosts), str(loss.vms), down or "none")
        out.print(table)
        if len(found.losses) < found.sets:
            text = f"{len(found.losses)} of {found.sets} sets of hosts: those with most to place"
            out.print(text, highlight=False)
        for one in found.absent:
            out.print(f"nothing is known of the VMs of {one.host}: {one.why}", highlight=False)
    if not found.fits:
        raise typer.Exit(NO_ROOM)
