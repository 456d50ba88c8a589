"""`semper vm run`: hands a VM to the agent, or is the agent while the VM runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from sempervirt.agent.agent import Agent
from sempervirt.agent.moves import resume_all
from sempervirt.api.client import Client
from sempervirt.api.schemas import VmView
from sempervirt.api.server import serving
from sempervirt.cli.output import err, out, print_json_line
from sempervirt.cli.watch import Watch
from sempervirt.core.errors import AgentUnavailable, StateConflict
from sempervirt.daemon.logs import log_to_stderr
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.config import AgentConfig


async def run(spec: VmSpec, *, detach: bool, grace_s: float, json: bool) -> int:
    """Starts the VM and follows the VM to its end; gives the exit code of the command."""
    config = AgentConfig.default(keep_vms=True)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client.connect(config.socket))
        embedded = not await _agent_answers(client)
        if embedded and detach:
            raise AgentUnavailable(
                f"no agent answers at {config.socket}, so nobody could look after the VM",
                remedy="start one: semperd; or leave out --detach",
            )
        if embedded:
            agent = await stack.enter_async_context(_embedded_agent(config))
            stack.push_async_callback(_end, agent, spec.name, set(agent.vms))
        with err.status(f"starting {spec.name} …"):
            view = await client.run_vm(spec)
        if json:
            print_json_line(view)
        if detach:
            if not json:
                out.print(f"{view.name} is {view.state.value} (pid {view.pid})", highlight=False)
            return 0
        return await _follow(client, view, grace_s, json=json)


async def _agent_answers(client: Client) -> bool:
    try:
        await client.agent()
    except AgentUnavailable:
        return False
    return True


@asynccontextmanager
async def _embedded_agent(config: AgentConfig) -> AsyncIterator[Agent]:
    log_to_stderr("error")
    async with Agent.open(config) as agent:
        await resume_all(agent)
        async with serving(agent, config.socket):
            yield agent


async def _end(agent: Agent, name: str, before: set[str]) -> None:
    """Ends the VM that this command started, however the command ends; other VMs run on."""
    for vm in agent.vms.values():
        if vm.freed:
            continue
        if vm.name == name and name not in before:
            await vm.kill()
        else:
            err.print(f"[yellow]{vm.name} runs on without an agent; start one: semperd[/]")


async def _follow(client: Client, view: VmView, grace_s: float, *, json: bool) -> int:
    """Shows the VM until its end; Ctrl-C stops the VM, a second Ctrl-C kills the VM."""
    with Watch(view.name, client, live=out.is_terminal and not json) as watch:
        watching = asyncio.create_task(watch.until_ended())
        async with _interrupts() as interrupted:
            ending: asyncio.Task[None] | None = None
            for farewell in (_stop, _kill):
                pressed = asyncio.create_task(interrupted.get())
                await asyncio.wait((watching, pressed), return_when=asyncio.FIRST_COMPLETED)
                pressed.cancel()
                if watching.done():
                    break
                ending = asyncio.create_task(farewell(client, view.name, grace_s))
            last = await watching
            if ending is not None:
                await ending
    if json:
        print_json_line(last)
    elif last.end is not None:
        out.print(f"{last.name} is {last.state.value}: {last.end.reason}", highlight=False)
    return 0 if last.state is Runstate.STOPPED else 1


async def _stop(client: Client, name: str, grace_s: float) -> None:
    err.print(f"powering {name} off; Ctrl-C again ends it at once")
    try:
        await client.stop_vm(name, grace_s)
    except StateConflict:  # paused, halted or unknown: a power button would do nothing
        await _kill(client, name, grace_s)


async def _kill(client: Client, name: str, _grace_s: float) -> None:
    with contextlib.suppress(StateConflict):
        await client.kill_vm(name)


@asynccontextmanager
async def _interrupts() -> AsyncIterator[asyncio.Queue[None]]:
    """Inside, each SIGINT and SIGTERM puts an item into the queue."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[None] = asyncio.Queue()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, queue.put_nowait, None)
    try:
        yield queue
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
