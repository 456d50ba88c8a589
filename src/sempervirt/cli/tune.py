"""`semper disk tune`: finds out how disks are best served on this host's storage."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Coroutine
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sempervirt.cli.output import Output, OutputOption, err, out, print_json
from sempervirt.cli.session import require_here
from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.sizes import format_size, parse_size
from sempervirt.disk.tuning.bounds import SECONDS, Bounds

if TYPE_CHECKING:
    from sempervirt.cli import tune_output
    from sempervirt.disk.tuning.preparation import Prepared, Request

Result = TypeVar("Result")
TERMINATED = 128 + signal.SIGTERM


class Device(Enum):
    """The types of devices that have presets."""

    VHOST_USER_BLK = "vhost-user-blk"
    VIRTIO_BLK = "virtio-blk"
    VIRTIO_SCSI = "virtio-scsi"
    VIRTIO_NET = "virtio-net"


class _Terminated(Exception):
    """SIGTERM."""


def tune(
    targets: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IMAGE-OR-DIRECTORY",
            help="Where images lie. Beside an image a scratch image is used: the image itself is "
            "never written, and must not be in use. On a block device only reads are measured.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        list[Device] | None,
        typer.Option(help="Only this type of device; may be repeated.", show_default=False),
    ] = None,
    direct: Annotated[
        bool | None,
        typer.Option(
            "--direct/--cached",
            help="Only around the host's page cache, or only through the cache; default: both.",
            show_default=False,
        ),
    ] = None,
    queues: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Queues of the disk that is measured; default: one for each processor, 2 to 4.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="About the longest time for each storage.")
    ] = SECONDS,
    size: Annotated[str, typer.Option(help="Size of the scratch image.")] = "256M",
    latency_bound: Annotated[
        float,
        typer.Option(
            min=1, help="How many times the best candidate's p99 latency a winner's may be."
        ),
    ] = Bounds.latency,
    throughput_bound: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="The share of the best throughput that a winner must reach."
        ),
    ] = Bounds.throughput,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the candidates into this file (.svg, .png, .pdf)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured; write nothing.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="List the stored presets; measure nothing.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure how disks are best served on this host's storage, and keep the result.

    Every combination of engine, queues for each thread and polling is tried with 4 KiB reads and
    writes, at depth 1 and 32 on all queues. Of the combinations that hold both bounds, the one that
    serves the most requests for each second of processor time becomes a preset. VMs that are
    started afterwards use the preset where the VM file says "auto".
    """
    import asyncio

    from sempervirt.cli import tune_output
    from sempervirt.disk.backend import Blkd
    from sempervirt.disk.tuning import preparation
    from sempervirt.disk.tuning.preparation import Request
    from sempervirt.disk.tuning.tune import alone
    from sempervirt.host.places import default_state_dir

    require_here()
    if show:
        listed = asyncio.run(preparation.show(default_state_dir(), Blkd().binary(), _qemu()))
        tune_output.print_presets(listed) if output is Output.TABLE else print_json(listed)
        return
    request = Request(
        targets=targets or (),
        blkd=Blkd().binary(),
        qemu=_qemu(),
        state_dir=default_state_dir(),
        devices=tuple(each.value for each in device) if device else preparation.DEVICES,
        direct=direct,
        queues=queues,
        seconds=seconds,
        size_bytes=_size(size),
        bounds=Bounds(latency_bound, throughput_bound),
    )
    with contextlib.ExitStack() as stack:
        try:
            if not dry_run:
                stack.enter_context(alone(request.state_dir))
            _until_signalled(_tune(request, plot, dry_run=dry_run, output=output))
        except _Terminated:
            err.print("ended by SIGTERM; nothing is left behind")
            raise typer.Exit(TERMINATED) from None


async def _tune(request: Request, plot: Path | None, *, dry_run: bool, output: Output) -> None:
    from sempervirt.cli import tune_output
    from sempervirt.disk.tuning import preparation

    if plot is not None:
        tune_output.check_plot(plot)
    prepared = await preparation.prepare(request)
    if dry_run:
        planned = prepared.plan()
        tune_output.print_plan(planned) if output is Output.TABLE else print_json(planned)
        return
    report = await _run(prepared)
    if output is Output.JSON:
        print_json(report)
    else:
        tune_output.print_report(report, chart=plot is None)
        out.print(f"stored in {report.stored}; VMs use it from their next start", highlight=False)
    if plot is not None:
        tune_output.draw(report, plot)
        err.print(f"drawn: {plot}", highlight=False)
    for warning in report.warnings:
        err.print(f"[yellow]warning:[/] {warning}", highlight=False)


async def _run(prepared: Prepared) -> tune_output.TuneReport:
    from sempervirt.cli import tune_output
    from sempervirt.disk.tuning.tune import Tuning

    with tune_output.Bar(prepared.plan()) as bar:
        return await Tuning(prepared).run(bar)


def _until_signalled(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs `work`. Ctrl-C and SIGTERM cancel it, so that it cleans up, and are then raised."""
    import asyncio

    terminated = False

    async def guarded() -> Result:
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
        return await work

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if terminated:
            raise _Terminated from None
        raise


def _qemu() -> str | None:
    from sempervirt.qemu.features import find_qemu

    try:
        return find_qemu()
    except Unavailable:
        return None


def _size(text: str) -> int:
    from sempervirt.disk.tuning import preparation

    try:
        size_bytes = parse_size(text)
    except ValueError as error:
        raise InvalidRequest.of(error, "--size: ") from error
    if not preparation.SIZE_LEAST <= size_bytes <= preparation.SIZE_MOST:
        least, most = (
            format_size(size) for size in (preparation.SIZE_LEAST, preparation.SIZE_MOST)
        )
        raise InvalidRequest(
            f"--size: {text} is not between {least} and {most}", remedy=f"give {least} to {most}"
        )
    return size_bytes
