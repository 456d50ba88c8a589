"""`semper disk map`: which blocks of a disk stand in which pages of its guest's memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sempervirt.cli.arguments import DiskName
from sempervirt.cli.output import Output, OutputOption, ago, err, facts, out, print_json
from sempervirt.cli.session import ask_agent
from sempervirt.core.errors import InvalidRequest
from sempervirt.core.sizes import format_size

if TYPE_CHECKING:
    from sempervirt.api.client import Client
    from sempervirt.api.schemas import MapVerificationView, MapView

POLL_S = 0.2
STEPS = {"index": "reading blocks", "pages": "comparing pages"}


def show_map(
    name: DiskName,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every page in memory with the disk now.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the verified map to a file (docs/reference/map-format.md)."
        ),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show how much of a guest's memory is a copy of what stands on a disk.

    A guest uses much of its memory as a cache of its disks. At each request the backend notes
    which block of the disk went into which page of memory. A migration or a save can then name the
    block instead of sending the page.

    The notes are hints: the guest may have changed a page since. --verify compares every page with
    the disk, and also finds pages that the guest has copied or moved, by their content. Verifying
    reads each block in use once, at low priority; the guest goes on.
    """
    if export is not None and export.is_dir():
        raise InvalidRequest(f"{export} is a directory", remedy="name a file in it")
    written = None
    if export is not None:
        with err.status(f"comparing the memory of {name} with its disk …"):
            written = ask_agent(lambda client: _export(client, name, export))
    elif verify:
        ask_agent(lambda client: _verify(client, name))
    view = ask_agent(lambda client: client.block_map(name))
    if output is Output.JSON:
        print_json(view)
        return
    out.print(facts(_rows(view)))
    if written is not None:
        out.print()
        out.print(f"{export}: {format_size(written)} written")


async def _verify(client: Client, name: str) -> None:
    """Compares every page with the disk, with a bar until that is done."""
    import asyncio

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    view = await client.verify_block_map(name)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(STEPS["index"], total=None)
        while (running := view.running) is not None:
            text = STEPS.get(running.step, running.step)
            total = running.total or None
            bar.update(task, description=text, completed=running.done, total=total)
            await asyncio.sleep(POLL_S)
            view = await client.block_map(name)


async def _export(client: Client, name: str, path: Path) -> int:
    """Writes the map beside `path` and then renames the file; gives the size in bytes."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    size = 0
    try:
        with part.open("xb") as file:
            async for piece in client.export_block_map(name):
                size += file.write(piece)
        part.rename(path)
    except OSError as error:
        raise InvalidRequest(
            f"cannot write {path}: {error.strerror}", remedy="name a file that you may write"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return size


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _pages(count: int, view: MapView) -> str:
    return f"{count} pages, {format_size(count * view.page_size)}"


def _rows(view: MapView) -> list[tuple[str, str | None]]:
    memory = view.memory
    size = f"{format_size(memory.total)}, at most {format_size(memory.bound)}"
    parts = ("associations", "versions", "touched", "index")
    detail = ", ".join(f"{part} {format_size(getattr(memory, part))}" for part in parts)
    used = f"{_share(view.touched, view.blocks)} of {format_size(view.blocks * view.page_size)}"
    rows: list[tuple[str, str | None]] = [
        ("disk", view.disk),
        ("memory of the guest", _pages(view.pages, view)),
        ("noted as on disk", _noted(view)),
        ("disk in use", used),
        ("recorded", f"{view.recorded} pages, {view.dropped} could not be told"),
        ("cost in memory", f"{size} ({detail})"),
    ]
    if (running := view.running) is not None:
        rows.append(("now", f"{STEPS.get(running.step)}: {running.done} of {running.total}"))
    if view.verification is None:
        rows.append(("verified", "never; see --verify"))
    else:
        rows += _verified(view.verification, view)
    return rows


def _noted(view: MapView) -> str:
    return f"{_pages(view.associated, view)}, {_share(view.associated, view.pages)}"


def _verified(last: MapVerificationView, view: MapView) -> list[tuple[str, str | None]]:
    found = last.verified_associated + last.verified_content
    hits = f"{_share(last.verified_associated, last.associated)} of the notes were right"
    rows: list[tuple[str, str | None]] = [
        ("verified", f"{ago(last.time)} ago, in {last.seconds:.1f} s, {last.indexed} blocks"),
        ("pages in memory", f"{_pages(last.pages, view)}, {last.zero} of them all zeros"),
        ("equal to a block", f"{_pages(found, view)}, {_share(found, last.pages)} of these"),
        ("found by note", f"{last.verified_associated}; {hits}"),
        ("found by content", f"{last.verified_content}"),
    ]
    left_out = {
        "being written": last.busy,
        "beyond the index": last.beyond_limit,
        "unreadable": last.unreadable,
    }
    text = ", ".join(f"{count} {why}" for why, count in left_out.items() if count)
    return [*rows, ("blocks left out", text)]
