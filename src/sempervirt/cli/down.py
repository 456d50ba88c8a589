"""`semper host down`: the VMs of a host that goes down are moved away, saved or powered off."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from sempervirt.cli.evacuate import PATIENCE_S, POLL_S, begun, parse_duration, watch
from sempervirt.cli.output import Output, OutputOption, err, listing, out
from sempervirt.cli.session import ask_agent, here
from sempervirt.core.errors import (
    AgentUnavailable,
    OutcomeUnknown,
    SempervirtError,
    Unavailable,
    reason,
)

if TYPE_CHECKING:
    from sempervirt.api.client import Client
    from sempervirt.api.schemas import VmView
    from sempervirt.qemu.spec import VmSpec


def down(
    deadline: Annotated[
        str, typer.Option(metavar="TIME", help='For all of it; for example "90s" or "5m".')
    ] = "5m",
    grace: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="A guest that has not powered off in that time is ended."
        ),
    ] = "90s",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be done, in which order.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Do with each VM what its file says for the time when its host goes down.

    on_host_shutdown = "move" (the default): another host takes the VM; where none does, it is
    powered off. "power-off": the guest is asked to power off. "save": its memory is kept, and
    semper vm start goes on from there. VMs of a low ha.priority end first.

    The unit sempervirt-guests.service does this before a shutdown; semperd starts VMs that have
    autostart = true when the host is up. Exit codes: 0 no VM runs here any more; 6 one does.
    """
    deadline_s, grace_s = parse_duration(deadline), parse_duration(grace)
    clustered = here().cluster_file.exists()
    if dry_run:
        _show(ask_agent(_running), output)
        return

    async def work(client: Client) -> list[str]:
        leaving = _Leaving(client, deadline_s, grace_s, json=output is Output.JSON)
        return await leaving.run(clustered=clustered)

    left = ask_agent(work)
    if left:
        raise Unavailable(f"still here: {', '.join(left)}", remedy="end them: semper vm kill NAME")


async def _running(client: Client) -> list[VmSpec]:
    """What runs here. A VM that is unknown is nobody's to end in order."""
    return [v.spec for v in await client.vms() if v.end is None and v.spec is not None]


def _show(specs: list[VmSpec], output: Output) -> None:
    from sempervirt.vm.shutdown import in_order

    ordered = [spec for group in in_order(specs) for spec in group]
    if output is Output.JSON:
        for spec in ordered:
            typer.echo(json.dumps({"vm": spec.name, "wish": spec.on_host_shutdown}))
        return
    table = listing("vm", "priority", "when the host goes down", "starts with the host")
    for spec in ordered:
        starts = "yes" if spec.autostart else "no"
        table.add_row(spec.name, str(spec.ha.priority), spec.on_host_shutdown, starts)
    out.print(table)


class _Leaving:
    """Empties this host, whatever fails on the way: also an agent that ends meanwhile, whose next
    one is asked for what is left.
    """

    def __init__(self, client: Client, deadline_s: float, grace_s: float, *, json: bool) -> None:
        import time

        self._now = time.monotonic
        self._ends = self._now() + deadline_s
        self._client = client
        self._grace_s = grace_s
        self._json = json
        self._interrupted = False

    async def run(self, *, clustered: bool) -> list[str]:
        """Gives the names of those that are still here."""
        specs = await self._running()
        movers = [spec.name for spec in specs if spec.on_host_shutdown == "move"]
        staying = [spec for spec in specs if not (clustered and spec.name in movers)]
        await self._end(staying, reserved_s=self._left_s() / 2 if clustered and movers else 0.0)
        if clustered and movers:
            await self._move()
            await self._end(await self._running())
        if self._interrupted and (left := await self._running()):
            await self._end(left)
        await self._end_at_once()
        return [spec.name for spec in await self._running()]

    async def _views(self) -> list[VmView]:
        """What runs here. Raises as the client when no agent answers for `PATIENCE_S`."""
        import asyncio

        ends = self._now() + PATIENCE_S
        while True:
            try:
                return [view for view in await self._client.vms() if view.end is None]
            except (AgentUnavailable, OutcomeUnknown):
                if self._now() > ends:
                    raise
            await asyncio.sleep(POLL_S)

    async def _running(self) -> list[VmSpec]:
        return [view.spec for view in await self._views() if view.spec is not None]

    async def _end_at_once(self) -> None:
        """Ends what cannot be asked: paused, panicked, or busy with something that takes too long.
        Their disks are freed in order by that, which they are not when the host goes down with
        them. One that is on its way to or from another host, or unknown, is left alone.
        """
        from sempervirt.qemu.state import Runstate

        known = (Runstate.RUNNING, Runstate.PAUSED, Runstate.HALTED, Runstate.STOPPING)
        for view in await self._views():
            moves = view.migration is not None and not view.migration.over
            if view.state not in known or moves:
                continue
            try:
                await self._client.kill_vm(view.name)
            except SempervirtError as error:
                self._tell(view.name, f"does not end: {error}")
            else:
                self._tell(view.name, "is ended, for its guest could not be asked to power off")

    def _left_s(self) -> float:
        return max(0.0, self._ends - self._now())

    async def _end(self, specs: list[VmSpec], reserved_s: float = 0.0) -> None:
        import asyncio

        from sempervirt.vm.shutdown import in_order, share_s

        groups = in_order(specs)
        for index, group in enumerate(groups):
            grace_s = share_s(self._left_s() - reserved_s, len(groups) - index, self._grace_s)
            await asyncio.gather(*(self._end_one(spec, grace_s) for spec in group))

    async def _end_one(self, spec: VmSpec, grace_s: float) -> None:
        import asyncio

        if spec.on_host_shutdown == "save":
            try:
                async with asyncio.timeout(max(grace_s, self._left_s() / 2)):
                    await self._client.save_vm(spec.name, None)
            except (SempervirtError, TimeoutError) as error:
                self._tell(spec.name, f"is not saved, so it is powered off: {reason(error)}")
            else:
                self._tell(spec.name, "is saved")
                return
        try:
            view = await self._client.stop_vm(spec.name, grace_s)
        except SempervirtError as error:
            self._interrupted |= isinstance(error, AgentUnavailable | OutcomeUnknown)
            self._tell(spec.name, f"does not end: {error}")
        else:
            self._tell(spec.name, f"is {view.state.value} ({view.why})")

    async def _move(self) -> None:
        from sempervirt.cli.evacuate import in_words
        from sempervirt.evacuation.messages import Asker, EvacuateRequest
        from sempervirt.vm.shutdown import moving_s

        request = EvacuateRequest(
            cause=Asker.SHUTDOWN,
            why="the host goes down",
            deadline_s=moving_s(self._left_s(), self._grace_s),
        )
        try:
            view, ours = await begun(self._client, request)
            view = await watch(self._client, view)
            if not ours and not view.emptied:
                # The other one may have had less time, as the guard's has.
                view = await watch(self._client, (await begun(self._client, request))[0])
        except SempervirtError as error:
            self._tell("this host", f"is not evacuated: {error}")
            return
        for one in view.vms:
            self._tell(one.vm, in_words(one))

    def _tell(self, name: str, what: str) -> None:
        if self._json:
            typer.echo(json.dumps({"vm": name, "outcome": what}))
        else:
            err.print(f"{name} {what}", highlight=False, markup=False)
