"""`semper demo`: a guest whose backend is killed, live."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table

from sempervirt.cli.demo_guard import demo_guard
from sempervirt.cli.demo_passthrough import demo_passthrough
from sempervirt.cli.demo_standby import standby
from sempervirt.cli.output import Output, OutputOption, progress_console
from sempervirt.cli.session import require_here
from sempervirt.core.errors import SempervirtError, StateConflict, Unavailable
from sempervirt.guest.errors import ProbeGone, ProbeSilent

if TYPE_CHECKING:
    from sempervirt.demo.script import Act, Story
    from sempervirt.demo.trial import Trial, TrialSetup
    from sempervirt.demo.verdict import Verdict
    from sempervirt.guest.reports import Stats

REFRESH_S = 0.25
# Until the first loss, if there is one; the time is limited as well.
PEER_KILLS = 100
NOTHING_IN_FLIGHT = (
    "No kill fell on a request in flight, so no recovery was seen: choose storage that takes "
    "longer for a request (--image on a disk), or more writers."
)
# All but "null", which keeps nothing.
T = TypeVar("T")
TriedEngine = Literal["auto", "sync", "nowait", "uring", "mmap"]


def _default_image() -> Path:
    """On a disk: in memory nothing would be in flight for long enough to be struck by a kill."""
    from tempfile import gettempdir

    folder = Path("/var/tmp")
    return (folder if folder.is_dir() else Path(gettempdir())) / f"semper-demo-{os.getpid()}.raw"


def _goes_around_cache(folder: Path) -> bool:
    """Whether files there can be opened with O_DIRECT."""
    from tempfile import NamedTemporaryFile

    try:
        with NamedTemporaryFile(dir=folder) as file:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


class Screen:
    """The live display: what is being done, and what the guest sees meanwhile."""

    def __init__(self, story: Story, console: Console, *, live: bool) -> None:
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.task = self.bar.add_task("booting a guest", total=story.length)
        self._figures = Table.grid(padding=(0, 2))
        self._live = Live(self._render(), console=console, refresh_per_second=8, transient=True)
        self._enabled = live
        self._last: Stats | None = None

    def __enter__(self) -> Screen:
        if self._enabled:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._live.stop()

    def _render(self) -> RenderableType:
        return Group(self.bar, self._figures)

    def say(self, what: str) -> None:
        """Names what goes on now."""
        self.bar.update(self.task, description=what)

    def acted(self, act: Act) -> None:
        """One more act is done."""
        stall = "" if act.stall_ms is None else f", the guest waited {act.stall_ms:.1f} ms"
        self.bar.update(self.task, advance=1, description=f"{act.deed.value}{stall}")

    def show(self, stats: Stats, verdict: Verdict) -> None:
        """Shows the figures of the guest's writers."""
        iops = 0.0
        if self._last is not None and stats.monotonic_ns > self._last.monotonic_ns:
            passed_s = (stats.monotonic_ns - self._last.monotonic_ns) / 1e9
            iops = (stats.completions - self._last.completions) / passed_s
        self._last = stats
        grid = Table.grid(padding=(0, 2))
        bad = stats.io_error_count + stats.hung + stats.wrong.total
        grid.add_row(
            f"{iops:>8,.0f} requests/s",
            f"{stats.completions:,} done",
            f"{stats.verified:,} verified",
            f"{verdict.kills} kills",
            f"[{'red bold' if bad else 'green'}]{bad} errors, hung or wrong",
        )
        self._figures = grid
        self._live.update(self._render())


async def _ended_by_signals(work: Coroutine[Any, Any, T]) -> T:
    """`work`, which also tidies up when the terminal hangs up or the program is asked to end."""
    import asyncio

    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(number, task.cancel)
    return await task


async def _watch(trial: Trial, screen: Screen) -> None:
    import asyncio

    while True:
        with suppress(ProbeSilent):
            screen.show(await trial.probe.stats(), trial.verdict)
        await asyncio.sleep(REFRESH_S)


async def _run(
    setup: TrialSetup, story: Story, screen: Screen
) -> tuple[Trial, list[Act], list[tuple[float, int]]]:
    import asyncio

    from sempervirt.demo.script import play
    from sempervirt.demo.trial import Trial

    async with Trial(setup) as trial:
        screen.say("starting the writers")
        await trial.start_load()
        watcher = asyncio.create_task(_watch(trial, screen))
        try:
            acts = await play(trial, story, screen.acted)
            completions = await trial.completions()
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        screen.say("reading every block back")
        await trial.stop_load()
        return trial, acts, completions


def demo(
    context: typer.Context,
    kills: Annotated[int, typer.Option(help="How often the backend is killed.", min=0)] = 20,
    pauses: Annotated[int, typer.Option(help="How often the VM is stopped and continued.")] = 5,
    upgrades: Annotated[int, typer.Option(help="How often the backend is upgraded.")] = 1,
    writers: Annotated[int, typer.Option(help="Writers in the guest.", min=1, max=64)] = 32,
    queues: Annotated[int, typer.Option(help="Virtqueues of the disk.", min=1, max=16)] = 1,
    engine: Annotated[
        TriedEngine,
        typer.Option(help="How the backend does its I/O; auto: as a preset says."),
    ] = "auto",
    direct: Annotated[
        bool | None,
        typer.Option(
            help="Go around the host's page cache (O_DIRECT); by default where the storage can.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        int, typer.Option(help="Requests that each writer has out at a time.", min=1, max=8)
    ] = 4,
    flush_every: Annotated[
        int, typer.Option(help="Each writer flushes after so many writes; 0: never.", min=0)
    ] = 3,
    peer: Annotated[
        bool,
        typer.Option(help="Then kill qemu-storage-daemon in the same way: half a minute more."),
    ] = False,
    image: Annotated[
        Path | None, typer.Option(help="Where the disk's image is made; removed afterwards.")
    ] = None,
    plot: Annotated[
        Path, typer.Option(help="Where the picture of the guest's I/O is written.")
    ] = Path("semper-demo.png"),
    seed: Annotated[
        int | None, typer.Option(help="The same number gives the same order of events.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Boot a guest, kill its disk's backend again and again, and prove that nothing is lost.

    A stock Linux guest runs on a disk that semper-blkd serves. Writers in the guest write, flush
    and verify stamped blocks, as a database does, while the backend is killed with SIGKILL, the VM
    is stopped and continued, and the backend is upgraded. What was in flight at a kill is done
    again, and counted. At the end every block is read back.

    The exit status is 0 only if nothing was lost, nothing hung and nothing was wrong.
    """
    require_here()
    if context.invoked_subcommand is not None:
        return
    import asyncio

    from sempervirt.demo import plots, report
    from sempervirt.demo.peer import kill_until_lost, with_peer
    from sempervirt.demo.script import Story
    from sempervirt.demo.trial import Load, TrialSetup

    # Every kill is a warning of the supervision; here they are what was ordered.
    logging.getLogger("sempervirt").setLevel(logging.ERROR)
    console = progress_console(output)
    story = Story(kills=kills, pauses=pauses, upgrades=upgrades, seed=seed)
    chosen = image or _default_image()
    setup = TrialSetup(
        image=chosen,
        engine=engine,
        direct=_goes_around_cache(chosen.parent) if direct is None else direct,
        queues=queues,
        load=Load(writers=writers, depth=depth, flush_every=flush_every),
    )
    if setup.image.exists() and image is not None:
        raise StateConflict(f"{image} exists", remedy="name a path where a new image can be made")
    try:
        with Screen(story, console, live=console.is_terminal) as screen:
            trial, acts, completions = asyncio.run(_ended_by_signals(_run(setup, story, screen)))
            beside = None
            if peer:
                more = max(kills, PEER_KILLS)
                killing = kill_until_lost(with_peer(setup), more, seed, screen.say)
                beside = asyncio.run(_ended_by_signals(killing))
    except (ProbeGone, ProbeSilent) as error:
        raise SempervirtError(
            f"the guest is gone or does not answer: {error.message}",
            remedy="is this machine too busy to boot a guest? Try once more",
        ) from error
    verdict, start_ns, accelerator = trial.verdict, trial.started_ns, trial.accelerator
    drawn: str | None = str(plot)
    try:
        plots.draw_file(completions, acts, start_ns, plot)
    except (Unavailable, OSError) as error:
        drawn = None
        console.print(f"[yellow]{error}[/]")
    if output is Output.JSON:
        document = {
            **verdict.as_dict(),
            "direct": setup.direct,
            "accelerator": accelerator,
            "plot": drawn,
            "peer": beside.as_dict() if beside else None,
        }
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        width = min(console.width, 110)
        print(plots.draw_terminal(completions, acts, start_ns, width))
        console.print(report.counts(verdict, beside), report.stalls(verdict))
        for line in report.losses(beside) if beside else ():
            console.print(line, highlight=False)
        if verdict.kills and not verdict.kills_in_flight:
            console.print(f"[yellow]{NOTHING_IN_FLIGHT}[/]")
        console.print(f"accelerator: {accelerator}", f"picture: {drawn or 'none'}", sep="\n")
    for line in report.problems(verdict):
        console.print(f"[red]{line}[/]")
    if not verdict.clean:
        console.print("[red bold]Something was lost.[/]")
        raise typer.Exit(1)
    console.print("[green bold]Nothing was lost.[/]")


app = typer.Typer(invoke_without_command=True)
app.callback(epilog="Example: semper demo --kills 50 --queues 4")(demo)
app.command("guard", epilog="Example: semper demo guard")(demo_guard)
app.command("passthrough", epilog="Example: semper demo passthrough")(demo_passthrough)
app.command("standby", epilog="Example: semper demo standby --tier file")(standby)
