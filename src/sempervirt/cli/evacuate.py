"""`semper host evacuate` and `return`: the VMs of a host leave it, and come back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, assert_never

import typer

from sempervirt.cli.output import Output, OutputOption, err, listing, out, print_json
from sempervirt.cli.session import ask_agent, here
from sempervirt.cli.whereabouts import sentence
from sempervirt.core.durations import format_duration
from sempervirt.core.errors import (
    AgentUnavailable,
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    StateLost,
    Unavailable,
)
from sempervirt.core.sizes import format_size
from sempervirt.evacuation.values import CONCURRENCY, CONCURRENCY_MAX, Fate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sempervirt.api.client import Client
    from sempervirt.evacuation.messages import (
        EvacuateRequest,
        EvacuationView,
        OutcomeView,
        PlanView,
        ServiceView,
    )

POLL_S = 0.2
# How long the agent may be silent, as one that is replaced.
PATIENCE_S = 30.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)")
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def evacuate(
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Where to; may be repeated. Default: every host that is in service.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only show which VM would go where, and which cannot and why."
        ),
    ] = False,
    deadline: Annotated[
        str,
        typer.Option(metavar="TIME", help='No move begins after that; for example "90s" or "5m".'),
    ] = "5m",
    concurrency: Annotated[
        int,
        typer.Option(
            min=1, max=CONCURRENCY_MAX, help="How many moves go on at once; they share the link."
        ),
    ] = CONCURRENCY,
    why: Annotated[
        str, typer.Option(help="Why; semper host list shows it.")
    ] = "an operator asked for it",
    shutdown: Annotated[
        bool,
        typer.Option(
            "--shutdown",
            help="The host goes down then: a VM whose QEMU is dead falls to its warm standby.",
        ),
    ] = False,
    without_records: Annotated[
        bool,
        typer.Option(
            "--without-records",
            help="Go on when the disk of this host takes no records any more, as when its file "
            "system is frozen. If the agent dies as well, the next one does not know what moved.",
        ),
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Show how far it is, or how the last one ended.")
    ] = False,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Have stay what has not left yet.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it has begun.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Empty this host: move its VMs to other hosts, the ones of highest priority first.

    From the beginning on this host is out of service: no VM comes here or is started here, until
    semper host return. Each VM goes as semper vm migrate moves it, and counts as moved when the
    store and the other host say so. Ctrl-C leaves this view, and the evacuation on its way.

    Exit codes: 0 no VM is left here (with --detach: it has begun; with --dry-run: all can go); 5
    with --dry-run: not all can go; 6 VMs stay here; 7 nobody could say where a VM is; 10 a VM is
    lost.
    """
    from pydantic import ValidationError

    from sempervirt.api.client import Client
    from sempervirt.evacuation.messages import Asker, EvacuateRequest

    if show or cancel:
        asked = Client.cancel_evacuation if cancel else Client.evacuation
        _print(ask_agent(asked), output)
        return
    try:
        request = EvacuateRequest(
            cause=Asker.SHUTDOWN if shutdown else Asker.OPERATOR,
            why=why,
            to=to or [],
            deadline_s=parse_duration(deadline),
            concurrency=concurrency,
            without_records=without_records,
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InvalidRequest(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error
    if dry_run:
        _dry_run(request, output)
        return

    async def work(client: Client) -> EvacuationView:
        view, ours = await begun(client, request)
        if detach:
            return view
        view = await watch(client, view)
        if ours or view.emptied:
            return view
        # The other one may have had less time, as the guard's has; what it left is tried again.
        return await watch(client, (await begun(client, request))[0])

    view = ask_agent(work)
    _print(view, output)
    if not detach:
        judge(view)


def return_host(
    key: Annotated[
        Path | None,
        typer.Option(
            "--bring-back",
            metavar="KEY",
            help="Have the VMs come back that the last evacuation has moved away. KEY is a file of "
            "semper operator add, of a role that may move VMs: the other hosts ask who wants that.",
        ),
    ] = None,
    after_shutdown: Annotated[
        bool,
        typer.Option(
            "--after-shutdown", help="Only if a shutdown has emptied the host, as its unit does."
        ),
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Put this host into service again, after semper host evacuate.

    Exit codes: 0 it is in service (with --bring-back: and every VM is back); 6 a VM did not come
    back, and runs where it was; 7 nobody could say where a VM is; 10 a VM is lost.
    """
    import asyncio

    view = ask_agent(lambda client: client.return_host(after_shutdown=after_shutdown))
    if key is None:
        _print_away(view, output)
        return
    kept = asyncio.run(_bring_back(view, key))
    left = view.model_copy(update={"away": {vm: view.away[vm] for vm in kept}})
    _print_away(left, output)
    judge_return(kept)


def judge_return(kept: Mapping[str, SempervirtError]) -> None:
    """Ends a command that has VMs come back; `kept` did not, each with the reason.

    Raises StateLost, OutcomeUnknown or Unavailable: the worst of what became of them.
    """
    whys = "; ".join(f"{vm}: {error.message}" for vm, error in kept.items())
    if any(isinstance(error, StateLost) for error in kept.values()):
        raise StateLost(f"not back: {whys}")
    if any(isinstance(error, OutcomeUnknown) for error in kept.values()):
        raise OutcomeUnknown(
            f"not known to be back: {whys}", remedy="ask on both hosts: semper vm show NAME"
        )
    if kept:
        raise Unavailable(f"not back: {whys}")


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "5m" or "1h". Raises InvalidRequest."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or (seconds := float(match[1]) * _UNITS_S[match[2]]) <= 0:
        raise InvalidRequest(f'"{text}" is no time', remedy='write for example "90s" or "5m"')
    return seconds


def judge(view: EvacuationView) -> None:
    """Ends a command that has emptied the host.

    Raises StateLost, OutcomeUnknown or Unavailable, naming the VMs that are lost, whose place is
    unknown, or that stay.
    """
    lost, unknown, stay = (_named(view, fate) for fate in (Fate.LOST, Fate.UNKNOWN, Fate.STAYS))
    if lost:
        raise StateLost(
            f"lost: {lost}",
            remedy="what is left are their disks, as after a power failure: start them again",
        )
    if unknown:
        raise OutcomeUnknown(
            f"nobody could say where these run: {unknown}",
            remedy="ask on both hosts: semper vm show NAME",
        )
    if view.failure:
        raise Unavailable(f"the host was not emptied: {view.failure}")
    if stay:
        raise Unavailable(
            f"still here: {stay}",
            remedy="see why above; move them by hand: semper vm migrate NAME --to HOST --dry-run",
        )


async def begun(client: Client, request: EvacuateRequest) -> tuple[EvacuationView, bool]:
    """The evacuation that goes on now, and whether it is the one that is asked for here. Before a
    shutdown one that goes on already, as the guard's does, is waited for: whoever asks here lets
    the host go down afterwards.
    """
    from sempervirt.evacuation.messages import Asker

    try:
        return await client.evacuate_host(request), True
    except StateConflict:
        if request.cause is not Asker.SHUTDOWN:
            raise
    try:
        view = await client.evacuation()
    except NotFound:  # the conflict is another one: the next try tells which
        return await client.evacuate_host(request), True
    # One that has ended meanwhile is not ours: VMs may be left.
    return (await client.evacuate_host(request), True) if view.over else (view, False)


def _named(view: EvacuationView, fate: Fate) -> str:
    return ", ".join(one.vm for one in view.vms if one.fate is fate)


def _dry_run(request: EvacuateRequest, output: Output) -> None:
    view = ask_agent(lambda client: client.plan_evacuation(request))
    if output is Output.JSON:
        print_json(view)
    else:
        _print_plan(view)
    if view.left:
        raise typer.Exit(5)


def _print_plan(view: PlanView) -> None:
    table = listing("vm", "priority", "to", "memory", "begins", "ends")
    for move in view.moves:
        ends = "cannot be told" if move.ends_s is None else f"{move.ends_s:.0f} s"
        late = " (late)" if move.late and move.ends_s is not None else ""
        table.add_row(
            move.vm,
            str(move.priority),
            move.host,
            format_size(move.bytes),
            f"{move.begins_s:.0f} s",
            ends + late,
        )
    if view.moves:
        out.print(table)
        out.print("reckoned for a link of 1 Gbit/s, if each guest goes on as it does now")
    for left in view.left:
        why = f": {left.why}" if left.why else ""
        out.print(f"{left.vm} stays: {left.reason.value}{why}", highlight=False, markup=False)
    for one in view.absent:
        out.print(f"{one.host} takes no VM: {one.why}", highlight=False, markup=False)
    if not view.moves and not view.left:
        out.print("no VM is on this host")


async def watch(client: Client, view: EvacuationView) -> EvacuationView:
    """Tells each change until it is over. Raises OutcomeUnknown when the agent falls silent."""
    import asyncio

    told: dict[str, Fate] = {}
    silent_s = 0.0
    with err.status("asking the hosts …") as status:
        while True:
            for one in view.vms:
                if told.get(one.vm) is not one.fate and one.fate is not Fate.WAITS:
                    err.print(f"{one.vm}: {in_words(one)}", highlight=False, markup=False)
                told[one.vm] = one.fate
            if view.over:
                return view
            status.update(_summary(view))
            await asyncio.sleep(POLL_S)
            try:
                view, silent_s = await client.evacuation(), 0.0
            except (AgentUnavailable, OutcomeUnknown) as error:
                silent_s += POLL_S
                if silent_s > PATIENCE_S:
                    raise OutcomeUnknown(
                        f"the agent has not answered for {PATIENCE_S:g} s",
                        remedy="start it, and it goes on: semperd; then: semper host evacuate "
                        "--show",
                    ) from error


def _summary(view: EvacuationView) -> str:
    """How far it is, without a promise when it ends."""
    ended = sum(one.fate.is_end for one in view.vms)
    text = f"{ended} of {len(view.vms)} VMs settled" if view.vms else "asking the hosts"
    left = sum(one.remaining_bytes or 0 for one in view.vms)
    sending = f", {format_size(left)} to be sent by the moves that go on" if left else ""
    rest_s = view.deadline_s - view.elapsed_s
    until = f"{format_duration(rest_s)} to the deadline" if rest_s > 0 else "past the deadline"
    return f"{text}{sending}; {format_duration(view.elapsed_s)}, {until}"


def in_words(one: OutcomeView) -> str:
    """What becomes of a VM, in words."""
    why = "; ".join(part for part in (one.reason and one.reason.value, one.why) if part)
    because = f": {why}" if why else ""
    match one.fate:
        case Fate.WAITS:
            return "waits for its turn"
        case Fate.MOVES:
            return f"moves to {one.host}"
        case Fate.CHECKS:
            return f"has moved to {one.host}, which is being checked"
        case Fate.FALLS:
            return f"cannot move, its warm standby is asked for{because}"
        case Fate.MOVED:
            took = ""
            if one.began_s is not None and one.ended_s is not None:
                took = f", after {one.ended_s - one.began_s:.1f} s"
            return f"runs on {one.host}{took}{because}"
        case Fate.STANDBY:
            return f"its warm standby runs on {one.host}{because}"
        case Fate.STAYS:
            return f"stays{because}"
        case Fate.UNKNOWN:
            return f"nobody knows where it runs{because}"
        case Fate.LOST:
            return f"is lost{because}"
        case Fate.ENDED:
            return f"has ended by itself{because}"
        case _:
            assert_never(one.fate)


def _print(view: EvacuationView, output: Output) -> None:
    if output is Output.JSON:
        print_json(view)
        return
    table = listing("vm", "outcome")
    for one in view.vms:
        table.add_row(one.vm, in_words(one))
    if view.vms:
        out.print(table, highlight=False, markup=False)
    if not view.over:
        out.print(_summary(view), highlight=False)
    elif view.failure:
        out.print(f"it failed: {view.failure}", highlight=False, markup=False, soft_wrap=True)
    elif view.emptied:
        out.print(
            f"no VM is left here, after {format_duration(view.elapsed_s)}; this host is out of "
            "service until: semper host return",
            highlight=False,
            soft_wrap=True,
        )


def _print_away(view: ServiceView, output: Output) -> None:
    if output is Output.JSON:
        print_json(view)
        return
    out.print(f"this host is {'in' if view.in_service else 'out of'} service")
    for vm, host in view.away.items():
        out.print(f"{vm} runs on {host}, as far as this host knows", highlight=False)


async def _bring_back(view: ServiceView, key: Path) -> dict[str, SempervirtError]:
    """Has VMs come back, one after the other; those that did not, and why."""
    import asyncio

    from sempervirt.api.client import Client
    from sempervirt.api.schemas import MigrateRequest
    from sempervirt.cli import cluster
    from sempervirt.trust.operator import operator_context
    from sempervirt.vm.phases import Phase

    tls = operator_context(key)
    addresses = {member.name: member.address for member in await cluster.members()}
    own = cluster.own_name(here())
    kept = dict[str, SempervirtError]()
    for vm, host in view.away.items():
        try:
            if host not in addresses:
                raise StateConflict(f"there is no host {host}")
            async with Client.connect_host(addresses[host], host, tls) as client:
                moved = await client.migrate(vm, MigrateRequest(to=own))
                while not moved.over:
                    await asyncio.sleep(POLL_S)
                    moved = await client.migration(vm)
            err.print(f"{vm}: {sentence(moved)}", highlight=False, markup=False)
            if moved.phase is not Phase.DONE:
                lost = moved.phase is Phase.LOST
                kept[vm] = StateLost(moved.why) if lost else Unavailable(moved.why)
        except SempervirtError as error:
            kept[vm] = error
    return kept
