"""The commands of `semper`: one sub-command for each noun, each in a module of its own.

A module of a noun is imported when that noun is asked for, and what a command needs when the
command runs: `semper --help` would take a second of processor time if it imported the agent.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

import sempervirt
from sempervirt.cli import events
from sempervirt.cli.output import Output, OutputOption

if TYPE_CHECKING:
    from collections.abc import Mapping


class Noun(NamedTuple):
    """A sub-command: its module, and the line of help that `semper --help` has for it."""

    module: str
    help: str


NOUNS: Mapping[str, Noun] = {
    "vm": Noun("sempervirt.cli.vm", "Run virtual machines, look at them, move them."),
    "disk": Noun(
        "sempervirt.cli.disk",
        "Look at disks and at the backends that serve them; tune and upgrade them.",
    ),
    "passthrough": Noun(
        "sempervirt.cli.passthrough",
        "Look at devices that are handed to a guest, and at whether they can be moved.",
    ),
    "standby": Noun(
        "sempervirt.cli.standby",
        "Keep a second VM ready, booted and frozen, that goes on when the first one dies.",
    ),
    "libvirt": Noun(
        "sempervirt.cli.libvirt",
        "Disks of libvirt's domains: the lines of XML, and what is wrong with a domain.",
    ),
    "host": Noun(
        "sempervirt.cli.host", "What this host offers, and the cluster of hosts that it belongs to."
    ),
    "cluster": Noun("sempervirt.cli.fleet", "The hosts of a cluster taken together."),
    "operator": Noun(
        "sempervirt.cli.operator",
        "People who ask the agents of the cluster from elsewhere, each with a role.",
    ),
    "guard": Noun(
        "sempervirt.cli.guard",
        "What tells that this host may die, what is done about it, and the kernel's module.",
    ),
    "demo": Noun(
        "sempervirt.cli.demo",
        "Boot a guest, kill its disk's backend again and again, and prove that nothing is lost.",
    ),
}


class Deferred(TyperGroup):
    """The group of all nouns. The module of a noun is imported when the noun is asked for; until
    then a group without commands stands for it, in the help and in suggestions.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, noun in NOUNS.items():
            self.add_command(TyperGroup(name=name, help=noun.help))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The name, the command and what is left of `args`. Raises typer's UsageError."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None or name not in NOUNS else load(name), rest


def load(noun: str) -> Any:
    """The whole command of a noun."""
    command = get_command(import_module(NOUNS[noun].module).app)
    command.name = noun
    return command


app = typer.Typer(
    name="semper",
    cls=Deferred,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Virtual machines that keep running when the backend of a disk dies.",
    epilog="Begin with: semper host show, then semper vm run web.toml",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        version(Output.TABLE)
        raise typer.Exit


@app.callback()
def options(
    shown: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version of this program.",
        ),
    ] = False,
    host_asked: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="NAME@ADDRESS:PORT",
            envvar="SEMPERVIRT_HOST",
            help="Ask the agent of that host, over TLS, and not this host's.",
        ),
    ] = "",
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="SEMPERVIRT_KEY",
            help="Who asks there: a file of semper operator add.",
        ),
    ] = None,
) -> None:
    """Virtual machines that keep running when the backend of a disk dies."""
    if host_asked:  # else what asks an agent need not be imported
        from sempervirt.cli import session

        session.choose(host_asked, key)


@app.command("version", epilog="Example: semper version")
def version(output: OutputOption = Output.TABLE) -> None:
    """Print the version of this program."""
    if output is Output.JSON:
        typer.echo(f'{{"version": "{sempervirt.__version__}"}}')
    else:
        typer.echo(f"semper {sempervirt.__version__}")


app.command("events", epilog="Example: semper events --follow")(events.events)
