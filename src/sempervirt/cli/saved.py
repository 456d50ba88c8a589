"""`semper vm save`, `restore` and `clone`: a VM as a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from sempervirt.cli.arguments import VmName
from sempervirt.cli.output import Output, OutputOption, err, facts, out, print_json
from sempervirt.cli.session import ask_agent, is_here
from sempervirt.core.errors import InvalidRequest, SempervirtError, StateConflict
from sempervirt.core.sizes import format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from sempervirt.api.client import Client
    from sempervirt.api.schemas import SavedView, VmView

PAGE_BYTES = 4096
POLL_S = 0.2
Answer = TypeVar("Answer")

TapOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OLD=NEW", help="Use tap NEW where the saved VM had tap OLD; may be repeated."
    ),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="The saved state.", show_default=False)]


def save(
    name: VmName,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="The saved state; by default the agent keeps it for semper vm start.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE, if it exists, without a question.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Save a VM, with its memory and devices, to FILE, and end it. Without FILE the next semper vm
    start goes on from there.

    Memory that is a copy of what stands on the VM's disks is not written to FILE: FILE names the
    blocks. So FILE belongs to the disks as they are now, and the VM can be restored as long as
    nobody has written to the disks. If saving fails, the VM goes on.
    """
    path = None if file is None else file.absolute()
    if path is not None and not force and is_here():  # elsewhere the agent replaces nothing
        _require_replaceable(path)
    view = with_bar(f"saving {name}", name, lambda client: client.save_vm(name, path))
    if output is Output.JSON:
        print_json(view)
        return
    out.print(facts(_rows(view)))


def _require_replaceable(path: Path) -> None:
    """Asks whether a file that exists may be replaced. Raises StateConflict where nobody can be
    asked, and typer.Abort for a no.
    """
    if not path.exists():
        return
    if not sys.stdin.isatty():
        raise StateConflict(
            f"{path} exists, and is perhaps the only copy of a VM that was saved",
            remedy="choose another file, or replace this one: --force",
        )
    typer.confirm(f"{path} exists. Replace it?", abort=True, err=True)


def restore(
    file: File,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="A new name for the VM.")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="DISK=PATH", help="Where a disk's image is now; may be repeated."),
    ] = None,
    tap: TapOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a saved VM run on from the moment of the save.

    Refused if a disk was written to since the save. FILE is only read.
    """
    from sempervirt.api.schemas import RestoreRequest

    images = dict(_image(text) for text in image or [])
    request = RestoreRequest(file=file.absolute(), name=name, images=images, taps=_taps(tap))
    view = with_bar(f"restoring {file.name}", name, lambda client: client.restore_vm(request))
    _show(view, output)


def clone(
    file: File,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The new VM's name.", show_default=False)
    ],
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the copies of the disks go; by default beside FILE."
        ),
    ] = None,
    tap: TapOption = None,
    keep_macs: Annotated[
        bool,
        typer.Option(
            "--keep-macs", help="Let the network cards keep the addresses of the saved VM."
        ),
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make one more VM from a saved state, with copies of the disks.

    The copies share their blocks with the originals where the file system can do that. Inside, a
    clone is the VM that was saved: the same identities, and until the guest is rebooted the same
    addresses of network cards. Do not put clone and original on one network before that.
    """
    from sempervirt.api.schemas import RestoreRequest

    request = RestoreRequest(
        file=file.absolute(),
        name=name,
        taps=_taps(tap),
        new_macs=not keep_macs,
        copy_disks_to=(into or file.parent).absolute(),
    )
    view = with_bar(f"cloning {file.name}", name, lambda client: client.restore_vm(request))
    _show(view, output)


def _image(text: str) -> tuple[str, Path]:
    disk, equals, path = text.partition("=")
    if not equals or not disk or not path:
        raise InvalidRequest(f'"{text}" is not DISK=PATH', remedy="write root=/images/web.raw")
    return disk, Path(path).absolute()


def _taps(texts: list[str] | None) -> dict[str, str]:
    taps = {}
    for text in texts or []:
        before, equals, after = text.partition("=")
        if not equals or not before or not after:
            raise InvalidRequest(f'"{text}" is not OLD=NEW', remedy="write tap0=tap1")
        taps[before] = after
    return taps


def with_bar(text: str, name: str | None, request: Callable[[Client], Awaitable[Answer]]) -> Answer:
    """What came of `request`; a bar shows the work on the VM `name`, if the name is known."""
    import asyncio

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())

    async def _with_bar(client: Client) -> Answer:
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task(text, total=None)
            following = asyncio.ensure_future(_follow(client, name, bar, task))
            try:
                return await request(client)
            finally:
                following.cancel()

    return ask_agent(_with_bar)


async def _follow(client: Client, name: str | None, bar: Progress, task: TaskID) -> None:
    import asyncio

    while name is not None:
        with contextlib.suppress(SempervirtError):  # it is not there yet, or not any more
            work = (await client.vm(name)).work
            if work is not None:
                bar.update(task, completed=work.done, total=work.total)
        await asyncio.sleep(POLL_S)


def _show(view: VmView, output: Output) -> None:
    if output is Output.JSON:
        print_json(view)
    else:
        out.print(f"{view.name} is {view.state.value}, pid {view.pid}", highlight=False)


def _rows(view: SavedView) -> list[tuple[str, str | None]]:
    def part(pages: int) -> str:
        return format_size(pages * PAGE_BYTES)

    return [
        ("saved", f"{view.vm} to {view.file}"),
        ("size", f"{format_size(view.size)} for {format_size(view.memory)} of memory"),
        ("full of zeros", part(view.zero_pages)),
        ("named as blocks", part(view.block_pages)),
        ("packed", f"{part(view.data_pages)}"),
        ("stood still", f"{view.paused_ms / 1000:.1f} s, and has ended"),
    ]
