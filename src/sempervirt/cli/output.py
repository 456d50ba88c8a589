"""How results are printed: tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Sequence
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from sempervirt.core.durations import format_duration
from sempervirt.core.errors import NotAllowed

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sempervirt.cli.member_state import MemberState
    from sempervirt.disk.state import Condition
    from sempervirt.qemu.state import Runstate

    State = Runstate | Condition | MemberState

out = Console()
err = Console(stderr=True)


class Output(Enum):
    """The forms of output."""

    TABLE = "table"
    JSON = "json"


def progress_console(output: Output) -> Console:
    """Where a demonstration tells people how it goes: nowhere, if programs read what it prints."""
    return Console(quiet=output is Output.JSON)


OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="How to print the result.", show_default=True)
]

_GOOD, _ON_THE_WAY, _LOOK, _BAD, _ENDED = "green", "cyan", "yellow", "bold red", "dim"


@cache
def _styles() -> dict[State, str]:
    """The colour of each state."""
    from sempervirt.cli.member_state import MemberState
    from sempervirt.disk.state import Condition
    from sempervirt.qemu.state import Runstate

    return {
        Runstate.STARTING: _ON_THE_WAY,
        Runstate.RUNNING: _GOOD,
        Runstate.PAUSED: _LOOK,
        Runstate.HALTED: _LOOK,
        Runstate.STOPPING: _ON_THE_WAY,
        Runstate.UNKNOWN: _BAD,
        Runstate.STOPPED: _ENDED,
        Runstate.CRASHED: _BAD,
        Condition.STARTING: _ON_THE_WAY,
        Condition.GUARDED: _GOOD,
        Condition.UNGUARDED: _LOOK,
        Condition.RECOVERING: _ON_THE_WAY,
        Condition.STALLED: _BAD,
        Condition.MEDIUM_HANGS: _BAD,
        Condition.BACKING_OFF: _LOOK,
        Condition.FAILING: _BAD,
        Condition.FROZEN: _LOOK,
        Condition.STOPPING: _ON_THE_WAY,
        Condition.STOPPED: _ENDED,
        Condition.QEMU: _LOOK,
        Condition.EJECTED: _LOOK,
        MemberState.ALIVE: _GOOD,
        MemberState.SILENT: _LOOK,
        MemberState.OUT_OF_SERVICE: _LOOK,
        MemberState.REVOKED: _BAD,
    }


def echo_secret(text: str) -> None:
    """Prints a secret. A file that the shell has opened for the output becomes its owner's alone
    first; one that cannot become so gets nothing. Raises NotAllowed.
    """
    target = sys.stdout.fileno()
    if stat.S_ISREG(os.fstat(target).st_mode):
        try:
            os.fchmod(target, 0o600)
        except OSError as error:
            raise NotAllowed(
                f"the output is a file that others may read, and that cannot be changed: {error}",
                remedy="send the output to a file of your own",
            ) from error
    typer.echo(text)


def print_json_line(value: BaseModel) -> None:
    """One JSON document in one line, for commands that print several."""
    typer.echo(value.model_dump_json())


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """One JSON document on stdout."""
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        document: object = value.model_dump(mode="json")
    else:
        document = [item.model_dump(mode="json") for item in value]
    typer.echo(json.dumps(document, indent=2))


def styled(state: State) -> Text:
    """A state in its colour."""
    return Text(state.value, style=_styles()[state])


def listing(*columns: str) -> Table:
    """An empty table for a list of things."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.upper(), overflow="fold")
    return table


def facts(rows: Sequence[tuple[str, RenderableType | None]]) -> Table:
    """A table of names and values; rows without a value are left out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None and value != "":
            table.add_row(name, value)
    return table


def ago(moment: float) -> str:
    """How long ago a time since the epoch was."""
    return format_duration(max(0.0, time.time() - moment))


def day(moment: float) -> str:
    """The day of a time since the epoch."""
    return time.strftime("%Y-%m-%d", time.localtime(moment))


def clock(moment: float) -> str:
    """The time of day of a time since the epoch."""
    return time.strftime("%H:%M:%S", time.localtime(moment))
