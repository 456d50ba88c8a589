"""`semper vm run`: hands a VM to the agent, or is the agent while the VM runs.

What ends the command:

    Ctrl-C, SIGTERM   the guest is asked to power off; a second one kills the VM
    SIGHUP            the terminal is gone; the VM runs on. With semperd this command ends. As the
                      agent this command goes on without a terminal, until the VM ends
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from sempervirt.agent.agent import Agent
from sempervirt.api.client import Client
from sempervirt.api.schemas import VmView
from sempervirt.api.server import serving
from sempervirt.cli.output import err, out, print_json_line
from sempervirt.cli.session import agent_socket, here
from sempervirt.cli.watch import Watch
from sempervirt.core.errors import AgentUnavailable, OutcomeUnknown, StateConflict, Unavailable
from sempervirt.daemon.logs import log_to_stderr
from sempervirt.host.records import PRIVATE
from sempervirt.migration.moves import resume_all
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.config import AgentConfig


async def run(spec: VmSpec, *, detach: bool, grace_s: float, json: bool) -> int:
    """Starts the VM and follows the VM to its end; gives the exit code of the command."""
    config = replace(here(), keep_vms=True)
    agent: Agent | None = None
    heard: asyncio.Queue[signal.Signals] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        stack.enter_context(_caught(heard, signal.SIGHUP))
        client = await stack.enter_async_context(Client.connect(agent_socket(config, usable=True)))
        embedded = not await _agent_answers(client)
        if embedded and detach:
            raise AgentUnavailable(
                f"no agent answers at {config.socket}, so nobody could look after the VM",
                remedy="start one: semperd; or leave out --detach",
            )
        if embedded:
            agent = await stack.enter_async_context(_embedded_agent(config))
            stack.push_async_callback(_end, agent, spec.name, set(agent.vms))
        with _status(f"starting {spec.name} …"):
            view = await client.run_vm(spec)
        if json:
            print_json_line(view)
        if detach:
            if not json:
                out.print(f"{view.name} is {view.state.value} (pid {view.pid})", highlight=False)
            return 0
        return await _follow(client, view, grace_s, agent, heard, json=json)


async def _agent_answers(client: Client) -> bool:
    try:
        await client.agent()
    except AgentUnavailable:
        return False
    return True


@asynccontextmanager
async def _embedded_agent(config: AgentConfig) -> AsyncIterator[Agent]:
    log_to_stderr("error")
    os.umask(PRIVATE)
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
            _say(f"[yellow]{vm.name} runs on without an agent; start one: semperd[/]")


async def _follow(
    client: Client,
    view: VmView,
    grace_s: float,
    agent: Agent | None,
    heard: asyncio.Queue[signal.Signals],
    *,
    json: bool,
) -> int:
    """Shows the VM until its end, or until the command is told to leave; see above.

    `agent` is the one of this command, if the command is the agent. `heard` gets the signals.
    """
    with Watch(view.name, client, live=out.is_terminal and not json) as watch:
        watching = asyncio.create_task(watch.until_ended())
        with _caught(heard, signal.SIGINT, signal.SIGTERM):
            ending: asyncio.Task[None] | None = None
            farewells = [_stop, _kill]
            while farewells:
                signalled = asyncio.create_task(heard.get())
                await asyncio.wait((watching, signalled), return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    signalled.cancel()
                    break
                if signalled.result() is not signal.SIGHUP:
                    ending = asyncio.create_task(farewells.pop(0)(client, view.name, grace_s))
                elif agent is None:
                    watching.cancel()
                    _say(f"{view.name} runs on, and semperd looks after it; this command ends")
                    return 0
                else:
                    watch.leave_terminal()
                    _go_on_without_terminal(agent, view.name)
            last = await watching
            if ending is not None:
                await ending
    with contextlib.suppress(OSError):  # whoever was to read it is gone
        if json:
            print_json_line(last)
        elif last.end is not None:
            out.print(f"{last.name} is {last.state.value}: {last.end.reason}", highlight=False)
    return 0 if last.state is Runstate.STOPPED else 1


def _go_on_without_terminal(agent: Agent, name: str) -> None:
    """Says so where it can still be read: on a terminal that is there, and in the VM's events."""
    text = (
        f"the terminal hung up; {name} runs on, and its agent is still this semper vm run (pid "
        f"{os.getpid()}); end both with: semper vm stop {name}"
    )
    agent.vm(name).machine.journal.note(time.time(), "agent", text)
    _say(text)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        if stat.S_ISCHR(os.fstat(number).st_mode):  # a terminal that is gone is none to isatty()
            os.dup2(nowhere, number)
    os.close(nowhere)


def _say(text: str) -> None:
    """To stderr, if anybody can still read that."""
    with contextlib.suppress(OSError):
        err.print(text, highlight=False)


async def _stop(client: Client, name: str, grace_s: float) -> None:
    _say(f"powering {name} off; Ctrl-C again ends it at once")
    try:
        await client.stop_vm(name, grace_s)
    except StateConflict:  # paused, halted or unknown: a power button would do nothing
        await _kill(client, name, grace_s)
    except (Unavailable, OutcomeUnknown) as error:  # nobody presses the button: as when it is over
        _say(f"{error.message}; ending {name} at once")
        await _kill(client, name, grace_s)


async def _kill(client: Client, name: str, _grace_s: float) -> None:
    with contextlib.suppress(StateConflict):
        await client.kill_vm(name)


@contextlib.contextmanager
def _caught(queue: asyncio.Queue[signal.Signals], *numbers: signal.Signals) -> Iterator[None]:
    """Inside, these signals go into the queue; one that is ignored (nohup) stays ignored."""
    loop = asyncio.get_running_loop()
    caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    for number in caught:
        loop.add_signal_handler(number, queue.put_nowait, number)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """Says what goes on; a terminal that is gone meanwhile changes nothing."""
    status = err.status(text)
    with contextlib.suppress(OSError):
        status.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            status.stop()
