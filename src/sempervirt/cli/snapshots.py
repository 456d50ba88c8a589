"""`semper disk snapshot`, `snapshots`, `merge` and `unpin`: the layers of a disk."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sempervirt.cli.arguments import DiskName, VmName
from sempervirt.cli.output import Output, OutputOption, ago, err, listing, out, print_json
from sempervirt.cli.saved import with_bar
from sempervirt.cli.session import ask_agent
from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.sizes import format_size, parse_size
from sempervirt.disk.image_format import ImageFormat

if TYPE_CHECKING:
    from sempervirt.api.client import Client
    from sempervirt.api.schemas import LayersView, LayerView, MergingView
    from sempervirt.disk.answers import LayerState
    from sempervirt.renewal.snapshot import Consistency

POLL_S = 0.2


@cache
def _what() -> dict[LayerState, str]:
    """What is said of a layer."""
    from sempervirt.disk.answers import LayerState

    return {
        LayerState.OPENED: "being taken",
        LayerState.SEALED: "there",
        LayerState.LAPSED: "unwanted",
        LayerState.MERGING: "being merged",
    }


@cache
def _reliance() -> dict[Consistency, str]:
    """How far a snapshot can be relied upon."""
    from sempervirt.renewal.snapshot import Consistency

    return {
        Consistency.FILE_SYSTEMS: "the guest's file systems were frozen",
        Consistency.CRASH: "as after a power failure",
    }


def snapshot(
    name: VmName,
    disk: Annotated[
        list[str] | None,
        typer.Option(metavar="DISK", help="Only this disk of the VM; may be repeated."),
    ] = None,
    freeze: Annotated[
        bool | None,
        typer.Option(
            "--freeze/--no-freeze",
            help="Freeze the guest's file systems for the moment, or take no snapshot; or never. "
            "By default they are frozen where the guest's agent answers.",
        ),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take a snapshot of a running VM's disks, all at one instant.

    The guest goes on writing, into a layer above what is in the snapshot. It is frozen for at most
    two seconds, which needs qemu-guest-agent in the guest and the channel org.qemu.guest_agent.0 in
    the VM file. A disk has at most four layers: give the oldest up with semper disk merge.
    """
    from sempervirt.renewal.snapshot import Freezing

    freezing = {None: Freezing.AUTO, True: Freezing.REQUIRED, False: Freezing.NEVER}[freeze]
    with err.status(f"taking a snapshot of {name} …"):
        view = ask_agent(lambda client: client.snapshot_vm(name, disk or [], freezing))
    if output is Output.JSON:
        print_json(view)
        return
    table = listing("disk", "snapshot", "paused")
    for one in view.disks:
        table.add_row(one.disk, str(one.snapshot), f"{one.pause_ms:.1f} ms")
    out.print(table)
    frozen = "" if view.frozen_ms is None else f", for {view.frozen_ms:.0f} ms"
    why = f": {view.reason}" if view.reason else frozen
    out.print(f"consistent: {_reliance()[view.consistency]}{why}", soft_wrap=True)


def snapshots(name: DiskName, output: OutputOption = Output.TABLE) -> None:
    """Show the snapshots of a disk, and who reads them.

    A snapshot has the number of the layer that takes the writes after it; IN LAYER is how much was
    written since, until the next snapshot.
    """
    view = ask_agent(lambda client: client.layers(name))
    _show(view, output)


def merge(
    name: DiskName,
    through: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Give up snapshot N and all before it. Without it only what nobody wants goes.",
        ),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Copy at most so much a second.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Do not wait for the end of the merge.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Give snapshots of a disk up, and merge their layers into the image while the guest runs.

    The layer that takes a running guest's writes stays. When the VM has ended, that layer goes as
    well, if its own snapshot is given up.
    """
    from sempervirt.api.schemas import MergingView

    try:
        rate_bytes = None if rate is None else parse_size(rate)
    except ValueError as error:
        raise InvalidRequest.of(error) from error

    async def merged(client: Client) -> LayersView | MergingView:
        begun = await client.merge_layers(name, through, rate_bytes)
        if begun.done:
            return begun
        if detach:
            return await client.layers(name)
        return await _followed(client, name, set(begun.merging))

    view = ask_agent(merged)
    if not isinstance(view, MergingView):
        _show(view, output)
    elif output is Output.JSON:
        print_json(view)
    else:
        layers = ", ".join(map(str, view.merging))
        out.print(f"{name}: layers that went into the image: {layers or 'none'}")


def export(
    name: DiskName,
    snapshot: Annotated[int, typer.Argument(metavar="N", help="The snapshot.")],
    to: Annotated[Path, typer.Option(help="Where the image is to be; nothing is overwritten.")],
    image_format: Annotated[
        ImageFormat, typer.Option("--format", help="Of the image; qcow2 takes room for both.")
    ] = ImageFormat.RAW,
    output: OutputOption = Output.TABLE,
) -> None:
    """Write a snapshot of a disk to an image of its own, while the guest goes on."""
    path, vm = to.absolute(), name.partition("/")[0]
    view = with_bar(
        f"exporting snapshot {snapshot} of {name}",
        vm,
        lambda client: client.export_snapshot(name, snapshot, path, image_format),
    )
    if output is Output.JSON:
        print_json(view)
        return
    size, data = format_size(view.size_bytes), format_size(view.data_bytes)
    out.print(f"{view.path}: {size}, of which {data} are not zeros", soft_wrap=True)


def unpin(
    name: DiskName,
    snapshot: Annotated[int, typer.Argument(metavar="N", help="The snapshot.")],
    reader: Annotated[str, typer.Option(help="Who read it; see semper disk snapshots.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Forget a reader of a snapshot that died, so that the snapshot can be merged.

    A reader that lives on reads wrong data when its snapshot is merged: be sure that it is dead.
    """
    _show(ask_agent(lambda client: client.unpin_snapshot(name, snapshot, reader)), output)


async def _followed(client: Client, disk: str, merging: set[int]) -> LayersView:
    """Shows how far the merge is, until all those layers are gone. Raises Unavailable."""
    import asyncio

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        shown = progress.add_task(f"merging {disk}", total=None)
        while True:
            view = await client.layers(disk)
            left = merging.intersection(layer.id for layer in view.layers)
            if not left:
                return view
            if view.last_error is not None and view.task is None:
                raise Unavailable(
                    f"the merge of {disk} ended early: {view.last_error}",
                    remedy=f"mend that, and merge again: semper disk merge {disk}",
                )
            if view.task is not None:
                progress.update(
                    shown,
                    description=f"merging layer {view.task.layer} of {disk} ({view.task.step})",
                    completed=view.task.done_bytes,
                    total=view.task.total_bytes or None,
                )
            await asyncio.sleep(POLL_S)


def _show(view: LayersView, output: Output) -> None:
    if output is Output.JSON:
        print_json(view)
        return
    if not view.layers:
        out.print(f"{view.disk} has no snapshots")
        return
    table = listing("snapshot", "is", "taken", "consistent", "in layer", "read by")
    for layer in view.layers:
        readers = ", ".join(pin.reader for pin in view.pins if pin.snapshot == layer.id)
        table.add_row(
            str(layer.id),
            _what()[layer.state],
            f"{ago(layer.time)} ago",
            _worth(layer),
            format_size(layer.data_bytes),
            readers or "-",
        )
    out.print(table)
    if view.kept:
        out.print(f"{view.kept} merged layers are kept for their readers", style="yellow")
    if view.last_error:
        out.print(f"last failure: {view.last_error}", style="yellow", soft_wrap=True)


def _worth(layer: LayerView) -> str:
    return "file systems" if layer.frozen else "crash"
