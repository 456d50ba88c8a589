"""`semper`: the program. One sub-command for each noun, each in a module of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import sempervirt
from sempervirt.cli import disk, host, operator, session, vm
from sempervirt.cli.output import Output, OutputOption, err
from sempervirt.core.errors import SempervirtError, kind_of
from sempervirt.demo.cli import demo

app = typer.Typer(
    name="semper",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Virtual machines that keep running when the backend of a disk dies.",
    epilog="Begin with: semper host show, then semper vm run web.toml",
)
app.add_typer(vm.app, name="vm")
app.add_typer(disk.app, name="disk")
app.add_typer(host.app, name="host")
app.add_typer(operator.app, name="operator")
app.command("demo", epilog="Example: semper demo --kills 50 --queues 4")(demo)


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
    session.choose(host_asked, key)


@app.command("version", epilog="Example: semper version")
def version(output: OutputOption = Output.TABLE) -> None:
    """Print the version of this program."""
    if output is Output.JSON:
        typer.echo(f'{{"version": "{sempervirt.__version__}"}}')
    else:
        typer.echo(f"semper {sempervirt.__version__}")


def main() -> None:
    """The entry point: an error of ours becomes one clear line and an exit code."""
    try:
        app()
    except SempervirtError as error:
        err.print(f"[bold red]semper: error:[/] {escape(error.message)}", highlight=False)
        if error.remedy:
            err.print(f"  {escape(error.remedy)}", highlight=False)
        sys.exit(kind_of(error).exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
