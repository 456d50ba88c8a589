"""`semper vm migrate` and `resolve`: a VM goes to another host."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sempervirt.cli.arguments import VmName
from sempervirt.cli.output import Output, OutputOption, err, facts, listing, out, print_json
from sempervirt.cli.session import ask_agent
from sempervirt.cli.whereabouts import judge, judge_cancelled, sentence
from sempervirt.core.errors import (
    AgentUnavailable,
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
)
from sempervirt.core.sizes import format_size

if TYPE_CHECKING:
    from sempervirt.api.client import Client
    from sempervirt.migration.messages import MigrationView

POLL_S = 0.2
# How long the agent may be silent, as one that is replaced, or may not know who owns the VM.
PATIENCE_S = 30.0
PAGE_BYTES = 4096


def migrate(
    name: VmName,
    to: Annotated[
        str | None, typer.Option(metavar="HOST", help="Where to; see semper host list.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list every reason that would stop the move.")
    ] = False,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Have a VM that is on its way stay here.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once the move has begun.")
    ] = False,
    blackout: Annotated[
        int, typer.Option(metavar="MS", help="How long the guest may stand still.", min=1)
    ] = 300,
    max_blackout: Annotated[
        int,
        typer.Option(
            metavar="MS",
            help="How long at most, if the guest changes too much memory for --blackout.",
            min=1,
        ),
    ] = 2000,
    deadline: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Give up a move that takes longer.", min=1),
    ] = 600.0,
    throttle: Annotated[
        int,
        typer.Option(
            metavar="PERCENT",
            help="Take up to this much processor time from a guest that changes memory faster "
            "than it can be sent; 0: never.",
            min=0,
            max=99,
        ),
    ] = 80,
    postcopy: Annotated[
        bool,
        typer.Option(
            "--postcopy",
            help="As the last means, let the guest run on the other host before all of its memory "
            "is there: until all memory has arrived, the loss of either host loses the VM.",
        ),
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move a running VM to another host, with its memory, devices and connections.

    Memory that is a copy of what stands on the shared disk is not sent, only named. If anything
    fails before the other host owns the VM, the VM goes on here. Ctrl-C leaves this view, and the
    VM on its way.

    Exit codes: 0 the VM has moved (with --detach: the move has begun); 5 something stands in the
    way, or it is too late to cancel; 6 the VM stays here; 7 nobody knows who owns the VM; 10 the
    VM is lost, which only --postcopy risks.
    """
    from sempervirt.api.schemas import MigrateRequest
    from sempervirt.migration.messages import MovePolicy

    if cancel:
        view = ask_agent(lambda client: client.cancel_migration(name))
        _print(view, output)
        judge_cancelled(view)
        return
    if to is None:
        raise InvalidRequest("no host was named", remedy="say where to: --to HOST")
    host = to
    if dry_run:
        _dry_run(name, host, output)
        return
    policy = MovePolicy(
        blackout_s=blackout / 1e3,
        blackout_max_s=max(blackout, max_blackout) / 1e3,
        deadline_s=deadline,
        throttle_max=throttle,
        postcopy=postcopy,
    )
    request = MigrateRequest(to=host, policy=policy)

    async def work(client: Client) -> MigrationView:
        view = await client.migrate(name, request)
        return view if detach else await _watch(client, view)

    view = ask_agent(work)
    _print(view, output)
    judge(view)


def resolve(
    name: VmName,
    owner: Annotated[str, typer.Option(metavar="HOST", help="The host that is to have the VM.")],
    evidence: Annotated[
        str, typer.Option(help="How you know that the VM runs nowhere else; the store keeps it.")
    ],
    output: OutputOption = Output.TABLE,
) -> None:
    """Settle who owns a VM after a host went silent in the middle of a migration.

    A VM of which nobody knows the owner runs nowhere. First make sure that no other host can run
    the VM: switch that host off, or cut it off from its storage. Then give the VM to HOST here, and
    say how you know. If the guest already waits on HOST with all its memory, the guest goes on
    there; otherwise start the VM on HOST again.
    """
    view = ask_agent(lambda client: client.resolve(name, owner, evidence))
    if output is Output.JSON:
        print_json(view)
    else:
        out.print(view.message, highlight=False)


def place(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Show which hosts a VM could move to, the best first, and why not to the others.

    The score adds up from the reasons beside it. An evacuation chooses by the same.
    """
    found = ask_agent(lambda client: client.places(name))
    if output is Output.JSON:
        print_json(found)
        return
    if found.stuck:
        out.print(f"{name} can move nowhere now: {found.stuck}", highlight=False, markup=False)
    table = listing("host", "score", "why")
    for host in found.hosts:
        reasons = [f"{part.points:+.1f} {part.reason}" for part in host.points] or host.against
        table.add_row(host.host, f"{host.score:.1f}" if host.fits else "no", "; ".join(reasons))
    out.print(table)


def _dry_run(name: str, host: str, output: Output) -> None:
    found = ask_agent(lambda client: client.migration_obstacles(name, host))
    if output is Output.JSON:
        print_json(found)
    elif not found:
        out.print(f"nothing that was looked at would stop {name} from moving to {host}")
    for obstacle in found if output is Output.TABLE else ():
        out.print(f"- {obstacle.what}", highlight=False, markup=False)
        if obstacle.remedy:
            out.print(f"  {obstacle.remedy}", highlight=False, markup=False, style="dim")
    if found:
        raise typer.Exit(5)


async def _watch(client: Client, view: MigrationView) -> MigrationView:
    """Shows how far the move is until it is over, or until nothing certain was heard for long.

    Raises OutcomeUnknown when the agent is silent, or knows nothing of the move any more.
    """
    import asyncio

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from sempervirt.vm.phases import Phase

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[about]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(f"{view.vm} to {view.destination}", about="", total=1.0)
        certain = monotonic()
        while not view.over:
            done = 1 - min(1.0, view.remaining / view.memory) if view.memory else 0.0
            progress.update(task, completed=done, about=about(view))
            await asyncio.sleep(POLL_S)
            answer = await _look(client, view)
            view = answer or view
            if answer is not None and answer.phase is not Phase.UNKNOWN:
                certain = monotonic()
            elif monotonic() - certain > PATIENCE_S:
                return view if answer is not None else _silent(view)
    return view


async def _look(client: Client, view: MigrationView) -> MigrationView | None:
    """How far the move is now; None when the agent does not say so, as one that begins anew."""
    try:
        return await client.migration(view.vm)
    except (AgentUnavailable, OutcomeUnknown):
        return None
    except NotFound as error:
        if view.phase.is_end:  # its VM was removed right after the move
            return view.model_copy(update={"over": True})
        raise OutcomeUnknown(
            f"the agent on {view.source} knows nothing of the move any more; at last "
            f"{sentence(view)}",
            remedy=f"ask on {view.source} and on {view.destination}: semper vm show {view.vm}",
        ) from error


def _silent(view: MigrationView) -> NoReturn:
    raise OutcomeUnknown(
        f"the agent on {view.source} has not answered for {PATIENCE_S:g} s; at last "
        f"{sentence(view)}",
        remedy=f"start it, and it goes on with the move: semperd; then: semper vm show {view.vm}",
    )


def about(view: MigrationView) -> str:
    """One line: the phase, and what is sent."""
    from sempervirt.vm.phases import Phase

    parts = [view.phase.value]
    if view.passes:
        parts.append(f"pass {view.passes}, {format_size(view.remaining)} left")
    if view.dirtied:
        parts.append(f"the guest changes {view.dirtied / 1e6:.0f} MB/s")
    if view.wire is not None and view.wire.stream_bytes:
        sent, stock = format_size(view.wire.wire_bytes), format_size(view.wire.stream_bytes)
        parts.append(f"sent {sent} for {stock}")
    if view.expected_blackout_ms is not None and view.phase is Phase.PRECOPY:
        parts.append(f"blackout {view.expected_blackout_ms:.0f} ms of {view.limit_ms:.0f}")
    if view.throttle:
        parts.append(f"guest slowed down by {view.throttle} %")
    return ", ".join(parts)


def _print(view: MigrationView, output: Output) -> None:
    if output is Output.JSON:
        print_json(view)
        return
    wire = view.wire
    sent = saved = None
    if wire is not None and wire.stream_bytes:
        part = wire.wire_bytes / wire.stream_bytes
        sent = (
            f"{format_size(wire.wire_bytes)}, {part:.0%} of QEMU's {format_size(wire.stream_bytes)}"
        )
        saved = f"{wire.references} of {wire.pages + wire.zero_pages} pages stand on the disk"
    blackout = f"{view.blackout_ms:.0f} ms" if view.blackout_ms is not None else None
    rows = [
        ("vm", view.vm),
        ("from", view.source),
        ("to", view.destination),
        ("phase", f"{view.phase.value}: {sentence(view)}"),
        ("time", f"{view.elapsed_s:.1f} s, {view.passes} passes"),
        ("blackout", blackout),
        ("sent", sent),
        ("not sent", saved),
    ]
    out.print(facts(rows))
