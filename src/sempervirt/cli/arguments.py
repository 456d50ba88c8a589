"""Arguments that several commands take; the shell completes them with names from the agent."""

from __future__ import annotations

from typing import Annotated

import typer

from sempervirt.cli.completion import disk_names, vm_names

VmName = Annotated[
    str, typer.Argument(metavar="NAME", help="The VM's name.", autocompletion=vm_names)
]
_DISK = typer.Argument(metavar="VM/DISK", help="For example web/root.", autocompletion=disk_names)
DiskName = Annotated[str, _DISK]
DiskNameIfAny = Annotated[str | None, _DISK]
