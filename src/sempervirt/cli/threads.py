"""`semper disk threads`: which thread works on which queue of a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sempervirt.cli.arguments import DiskName
from sempervirt.cli.output import Output, OutputOption, err, facts, listing, out, print_json
from sempervirt.cli.session import ask_agent
from sempervirt.core.errors import InvalidRequest
from sempervirt.core.queue_map import ThreadMap, counted, parse_map

if TYPE_CHECKING:
    from sempervirt.api.schemas import DiskView

Counters = dict[str, object]


def threads(
    name: DiskName,
    thread_map: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="T,T,…",
            help="The thread of each queue, beginning with queue 0; threads are numbered from 0.",
        ),
    ] = None,
    queues_per_thread: Annotated[
        int | None,
        typer.Option(metavar="N", help="At most N queues on each thread.", min=1, max=64),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Only show; the same as no option at all.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show which thread works on which queue of a disk, or move queues to other threads.

    A guest puts requests for a disk into queues, by default one for each virtual processor; the
    backend works on the queues with one or more threads. More threads do more at the same time and
    need more processors. semper disk tune finds out what is best on this host.

    Queues are moved while the guest goes on, and no request is lost. Later backends of the disk
    use the same threads until the VM ends; at the next start the VM file decides again.
    """
    chosen = sum((thread_map is not None, queues_per_thread is not None, show))
    if chosen > 1:
        raise InvalidRequest(
            "--map, --queues-per-thread and --show exclude each other", remedy="give one of them"
        )
    if thread_map is None and queues_per_thread is None:
        view = ask_agent(lambda client: client.disk(name))
    else:
        asked = _parsed(thread_map) if thread_map is not None else None
        with err.status(f"moving the queues of {name} …"):
            view = ask_agent(
                lambda client: client.move_queues(
                    name, thread_map=asked, queues_per_thread=queues_per_thread
                )
            )
    if output is Output.JSON:
        print_json(view)
        return
    out.print(facts(_rows(view)))
    if view.queues is not None:
        out.print()
        out.print(_queues(view))


def _parsed(text: str) -> ThreadMap:
    try:
        return parse_map(text)
    except ValueError as error:
        raise InvalidRequest.of(error, "--map: ") from error


def _rows(view: DiskView) -> list[tuple[str, str]]:
    rows = [("disk", f"{view.name}, {view.condition.value}")]
    if (queues := view.queues) is None:
        return rows
    number = f"{counted(queues.queues, 'queue')} on {counted(queues.threads, 'thread')}"
    backend = view.backend or {}
    poll_us = backend.get("poll_us", queues.poll_us)
    polls = "its own time" if poll_us is None else f"at most {poll_us} µs"
    engine = backend.get("engine", queues.engine)
    return [
        *rows,
        ("threads", f"{number} ({queues.map_source})"),
        ("engine", f"{engine} ({queues.engine_source})"),
        ("polls for", f"{polls} ({queues.poll_source})"),
    ]


def _queues(view: DiskView) -> Table:
    """Each queue: where it is to be, where it is, and what it did."""
    assert view.queues is not None
    found = (view.backend or {}).get("queues")
    live: list[Counters] = found if isinstance(found, list) else []
    table = listing("queue", "thread", "used", "reads", "writes", "in flight", "kicks", "polls")
    for queue, thread in enumerate(view.queues.map):
        now = live[queue] if queue < len(live) else {}
        at = now.get("thread", thread)
        table.add_row(
            str(queue),
            str(thread) if at == thread else f"{thread} (still {at})",
            ("yes" if now.get("enabled") else "no") if now else "-",
            *(str(now.get(key, "-")) for key in ("reads", "writes", "in_flight", "kicks", "polls")),
        )
    return table
