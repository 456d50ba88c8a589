"""`semper standby`: VMs that are already up when the first one dies."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from sempervirt.cli.arguments import VmName
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
)
from sempervirt.cli.session import ask_agent
from sempervirt.core.durations import format_duration
from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.sizes import format_size
from sempervirt.standby.values import Tier

if TYPE_CHECKING:
    from sempervirt.api.client import Client
    from sempervirt.api.schemas import GenerationView, RehearsalView, StandbyView, TakeOverView

POLL_S = 0.5
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

app = typer.Typer(
    no_args_is_help=True,
    help="Keep a second VM ready, booted and frozen, that goes on when the first one dies.",
)


def parse_every(text: str) -> float:
    """Seconds of "90s", "10m", "2h" or "1d". Raises InvalidRequest."""
    match = re.fullmatch(r"(\d{1,7})([smhd])", text.strip())
    if match is None:
        raise InvalidRequest(f'"{text}" is no span of time', remedy="write for example 90s or 10m")
    return float(int(match[1]) * _UNITS[match[2]])


@app.command("enable", epilog="Example: semper standby enable web --every 10m --tier ready")
def enable(
    name: VmName,
    every: Annotated[
        str, typer.Option(metavar="SPAN", help="Make a new one so often: 90s, 10m, 2h.")
    ] = "10m",
    keep: Annotated[int, typer.Option(metavar="N", help="Keep so many that are ready.")] = 1,
    tier: Annotated[
        Tier,
        typer.Option(help="ready: memory in memory, a QEMU waits; file: all in a file, slower."),
    ] = Tier.READY,
    on: Annotated[
        str, typer.Option(metavar="HOST", help="Keep them on that host, which shares the storage.")
    ] = "",
    test_every: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Rehearse a take-over so often: 7d.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when the first standby is ready.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Keep standbys of a running VM: booted from a snapshot of its disks, with its identity.

    What the VM writes to a disk after the snapshot is not there when a standby takes over; semper
    standby show tells the window. A disk with keep = "latest" in the VM file is handed over as it
    is, and loses nothing. The new standby is ready before the old one goes.

    One on another host outlives this one. How it is proved there that this host writes no more is
    shown for each disk: where nothing proves it, only an operator has the standby take over.
    """
    from sempervirt.api.schemas import EnableStandbyRequest

    tested = None if test_every is None else parse_every(test_every)
    request = EnableStandbyRequest(
        every_s=parse_every(every), keep=keep, tier=tier, on=on, test_every_s=tested
    )

    async def enabled(client: Client) -> StandbyView:
        view = await client.enable_standby(name, request)
        return await _ready(client, name) if wait else view

    with err.status(f"making a standby of {name} …") if wait else err.status("…"):
        view = ask_agent(enabled)
    _show(view, output)


async def _ready(client: Client, name: str) -> StandbyView:
    """Waits until a standby is ready. Raises Unavailable when it was not made."""
    import asyncio

    from sempervirt.standby.state import Life

    while True:
        view = await client.standby(name)
        if any(one.life is Life.READY for one in view.generations):
            return view
        if view.trouble:
            raise Unavailable(view.trouble, remedy=f"it is tried again: semper standby show {name}")
        await asyncio.sleep(POLL_S)


@app.command("list", epilog="Example: semper standby list")
def list_standbys(output: OutputOption = Output.TABLE) -> None:
    """List the VMs that have standbys.

    WINDOW is what the system disk would lose now.
    """
    from sempervirt.standby.state import Life

    views = ask_agent(lambda client: client.standbys())
    if output is Output.JSON:
        print_json(views)
        return
    table = listing("vm", "ready", "tier", "every", "window", "trouble")
    for view in views:
        ready = [one for one in view.generations if one.life is Life.READY]
        table.add_row(
            view.vm,
            str(len(ready)),
            view.tier.value,
            format_duration(view.every_s),
            ago(ready[-1].taken) if ready else "-",
            Text(view.trouble or "-"),
        )
    out.print(table)


@app.command("show", epilog="Example: semper standby show web")
def show(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Show the standbys of a VM, what would be lost, and the last take-over."""
    _show(ask_agent(lambda client: client.standby(name)), output)


@app.command("lost", epilog="Example: semper standby lost web")
def lost(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Show what take-overs have lost, and where it is.

    That is what the VM wrote between the snapshot of the standby and its own end. Its disks are
    kept as they were then, for a week; the one that the VM had before any standby is kept for good.
    An image with layers is written to a plain one by semper-blkd --blk-file IMAGE --export FILE.
    """
    views = ask_agent(lambda client: client.losses(name))
    if output is Output.JSON:
        print_json(views)
        return
    if not views:
        out.print(f"no standby of {name} has taken over")
        return
    table = listing("standby", "ended", "lost", "disk", "image")
    for view in views:
        for disk in view.disks:
            table.add_row(
                str(view.standby),
                f"{ago(view.ended)} ago",
                f"the last {format_duration(max(0.0, view.ended - view.since))}",
                disk.disk,
                Text(str(disk.image) if disk.there else "removed"),
            )
    out.print(table)


@app.command("failover", epilog="Example: semper standby failover web")
def failover(
    name: VmName,
    force: Annotated[
        bool,
        typer.Option("--force", help="End the VM first if it runs; its window is lost then."),
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Make a standby for it first: what is lost is short then."),
    ] = False,
    i_know: Annotated[
        str,
        typer.Option(
            "--i-know",
            metavar="HOW",
            help="The VM has ended on its host, and how that is known; where nothing proves it.",
        ),
    ] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Have the newest standby take over now.

    For a standby on another host ask that host. A VM that runs is stopped first: its guest flushes
    what it has in memory, if it has an agent. What it wrote since the snapshot to a disk of which
    standbys have copies is lost, and nothing of a disk that is handed over.
    """
    from sempervirt.api.schemas import FailoverRequest

    request = FailoverRequest(force=force or bool(i_know), fresh=fresh, i_know=i_know)
    with err.status(f"a standby of {name} takes over …"):
        view = ask_agent(lambda client: client.failover_standby(name, request))
    _show(view, output)


@app.command("switchover", epilog="Example: semper standby switchover web")
def switchover(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Have a VM that runs go on in another QEMU, where its standbys are, with nothing lost at all.

    Its own memory goes along: it moves to the host that keeps its standbys, or to another QEMU of
    this host. The standbys are not used for that: their memory is of a snapshot, and fits no system
    disk that was written since. If it cannot go on there, it goes on where it is.
    """
    from sempervirt.cli import migrate, vm

    here = any(view.vm == name for view in ask_agent(lambda client: client.standbys()))
    host = "" if here else ask_agent(lambda client: client.standby(name)).host
    if host:
        migrate.migrate(name, to=host, output=output)
    else:
        vm.restart_qemu(name, output=output)


@app.command("cancel", epilog="Example: semper standby cancel web")
def cancel(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Call off a take-over that waits, for a proof that the VM has ended, say.

    Nothing that is seen of this death of the VM declares another one; an operator still can.
    """
    _show(ask_agent(lambda client: client.cancel_standby(name)), output)


@app.command("test", epilog="Example: semper standby test web")
def rehearse(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Try a take-over: a copy of the newest standby goes on, isolated, on copies of all disks.

    The VM and what waits are not touched. The exit status is 0 only if the guest went on.
    """
    with err.status(f"a copy of the standby of {name} goes on …"):
        view = ask_agent(lambda client: client.test_standby(name))
    if output is Output.JSON:
        print_json(view)
    else:
        _show_rehearsal(view)
    if view.failure:
        raise typer.Exit(1)


def _show_rehearsal(view: RehearsalView) -> None:
    steps = ", ".join(f"{step.name} {step.after_ms:g} ms" for step in view.steps)
    end = view.failure or "the guest went on"
    out.print(
        f"rehearsal with standby {view.number} at {clock(view.time)}: {end}; {steps}",
        style="red" if view.failure else None,
        soft_wrap=True,
        markup=False,
    )
    for note in view.notes:
        out.print(f"  {note}", soft_wrap=True, markup=False)


@app.command("disable", epilog="Example: semper standby disable web")
def disable(
    name: VmName,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget",
            help="Also forget that a standby took over: the VM may be run from its old disks.",
        ),
    ] = False,
) -> None:
    """Remove the standbys of a VM; the VM runs on, also if it was a standby."""
    with err.status(f"removing the standbys of {name} …"):
        ask_agent(lambda client: client.disable_standby(name, forget=forget))


def _show(view: StandbyView, output: Output) -> None:
    if output is Output.JSON:
        print_json(view)
        return
    because = f": {view.why}" if view.why else ""
    kept = f"{view.keep} in tier {view.tier.value}, every {format_duration(view.every_s)}"
    if view.test_every_s is not None:
        kept += f"; rehearsed every {format_duration(view.test_every_s)}"
    windows = ", ".join(f"{one.disk} {_window(one.window_s)}" for one in view.windows)
    out.print(
        facts(
            [
                ("vm", Text(f"{view.vm}, {view.first.value}{because}")),
                ("kept", kept),
                ("on host", view.host or None),
                ("would be lost", windows),
                ("system disk", Text(", ".join(view.images)) if view.images else None),
                ("judged", Text(view.judged) if view.judged else None),
                ("fence", Text(view.fence)),
                *[(f"  {disk}", Text(how)) for disk, how in view.fences.items()],
                ("trouble", Text(view.trouble) if view.trouble else None),
            ]
        )
    )  # fmt: skip
    if view.generations:
        table = listing("standby", "is", "snapshot", "consistent", "memory", "booted in")
        for one in view.generations:
            table.add_row(*_row(one))
        out.print(table)
    for one in view.generations:
        for note in one.notes:
            out.print(f"standby {one.number}: {note}", style="yellow", soft_wrap=True, markup=False)
    if view.last_rehearsal is not None:
        _show_rehearsal(view.last_rehearsal)
    for what, over in (("take-over", view.take_over), ("last take-over", view.last_take_over)):
        if over is not None:
            _show_take_over(what, over)


def _row(one: GenerationView) -> tuple[str, ...]:
    return (
        str(one.number),
        one.life.value,
        f"{ago(one.taken)} ago" if one.taken else "-",
        one.consistency or "-",
        format_size(one.memory_bytes) if one.memory_bytes else "-",
        format_duration(one.boot_s) if one.boot_s else "-",
    )


def _window(window_s: float | None) -> str:
    if window_s is None:
        return "all: no standby is ready"
    return "nothing" if window_s == 0 else f"the last {format_duration(window_s)}"


def _show_take_over(what: str, over: TakeOverView) -> None:
    from sempervirt.standby.state import Step

    steps = ", ".join(f"{step.name} {step.after_ms:g} ms" for step in over.steps)
    end = f": {over.trouble}" if over.trouble else ""
    out.print(
        f"{what}: standby {over.number} at {clock(over.time)}, {over.step.value}{end}; "
        f"{over.cause}; {steps}",
        style="red" if over.step is Step.FAILED else None,
        soft_wrap=True,
        markup=False,
    )
    for note in over.notes:
        out.print(f"  {note}", soft_wrap=True, markup=False)
