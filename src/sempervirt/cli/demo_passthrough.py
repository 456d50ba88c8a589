"""`semper demo passthrough`: the command, its picture and its verdict."""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sempervirt.cli.output import Output, OutputOption, progress_console
from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.guest.errors import ProbeGone, ProbeSilent

if TYPE_CHECKING:
    from sempervirt.demo.passthrough.side import Blackout, Side
    from sempervirt.guest.probe import ClockOffset, ProbeClient
    from sempervirt.guest.reports import Stats

DEVICE = "nvme0n1"
IMAGE_BYTES = 64 << 20
BOOT_S = 90.0
ANSWER_S = 30.0
# Between two moves, so that the picture shows what the guest does by itself.
BETWEEN_S = 2.0
# What a stock nvme driver says when its controller does not answer.
COMPLAINTS = ("timeout", "reset controller", "I/O error", "controller is down")


@dataclass
class Shown:
    """What was seen. `clocks` are the instants of the guest (nanoseconds) from which each
    comparison with the host's clock holds; `completions` are (seconds since the load began, how
    many).
    """

    moves: list[Blackout] = field(default_factory=list)
    clocks: list[tuple[int, ClockOffset]] = field(default_factory=list)
    completions: list[tuple[float, int]] = field(default_factory=list)
    started_ns: int = 0
    stats: Stats | None = None
    problems: list[str] = field(default_factory=list)


def demo_passthrough(
    moves: Annotated[int, typer.Option(help="How often the guest moves.", min=1, max=50)] = 4,
    qemu: Annotated[
        str | None,
        typer.Option(
            help="QEMU 11.1 or newer; by default the one on the PATH.", show_default=False
        ),
    ] = None,
    plot: Annotated[
        Path, typer.Option(help="Where the picture of the guest's I/O is written.")
    ] = Path("semper-demo-passthrough.png"),
    output: OutputOption = Output.TABLE,
) -> None:
    """Move a guest that owns an NVMe controller between two QEMUs, and prove that nothing is lost.

    A stock Linux guest drives the controller with its own nvme driver; doorbells go straight to
    memory. Writers in the guest write, flush and verify stamped blocks while the guest and its
    device move back and forth. At the end every block is read back.

    The exit status is 0 only if nothing was lost, nothing hung, and the driver noticed nothing.
    """
    import asyncio

    from sempervirt.demo.passthrough.picture import draw

    console = progress_console(output)
    try:
        shown = asyncio.run(_run(moves, qemu, console))
    except (ProbeGone, ProbeSilent) as error:
        raise SempervirtError(
            f"the guest is gone or does not answer: {error.message}",
            remedy="is this machine too busy to boot a guest? Try once more",
        ) from error
    picture: str | None = str(plot)
    try:
        draw(shown.completions, [_seconds(shown, one) for one in shown.moves], plot)
    except (Unavailable, OSError) as error:
        picture = None
        console.print(f"[yellow]{error}[/]")
    if output is Output.JSON:
        json.dump(_document(shown, picture), sys.stdout, indent=2)
        print()
    else:
        console.print(_table(shown))
        console.print(f"picture: {picture or 'none'}")
    for problem in shown.problems:
        console.print(f"[red]{problem}[/]")
    if shown.problems:
        console.print("[red bold]Something was lost.[/]")
        raise typer.Exit(1)
    console.print("[green bold]Nothing was lost.[/]")


async def _run(count: int, qemu: str | None, console: Console) -> Shown:
    import tempfile

    from sempervirt.demo.trial import make_image
    from sempervirt.qemu import accel, features

    folder = Path(tempfile.mkdtemp(prefix="semper-demo-"))
    try:
        program = qemu or features.find_qemu()
        found = await features.probe(program, folder / "cache")
        if not found.passes_through:
            raise Unavailable(
                f"QEMU {found.version} cannot hand a device to its guest",
                remedy="name one that can (11.1 or newer): semper demo passthrough --qemu FILE",
            )
        kind = (await accel.probe(program)).kind
        image = folder / "nvme.raw"
        make_image(image, IMAGE_BYTES)
        shown = Shown()
        await _play(shown, folder, program, kind, image, count, console)
        return shown
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _play(
    shown: Shown, folder: Path, qemu: str, kind: str, image: Path, count: int, console: Console
) -> None:
    import asyncio

    from sempervirt.demo.passthrough.side import move, side

    async with AsyncExitStack() as scene:
        console.print(f"booting a guest with an NVMe controller of its own ({kind})")
        first = AsyncExitStack()
        here = await first.enter_async_context(
            side(folder / "0", qemu, kind, image, incoming=False)
        )
        scene.push_async_callback(first.aclose)
        probe = await here.probe(BOOT_S)
        nonce = probe.nonce
        await probe.write_start(DEVICE, writers=8, depth=2, flush_every=16)
        shown.clocks.append((0, await probe.measure_clock()))
        shown.started_ns = time.monotonic_ns()
        for number in range(1, count + 1):
            await asyncio.sleep(BETWEEN_S)
            next_scene = AsyncExitStack()
            scene.push_async_callback(next_scene.aclose)
            there = await next_scene.enter_async_context(
                side(folder / str(number), qemu, kind, image, incoming=True)
            )
            done = await move(here, there)
            shown.moves.append(done)
            console.print(f"move {number}: the guest stood still for {done.ms:.0f} ms")
            await probe.close()
            await first.aclose()
            first, here = next_scene, there
            probe = await here.probe(ANSWER_S)
            # The guest's clock stood still with the guest: from that instant on it is behind.
            stopped_ns = shown.clocks[-1][1].to_guest(done.at_ns)
            shown.clocks.append((stopped_ns, await probe.measure_clock()))
            await _look(shown, probe, nonce)
        await asyncio.sleep(BETWEEN_S)
        await _judge(shown, probe, here)
        await probe.close()


async def _look(shown: Shown, probe: ProbeClient, nonce: str) -> None:
    """Whether the guest and its device have gone on."""
    if probe.nonce != nonce:
        shown.problems.append("the guest has booted anew")
    before = (await probe.stats(device=DEVICE)).completions
    try:
        await probe.wait_stats(
            lambda stats: stats.completions > before + 100, device=DEVICE, deadline_s=ANSWER_S
        )
    except Unavailable:
        shown.problems.append(f"the device has answered nothing for {ANSWER_S:g} s after a move")


async def _judge(shown: Shown, probe: ProbeClient, here: Side) -> None:
    timeline = await probe.timeline(device=DEVICE)
    for index, number in enumerate(timeline.counts):
        guest_ns = timeline.start_ns + index * timeline.bin_ns
        offset = [clock for since, clock in shown.clocks if since <= guest_ns][-1]
        shown.completions.append(((offset.to_host(guest_ns) - shown.started_ns) / 1e9, number))
    stats = shown.stats = await probe.write_stop(device=DEVICE)
    if not stats.is_clean:
        shown.problems.append(
            f"{stats.wrong.total} wrong blocks, {stats.io_error_count} failed requests, "
            f"{stats.hung} that hang"
        )
    for line in await probe.dmesg():
        if any(complaint in line.text for complaint in COMPLAINTS):
            shown.problems.append(f"the guest's driver has noticed: {line.text}")
    try:
        counters = (await here.device.client.status()).counters
    except SempervirtError as error:
        shown.problems.append(error.message)
    else:
        if counters.errors:
            shown.problems.append(f"the mediator has failed {counters.errors} requests")


def _seconds(shown: Shown, done: Blackout) -> tuple[float, float]:
    """When the guest stood still, and until when, after the load began."""
    start = (done.at_ns - shown.started_ns) / 1e9
    return start, start + done.ms / 1e3


def _table(shown: Shown) -> Table:
    from sempervirt.demo.stall import percentile

    table = Table(title="What the guest saw", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    blackouts = [one.ms for one in shown.moves]
    stats = shown.stats
    table.add_row("moves with its device", str(len(shown.moves)))
    table.add_row(
        "stood still, ms (median, most)",
        f"{percentile(blackouts, 0.5):.0f}, {max(blackouts, default=0):.0f}",
    )
    table.add_row("doorbells captured", f"{sum(one.doorbells for one in shown.moves):,}")
    if stats is not None:
        table.add_row("requests answered", f"{stats.completions:,}")
        table.add_row("blocks verified", f"{stats.verified:,}")
        table.add_row("wrong blocks", str(stats.wrong.total))
        table.add_row("failed requests", str(stats.io_error_count))
        table.add_row("requests that hang", str(stats.hung))
    return table


def _document(shown: Shown, picture: str | None) -> dict[str, object]:
    stats = shown.stats
    return {
        "moves": len(shown.moves),
        "blackouts_ms": [round(one.ms, 1) for one in shown.moves],
        "doorbells_captured": sum(one.doorbells for one in shown.moves),
        "requests": stats.completions if stats else 0,
        "verified": stats.verified if stats else 0,
        "wrong": stats.wrong.total if stats else None,
        "failed": stats.io_error_count if stats else None,
        "hung": stats.hung if stats else None,
        "problems": shown.problems,
        "plot": picture,
    }
