"""What every command needs: which agent is asked, and by whom."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, assert_never

from sempervirt.cli.output import day, err
from sempervirt.core.durations import format_duration
from sempervirt.core.errors import InvalidRequest
from sempervirt.host.places import RUN_VARIABLE, SYSTEM_RUN_DIR

if TYPE_CHECKING:
    from sempervirt.api.client import Client
    from sempervirt.vm.config import AgentConfig

Result = TypeVar("Result")


@dataclass(frozen=True)
class Elsewhere:
    """Another host's agent, and the key of the operator who asks it."""

    host: str
    address: str
    key: Path


_elsewhere: ContextVar[Elsewhere | None] = ContextVar("elsewhere", default=None)


def choose(host: str, key: Path | None) -> None:
    """From now on the agent of "NAME@ADDRESS:PORT" is asked; with "": this user's.

    Raises InvalidRequest.
    """
    if not host:
        return
    name, at, address = host.partition("@")
    if not (name and at and ":" in address):
        raise InvalidRequest(
            f'"{host}" is no host to ask', remedy="write for example a@10.0.0.1:7443"
        )
    if key is None:
        raise InvalidRequest("who asks?", remedy="give the file of semper operator add: --key FILE")
    _elsewhere.set(Elsewhere(name, address, key))


def here() -> AgentConfig:
    """This user's directories, for what is done on this host. Raises InvalidRequest when another
    host was named.
    """
    from sempervirt.vm.config import AgentConfig

    require_here()
    return AgentConfig.default()


def is_here() -> bool:
    """Whether no other host was named."""
    return _elsewhere.get() is None


def require_here() -> None:
    """Raises InvalidRequest when another host was named, for what is done on this one."""
    elsewhere = _elsewhere.get()
    if elsewhere is not None:
        raise InvalidRequest(
            "this is done on the host itself", remedy=f"run it on {elsewhere.host}, without --host"
        )


def ask_agent(question: Callable[[Client], Awaitable[Result]]) -> Result:
    """Runs `question` with a client of the agent that was chosen."""
    import asyncio

    async def _ask() -> Result:
        async with _client() as client:
            return await question(client)

    return asyncio.run(_ask())


def agent_socket(own: AgentConfig, *, usable: bool = False) -> Path:
    """Where this user's agent is, or where it would be: a user who runs none asks the one of root.
    With `usable` only if this user may.
    """
    system = SYSTEM_RUN_DIR / own.socket.name
    if RUN_VARIABLE in os.environ or own.socket.exists():
        return own.socket
    try:
        there = os.access(system, os.W_OK) if usable else system.exists()
    except PermissionError:  # it may not be looked for: so there is something
        there = not usable
    return system if there else own.socket


@asynccontextmanager
async def _client() -> AsyncIterator[Client]:
    from sempervirt.api.client import Client
    from sempervirt.vm.config import AgentConfig

    elsewhere = _elsewhere.get()
    if elsewhere is None:
        async with Client.connect(agent_socket(AgentConfig.default())) as client:
            yield client
        return
    from sempervirt.trust.operator import (
        life_of,
        operator_context,
    )

    tls = operator_context(elsewhere.key)
    life = life_of(elsewhere.key)
    _tell_end(elsewhere.key, life.begins, life.ends)
    async with Client.connect_host(elsewhere.address, elsewhere.host, tls) as client:
        yield client


def _tell_end(key: Path, begins: float, ends: float) -> None:
    """Warns of an operator's certificate that has ended, or is about to: nobody renews it."""
    from sempervirt.cluster.standing import Age, age

    now = time.time()
    again = "ask for another where the authority is: semper operator add NAME"
    match age(begins, ends, now):
        case Age.ENDED:
            err.print(f"the certificate in {key.name} has ended on {day(ends)}; {again}")
        case Age.LATE | Age.DUE:
            left = format_duration(ends - now)
            err.print(f"the certificate in {key.name} ends in {left}; {again}")
        case Age.FRESH:
            pass
        case state:
            assert_never(state)
