"""The live status of one VM and of the VM's disks, in a terminal or as lines."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from sempervirt.api.client import Client
from sempervirt.api.schemas import DiskView, VmView
from sempervirt.cli.output import ago, facts, listing, out, styled

INTERVAL_S = 0.5


class Watch:
    """Asks the agent twice a second. Use as a context manager.

    When nobody can read it any more (a terminal or a pipe that is gone), it goes on unseen.
    """

    def __init__(self, name: str, client: Client, *, live: bool) -> None:
        self._name = name
        self._client = client
        self._live = Live(console=out, auto_refresh=False, transient=True) if live else None
        self._seen = True
        self._told: dict[str, str] = {}
        self._counted: dict[str, tuple[float, int, int]] = {}

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave_terminal()

    def leave_terminal(self) -> None:
        """Shows nothing any more."""
        self._seen = False
        if self._live:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None

    async def until_ended(self) -> VmView:
        """Shows what is there until the VM has ended; its last state."""
        while True:
            view = await self._client.vm(self._name)
            disks = [] if view.end else await self._disks()
            if self._seen:
                try:
                    self._show(view, disks)
                except OSError:
                    self.leave_terminal()
            if view.end is not None:
                return view
            await asyncio.sleep(INTERVAL_S)

    def _show(self, view: VmView, disks: list[DiskView]) -> None:
        if self._live:
            self._live.update(self._render(view, disks), refresh=True)
        else:
            self._tell(view, disks)

    async def _disks(self) -> list[DiskView]:
        mine = f"{self._name}/"
        return [disk for disk in await self._client.disks() if disk.name.startswith(mine)]

    def _tell(self, view: VmView, disks: list[DiskView]) -> None:
        """Lines, for what has changed."""
        lines = {view.name: f"{view.name} is {view.state.value}"}
        for disk in disks:
            restarts = f", {disk.restart_count} restarts" if disk.restart_count else ""
            lines[disk.name] = f"{disk.name} is {disk.condition.value}{restarts}"
        for key, line in lines.items():
            if self._told.get(key) != line:
                out.print(line, highlight=False)
                self._told[key] = line

    def _render(self, view: VmView, disks: list[DiskView]) -> RenderableType:
        up = "-" if view.started is None else ago(view.started)
        state = styled(view.state)
        state.append(f"  {view.why}" if view.why else "", style="")
        head = facts(
            [
                ("vm", f"{view.name}, pid {view.pid}, {view.accelerator}, up {up}"),
                ("state", state),
            ]
        )
        table = listing("disk", "condition", "reads/s", "writes/s", "restarts", "last take-over")
        for disk in disks:
            reads, writes = self._rates(disk.name, disk.backend or {})
            table.add_row(
                disk.name,
                styled(disk.condition),
                f"{reads:.0f}",
                f"{writes:.0f}",
                str(disk.restart_count),
                last_takeover(disk),
            )
        hint = Text(f"Ctrl-C powers it off; elsewhere: semper vm console {view.name}", style="dim")
        return Group(head, table, hint)

    def _rates(self, name: str, backend: dict[str, Any]) -> tuple[float, float]:
        """Requests a second since the last look; a new backend counts from 0."""
        queues = backend.get("queues") or []
        now = time.monotonic()
        reads, writes = (sum(queue[key] for queue in queues) for key in ("reads", "writes"))
        then, old_reads, old_writes = self._counted.get(name, (now, reads, writes))
        self._counted[name] = now, reads, writes
        if now == then or reads < old_reads or writes < old_writes:
            return 0.0, 0.0
        return (reads - old_reads) / (now - then), (writes - old_writes) / (now - then)


def last_takeover(disk: DiskView) -> str:
    """When, why, and how long until the first completed request."""
    if not disk.restarts:
        return "-"
    last = disk.restarts[-1]
    done = last.milestones_ms.get("first_completion")
    took = f", {done:.1f} ms" if done is not None else ""
    return f"{ago(last.time)} ago: {last.reason}{took}"
