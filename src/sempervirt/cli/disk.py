"""`semper disk`: the disks of running VMs and the backends that serve them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sempervirt.cli import disk_map, guarded, snapshots, threads, tune
from sempervirt.cli.arguments import DiskName, DiskNameIfAny
from sempervirt.cli.output import (
    Output,
    OutputOption,
    ago,
    clock,
    err,
    facts,
    listing,
    out,
    print_json,
    styled,
)
from sempervirt.cli.saved import with_bar
from sempervirt.cli.session import ask_agent
from sempervirt.core.errors import InvalidRequest, SempervirtError
from sempervirt.core.sizes import format_size, parse_size

if TYPE_CHECKING:
    from sempervirt.api.schemas import DiskView, RestartView

app = typer.Typer(
    no_args_is_help=True,
    help="Look at disks and at the backends that serve them; tune and upgrade them.",
)

app.command("threads", epilog="Example: semper disk threads web/root --map 0,0,1,1")(
    threads.threads
)
app.command("map", epilog="Example: semper disk map web/root --verify")(disk_map.show_map)
app.command("snapshot", epilog="Example: semper disk snapshot web --freeze")(snapshots.snapshot)
app.command("snapshots", epilog="Example: semper disk snapshots web/root")(snapshots.snapshots)
app.command("merge", epilog="Example: semper disk merge web/root --through 3")(snapshots.merge)
app.command(
    "export", epilog="Example: semper disk export web/root 3 --to /srv/copy.qcow2 --format qcow2"
)(snapshots.export)
app.command("unpin", epilog="Example: semper disk unpin web/root 3 --reader bonn")(snapshots.unpin)
app.command("tune", epilog="Example: semper disk tune /srv/images")(tune.tune)
app.command(
    "guard",
    epilog="Example: semper disk guard /srv/images/web.raw --name web/vda --group kvm",
)(guarded.guard)
app.command("unguard", epilog="Example: semper disk unguard web/vda")(guarded.unguard)

RESTARTS_SHOWN = 8
UPGRADE_HINT = " (another one is installed: see semper disk upgrade)"


@app.command("list", epilog="Example: semper disk list")
def list_disks(output: OutputOption = Output.TABLE) -> None:
    """List the disks of all running VMs.

    ACTIVE is the process of the backend that serves, SPARE the process that takes over when the
    active one ends. A disk is guarded while its spare is ready. A disk in the condition qemu is
    served by QEMU itself and has no spare.
    """
    views = ask_agent(lambda client: client.disks())
    if output is Output.JSON:
        print_json(views)
        return
    table = listing("disk", "condition", "size", "active", "spare", "restarts", "image")
    for view in views:
        table.add_row(
            view.name,
            styled(view.condition),
            _size(view),
            str(view.active_pid or "-"),
            str(view.spare_pid or "-"),
            str(view.restart_count),
            str(view.image) + _note(view),
        )
    out.print(table)
    for view in views:
        if view.image_finding:
            out.print(f"{view.name}: {view.image_finding}", style="yellow", soft_wrap=True)


@app.command("show", epilog="Example: semper disk show web/root")
def show(name: DiskName, output: OutputOption = Output.TABLE) -> None:
    """Show one disk: condition, backend, counters, last error, and each restart with its reason."""
    view = ask_agent(lambda client: client.disk(name))
    if output is Output.JSON:
        print_json(view)
        return
    out.print(facts(_rows(view)))
    if view.restarts:
        out.print()
        out.print(_restarts(view.restarts[-RESTARTS_SHOWN:]))


@app.command("upgrade", epilog="Example: semper disk upgrade web/root")
def upgrade(
    name: DiskNameIfAny = None,
    every: Annotated[
        bool, typer.Option("--all", help="All disks that another binary is installed for.")
    ] = False,
    binary: Annotated[
        Path | None,
        typer.Option(help="Serve from this binary instead of the installed one."),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Serve a disk from the newly installed semper-blkd; the guest goes on.

    First a spare is started from the new binary. If the spare fails, the present backend goes on
    serving. With --all one disk after the other; one that cannot be upgraded keeps none from it.
    """
    if (name is None) is not every or (every and binary is not None):
        raise InvalidRequest(
            "one disk, or all of them by the installed binary",
            remedy="write semper disk upgrade VM/DISK, or semper disk upgrade --all",
        )
    if name is None:
        _upgrade_all(output)
        return
    view = _upgrade(name, binary.absolute() if binary else None)
    if output is Output.JSON:
        print_json(view)
    else:
        out.print(f"{name} is served by {view.binary}, pid {view.active_pid}")


def _upgrade(name: str, binary: Path | None) -> DiskView:
    with err.status(f"upgrading {name} …"):
        return ask_agent(lambda client: client.upgrade_disk(name, binary))


def _upgrade_all(output: Output) -> None:
    """All disks that are served by another binary than the installed one. Raises the first error
    once all have been tried; people are told all of them.
    """
    views: list[DiskView] = []
    failed: list[SempervirtError] = []
    for disk in ask_agent(lambda client: client.disks()):
        if not disk.upgrade_available:
            continue
        try:
            view = _upgrade(disk.name, None)
        except SempervirtError as error:
            failed.append(error)
            if output is not Output.JSON:
                err.print(f"{disk.name} was not upgraded: {error}", soft_wrap=True)
            continue
        views.append(view)
        if output is not Output.JSON:
            out.print(f"{view.name} is served by {view.binary}, pid {view.active_pid}")
    if output is Output.JSON:
        print_json(views)
    elif not (views or failed):
        out.print("every disk is served by the installed binary")
    if failed:
        raise failed[0]


@app.command("resize", epilog="Example: semper disk resize web/root 64G")
def resize(
    name: DiskName,
    size: Annotated[str, typer.Argument(help="The new size: bytes, or with K, M, G, T or P.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a disk larger while its guest runs; the guest is told.

    The image grows (as a sparse file, it takes no space at once), then all of it is served. A disk
    is never made smaller. A block device has to be made larger first, by lvextend for example. What
    the guest makes of the new space, a larger partition and file system, is up to the guest.
    """
    try:
        size_bytes = parse_size(size)
    except ValueError as error:
        raise InvalidRequest.of(error) from error
    view = ask_agent(lambda client: client.resize_disk(name, size_bytes))
    if output is Output.JSON:
        print_json(view)
        return
    told = "" if view.told else "; QEMU reads that when it connects to the disk the next time"
    out.print(f"{name} has {format_size(view.size_bytes)} now{told}")


@app.command("rescue", epilog="Example: semper disk rescue web/root --to /srv/copy.raw")
def rescue(
    name: DiskName,
    to: Annotated[Path, typer.Option(help="Where the copy is to be; nothing is overwritten.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Copy the image of a running disk, also one that was removed or replaced under its VM.

    The guest stands still while the image is copied, so that the copy is of one moment: for
    milliseconds where the file system can share blocks (btrfs, XFS), otherwise for as long as the
    copy takes. It then runs on with its own image: to lose nothing of an image that was removed,
    pause the VM, rescue the disk, and kill the VM.

    An image that was only renamed is put back to its path without a copy, if --to names that path.
    """
    from sempervirt.disk.rescue import How

    path = to.absolute()
    vm = name.partition("/")[0]
    view = with_bar(f"copying {name}", vm, lambda client: client.rescue_disk(name, path))
    if output is Output.JSON:
        print_json(view)
        return
    still = "" if view.paused_ms is None else f"; the guest stood still {view.paused_ms:.0f} ms"
    if view.how is How.LINKED:
        out.print(f"the image of {name} is at {view.path} again")
    else:
        size = format_size(view.size_bytes)
        out.print(f"{name} is {view.how.value} to {view.path}, {size}{still}", soft_wrap=True)


def _note(view: DiskView) -> str:
    """What has become of the image, behind its path."""
    from sempervirt.disk.image import ImageState

    return "" if view.image_state is ImageState.IN_PLACE else f" ({view.image_state.value})"


def _size(view: DiskView) -> str:
    return format_size(view.size_bytes) if view.size_bytes is not None else "?"


def _rows(view: DiskView) -> list[tuple[str, str | None]]:
    from sempervirt.disk.state import Condition

    backend = view.backend or {}
    if view.condition is Condition.QEMU:
        return _own_rows(view)
    ejected = view.condition is Condition.EJECTED
    spare = f"{view.spare_pid} ({'ready' if view.spare_ready else 'preparing'})"
    rows: list[tuple[str, str | None]] = [
        ("disk", view.name),
        ("condition", f"ejected: {view.reason}" if ejected else view.condition.value),
        ("image", f"{view.image} ({_size(view)}{', read-only' if view.read_only else ''})"),
        ("", view.image_finding),
        ("active", f"{view.active_pid or 'none'}, generation {view.generation}"),
        ("spare", spare if view.spare_pid else "none"),
        ("socket", str(view.socket) if view.socket else None),
        ("binary", view.binary + (UPGRADE_HINT if view.upgrade_available else "")),
        ("state", backend.get("state")),
        ("engine", _engine(backend)),
        ("queues", view.queues.summary if view.queues else None),
        ("requests", _counters(backend)),
        ("restarts", f"{view.restart_count}, upgrades {view.upgrade_count}"),
    ]
    if view.reason and not ejected:
        rows.append(("last end", view.reason))
    if view.silence:
        rows.append(("backend", f"does not answer: {view.silence}"))
    if view.last_error:
        rows.append(("last error", describe_error(view.last_error)))
    return rows


def _own_rows(view: DiskView) -> list[tuple[str, str | None]]:
    """A disk that QEMU itself serves."""
    return [
        ("disk", view.name),
        ("condition", "qemu: served by QEMU itself, without a spare"),
        ("image", f"{view.image} ({_size(view)}{', read-only' if view.read_only else ''})"),
        ("pid", str(view.active_pid)),
        ("queues", view.queues.summary if view.queues else None),
    ]


def describe_error(error: dict[str, object]) -> str:
    """The last error of a backend, with its cause, in one line."""
    where = f"{error.get('op')} of {error.get('length')} bytes at {error.get('offset')}"
    return f"{where}: {error.get('message')} ({error.get('time')})"


def _engine(backend: dict[str, object]) -> str | None:
    if not backend:
        return None
    return f"{backend.get('engine')}{', direct' if backend.get('direct') else ''}"


def _counters(backend: dict[str, object]) -> str | None:
    queues = backend.get("queues")
    if not isinstance(queues, list):
        return None
    names = ("reads", "writes", "flushes", "errors", "replayed", "in_flight")
    sums = {name: sum(int(queue.get(name, 0)) for queue in queues) for name in names}
    return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in sums.items())


def _connection(kept: bool | None) -> str:
    """What QEMU saw of a restart."""
    if kept is None:
        return "-"
    return "saw nothing" if kept else "connected again"


def _restarts(restarts: list[RestartView]) -> Table:
    """Restarts; the milestones of a restart in milliseconds after the agent saw its cause."""
    table = listing(
        "time", "ago", "why", "pid", "QEMU", "lock", "accepted", "started", "first done"
    )
    steps = ("lock_acquired", "accepted", "started", "first_completion")
    for restart in restarts:
        times = [restart.milestones_ms.get(step) for step in steps]
        table.add_row(
            clock(restart.time),
            ago(restart.time),
            restart.reason,
            str(restart.successor_pid or "-"),
            _connection(restart.kept_connection),
            *("-" if ms is None else f"{ms:.1f} ms" for ms in times),
        )
    return table
