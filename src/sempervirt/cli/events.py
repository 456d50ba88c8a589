"""`semper events`: what happened on this host, and what happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sempervirt.cli.output import Output, OutputOption, clock, out, print_json_line

if TYPE_CHECKING:
    from sempervirt.api.client import Client
    from sempervirt.api.event_schemas import AnnouncedView, GapView


def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Then print what happens, until Ctrl-C.")
    ] = False,
    after: Annotated[
        str, typer.Option(metavar="ID", help="Only what came after the event with this id.")
    ] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Print what happened to VMs and disks, oldest first, each with its evidence.

    With --output json each event is a line, and has an id: --after ID goes on after it.
    """
    from sempervirt.cli.session import ask_agent

    async def show(client: Client) -> None:
        async for event in client.events(after=after, follow=follow):
            _print(event, output)

    ask_agent(show)


def _print(event: AnnouncedView | GapView, output: Output) -> None:
    if output is Output.JSON:
        print_json_line(event)
        return
    if event.kind == "gap":
        out.print("… events before this point are not kept any more", style="yellow")
        return
    said = "  ".join(f"{name}={value}" for name, value in event.evidence.items() if value)
    out.print(
        f"{clock(event.time)}  {event.subject}  {event.kind}: {event.message}"
        + (f"  ({said})" if said else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
